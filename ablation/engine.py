"""The engine: runs any list of ablations on one prompt, in growing batches or in one forward pass each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation import choices, provenance
from ablation.causality import verify_causal_lm
from ablation.edits import Ablation
from ablation.forward import Request, at_prompt, rows_per_pass, validated_request, verify_positions_exist
from ablation.measure import Continuation, Metric, MovedTokens, NextToken, tie_tolerance
from ablation.passes import Measuring, Progress, Run, Values, run_batched, run_one_by_one
from ablation.results import METRICS, RECEIPTS, AblationKey, PromptRecord, Result


def run(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    target: int | Sequence[int] | None = None,
    control: int | Sequence[int] | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run every ablation of a list on one prompt, in growing batches. Nothing is approximated.

    A growing batch is a forward pass that starts with one row, the clean row. Before each layer, a copy of the clean
    row joins the batch for every ablation whose first head is in that layer; `HeadAblation` then edits the heads of
    each row. Layers before an ablation's first head are thus computed once per batch, for the clean row. After the
    attention of the last layer, only the last token is computed, unless that layer has no heads.

    A guard also computes the clean row and some of the ablations in ordinary forward passes: at least one ablation
    for each layer in which an ablation begins. The growing batch fails if its logits differ by more than the model's
    own rounding (see `ablation.guard`), or if the model's own code fails. `run` then tries a growing batch that
    computes all tokens in the last layer. If this one fails, too, each ablation runs in its own forward pass, and `run`
    warns. Growing batches are not tried if the model's own code fails in the guard, or if the rows of a batch are known
    to influence each other in this model. `provenance["method"]` says whether the result is from growing batches.

    Errors that are raised in this package, in an imputation or in `progress` propagate.

    token_ids: the prompt, one row without padding. target, control: a token id, or the token ids of a continuation of
    the prompt; None stands for the most probable token of the clean run that is not the other one. A continuation of
    several tokens is scored in forward passes of its own, over the prompt and the continuation without its last token,
    in which every token is predicted from the true tokens before it; an imputation that takes a mean over the tokens
    takes it over all tokens of these passes; the positions of an ablation are those of the prompt, and an imputation
    with values for each position leaves the z of the continuation as it is. metrics: {name: function}, in addition to
    `ablation.results.METRICS`; see `ablation.measure.Metric`. max_rows: the largest number of rows in a forward pass,
    at least 2; by default as many as fit in memory. Ablations that do not fit run in further passes. progress: called
    with the share of the work that is done, up to 1.

    Raises InvalidPrompt, InvalidHead, InvalidAblation, UnsupportedModel, AblationNotApplied, NonFiniteLogits.
    """
    request = validated_request(model, token_ids, ablations, target, control, metrics)
    rows = rows_per_pass(request, max_rows)
    verify_positions_exist(request)
    verify_causal_lm(request, rows)
    return _answer(request, partial(run_batched, max_rows=rows), _never_back(progress))


def run_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    target: int | Sequence[int] | None = None,
    control: int | Sequence[int] | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Reference implementation of `run`: one forward pass for each ablation."""
    request = validated_request(model, token_ids, ablations, target, control, metrics)
    verify_positions_exist(request)
    verify_causal_lm(request)
    return _answer(request, run_one_by_one, progress)


def score(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    scored: int,
    ablations: Sequence[Ablation],
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return the mean next-token loss on the last tokens of a text, for each ablation: `loss`, in nats per token.

    token_ids: the text. scored: the number of its last tokens that are scored, less than all. Passes are so small that
    the logits of all scored tokens fit in memory. The other arguments and the errors are those of `run`.
    """
    context, tokens = tuple(token_ids[:-scored]), tuple(token_ids[-scored:])
    request = validated_request(model, context, ablations, tokens, None, None)
    request = replace(request, token_ids=context + tokens[:-1], scored=scored)
    rows = rows_per_pass(request, max_rows)
    verify_positions_exist(request)
    verify_causal_lm(request, rows)

    def measuring(logits: Tensor) -> Continuation:
        return Continuation("text", tokens, tie_tolerance(logits))

    with torch.no_grad():
        run = run_batched(request, measuring, _never_back(progress), max_rows=rows)
    clean, ablated = ({"loss": -of["text_log_probability"] / scored} for of in (run.clean, run.ablated))
    return _result(request, run, clean, ablated, PromptRecord(context, tokens, ()))


class MovedToken(NamedTuple):
    """A token whose probability an ablation changes. change: ablated - clean, in [-1, 1]."""

    token: int
    clean: float
    change: float


def moved_tokens(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    count: int = 5,
    *,
    max_rows: int | None = None,
) -> list[tuple[list[MovedToken], list[MovedToken]]]:
    """Return, for each ablation, the tokens after a prompt that rise and that fall most in probability.

    count: of the tokens that rise, and of those that fall. Tokens that move the other way, or by no more than rounding,
    are left out.
    The other arguments and the errors are those of `run`.
    """
    request = validated_request(model, token_ids, ablations, None, None, None)
    rows = rows_per_pass(request, max_rows)
    verify_positions_exist(request)
    verify_causal_lm(request, rows)
    with torch.no_grad():
        run = run_batched(request, partial(MovedTokens.after, count=count), None, max_rows=rows)
    assert isinstance(run.measure, MovedTokens)
    clean, rounding = run.measure.clean.cpu().numpy(), run.measure.tolerance

    def moved(tokens: str, changes: str, sign: int, row: int) -> list[MovedToken]:
        both = zip(run.ablated[tokens][row].tolist(), run.ablated[changes][row].tolist(), strict=True)
        found = [MovedToken(token, float(clean[token]), change) for token, change in both]
        # The probability of a token is proportional to the exponential of its logit.
        return [t for t in found if sign * t.change > rounding * max(t.clean, t.clean + t.change)]

    rows_of = range(len(request.ablations))
    return [(moved("rising", "rise", 1, row), moved("falling", "fall", -1, row)) for row in rows_of]


def _never_back(progress: Progress | None) -> Progress | None:
    """Return the same report, without shares below one that was reported: a second way starts again."""
    if progress is None:
        return None
    largest = 0.0

    def report(share: float) -> None:
        nonlocal largest
        if share > largest:
            largest = share
            progress(share)

    return report


# ---- one prompt: the token after it, and continuations of several tokens

_Runner = Callable[[Request, Measuring, Progress | None], Run]


def _answer(request: Request, runner: _Runner, progress: Progress | None) -> Result:
    """Run all ablations on the prompt, and then on the prompt with each continuation of several tokens."""
    continuations = {"target": request.target, "control": request.control}
    longer = {name: tokens for name, tokens in continuations.items() if tokens is not None and len(tokens) > 1}
    first = {name: None if tokens is None else tokens[0] for name, tokens in continuations.items()}

    def next_token(clean: Tensor) -> NextToken:
        return NextToken.after(clean, first["target"], first["control"], request.metrics)

    def part(number: int) -> Progress | None:
        return None if progress is None else lambda share: progress((number + share) / (1 + len(longer)))

    with torch.no_grad():
        base = runner(request, next_token, part(0))
        if "reason" in base.how:  # growing batches have failed
            runner = partial(run_one_by_one, **base.how)
        clean, ablated, how = base.clean, base.ablated, dict[str, Any]()
        for number, (name, tokens) in enumerate(longer.items(), start=1):

            def scored(logits: Tensor, name: str = name, tokens: tuple[int, ...] = tokens) -> Continuation:
                return Continuation(name, tokens, tie_tolerance(logits))

            continued = replace(
                request,
                token_ids=request.token_ids + tokens[:-1],
                ablations=at_prompt(request.ablations, len(request.token_ids)),
                scored=len(tokens),
            )
            run = runner(continued, scored, part(number))
            clean, ablated, how[name] = clean | run.clean, ablated | run.ablated, run.how
    assert isinstance(base.measure, NextToken)
    record = PromptRecord(
        request.token_ids,
        target=longer.get("target", (base.measure.target,)),
        control=longer.get("control", (base.measure.control,)),
    )
    if how:
        base = base._replace(how={**base.how, "continuations": how})
    return _result(request, base, _metrics(clean, request.metrics), _metrics(ablated, request.metrics), record)


def _result(request: Request, run: Run, clean: Values, ablated: Values, record: PromptRecord) -> Result:
    """Return the result of one prompt. run: of the prompt itself. clean, ablated: its metrics, [1] and [A]."""
    return Result(
        ablations=tuple(_key(ablation) for ablation in request.ablations),
        prompts=(record,),
        clean=clean,
        ablated={name: values[None] for name, values in ablated.items()},
        head_mean=run.head_mean[None],
        **dict(zip(RECEIPTS, run.receipts.T[:, None], strict=True)),
        provenance={
            **run.how,
            "rounding": run.measure.tolerance,
            **provenance.of_model(request.model),
            **provenance.environment(),
        },
    )


def _key(ablation: Ablation) -> AblationKey:
    positions = choices.label("all" if ablation.positions is None else ablation.positions)
    return AblationKey(ablation.heads, ablation.imputation.name, positions)


def _metrics(values: Values, own: Mapping[str, Metric]) -> Values:
    """Return all metrics of some rows, in the order of `METRICS`, with the user's own ones last."""
    target, control = values["target_log_probability"], values["control_log_probability"]
    derived = {
        "target_probability": np.exp(target),
        "control_probability": np.exp(control),
        "logit_difference": target - control,
    }
    return {name: (values | derived)[name] for name in (*METRICS, *own)}
