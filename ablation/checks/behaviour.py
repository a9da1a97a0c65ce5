"""What an ablation changes, and what it must not: seen at the projections, and in the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ablation.checks.cases import Case, CaseSpec, close, run, same
from ablation.checks.check import Check, Factory, declared
from ablation.checks.decoders import VOCABULARY
from ablation.checks.observe import recorded_inputs
from ablation.checks.oracles import ablated_logits
from ablation.checks.protocol import CACHE, Implementation
from ablation.heads import find_heads


def identity(make: Factory, case: Case) -> None:
    """Unset, with an empty set, cleared and closed: the bare model's logits, bit for bit; with a cache, too."""
    model, inputs = case.model(), case.inputs()
    unmasked = {"input_ids": inputs["input_ids"], "use_cache": False}
    unplaced = {name: value for name, value in inputs.items() if name != "position_ids"}
    real = inputs["attention_mask"].bool()  # what padding gives is nobody's concern
    bare = run(model, inputs)
    implementation = make(model)

    def unchanged(what: str) -> None:
        same(implementation.run(**inputs)[real], bare[real], f"the logits {what}")

    try:
        unchanged("before anything is ablated")
        if "cache" not in declared(make):
            both = decoded(lambda **piece: run(model, piece), case), decoded(implementation.run, case)
            for (name, here, want), (_, _, got) in zip(*both, strict=True):
                same(got[real[:, here]], want[real[:, here]], f"the logits of {name}, decoded with a cache,")
        implementation.ablate([], case.imputation)
        unchanged("with an empty set of heads")
        implementation.ablate(list(case.heads), case.imputation)
        implementation.run(**inputs)
        implementation.ablate([], case.imputation)
        unchanged("with an empty set of heads after another set")
        implementation.ablate(list(case.heads), case.imputation)
        implementation.clear()
        unchanged("after clear()")
        same(implementation.run(**unmasked), run(model, unmasked), "the logits without an attention mask")
        got, want = implementation.run(**unplaced), run(model, unplaced)
        same(got[real], want[real], "the logits without position_ids")
    finally:
        implementation.close()
    same(run(model, inputs)[real], bare[real], "the logits of the model after close()")


def foreign_edit(make: Factory, case: Case) -> None:
    """Locality, where a hook of the user's doubles z: before or after the ablation is the same, to the last bit."""
    model = case.model()
    for layer in find_heads(model).layers:
        layer.projection.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    _assert_local(make, case, model)


def locality(make: Factory, case: Case) -> None:
    """At the projections' inputs the target heads' slices, and no others, hold what they should; each is called once.

    The others are compared up to the first layer with targets: what comes into the layers above is changed already.
    """
    _assert_local(make, case, case.model())


def _assert_local(make: Factory, case: Case, model: PreTrainedModel) -> None:
    inputs = case.inputs()
    layers = find_heads(model).layers
    real = inputs["attention_mask"].bool()
    with recorded_inputs(model) as calls:  # before the implementation, which may wrap or replace the projections
        run(model, inputs)
        clean = [layer.pop() for layer in calls]
        implementation = make(model)
        try:
            implementation.ablate(list(case.heads), case.imputation)
            implementation.run(**inputs)
        finally:
            implementation.close()
    first = min(layer for layer, _ in case.heads)
    for layer, was, now in zip(layers, clean, calls, strict=True):
        assert len(now) == 1, f"the projection of layer {layer.index} was called {len(now)} times, not once"
        assert now[0].dtype == was.dtype, f"the projection of layer {layer.index} got {now[0].dtype}, not {was.dtype}"
        old, new = (z.unflatten(-1, (layer.num_heads, layer.head_dim)) for z in (was, now[0]))
        targets = sorted(head for index, head in case.heads if index == layer.index)
        what = f"of layer {layer.index}, {', '.join(f'head {head}' for head in targets) or 'no head'} was to be ablated"
        if layer.index <= first:
            touched = (old != new).any(dim=-1).flatten(0, 1).any(dim=0)  # [heads]
            others = [head for head in range(layer.num_heads) if touched[head] and head not in targets]
            assert not others, f"{what}, but head {others[0]} was changed"
        for head in targets:
            for row, here in enumerate(real):  # what padding holds is nobody's concern
                held, own = (z[row, here, head] for z in (new, old))  # [tokens, width]
                name = f"{what}; head {head}, row {row}"
                _assert_imputed(held, own if layer.index == first else None, case.imputation, name)


def _assert_imputed(held: torch.Tensor, own: torch.Tensor | None, imputation: str, what: str) -> None:
    """held: [tokens, width] of one row. own: what it replaces, where that is known."""
    if imputation == "zero":
        left = int(held.count_nonzero())
        assert not left, f"{what}, holds {left} of {held.numel()} elements that are not 0"
        return
    spread = (held.max() - held.min()).item()
    assert spread == 0, f"{what}, holds several values, from {held.min():.6g} to {held.max():.6g}"
    if own is not None:
        mean = own.double().mean()
        ulps = 4 * torch.finfo(held.dtype).eps * own.abs().max().item()  # the mean of few numbers, rounded
        off = abs(held[0, 0].double() - mean).item()
        assert off <= ulps, f"{what}, holds {held[0, 0]:.9g}; its mean is {mean:.9g}"


def input_untouched(make: Factory, case: Case) -> None:
    """A tensor that somebody else keeps, such as a captured activation, is not written to, then or in the next run."""
    model, inputs = case.model(), case.inputs()
    kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(place: str) -> Callable[..., None]:
        return lambda _, args, *output: kept.append((place, args[0], args[0].clone()))

    for layer in find_heads(model).layers:
        place = f"the input of the projection of layer {layer.index}, captured by a hook"
        layer.projection.register_forward_pre_hook(keep(f"{place} before the ablation"))
        layer.projection.register_forward_hook(keep(f"{place} behind it"))
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        implementation.run(**inputs)
        implementation.run(**inputs | {"input_ids": other_ids(case)})
    finally:
        implementation.close()
    for what, tensor, copy in kept:
        same(tensor, copy, what)


def other_ids(case: Case) -> torch.Tensor:
    """Other prompts of the same shape, [rows, tokens]."""
    ids: torch.Tensor = (case.inputs()["input_ids"] + 7) % VOCABULARY
    return ids


def rows_stand_alone(make: Factory, case: Case) -> None:
    """A row of a batch, padded or not, gives what it gives alone, without an attention mask.

    A batch without padding is run without a mask, too.
    """
    model, inputs = case.model(), case.inputs()
    batches = {"": inputs}
    if inputs["attention_mask"].all():
        batches[" without an attention mask"] = {"input_ids": inputs["input_ids"], "use_cache": False}
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        together = {name: implementation.run(**batch).clone() for name, batch in batches.items()}
        for index, row in enumerate(case.rows):
            alone = implementation.run(torch.tensor([row]))
            real = inputs["attention_mask"][index].bool()
            for name, logits in together.items():
                what = f"row {index} of {len(case.rows)}{name}, against the same row alone"
                close(logits[index, real], alone[0], what)
    finally:
        implementation.close()


def forgets(make: Factory, case: Case) -> None:
    """Whatever was run, ablated, cleared or interrupted before, a run gives what a new implementation gives."""
    prompts: list[dict[str, Any]] = [
        case.inputs(),
        {"input_ids": other_ids(case), "use_cache": False},
        replace(case, rows=case.rows[::-1]).inputs(),
        {"input_ids": case.inputs()["input_ids"], "use_cache": False},
    ]
    names = ("", "of another prompt, without a mask, ", "of the rows in another order ", "without a mask ")
    imputations = [case.imputation, *({"zero", "mean"} - {case.imputation} - set(declared(make)))]
    case = replace(case, heads=tuple(sorted(case.heads, reverse=True)))  # what is below the first comes later
    first, another, every = [case.heads[0]], [case.another()], list(case.heads)
    spare = case.model()

    def new(heads: list[tuple[int, int]], imputation: str, prompt: int) -> torch.Tensor:
        """What a new implementation gives: closed before the next is made."""
        implementation = make(spare)
        try:
            implementation.ablate(heads, imputation)
            return implementation.run(**prompts[prompt]).clone()
        finally:
            implementation.close()

    alone = [new(first, case.imputation, prompt) for prompt in range(len(prompts))]
    model = case.model()
    layer = find_heads(model).layers[first[0][0]]
    implementation = make(model)
    kept: list[tuple[torch.Tensor, torch.Tensor, str]] = []

    def then(prompt: int, want: torch.Tensor, what: str) -> None:
        got = implementation.run(**prompts[prompt])
        same(got, want, f"the logits {names[prompt]}{what}")
        kept.append((got, got.clone(), f"the logits {names[prompt]}{what}, that were kept, after later runs"))

    try:
        implementation.ablate(first, case.imputation)
        then(0, alone[0], "of a second implementation")
        then(0, alone[0], "of a second run")
        for prompt in (1, 2, 3):
            then(prompt, alone[prompt], "after a run")
            then(0, alone[0], "after a run on another prompt")
        implementation.ablate(another, case.imputation)
        then(0, new(another, case.imputation, 0), "with another head, after a run with the first")
        passed = list(every)
        implementation.ablate(passed, case.imputation)
        passed.clear()  # what becomes of the caller's list is the caller's affair
        then(0, new(every, case.imputation, 0), f"with {every} ablated, after runs with others")
        implementation.clear()
        then(0, new([], case.imputation, 0), "after clear()")
        implementation.ablate(first, case.imputation)
        implementation.ablate(first, imputations[-1])
        then(0, new(first, imputations[-1], 0), "with another imputation, set after the first")
        implementation.ablate(first, case.imputation)
        for interrupt in (layer.block.register_forward_pre_hook, layer.projection.register_forward_hook):
            for interrupted, prompt in ((0, 1), (1, 2)):
                _interrupted(implementation, interrupt, prompts[interrupted])
                then(prompt, alone[prompt], "after a forward that was interrupted")
        for got, was, what in kept:
            same(got, was, what)
    finally:
        implementation.close()


class Interrupted(Exception):
    """What a layer raises in the middle of a forward."""


def _interrupted(implementation: Implementation, register: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Run, with a hook in the middle that raises."""

    def fail(*_: Any) -> None:
        raise Interrupted

    handle = register(fail)
    try:
        with suppress(Interrupted):
            implementation.run(**inputs)
    finally:
        handle.remove()


def isolation(make: Factory, case: Case) -> None:
    """Of two models, each has its own ablation: the other's changes nothing in it, ended before it or after it."""
    inputs, one, other = case.inputs(), case.model(), case.model()
    other.config = one.config  # as of models that are made from one configuration
    another = replace(case, heads=(case.another(),))
    bare, want = run(other, inputs), ablated_logits(make, another)
    with ExitStack() as on_one, ExitStack() as on_other:
        first = make(one)
        on_one.callback(first.close)
        first.ablate(list(case.heads), case.imputation)
        alone = first.run(**inputs).clone()
        same(run(other, inputs), bare, "the logits of a second model, where heads of the first are ablated,")
        second = make(other)
        on_other.callback(second.close)
        second.ablate(list(another.heads), another.imputation)
        same(second.run(**inputs), want, "the logits of a second model, where heads of both are ablated,")
        same(first.run(**inputs), alone, "the logits of the first model, where heads of both are ablated,")
        on_one.close()
        same(second.run(**inputs), want, "the logits of the second model, after close() on the first,")


def order_is_irrelevant(make: Factory, case: Case) -> None:
    """A set of heads is a set: its order does not matter, and a head named twice is ablated once."""
    model, inputs = case.model(), case.inputs()
    implementation = make(model)
    try:
        implementation.ablate(tuple(case.heads), case.imputation)  # any sequence
        once = implementation.run(**inputs).clone()
        implementation.ablate(list(reversed(case.heads)), case.imputation)
        same(implementation.run(**inputs), once, "the logits with the heads in the opposite order")
        implementation.ablate([*case.heads, case.heads[0]], case.imputation)
        same(implementation.run(**inputs), once, "the logits with the first head named twice")
    finally:
        implementation.close()


def causality(make: Factory, case: Case) -> None:
    """Under zero imputation, the logits of earlier tokens do not depend on later ones."""
    model, row = case.model(), case.rows[0]
    changed = (*row[:-1], (row[-1] + 1) % 41)
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), "zero")
        mask = torch.ones(1, len(row), dtype=torch.long)
        one, two = (implementation.run(torch.tensor([ids]), mask).clone() for ids in (row, changed))
    finally:
        implementation.close()
    # Not bit for bit: experts share out the tokens of a batch, and sum in another order.
    close(one[:, :-1], two[:, :-1], "the logits before the last token, against those with another last token")


def cache(make: Factory, case: Case) -> None:
    """Under zero imputation, decoding in pieces of one and two tokens with a cache gives what one forward gives."""
    model, inputs = case.model(), case.inputs()
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), "zero")
        whole, mask = implementation.run(**inputs).clone(), inputs["attention_mask"].bool()
        for name, here, step in decoded(implementation.run, case):
            real = mask[:, here]
            close(step[real], whole[:, here][real], f"the logits of {name}, decoded with a cache, against one forward")
    finally:
        implementation.close()


def decoded(forward: Callable[..., torch.Tensor], case: Case) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """Decode with a cache, in pieces of one and two tokens: each one's name, place, and logits [rows, tokens, ...]."""
    from transformers import DynamicCache

    inputs, past = case.inputs(), DynamicCache(config=case.decoder.build().config)
    length = inputs["input_ids"].shape[1]
    start, size = 0, 1 + case.rows[0][0] % 2
    while start < length:
        stop = min(start + size, length)
        logits = forward(
            input_ids=inputs["input_ids"][:, start:stop],
            attention_mask=inputs["attention_mask"][:, :stop],
            position_ids=inputs["position_ids"][:, start:stop],
            use_cache=True,
            **{CACHE: past},
        )
        name = f"token {start}" if stop == start + 1 else f"tokens {start} to {stop - 1}"
        yield name, slice(start, stop), logits
        start, size = stop, 3 - size


# In float64, transformers' eager attention itself gives NaN where a token sees nothing but padding.
PADDED = ("float32", "float64")
EXACT = ("float32", "float64", "bfloat16")  # where no tolerance is needed

CHECKS = [
    Check(
        id="identity",
        requirement="Unset, with an empty set, cleared or closed, the logits are the bare model's, bit for bit.",
        function=identity,
        cases=CaseSpec(heads=4, dtypes=EXACT),
    ),
    Check(
        id="identity.padded",
        requirement="So are those of a padded batch, whose mask and positions the model needs.",
        function=identity,
        cases=CaseSpec(rows=3, ragged=True, heads=4, dtypes=PADDED),
        needs=("batch", "padding"),
    ),
    Check(
        id="locality",
        requirement="At the input of the projections, the target heads' slices and nothing else are replaced.",
        function=locality,
        cases=CaseSpec(dtypes=EXACT),
        needs=("observable", "single_forward"),
    ),
    Check(
        id="locality.padded",
        requirement="In a padded batch, each row's slice is replaced by what its own real tokens give.",
        function=locality,
        cases=CaseSpec(rows=3, ragged=True, heads=4, dtypes=PADDED),
        needs=("observable", "single_forward", "batch", "padding"),
    ),
    Check(
        id="locality.sets",
        requirement="Several heads are replaced at once, each by what its own output gives.",
        function=locality,
        cases=CaseSpec(rows=2, heads=4, dtypes=EXACT),
        needs=("observable", "single_forward", "multiple_heads"),
    ),
    Check(
        id="locality.user_hooks",
        requirement="The same where a hook of the user's edits z: its edit is kept.",
        function=foreign_edit,
        cases=CaseSpec(dtypes=EXACT),
        needs=("observable", "single_forward"),
    ),
    Check(
        id="locality.input_untouched",
        requirement="The tensor that enters the projection is not written to, then or later: others may keep it.",
        function=input_untouched,
        cases=CaseSpec(dtypes=EXACT),
        needs=("observable",),
    ),
    Check(  # before those that run an implementation more than once, and would blame what they vary
        id="independence.earlier_runs",
        requirement="What was run, ablated, cleared or interrupted before leaves no trace, to the last bit.",
        function=forgets,
        cases=CaseSpec(heads=4, dtypes=EXACT),
    ),
    Check(
        id="independence.earlier_masks",
        requirement="Nor does an attention mask that a run before was given.",
        function=forgets,
        cases=CaseSpec(rows=2, ragged=True, heads=4, dtypes=PADDED),
        needs=("batch", "padding"),
    ),
    Check(
        id="independence.other_models",
        requirement="What is ablated in one model changes nothing in another that is ablated at the same time.",
        function=isolation,
        cases=CaseSpec(heads=4, dtypes=EXACT),
    ),
    Check(
        id="independence.rows",
        requirement="A row of a batch gives what it gives alone.",
        function=rows_stand_alone,
        cases=CaseSpec(rows=3),
        needs=("batch",),
    ),
    Check(
        id="independence.padding",
        requirement="Padding, left or right, changes nothing.",
        function=rows_stand_alone,
        cases=CaseSpec(rows=9, ragged=True, heads=4, layers=2, dtypes=PADDED),
        needs=("batch", "padding"),
    ),
    Check(
        id="independence.head_order",
        requirement="The order of the heads does not matter, nor that one is named twice.",
        function=order_is_irrelevant,
        cases=CaseSpec(heads=4, dtypes=EXACT),
        needs=("multiple_heads",),
    ),
    Check(
        id="independence.later_tokens",
        requirement="Under zero imputation, earlier logits do not depend on later tokens.",
        function=causality,
        cases=CaseSpec(imputations=("zero",), tokens=2),
        needs=("zero",),
    ),
    Check(
        id="independence.cache",
        requirement="Under zero imputation, decoding with a key/value cache gives what one forward gives.",
        function=cache,
        cases=CaseSpec(imputations=("zero",), tokens=3),
        needs=("zero", "cache"),
    ),
    Check(
        id="independence.cache_padded",
        requirement="The same for a padded batch, as in generation.",
        function=cache,
        cases=CaseSpec(imputations=("zero",), rows=3, ragged=True, tokens=3, dtypes=PADDED),
        needs=("zero", "cache", "batch", "padding"),
    ),
]
