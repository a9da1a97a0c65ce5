"""Text that a model generates, first unchanged, then with heads ablated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ablation import choices, provenance
from ablation.edits import Ablation
from ablation.errors import InvalidPrompt, NonFiniteLogits, UnsupportedModel
from ablation.forward import token_batch
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation
from ablation.memory import accelerator, num_accelerators
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.prompt_files import TO_CONTINUE, Row, as_rows, valid_rows
from ablation.prompts import Question
from ablation.reference import Reference
from ablation.studies.plan import Plan
from ablation.studies.questions import Asked, reference_prompts, tokenised, warn
from ablation.studies.sampling import Sampling, seed_of_prompt, verify_imputation, verify_new_tokens, verify_seed
from ablation.units import Pair


@dataclass(frozen=True)
class Generation:
    """The text that follows a prompt in the clean run and in the ablated run.

    token_ids: of the prompt. clean, ablated: the new tokens, with the token that ends the text, if the model generated
    it. clean_text, ablated_text: their texts, without special tokens. parts_at: the first new token that differs,
    counted from 0; None if the runs agree. clean_margin, ablated_margin: at this token, by how many logits each run
    prefers its own token to that of the other run; negative only if sampled. forwards: passes of the ablated run.
    replaced, changed: elements of z, summed over these passes; see `EditCounts`.
    """

    prompt: str
    token_ids: tuple[int, ...]
    target: str | None
    group: str | None
    clean: tuple[int, ...]
    ablated: tuple[int, ...]
    clean_text: str
    ablated_text: str
    parts_at: int | None
    clean_margin: float | None
    ablated_margin: float | None
    forwards: int
    replaced: int
    changed: int


def generate(
    loaded: LoadedModel,
    prompts: Iterable[Any],
    heads: Iterable[Pair],
    imputation: str | Imputation = "zero",
    *,
    positions: str | Iterable[int] = "all",
    max_new_tokens: int = 20,
    sampling: Sampling | None = None,
    seed: int = 0,
    chat: bool = False,
    reference: Reference | Iterable[Any] | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> list[Generation]:
    """Generate text after each prompt, in a clean run and in a run with heads ablated.

    Prompts run one by one, without padding. Of the model's generation configuration, only the tokens that end a text
    are used.

    prompts: texts, `Question` objects, or records with the column prompt, and optionally target and group. heads:
    (layer, head) pairs. imputation: a name or an `Imputation`, but not `resample`. One that reads the whole row
    (`mean`, `channel-mean`) runs without a key/value cache, so that each step computes its values from the text so
    far. positions: "all", "prompt" (all tokens of the prompt, but no new ones), "last" (of the prompt), positions
    of the prompt, or a column with spans of characters. sampling: None for the most probable token at each step.
    seed: of the sampling. The random numbers of a prompt depend on the seed and its tokens; the clean and the
    ablated run see the same ones. chat: whether texts and records are messages of the user, rendered by the chat
    template. reference: for reference means; by default, `prompts`. skip_bad: leave out prompts that cannot be
    used, and warn. progress: called with the share of the work that is done, after each token.

    Raises UnsupportedModel, InvalidHead, UnknownImputation, InvalidAblation, and InvalidPrompt for a prompt that cannot
    be used, or that is too long for the model or the values, before any text is generated; NonFiniteLogits;
    AblationNotApplied.
    """
    study = Generations(
        loaded,
        prompts,
        heads,
        imputation,
        positions=positions,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        chat=chat,
        reference=reference,
        skip_bad=skip_bad,
        stacklevel=3,
    )
    return list(study.run(progress))


class Generations:
    """Prompts and what replaces z in them, checked before any text is generated. The arguments are those of `generate`.

    provenance: what the texts are made with, as values that JSON can hold; complete once `run` has yielded a text.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Iterable[Any],
        heads: Iterable[Pair],
        imputation: str | Imputation = "zero",
        *,
        positions: str | Iterable[int] = "all",
        max_new_tokens: int = 20,
        sampling: Sampling | None = None,
        seed: int = 0,
        chat: bool = False,
        reference: Reference | Iterable[Any] | None = None,
        skip_bad: bool = False,
        stacklevel: int = 2,
    ) -> None:
        """stacklevel: of the warnings."""
        if not isinstance(loaded, LoadedModel):
            raise UnsupportedModel(f"a {type(loaded).__name__} has no tokenizer: pass what `ablation.load` returns")
        verify_new_tokens(max_new_tokens)
        verify_seed(seed)
        verify_imputation(imputation)
        self.loaded, self.max_new_tokens, self.sampling, self.seed = loaded, max_new_tokens, sampling, seed
        self.heads = Ablation(heads).validated(find_heads(loaded.model)).heads
        self.only_prompt = isinstance(positions, str) and positions == choices.PROMPT
        self.plan = Plan.of(loaded, [imputation], "all" if self.only_prompt else positions, reference, 1, 0)
        where = self.plan.positions
        column = where if isinstance(where, str) and where not in ("all", "last") else None
        columns = TO_CONTINUE._replace(spans=column)
        rows, bad = valid_rows(as_rows(_records(prompts, chat), chat=chat, columns=columns), skip_bad=skip_bad)
        others, bad_others = reference_prompts(loaded, reference, skip_bad)
        asked, unusable = valid_rows(self._tokenised(rows), skip_bad=skip_bad)
        self.plan.reference_ids = [ids for _, ids in others] or [of.token_ids for of in asked]
        if self.plan.needs_reference and self.plan.reference is None and len(self.plan.reference_ids) < 2:
            name = self.plan.imputations[0]
            raise InvalidPrompt(
                f"{name!r} takes z from other prompts, and there is one prompt only: pass others as `reference` "
                "(on the command line, --reference FILE)"
            )
        self.asked, too_long = valid_rows(map(self._with_length, asked), skip_bad=skip_bad)
        warn(loaded, [*bad_others, *bad, *unusable, *too_long], self.asked, stacklevel=stacklevel)
        self.provenance: dict[str, Any] = {}

    def _tokenised(self, rows: Sequence[Row]) -> Iterator[Asked | InvalidPrompt]:
        """Yield each prompt with its tokens, or what is wrong with it. A target is a text, and needs no tokens."""
        texts = [row._replace(question=replace(row.question, target=None, control=None)) for row in rows]
        for row, found in zip(rows, tokenised(self.loaded, texts, self.plan.positions), strict=True):
            yield found if isinstance(found, InvalidPrompt) else found._replace(row=row)

    def _with_length(self, of: Asked) -> Asked | InvalidPrompt:
        """Return a prompt, or what is wrong with it if the model or the values do not reach as far as its text."""
        tokens = len(of.token_ids)
        read = tokens + self.max_new_tokens - 1  # the last token that is generated is not read
        longest = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and read > longest:
            return of.row.problem(
                f"the prompt has {tokens} tokens, and the model takes at most {longest}, so it can generate at most "
                f"{longest - tokens + 1} new tokens, not {self.max_new_tokens}"
            )
        at_new_tokens = of.positions is None and not self.only_prompt
        try:
            self.plan.verify_length(range(read) if at_new_tokens else of.token_ids)
        except InvalidPrompt as error:
            hint = "pass a longer reference, or the positions 'prompt' (--positions prompt), which leave out new tokens"
            return of.row.problem(f"with its new tokens, {error}: {hint}" if at_new_tokens else error)
        return of

    def run(self, progress: Progress | None = None) -> Iterator[Generation]:
        """Compute the reference, if it is needed and was not given, and yield the texts, prompt by prompt."""
        loaded = self.loaded
        known = {"model": loaded.name, "source": loaded.source, "revision": loaded.revision}
        share = 0.5 if self.plan.needs_reference and self.plan.reference is None else 0.0

        def of_reference(done: float) -> None:
            if progress is not None:
                progress(share * done)

        prepared = self.plan.prepare(loaded, known, of_reference)
        (imputation,) = prepared.replacements.imputations
        assert isinstance(imputation, Imputation)  # `resample` is refused
        sampling = None if self.sampling is None else {**vars(self.sampling), "seed": self.seed}
        self.provenance = {
            **known,
            **provenance.of_model(loaded.model),
            **provenance.weights_digest(loaded.model),
            **provenance.environment(),
            **prepared.made_with,
            "heads": [list(head) for head in self.heads],
            "imputation": imputation.name,
            "positions": choices.PROMPT if self.only_prompt else prepared.label,
            "max_new_tokens": self.max_new_tokens,
            "sampling": sampling,
        }
        for number, of in enumerate(self.asked):

            def of_prompt(done: float, number: int = number) -> None:
                if progress is not None:
                    progress(share + (1 - share) * (number + done) / len(self.asked))

            yield self._generation(of, imputation, of_prompt)

    def _generation(self, of: Asked, imputation: Imputation, progress: Progress) -> Generation:
        """Generate the two texts of a prompt."""
        ids = of.token_ids
        at = range(len(ids)) if self.only_prompt else of.positions
        cached = imputation.reads != "row"  # with a cache, a pass has only a part of the row
        clean = self._run(ids, Ablation(()), cached, lambda done: progress(done / 2))
        ablated = self._run(ids, Ablation(self.heads, imputation, at), cached, lambda done: progress((1 + done) / 2))
        progress(1.0)
        pairs = zip(clean.tokens, ablated.tokens, strict=False)
        parts_at = next((step for step, (one, other) in enumerate(pairs) if one != other), None)
        clean_margin = ablated_margin = None
        if parts_at is not None:
            tokens = [clean.tokens[parts_at], ablated.tokens[parts_at]]
            clean_margin, ablated_margin = (
                float(run.logits[parts_at][own].double() - run.logits[parts_at][other].double())
                for run, (own, other) in ((clean, tokens), (ablated, tokens[::-1]))
            )
        question = of.row.question
        return Generation(
            question.prompt,
            ids,
            question.target,
            question.group,
            clean.tokens,
            ablated.tokens,
            continuation_text(self.loaded, ids, clean.tokens),
            continuation_text(self.loaded, ids, ablated.tokens),
            parts_at,
            clean_margin,
            ablated_margin,
            ablated.forwards,
            ablated.replaced,
            ablated.changed,
        )

    def _run(self, ids: Sequence[int], ablation: Ablation, cached: bool, progress: Progress) -> _Run:
        """Generate one text. cached: whether to use a key/value cache."""
        model = self.loaded.model
        ends = model.generation_config.eos_token_id
        sampled = self.sampling or Sampling()
        chosen = dict(temperature=sampled.temperature, top_p=sampled.top_p, top_k=sampled.top_k or 0)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            use_cache=cached,
            eos_token_id=ends,
            pad_token_id=ends[0] if isinstance(ends, list) else ends,  # never used: there is one row
            do_sample=self.sampling is not None,
            **(chosen if self.sampling is not None else {}),
        )
        batch = token_batch(model, [ids])
        with HeadAblation(model) as hook, _without_own_settings(model), _random_numbers(seed_of_prompt(self.seed, ids)):
            hook.ablate(ablation.heads, ablation.imputation, ablation.positions)
            watch = _Watch(hook, self.max_new_tokens, progress)
            sequences: Any = model.generate(  # type: ignore[operator]
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                generation_config=config,
                logits_processor=LogitsProcessorList([watch]),
            )
        new = tuple(sequences[0, len(ids) :].tolist())
        return _Run(new, watch.logits, watch.forwards, watch.replaced, watch.changed)


class _Run(NamedTuple):
    """One generated text. logits: of each step, [vocabulary]. The others: see `Generation`."""

    tokens: tuple[int, ...]
    logits: list[Tensor]
    forwards: int
    replaced: int
    changed: int


class _Watch(LogitsProcessor):
    """Looks at the logits and the receipt of each forward pass, and changes nothing."""

    def __init__(self, hook: HeadAblation, steps: int, progress: Progress) -> None:
        self.hook, self.steps, self.progress = hook, steps, progress
        self.logits: list[Tensor] = []
        self.forwards = self.replaced = self.changed = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, [1, vocabulary]. Raises NonFiniteLogits."""
        if not scores.isfinite().all():
            raise NonFiniteLogits(
                f"the logits of new token {self.forwards} are not finite, so no token can be chosen: use --dtype "
                "float32, or another imputation"
            )
        self.logits.append(scores[0])
        for edits in self.hook.receipt.counts.values():
            self.replaced += sum(edit.replaced for edit in edits)
            self.changed += sum(edit.changed for edit in edits)
        self.forwards += 1
        self.progress(min(1.0, self.forwards / self.steps))
        return scores


def continuation_text(loaded: LoadedModel, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text of new tokens, without special tokens, with the space between the prompt and them.

    Some tokenizers drop the space before the first token that they decode, so both are decoded together.
    """

    def decoded(ids: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True))

    before, whole = decoded(prompt), decoded([*prompt, *new])
    return whole.removeprefix(before) if whole.startswith(before) else decoded(new)


def _records(prompts: Iterable[Any], chat: bool) -> Iterable[Any]:
    """Return prompts with texts as questions. Anything else is left to `as_rows`."""
    if not isinstance(prompts, list | tuple):
        return prompts
    return [Question(prompt, chat=chat) if isinstance(prompt, str) else prompt for prompt in prompts]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """While entered, the model has no generation configuration of its own.

    `generate` takes every setting that its caller leaves out from there: penalties, suppressed and forced tokens.
    """
    owners = [
        module for module in model.modules() if isinstance(vars(module).get("generation_config"), GenerationConfig)
    ]
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, config in zip(owners, own, strict=True):
            owner.generation_config = config


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """While entered, torch's random numbers follow from the seed; then they go on as before, on every device."""
    found = accelerator()
    kind = {} if found is None else {"device_type": found.type}
    with torch.random.fork_rng(range(num_accelerators()), **kind):
        torch.manual_seed(seed)
        yield
