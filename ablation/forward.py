"""Validated inputs of a run, and forward passes that tell a failure of the model from an error of this package."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.edits import Ablation
from ablation.errors import InvalidAblation, InvalidPrompt, one_line
from ablation.growing import BatchMismatch
from ablation.heads import HeadMap, as_index
from ablation.hook import HeadAblation
from ablation.measure import Metric
from ablation.memory import is_out_of_memory, pass_bytes
from ablation.results import METRICS
from ablation.rows import verify_positions

PACKAGE = f"{Path(__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Request:
    """The validated arguments of a run.

    hook: a `HeadAblation` of the model. token_ids: the prompt. target, control, metrics: see `run`. scored: of how many
    last tokens the logits are measured.
    """

    hook: HeadAblation
    model: PreTrainedModel
    token_ids: tuple[int, ...]
    ablations: tuple[Ablation, ...]
    target: tuple[int, ...] | None
    control: tuple[int, ...] | None
    metrics: Mapping[str, Metric]
    scored: int = 1

    @property
    def heads(self) -> HeadMap:
        """The heads of the model."""
        return self.hook.heads


def validated_request(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    target: int | Sequence[int] | None,
    control: int | Sequence[int] | None,
    metrics: Mapping[str, Metric] | None,
) -> Request:
    """Validate the arguments of a run. Raises UnsupportedModel, InvalidAblation, InvalidHead, InvalidPrompt."""
    hook = HeadAblation(model)
    if any(module.training for module in model.modules()):
        raise InvalidAblation("the model is in training mode, where dropout hides effects: call model.eval()")
    ids = as_token_ids(token_ids)
    wanted = _listed(ablations, "`ablations`", InvalidAblation)
    if not ids:
        raise InvalidPrompt("a run needs at least one prompt token")
    if not wanted:
        raise InvalidAblation("the list of ablations is empty")
    if strangers := [ablation for ablation in wanted if not isinstance(ablation, Ablation)]:
        raise InvalidAblation(f"{strangers[0]!r} is not an Ablation: pass Ablation(heads, imputation)")
    continuations = _continuation(target, "target"), _continuation(control, "control")
    verify_tokens(ids, len(embedding_weight(model)), "has")
    if (predicted := _predicted_tokens(model)) < 2:
        raise InvalidPrompt(f"a target and a control are two tokens: the model has {predicted}")
    for tokens in filter(None, continuations):
        verify_tokens(tokens, predicted, "predicts")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    read = len(ids) + max(len(tokens or "1") - 1 for tokens in continuations)
    if longest is not None and read > longest:
        continued = " with its target or control" if read > len(ids) else ""
        raise InvalidPrompt(f"the prompt{continued} has {read} tokens, the model takes at most {longest}")
    ablated = tuple(ablation.validated(hook.heads) for ablation in wanted)
    return Request(hook, model, ids, ablated, *continuations, _validated_metrics(metrics or {}))


def as_token_ids(prompt: Any) -> tuple[int, ...]:
    """Return the token ids of a prompt as ints. Raises InvalidPrompt unless it is one flat list of integers."""
    return tuple(_token_id(token) for token in _listed(prompt, "a prompt"))


def verify_positions_exist(request: Request) -> None:
    """Raise InvalidPrompt unless the prompt has all positions at which an ablation applies."""
    for ablation in request.ablations:
        if ablation.positions is not None:
            verify_positions(ablation.positions, len(request.token_ids), "the prompt", InvalidPrompt)


def at_prompt(ablations: Sequence[Ablation], tokens: int) -> tuple[Ablation, ...]:
    """Return ablations of a prompt of so many tokens as those of the same prompt with a continuation.

    Positions stay those of the prompt. An imputation with values for each position of the prompt has none for the
    continuation, whose z it leaves as it is.
    """

    def positions(ablation: Ablation) -> Iterable[int] | None:
        if ablation.positions is not None:
            return [position % tokens for position in ablation.positions]
        return range(tokens) if ablation.imputation.by_position else None

    return tuple(Ablation(of.heads, of.imputation, positions(of)) for of in ablations)


def _continuation(tokens: Any, name: str) -> tuple[int, ...] | None:
    """Return a target or control as token ids. Raises InvalidPrompt."""
    if tokens is None:
        return None
    try:
        return (as_index(tokens),)
    except TypeError:
        ids = tuple(_token_id(token) for token in _listed(tokens, f"a {name} of several tokens"))
    if not ids:
        raise InvalidPrompt(f"the {name} has no tokens")
    return ids


def _validated_metrics(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the metrics of the user. Raises InvalidAblation for names that are taken, and for what is no function."""
    if not isinstance(metrics, Mapping):
        raise InvalidAblation(f"`metrics` is a mapping of names to functions, not {metrics!r}")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.isidentifier() or name in METRICS or name == "finite":
            raise InvalidAblation(f"{name!r} cannot name a metric: take letters, digits and _, and no built-in name")
        if not callable(metric):
            raise InvalidAblation(f"the metric {name!r} is {metric!r}, not a function of the logits")
    return dict(metrics)


def _listed(values: Any, what: str, error: type[Exception] = InvalidPrompt) -> list[Any]:
    """Return the values of an argument that has to be a list. Raises the error."""
    try:
        return list(values)
    except TypeError:
        raise error(f"{what} is a list, not {values!r}") from None


def _token_id(token: Any) -> int:
    try:
        return as_index(token)
    except TypeError:
        raise InvalidPrompt(f"{token!r} is not a token id: a prompt is one flat list of integers") from None


def verify_tokens(tokens: Sequence[int], vocabulary: int, verb: str) -> None:
    """Raise InvalidPrompt for a token id that is not below the size of a vocabulary. verb: what the model does."""
    if unknown := [token for token in tokens if not 0 <= token < vocabulary]:
        raise InvalidPrompt(f"no token {unknown[0]}: the model {verb} {vocabulary} tokens")


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """Return the input embedding, [vocabulary, channels]."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight


def _predicted_tokens(model: PreTrainedModel) -> int:
    """The number of tokens that the model predicts, which may differ from those that it reads."""
    unembedding = getattr(model.get_output_embeddings(), "weight", None)
    return len(embedding_weight(model) if unembedding is None else unembedding)


def rows_per_pass(request: Request, max_rows: int | None) -> int:
    """Return the number of rows per forward pass: `max_rows`, or as many as fit in memory.

    Raises InvalidAblation if `max_rows` is less than 2.
    """
    if max_rows is not None:
        try:
            rows = as_index(max_rows)
        except TypeError:
            raise InvalidAblation(f"max_rows is {max_rows!r}, not a number of rows") from None
        if rows < 2:
            raise InvalidAblation(f"max_rows is {rows}: a pass needs 2 rows, a clean one and an ablated one")
        return rows
    tokens = len(request.token_ids)
    shapes = [p.shape for layer in request.heads.layers for p in layer.block.parameters() if p.ndim > 1]
    widest = 4 * max((max(shape) for shape in shapes), default=1)
    scores = request.heads.shape[1] * tokens
    logits = len(embedding_weight(request.model)) * (request.scored if _keeps_last_logits(request.model) else tokens)
    row_bytes = (tokens * (widest + scores) + logits) * request.model.dtype.itemsize
    return max(2, pass_bytes(_devices(request.model)) // row_bytes)


def _devices(model: PreTrainedModel) -> set[torch.device]:
    """Return the devices that a model runs on. Parameters on the meta device are loaded onto others when needed."""
    spread: dict[str, Any] = getattr(model, "hf_device_map", {})
    named = {torch.device("cpu" if place == "disk" else place) for place in spread.values()}
    return named or {model.device}


def _keeps_last_logits(model: PreTrainedModel) -> bool:
    """Whether the model can be asked for the logits of the last token alone: a user's hook may edit other tokens."""
    unembedding = model.get_output_embeddings()
    hooked = unembedding is not None and (unembedding._forward_hooks or unembedding._forward_pre_hooks)
    return not hooked and "logits_to_keep" in inspect.signature(model.forward).parameters


def token_batch(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return token ids, [rows, tokens], on the device where the model takes them."""
    weight = embedding_weight(model)
    # An embedding on the meta device is loaded from elsewhere by accelerate, which also moves its input there.
    return torch.tensor(rows, device="cpu" if weight.is_meta else weight.device)


def _inputs(request: Request, rows: int) -> tuple[Tensor, dict[str, Any]]:
    """Return the arguments for the model: token ids [rows, tokens], and keyword arguments."""
    options: dict[str, Any] = {"logits_to_keep": request.scored} if _keeps_last_logits(request.model) else {}
    return token_batch(request.model, [request.token_ids] * rows), {"use_cache": False, **options}


def last_logits(request: Request, rows: int) -> Tensor:
    """Run the model on copies of the prompt. Returns the logits of the last tokens, [rows, scored, vocabulary]."""
    ids, options = _inputs(request, rows)
    return _of_last_tokens(request, request.model(ids, **options))


def batch_logits(request: Request, rows: int) -> Tensor:
    """Do as `last_logits`, but raise BatchMismatch if the model's own code fails."""
    ids, options = _inputs(request, rows)
    try:
        output = request.model(ids, **options)
    except Exception as error:
        if _raised_by_package(error) or is_out_of_memory(error):
            raise
        raise BatchMismatch(one_line(error)) from error
    return _of_last_tokens(request, output)


def _of_last_tokens(request: Request, output: Any) -> Tensor:
    """The logits of the last tokens, [rows, scored, vocabulary], from what a model returns."""
    logits: Tensor = output.logits
    return logits[:, -request.scored :]


def _raised_by_package(error: BaseException | None) -> bool:
    """Whether an error that left the model, or one that caused it, has passed through a hook of this package."""
    skipped = 1  # the frame that called the model
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))[skipped:]
        if any(frame.f_code.co_filename.startswith(PACKAGE) for frame, _ in frames):
            return True
        error, skipped = error.__cause__ or error.__context__, 0
    return False
