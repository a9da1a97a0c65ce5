"""What an ablation changes, and what it must not: seen at the projections, and in the logits."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ablation.checks.cases import Case, Cases, close, run, same
from ablation.checks.check import Check, Factory, declared
from ablation.checks.decoders import VOCABULARY
from ablation.checks.observe import received
from ablation.checks.protocol import CACHE, Implementation
from ablation.heads import find_heads


def identity(make: Factory, case: Case) -> None:
    """Unset, with an empty set, cleared and closed: the bare model's logits, bit for bit."""
    model, inputs = case.model(), case.inputs()
    bare = run(model, inputs)
    implementation = make(model)
    try:
        same(implementation.run(**inputs), bare, "the logits before anything is ablated")
        implementation.ablate([], case.imputation)
        same(implementation.run(**inputs), bare, "the logits with an empty set of heads")
        implementation.ablate(list(case.heads), case.imputation)
        implementation.run(**inputs)
        implementation.ablate([], case.imputation)
        same(implementation.run(**inputs), bare, "the logits with an empty set of heads after another set")
        implementation.ablate(list(case.heads), case.imputation)
        implementation.clear()
        same(implementation.run(**inputs), bare, "the logits after clear()")
        unmasked = {"input_ids": inputs["input_ids"], "use_cache": False}
        same(implementation.run(**unmasked), run(model, unmasked), "the logits without an attention mask")
    finally:
        implementation.close()
    same(run(model, inputs), bare, "the logits of the model after close()")


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
    with received(model) as calls:  # before the implementation, which may wrap or replace the projections
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
        old, new = (z.unflatten(-1, (layer.heads, layer.width)) for z in (was, now[0]))
        targets = sorted(head for index, head in case.heads if index == layer.index)
        what = f"of layer {layer.index}, {', '.join(f'head {head}' for head in targets) or 'no head'} was to be ablated"
        if layer.index <= first:
            touched = (old != new).any(dim=-1).flatten(0, 1).any(dim=0)  # [heads]
            others = [head for head in range(layer.heads) if touched[head] and head not in targets]
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
    """A tensor that somebody else keeps, such as a captured activation, is not written to."""
    model, inputs = case.model(), case.inputs()
    kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for layer in find_heads(model).layers:
        layer.projection.register_forward_pre_hook(
            lambda _, args, index=layer.index: kept.append((index, args[0], args[0].clone()))
        )
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        implementation.run(**inputs)
    finally:
        implementation.close()
    for index, tensor, copy in kept:
        same(tensor, copy, f"the input of the projection of layer {index}, captured by a hook before the ablation")


def rows_stand_alone(make: Factory, case: Case) -> None:
    """A row of a batch, padded or not, gives what it gives alone, without an attention mask."""
    model, inputs = case.model(), case.inputs()
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        together = implementation.run(**inputs)
        for index, row in enumerate(case.rows):
            alone = implementation.run(torch.tensor([row]))
            real = inputs["attention_mask"][index].bool()
            close(together[index, real], alone[0], f"row {index} of {len(case.rows)}, against the same row alone")
    finally:
        implementation.close()


def forgets(make: Factory, case: Case) -> None:
    """Whatever was run, ablated, cleared or interrupted before, a run gives what a new implementation gives."""
    inputs = case.inputs()
    ids = (inputs["input_ids"] + 7) % VOCABULARY
    prompts: list[dict[str, Any]] = [inputs, {"input_ids": ids, "use_cache": False}]
    imputations = [case.imputation, *({"zero", "mean"} - {case.imputation} - set(declared(make)))]
    first, head, imputation = (
        ([case.heads[0]], case.imputation),
        ([case.heads[-1]], case.imputation),
        ([case.heads[0]], imputations[-1]),
    )

    spare = case.model()

    def new(heads: list[tuple[int, int]], imputation: str, prompt: int) -> torch.Tensor:
        implementation = make(spare)
        try:
            implementation.ablate(heads, imputation)
            logits: torch.Tensor = implementation.run(**prompts[prompt])
        finally:
            implementation.close()
        return logits

    alone = [new(*first, 0), new(*first, 1)]  # each closed before the next is made
    other_head, other_imputation, clean = new(*head, 0), new(*imputation, 0), new([], case.imputation, 0)
    model = case.model()
    last = find_heads(model).layers[-1].block
    implementation = make(model)

    def then(prompt: int, want: torch.Tensor, what: str) -> None:
        same(implementation.run(**prompts[prompt]), want, f"the logits {what}")

    try:
        implementation.ablate(*first)
        then(0, alone[0], "of a second implementation")
        then(0, alone[0], "of a second run")
        then(1, alone[1], "of another prompt, without a mask, after a run")
        then(0, alone[0], "after a run on another prompt")
        implementation.ablate(*head)
        then(0, other_head, "with another head, after a run with the first")
        implementation.clear()
        then(0, clean, "after clear()")
        implementation.ablate(*first)
        implementation.ablate(*imputation)
        then(0, other_imputation, "with another imputation, set after the first")
        implementation.ablate(*first)
        _interrupted(implementation, last, inputs)
        then(0, alone[0], "after a forward that was interrupted")
    finally:
        implementation.close()


class Interrupted(Exception):
    """What a layer raises in the middle of a forward."""


def _interrupted(implementation: Implementation, block: nn.Module, inputs: dict[str, Any]) -> None:
    """Run, with a decoder layer that raises before its attention."""

    def fail(*_: Any) -> None:
        raise Interrupted

    handle = block.register_forward_pre_hook(fail)
    try:
        with suppress(Interrupted):
            implementation.run(**inputs)
    finally:
        handle.remove()


def order_is_irrelevant(make: Factory, case: Case) -> None:
    """A set of heads is a set: its order does not matter, and a head named twice is ablated once."""
    model, inputs = case.model(), case.inputs()
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        once = implementation.run(**inputs)
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
        one, two = (implementation.run(torch.tensor([ids]), mask) for ids in (row, changed))
    finally:
        implementation.close()
    # Not bit for bit: experts share out the tokens of a batch, and sum in another order.
    close(one[:, :-1], two[:, :-1], "the logits before the last token, against those with another last token")


def cache(make: Factory, case: Case) -> None:
    """Under zero imputation, decoding in pieces of one and two tokens with a cache gives what one forward gives."""
    from transformers import DynamicCache

    model, row = case.model(), case.rows[0]
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), "zero")
        whole = implementation.run(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
        past = DynamicCache(config=model.config)
        start, size = 0, 1 + row[0] % 2
        while start < len(row):
            piece = slice(start, min(start + size, len(row)))
            mask = torch.ones(1, piece.stop, dtype=torch.long)
            step = implementation.run(torch.tensor([row[piece]]), mask, use_cache=True, **{CACHE: past})
            name = f"token {start}" if piece.stop == start + 1 else f"tokens {start} to {piece.stop - 1}"
            close(step, whole[:, piece], f"the logits of {name}, decoded with a cache, against one forward")
            start, size = piece.stop, 3 - size
    finally:
        implementation.close()


# In float64, transformers' eager attention itself gives NaN where a token sees nothing but padding.
PADDED = ("float32",)
EXACT = ("float32", "float64", "bfloat16")  # where no tolerance is needed

CHECKS = [
    Check(
        id="identity",
        requirement="Unset, with an empty set, cleared or closed, the logits are the bare model's, bit for bit.",
        function=identity,
        cases=Cases(dtypes=EXACT),
    ),
    Check(
        id="locality",
        requirement="At the input of the projections, the target heads' slices and nothing else are replaced.",
        function=locality,
        cases=Cases(dtypes=EXACT),
        needs=("observe", "once"),
    ),
    Check(
        id="locality.padded",
        requirement="In a padded batch, each row's slice is replaced by what its own real tokens give.",
        function=locality,
        cases=Cases(rows=3, ragged=True, dtypes=PADDED),
        needs=("observe", "once", "batch", "padding"),
    ),
    Check(
        id="locality.sets",
        requirement="Several heads are replaced at once, each by what its own output gives.",
        function=locality,
        cases=Cases(rows=2, heads=4, dtypes=EXACT),
        needs=("observe", "once", "sets"),
    ),
    Check(
        id="locality.foreign",
        requirement="The same where a hook of the user's edits z: its edit is kept.",
        function=foreign_edit,
        cases=Cases(dtypes=EXACT),
        needs=("observe", "once"),
    ),
    Check(
        id="input.untouched",
        requirement="The tensor that enters the projection is not written to: others may keep it.",
        function=input_untouched,
        cases=Cases(dtypes=EXACT),
        needs=("observe",),
    ),
    Check(
        id="batch",
        requirement="A row of a batch gives what it gives alone.",
        function=rows_stand_alone,
        cases=Cases(rows=3),
        needs=("batch",),
    ),
    Check(
        id="padding",
        requirement="Padding, left or right, changes nothing.",
        function=rows_stand_alone,
        cases=Cases(rows=3, ragged=True, dtypes=PADDED),
        needs=("batch", "padding"),
    ),
    Check(
        id="sets.order",
        requirement="The order of the heads does not matter, nor that one is named twice.",
        function=order_is_irrelevant,
        cases=Cases(heads=4, dtypes=EXACT),
        needs=("sets",),
    ),
    Check(
        id="causality",
        requirement="Under zero imputation, earlier logits do not depend on later tokens.",
        function=causality,
        cases=Cases(imputations=("zero",), tokens=2),
        needs=("zero",),
    ),
    Check(
        id="cache",
        requirement="Under zero imputation, decoding with a key/value cache gives what one forward gives.",
        function=cache,
        cases=Cases(imputations=("zero",), tokens=3),
        needs=("zero", "cache"),
    ),
    Check(
        id="history",
        requirement="What was run, ablated, cleared or interrupted before leaves no trace, to the last bit.",
        function=forgets,
        cases=Cases(heads=2, dtypes=EXACT),
    ),
    Check(
        id="history.padded",
        requirement="Nor does an attention mask that a run before was given.",
        function=forgets,
        cases=Cases(rows=2, ragged=True, heads=2, dtypes=PADDED),
        needs=("batch", "padding"),
    ),
]
