"""The specification on the user's own model: checks on some of its heads, and a comparison of every head."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.assertions import measured_tolerance
from ablation.checks.cases import Case
from ablation.checks.check import (
    Check,
    CheckFailure,
    adapter_name,
    finding,
    isolated_process_state,
    offered_imputations,
    reasons,
    unsupported_features,
)
from ablation.checks.driving import ablate, discard, run
from ablation.checks.observe import assert_state_equals, state
from ablation.checks.on_model.every_head import EveryHead, Progress, try_every_head
from ablation.checks.on_model.own_model import OwnModel
from ablation.checks.on_model.report import findings, table, wrong_logits, wrong_z
from ablation.checks.oracles import LONG_PROMPT
from ablation.checks.protocol import Factory
from ablation.checks.runner import CHECKS, NO_TIME, Record, validate_ids
from ablation.errors import InvalidPrompt, one_line
from ablation.models import load
from ablation.prompt_files import PROMPTS_ONLY, read_rows, valid_rows
from ablation.prompts import prompt_ids
from ablation.sources import NAMED_MODELS

MOST_PROMPTS = 8
DEFAULT_PROMPT = "The capital of Germany is"
LEAST_TOKENS = 3
"""Of a prompt, so that decoding with a cache has several steps."""

EVERY_HEAD = {
    "oracle.zero": "zero",
    "oracle.mean": "mean",
    "oracle.channel_mean": "channel-mean",
    "oracle.scale": "scale",
    "oracle.values": "values",
    "oracle.reference_mean": "reference-mean",
    "oracle.reference_by_position": "reference-mean-by-position",
    "oracle.resample": "resample",
}
"""Checks for which the logits of every head are compared: id -> imputation."""
EVERY_Z = "locality"
"""The check for which the z of every head is looked at, on the same batch."""
ON_SOME_HEADS = (
    "smoke",
    "identity",
    "identity.padded",
    "locality.padded",
    "locality.sets",
    "locality.user_hooks",
    "locality.input_untouched",
    "independence.rows",
    "independence.padding",
    "independence.gradient_mode",
    "independence.head_order",
    "independence.later_tokens",
    "independence.cache",
    "independence.cache_padded",
    "independence.cache_kept",
    "masks.dtype",
    "masks.single_row",
    "oracle.zero_sets",
    "oracle.mean_sets",
    "oracle.long_prompt",
    "reference.partition",
    "reference.clean",
    "positions",
    "positions.cache",
    "hygiene.restored",
    "hygiene.user_hooks",
    "hygiene.global_state",
)
"""Checks that need one model at a time and change no weight. The others ask nothing that depends on the model."""

OF_THE_MODEL = (
    "independence.rows",
    "independence.padding",
    "independence.later_tokens",
    "independence.cache",
    "independence.cache_padded",
    "independence.cache_kept",
    "masks.dtype",
    "masks.single_row",
    "positions.cache",
)
"""Checks that most models pass with no head ablated. Where a model itself fails, a failure of a hook proves nothing."""

ONE_IMPUTATION = (
    "identity",
    "identity.padded",
    "masks.dtype",
    "hygiene.restored",
    "hygiene.user_hooks",
    "hygiene.global_state",
)
"""Checks that are tried with one imputation only, to save time."""
EXPLAINED = 3
"""Failures for which a likely cause is looked for."""
NO_PADDING = "the model itself gives other logits if a prompt is padded"
DAMAGED = "not tried, since the weights of the model are no longer as they were found"
FAILED_AT_ALL = "not tried, since `smoke` fails"


class ModelRun:
    """Runs checks on one implementation and one model, one after the other, like `CheckRun`.

    minutes: for every head; a layer that has begun is finished. Raises InvalidDeclaration if `expected_failures` names
    something that does not exist.
    """

    checks = tuple(check for check in CHECKS if check.id in (*ON_SOME_HEADS, EVERY_Z, *EVERY_HEAD))

    def __init__(
        self,
        factory: Factory,
        own: OwnModel,
        expected_failures: Mapping[str, str] | None = None,
        *,
        minutes: float = float("inf"),
        progress: Progress | None = None,
    ) -> None:
        self.factory, self.own, self.expected_failures = factory, own, expected_failures or {}
        validate_ids(self.expected_failures)
        self.minutes, self.progress = minutes, progress
        self._found: EveryHead | None = None
        self._spent = 0.0  # seconds, on every head
        self._stopped, self._failures = "", 0

    def every_head(self, imputations: Sequence[str]) -> EveryHead:
        """Return the comparison of every head, after these imputations are compared, too."""
        missing = [name for name in imputations if self._found is None or name not in self._found.outcomes]
        if missing:
            started = time.monotonic()
            self._found = try_every_head(
                self.factory,
                self.own,
                missing,
                found=self._found,
                deadline=started + 60 * self.minutes - self._spent,
                progress=self.progress,
            )
            self._spent += time.monotonic() - started
        assert self._found is not None
        return self._found

    def findings(self) -> list[str]:
        """Return lines about every head; none if no check asked for them."""
        return [] if self._found is None else list(findings(self.own, self._found))

    def table(self) -> str:
        """Return what was found for every head, as CSV; only the header if no check asked for it."""
        return table(self._found)

    def __call__(self, check: Check) -> Record:
        """Run one check."""
        if reason := self._stopped or self._skip_reason(check):
            return Record(check.id, "skipped", reason)
        with warnings.catch_warnings(), isolated_process_state(one_thread=False):
            warnings.simplefilter("ignore")
            with measured_tolerance(self.own.relative_tolerance):
                record = self._tried(check)
        if record.outcome == "failed" and check.id == "smoke":
            self._stopped = FAILED_AT_ALL
        if not self.own.is_intact:
            self._stopped = DAMAGED
            if record.outcome != "failed":
                damage = f"{adapter_name(self.factory)} damages the model in {check.id}: its logits are others"
                record = Record(check.id, "failed", damage)
        if record.outcome == "passed" and (reason := self._left_out(check)):
            return Record(check.id, "skipped", reason)
        expected = self.expected_failures.get(check.id)
        if expected is not None and record.outcome != "skipped":
            return Record(check.id, "expected failure" if record.outcome == "failed" else "unexpected pass", expected)
        return record

    def _left_out(self, check: Check) -> str:
        """Return what was left out of a comparison of every head for lack of time; empty if nothing was."""
        names = offered_imputations(self.factory) if check.id == EVERY_Z else [EVERY_HEAD.get(check.id, "")]
        left = [] if self._found is None else [self._found.left_out.get(name, []) for name in names]
        if not any(left):
            return ""
        count, layers = max(map(len, left)), len({layer for layer, _ in self.own.heads()})
        return f"{NO_TIME} for {count} of {layers} layers: give more --minutes; the heads that were tried are right"

    def _skip_reason(self, check: Check) -> str | None:
        unsupported = unsupported_features(self.factory)
        of_model = dict.fromkeys((self.own.family, self.own.model_type, self.own.dtype))
        if found := reasons(self.factory, [name for name in of_model if name in unsupported]):
            return "; ".join(found)
        if "padding" in check.needs and not self.own.can_be_padded:
            return NO_PADDING
        if check.id == "oracle.long_prompt" and self.own.longest < LONG_PROMPT:
            return f"the model reads at most {self.own.longest:.0f} tokens"
        return check.skip_reason(self.factory)

    def _tried(self, check: Check) -> Record:
        """Return whether a check passed, failed, or could not be tried."""
        try:
            if check.id == EVERY_Z:
                self._compare(check, wrong_z, offered_imputations(self.factory))
            elif check.id in EVERY_HEAD:
                self._compare(check, partial(wrong_logits, self.own.tolerance), [EVERY_HEAD[check.id]])
            else:
                self._try_on_some_heads(check)
        except CheckFailure as failure:
            if fault := _fault_of_the_model(check, failure.case):
                return Record(check.id, "skipped", fault)
            return Record(check.id, "failed", self._explained(check, failure))
        except Exception as error:  # such as a lack of memory in the comparison
            problem = one_line(f"{type(error).__name__}: {error}")
            return Record(check.id, "failed", f"{check.id} could not be run: {problem}")
        return Record(check.id, "passed")

    def _try_on_some_heads(self, check: Check) -> None:
        """Run a check on some heads. Raises CheckFailure."""
        spec = check.cases_for(self.factory)
        if check.id in ONE_IMPUTATION:
            spec = replace(spec, imputations=(spec.imputations or ())[:1])
        for case in self.own.cases(spec):
            _on_model(check).run_case(self.factory, case)

    def _compare(
        self, check: Check, problem_of: Callable[[EveryHead, str], str | None], imputations: Sequence[str]
    ) -> None:
        """Look at the comparison of every head. Raises CheckFailure, with the head that is most wrong."""
        every_head = self.every_head(imputations)
        for name in imputations:
            if found := problem_of(every_head, name):
                case = every_head.case_of([every_head.worst(name).pair], name)
                raise check.failure(self.factory, case, AssertionError(found))

    def _explained(self, check: Check, failure: CheckFailure) -> str:
        """Return the message of a failure; the first ones have their likely cause, which takes dozens of runs."""
        self._failures += 1
        return str(check.explained(self.factory, failure) if self._failures <= EXPLAINED else failure)


def load_own_model(
    name: str, prompts: str | None = None, *, device: str | None = None, dtype: str = "float32"
) -> OwnModel:
    """Load the user's own model, with prompts.

    name, device: as `models.load` takes them. prompts: a .jsonl or .csv file with a column prompt, of which the first
    MOST_PROMPTS rows are used; by default, the prompt of a named model or DEFAULT_PROMPT. dtype: its name. Raises
    ModelUnavailable, UnsupportedModel and InvalidPrompt.
    """
    if prompts is None:
        known = NAMED_MODELS.get(name.partition("=")[0])
        questions, left_out = [known.question.prompt if known else DEFAULT_PROMPT], 0
    else:
        rows, _ = valid_rows(read_rows(prompts, columns=PROMPTS_ONLY), skip_bad=False)
        questions, left_out = [row.question.prompt for row in rows[:MOST_PROMPTS]], len(rows[MOST_PROMPTS:])
    loaded = load(name, device=device, dtype=getattr(torch, dtype))
    ids = [prompt_ids(loaded.tokenizer, question) for question in questions]
    for question, row in zip(questions, ids, strict=True):
        if len(row) < LEAST_TOKENS:
            raise InvalidPrompt(f"the prompt {question!r} has {len(row)} tokens, but {LEAST_TOKENS} are needed")
    return OwnModel(loaded.model, loaded.name, ids, left_out=left_out)


class Bare:
    """The model itself: it ablates nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **given: Any) -> None:
        """Do nothing."""

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the logits of the model."""
        return run(self.model, {"input_ids": input_ids, "attention_mask": attention_mask, **inputs})

    def clear(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _fault_of_the_model(check: Check, case: Case) -> str | None:
    """Return in what way the model itself fails a check in one case, with no head ablated, or None."""
    if check.id not in OF_THE_MODEL:
        return None
    try:
        check.run_case(Bare, case)
    except CheckFailure as failure:
        return f"the model itself fails, with no head ablated: {finding(failure.error)}"
    return None


def _on_model(check: Check) -> Check:
    """Return the check with the function that leaves the weights of the model alone."""
    if check.id != "hygiene.restored":
        return check
    return Check(check.id, check.requirement, restored, check.cases, check.needs, check.level)


def restored(factory: Factory, case: Case) -> None:
    """Assert that the model is as it was found after `close`, with and without a run."""
    for runs in (1, 0):
        model = case.model()
        before = state(model)
        implementation = factory(model)
        discard(ablate, implementation, case)
        for _ in range(runs):
            implementation.run(**case.inputs())
        discard(implementation.close)
        assert_state_equals(model, before)
