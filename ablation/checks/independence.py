"""Chapter 4, independence: of earlier runs, other models, other rows, padding, the order of heads and later tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, offered_imputations
from ablation.checks.decoders import DTYPES
from ablation.checks.driving import (
    ablate,
    ablated_logits,
    decode_with_cache,
    discard,
    made,
    other_ids,
    other_keywords,
    piece,
    run,
)
from ablation.checks.protocol import WITHOUT_ROW, Factory, Implementation
from ablation.heads import find_heads


# This check is the first of the chapter, since the checks below run an implementation more than once. If the
# implementation depends on earlier runs, they would name a wrong cause: whatever they vary between the runs.
@check(
    "independence.earlier_runs",
    "A run gives the same logits, bit for bit, whatever runs, ablations, clears and interrupted forward passes came "
    "before.",
    cases=CaseSpec(max_heads=4, dtypes=DTYPES),
)
def earlier_runs(factory: Factory, case: Case) -> None:
    _assert_independent_of_history(factory, case)


@check(
    "independence.earlier_masks",
    "An attention mask given to an earlier run does not affect later runs.",
    cases=CaseSpec(without=("resample",), max_rows=2, ragged=True, max_heads=4),
    needs=("batch", "padding"),
)
def earlier_masks(factory: Factory, case: Case) -> None:
    _assert_independent_of_history(factory, case)


def _assert_independent_of_history(factory: Factory, case: Case) -> None:
    """Compare each run in a long history of one implementation with the first run of a new implementation."""
    prompts: list[dict[str, Any]] = [
        case.inputs(),
        {"input_ids": other_ids(case), "use_cache": False},
        replace(case, rows=case.rows[::-1]).inputs(),
        {"input_ids": case.inputs()["input_ids"], "use_cache": False},
    ]
    names = ("", "of another prompt, without a mask, ", "of the rows in another order ", "without a mask ")
    others = [name for name in ("zero", "mean") if name in offered_imputations(factory) and name != case.imputation]
    other = replace(case, imputation=others[0], by_position=False) if others else case
    case = replace(case, heads=tuple(sorted(case.heads, reverse=True)))  # so that the first head is in the last layer
    first, another, every = [case.heads[0]], [case.another_head()], list(case.heads)
    spare = case.model()

    changed = other_keywords(case)

    def from_new(heads: list[tuple[int, int]], prompt: int, case: Case = case, **changes: Any) -> Tensor:
        """Return the logits of a new implementation, which is closed before the next one is made."""
        with made(factory, spare) as implementation:
            ablate(implementation, case, heads, **changes)
            return implementation.run(**prompts[prompt]).clone()

    alone = [from_new(first, prompt) for prompt in range(len(prompts))]
    model = case.model()
    layer = find_heads(model).layers[first[0][0]]
    kept: list[tuple[Tensor, Tensor, str]] = []
    with made(factory, model) as implementation:

        def assert_run(prompt: int, want: Tensor, when: str) -> None:
            got = implementation.run(**prompts[prompt])
            assert_identical(got, want, f"the logits {names[prompt]}{when}")
            kept.append((got, got.clone(), f"the logits {names[prompt]}{when}, kept during later runs,"))

        ablate(implementation, case, first)
        assert_run(0, alone[0], "of a second implementation")
        assert_run(0, alone[0], "of a second run")
        for prompt in (1, 2, 3):
            assert_run(prompt, alone[prompt], "after a run")
            assert_run(0, alone[0], "after a run on another prompt")
        ablate(implementation, case, another, **changed)
        assert_run(0, from_new(another, 0, **changed), "with another head, after a run with the first")
        passed = list(every)
        ablate(implementation, case, passed)
        passed.clear()  # the caller may change its list
        assert_run(0, from_new(every, 0), f"with {every} ablated, after runs with others")
        implementation.clear()
        assert_run(0, from_new([], 0), "after clear()")
        ablate(implementation, case, first)
        discard(ablate, implementation, other, first)
        assert_run(0, from_new(first, 0, other), "with an imputation that replaced another one")
        ablate(implementation, case, first)
        for register in (layer.block.register_forward_pre_hook, layer.projection.register_forward_hook):
            for interrupted, prompt in ((0, 1), (1, 2)):
                interrupt(implementation, register, prompts[interrupted])
                assert_run(prompt, alone[prompt], "after an interrupted forward pass")
        for got, was, what in kept:
            assert_identical(got, was, what)


class Interrupted(Exception):
    """Raised by a hook in the middle of a forward pass."""


def interrupt(implementation: Implementation, register: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Run an implementation while a hook raises."""

    def fail(*_: Any) -> None:
        raise Interrupted

    handle = register(fail)
    try:
        with suppress(Interrupted):
            implementation.run(**inputs)
    finally:
        handle.remove()


@check(
    "independence.other_models",
    "An implementation on one model does not affect the logits of another model, ablated or not, and can be closed "
    "while the other model is ablated.",
    cases=CaseSpec(max_heads=4, dtypes=DTYPES),
)
def other_models(factory: Factory, case: Case) -> None:
    inputs, one, other = case.inputs(), case.model(), case.model()
    other.config = one.config  # models built from one configuration share it
    another = replace(case, heads=(case.another_head(),))
    bare, want = run(other, inputs), ablated_logits(factory, another)
    with ExitStack() as on_one, ExitStack() as on_other:
        first = on_one.enter_context(made(factory, one))
        ablate(first, case)
        alone = first.run(**inputs).clone()
        assert_identical(run(other, inputs), bare, "the logits of a second model, with heads of the first ablated,")
        second = on_other.enter_context(made(factory, other))
        ablate(second, another)
        assert_identical(second.run(**inputs), want, "the logits of a second model, with heads of both ablated,")
        assert_identical(first.run(**inputs), alone, "the logits of the first model, with heads of both ablated,")
        on_one.close()
        assert_identical(second.run(**inputs), want, "the logits of the second model, after close() on the first,")


@check(
    "independence.rows",
    "A row of a batch gives, up to rounding, the logits that the row gives alone.",
    cases=CaseSpec(without=("resample",), max_rows=3),
    needs=("batch",),
)
def rows(factory: Factory, case: Case) -> None:
    _assert_rows_stand_alone(factory, case)


@check(
    "independence.padding",
    "Padding on the left, on the right or on both sides changes the logits of real tokens only by rounding.",
    cases=CaseSpec(without=("resample",), max_rows=9, ragged=True, max_heads=4, min_layers=2),
    needs=("batch", "padding"),
)
def padding(factory: Factory, case: Case) -> None:
    _assert_rows_stand_alone(factory, case)


def _assert_rows_stand_alone(factory: Factory, case: Case) -> None:
    """Compare each row of a batch with a run of the row alone. A batch without padding is also run without a mask."""
    model, inputs = case.model(), case.inputs()
    batches = {"": inputs}
    if inputs["attention_mask"].all():
        batches[" without an attention mask"] = {"input_ids": inputs["input_ids"], "use_cache": False}
    with made(factory, model) as implementation:
        ablate(implementation, case)
        together = {name: implementation.run(**batch).clone() for name, batch in batches.items()}
        for index, row in enumerate(case.rows):
            alone = implementation.run(case.tensor(row))
            real = inputs["attention_mask"][index].bool()
            for name, logits in together.items():
                what = f"row {index} of {len(case.rows)}{name}, against the same row alone"
                assert_close(logits[index, real], alone[0], what)


@check(
    "independence.many_rows",
    "In a batch of more than 16 rows, each row gives, up to rounding, the logits that the row gives alone.",
    cases=CaseSpec(without=("resample",), dtypes=("float32",)),
    needs=("batch",),
)
def many_rows(factory: Factory, case: Case) -> None:
    batch = with_many_rows(case)
    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        together = implementation.run(**batch.inputs()).clone()
        for index in (0, 15, 16, 18):
            alone = implementation.run(case.tensor(batch.rows[index]))
            assert_close(together[index], alone[0], f"row {index} of {len(batch.rows)}, against the same row alone")


def with_many_rows(case: Case) -> Case:
    """Return a case with 19 rows of the length of its first row."""
    size = case.decoder.vocabulary
    return replace(case, rows=tuple(tuple((token + at) % size for token in case.rows[0]) for at in range(19)))


@check(
    "independence.gradient_mode",
    "The logits with gradients enabled, under torch.no_grad() and under torch.inference_mode() differ only by "
    "rounding.",
    cases=CaseSpec(max_heads=2, dtypes=("float32",)),
)
def gradient_mode(factory: Factory, case: Case) -> None:
    inputs, model, spare = case.inputs(), case.model(), case.model()
    want = ablated_logits(factory, case).detach().clone()
    with torch.inference_mode(), made(factory, spare) as implementation:
        ablate(implementation, case)
        assert_close(implementation.run(**inputs), want, "the logits of an implementation made under inference_mode")
    with made(factory, spare) as implementation:
        ablate(implementation, case)
        got = implementation.run(**inputs).detach().clone()
        assert_close(got, want, "the logits on a model that was ablated under inference_mode before")
    with made(factory, model) as implementation:
        ablate(implementation, case)
        # Gradients follow each of the others, since a tensor made under inference_mode cannot be saved for them.
        for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                got = implementation.run(**inputs)
            assert_close(got.detach().clone(), want, f"the logits under torch.{mode.__name__}()")


@check(
    "independence.threads",
    "A thread that calls `ablate` and then `run` gets, up to rounding, the logits that the main thread gets, also if "
    "another thread made the implementation.",
    cases=CaseSpec(max_heads=2, dtypes=("float32",)),
)
def threads(factory: Factory, case: Case) -> None:
    want = ablated_logits(factory, case).detach().clone()
    with made(factory, case.model()) as implementation, ThreadPoolExecutor(1) as worker:

        def work() -> Tensor:
            ablate(implementation, case)
            return implementation.run(**case.inputs()).detach().clone()

        there = worker.submit(work).result()
        assert_close(there, want, "the logits in a worker thread, of an implementation made in the main thread")
        there = worker.submit(lambda: ablated_logits(factory, case).detach().clone()).result()
        assert_close(there, want, "the logits of an implementation that lives in a worker thread")
        ablate(implementation, case)
        here = implementation.run(**case.inputs()).detach().clone()
        assert_close(here, want, "the logits in the main thread, after a worker thread")


@check(
    "independence.head_order",
    "The order in which heads are named does not change the logits, bit for bit, and if a head is named twice, they "
    "change only by rounding.",
    cases=CaseSpec(max_heads=4, dtypes=DTYPES),
    needs=("multiple_heads",),
)
def head_order(factory: Factory, case: Case) -> None:
    with made(factory, case.model()) as implementation:
        inputs = case.inputs()
        ablate(implementation, case, tuple(case.heads))  # a tuple here, lists elsewhere: any sequence
        once = implementation.run(**inputs).clone()
        ablate(implementation, case, list(reversed(case.heads)))
        assert_identical(implementation.run(**inputs), once, "the logits with the heads in the opposite order")
        ablate(implementation, case, [*case.heads, case.heads[0]])
        assert_close(implementation.run(**inputs), once, "the logits with the first head named twice, against once")


@check(
    "independence.later_tokens",
    "Under an imputation that does not read the whole row (zero, scale, values and means of a reference), later tokens "
    "affect the logits of a token only by rounding.",
    cases=CaseSpec(imputations=WITHOUT_ROW, min_tokens=2),
)
def later_tokens(factory: Factory, case: Case) -> None:
    row = case.rows[0]
    changed = (*row[:-1], (row[-1] + 1) % case.decoder.vocabulary)
    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        mask = case.inputs()["attention_mask"]
        one, two = (implementation.run(case.tensor(ids), attention_mask=mask).clone() for ids in (row, changed))
    # Up to rounding: in a mixture of experts, another last token changes how many tokens an expert multiplies at once.
    assert_close(one[:, :-1], two[:, :-1], "the logits before the last token, against those with another last token")


@check(
    "independence.cache",
    "Under an imputation that does not read the whole row (zero, scale, values and means of a reference), decoding "
    "with a key/value cache gives, up to rounding, the logits of one forward pass over all tokens.",
    cases=CaseSpec(imputations=WITHOUT_ROW, min_tokens=3),
    needs=("cache",),
)
def cache(factory: Factory, case: Case) -> None:
    assert_cache_changes_nothing(factory, case)


@check(
    "independence.cache_padded",
    "Under an imputation that does not read the whole row (zero, scale, values and means of a reference), decoding a "
    "padded batch with a key/value cache gives, up to rounding, the logits of one forward pass over all tokens.",
    cases=CaseSpec(imputations=WITHOUT_ROW, max_rows=3, ragged=True, min_tokens=3),
    needs=("cache", "batch", "padding"),
)
def cache_padded(factory: Factory, case: Case) -> None:
    assert_cache_changes_nothing(factory, case)


@check(
    "independence.cache_kept",
    "Keys and values that the caller's cache already holds are never written to.",
    cases=CaseSpec(imputations=WITHOUT_ROW, min_tokens=3, max_rows=2),
    needs=("cache",),
)
def cache_kept(factory: Factory, case: Case) -> None:
    past: Any = DynamicCache(config=case.decoder.shared().config)
    length = len(case.rows[0])
    with made(factory, case.model()) as implementation:
        implementation.run(**piece(case, past, 0, length - 1))
        layers = [layer for layer in past.layers if hasattr(layer, "keys")]  # those of attention
        before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        ablate(implementation, case)
        implementation.run(**piece(case, past, length - 1, length))
    for index, (layer, (keys, values)) in enumerate(zip(layers, before, strict=True)):
        for name, now, was in (("keys", layer.keys, keys), ("values", layer.values, values)):
            assert_identical(now[:, :, : length - 1], was, f"the {name} of layer {index} that the cache held before")


def assert_cache_changes_nothing(factory: Factory, case: Case) -> None:
    """Compare the logits of a case, decoded with a cache, with those of one forward pass."""
    with made(factory, case.model()) as implementation:
        inputs = case.inputs()
        ablate(implementation, case)
        whole, mask = implementation.run(**inputs).clone(), inputs["attention_mask"].bool()
        for name, here, logits in decode_with_cache(implementation.run, case):
            real = mask[:, here]
            what = f"the logits of {name}, decoded with a cache, against one forward pass"
            assert_close(logits[real], whole[:, here][real], what)
