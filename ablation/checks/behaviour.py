"""What an ablation changes, and what it must not: seen at the projections, and in the logits."""

from __future__ import annotations

import torch

from ablation.checks.cases import Case, Cases, close, run, same
from ablation.checks.check import Check, Factory
from ablation.checks.observe import received
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
        implementation.clear()
        same(implementation.run(**inputs), bare, "the logits after clear()")
    finally:
        implementation.close()
    same(run(model, inputs), bare, "the logits of the model after close()")


def locality(make: Factory, case: Case) -> None:
    """At the projections' inputs only the target heads' slices differ from the clean run; each is called once."""
    model, inputs = case.model(), case.inputs()
    layers = find_heads(model).layers
    with received(model) as clean:
        run(model, inputs)
    with received(model) as ablated:  # before it is made: it may wrap the `forward` of a projection, too
        implementation = make(model)
        try:
            implementation.ablate(list(case.heads), case.imputation)
            implementation.run(**inputs)
        finally:
            implementation.close()
    first = min(layer for layer, _ in case.heads)
    for layer, calls in zip(layers, ablated, strict=True):
        assert len(calls) == 1, f"the projection of layer {layer.index} was called {len(calls)} times, not once"
        was, now = clean[layer.index][0], calls[0]
        assert now.dtype == was.dtype, f"the projection of layer {layer.index} was given {now.dtype}, not {was.dtype}"
        if layer.index > first:
            break  # what comes in is changed already by the layer below
        targets = {head for index, head in case.heads if index == layer.index}
        shape = (layer.heads, layer.width)
        touched = (was != now).unflatten(-1, shape).any(dim=-1).flatten(0, 1).any(dim=0)  # [heads]
        others = [head for head in range(layer.heads) if touched[head] and head not in targets]
        asked = ", ".join(f"head {head}" for head in sorted(targets)) or "no head"
        what = f"of layer {layer.index}, {asked} was to be ablated"
        assert not others, f"{what}, but head {others[0]} was changed"
        for head in targets:
            value, old = (z.unflatten(-1, shape)[:, :, head] for z in (now, was))  # [rows, tokens, width]
            _assert_imputed(value, old, case, inputs["attention_mask"], f"{what}; head {head}")


def _assert_imputed(value: torch.Tensor, old: torch.Tensor, case: Case, mask: torch.Tensor, what: str) -> None:
    if case.imputation == "zero":
        left = int(value.count_nonzero())
        assert not left, f"{what} holds {left} of {value.numel()} elements that are not 0"
        return
    for row, real in enumerate(mask.bool()):
        held = value[row, real]
        spread = (held.max() - held.min()).item()
        assert spread == 0, f"{what}, row {row}, holds several values, from {held.min():.6g} to {held.max():.6g}"
        mean = old[row, real].double().mean()
        ulps = 4 * torch.finfo(held.dtype).eps * old[row, real].abs().max().item()  # the mean of few numbers, rounded
        off = abs(held[0, 0].double() - mean).item()
        assert off <= ulps, f"{what}, row {row}, holds {held[0, 0]:.9g}; its mean is {mean:.9g}"


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
    """A row of a batch, padded or not, gives what it gives alone."""
    model, inputs = case.model(), case.inputs()
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        together = implementation.run(**inputs)
        for index, row in enumerate(case.rows):
            alone = implementation.run(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
            real = inputs["attention_mask"][index].bool()
            close(together[index, real], alone[0], f"row {index} of {len(case.rows)}, against the same row alone")
    finally:
        implementation.close()


def repeats(make: Factory, case: Case) -> None:
    """The same run again gives the same bits, also after a run on something else and after other heads."""
    model, inputs = case.model(), case.inputs()
    other = torch.tensor([[(token + 7) % 41 for token in case.rows[0]] + [3, 1]])
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), case.imputation)
        once = implementation.run(**inputs)
        same(implementation.run(**inputs), once, "the logits of a second run")
        implementation.run(other, torch.ones_like(other))
        same(implementation.run(**inputs), once, "the logits after a run on another prompt")
        implementation.ablate([(0, 0)], case.imputation)
        implementation.run(**inputs)
        implementation.ablate(list(case.heads), case.imputation)
        same(implementation.run(**inputs), once, "the logits after other heads were ablated in between")
    finally:
        implementation.close()


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
    """Under zero imputation, decoding token by token with a cache gives what one forward gives."""
    from transformers import DynamicCache

    model, row = case.model(), case.rows[0]
    implementation = make(model)
    try:
        implementation.ablate(list(case.heads), "zero")
        whole = implementation.run(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
        past = DynamicCache(config=model.config)
        for i, token in enumerate(row):
            mask = torch.ones(1, i + 1, dtype=torch.long)
            step = implementation.run(torch.tensor([[token]]), mask, past_key_values=past, use_cache=True)
            close(step[:, -1], whole[:, i], f"the logits of token {i}, decoded with a cache, against one forward")
    finally:
        implementation.close()


# In float64, transformers' eager attention itself gives NaN where a token sees nothing but padding.
PADDED = ("float32",)

CHECKS = [
    Check(
        id="identity",
        requirement="Unset, with an empty set, cleared or closed, the logits are the bare model's, bit for bit.",
        function=identity,
        cases=Cases(dtypes=("float32", "float64", "bfloat16")),
    ),
    Check(
        id="locality",
        requirement="At the input of the projections, the target heads' slices and nothing else are replaced.",
        function=locality,
        cases=Cases(dtypes=("float32", "float64", "bfloat16")),
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
        cases=Cases(heads=4),
        needs=("observe", "once", "sets"),
    ),
    Check(
        id="input.untouched",
        requirement="The tensor that enters the projection is not written to: others may keep it.",
        function=input_untouched,
        cases=Cases(),
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
        cases=Cases(heads=4),
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
        cases=Cases(imputations=("zero",), tokens=2),
        needs=("zero", "cache"),
    ),
    Check(
        id="repeat",
        requirement="The same run again gives the same bits, whatever ran in between.",
        function=repeats,
        cases=Cases(),
    ),
]
