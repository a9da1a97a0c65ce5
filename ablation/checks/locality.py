"""Chapter 3, locality: the inputs of the projections show that the ablated heads are replaced, and no other head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.assertions import assert_identical, different, tolerance
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, inputs_for
from ablation.checks.decoders import DTYPES
from ablation.checks.driving import ablate, made, other_ids, run
from ablation.checks.imputed import frozen_values
from ablation.checks.observe import WITH_VALUE_PROJECTION, recorded_inputs, spoil_values
from ablation.checks.protocol import IMPUTATIONS, Factory
from ablation.heads import AttentionLayer, find_heads


@check(
    "locality",
    "Up to and including the layer of the ablated head, the input of each projection equals its input in the clean "
    "run, except for the slice of the ablated head, which holds the imputed value.",
    cases=CaseSpec(dtypes=DTYPES),
    needs=("observable", "single_forward"),
)
def locality(factory: Factory, case: Case) -> None:
    assert_local(factory, case, case.model())


@check(
    "locality.padded",
    "In each row of a padded batch, the slice of an ablated head holds the imputed value of that row, which does not "
    "depend on padding or on other rows.",
    cases=CaseSpec(max_rows=3, ragged=True, max_heads=4),
    needs=("observable", "single_forward", "batch", "padding"),
)
def locality_padded(factory: Factory, case: Case) -> None:
    assert_local(factory, case, case.model())


@check(
    "locality.sets",
    "Several heads are replaced in one forward pass, each by its own imputed value.",
    cases=CaseSpec(max_rows=2, max_heads=4, dtypes=DTYPES),
    needs=("observable", "single_forward", "multiple_heads"),
)
def locality_sets(factory: Factory, case: Case) -> None:
    assert_local(factory, case, case.model())


@check(
    "locality.user_hooks",
    "If a hook of the user edits z, the imputed value is computed from the edited z, and the heads that are not "
    "ablated keep the user's edit.",
    # Doubling commutes with these, up to the last bit, so either order of the hooks is right.
    cases=CaseSpec(imputations=("zero", "mean", "channel-mean", "scale"), dtypes=DTYPES),
    needs=("observable", "single_forward"),
)
def locality_user_hooks(factory: Factory, case: Case) -> None:
    model = case.model()
    for layer in find_heads(model).layers:
        layer.projection.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert_local(factory, case, model)


@check(
    "locality.non_finite",
    "If the z of one head holds NaN or infinity, an ablation of other heads gives these heads their usual imputed "
    "values, and does not change the z that holds NaN or infinity.",
    cases=CaseSpec(families=WITH_VALUE_PROJECTION, min_layer_heads=4),  # at most three share their values
    needs=("observable", "single_forward", "non_finite"),
)
def locality_non_finite(factory: Factory, case: Case) -> None:
    model, decoder = case.model(), case.decoder
    ((layer, head),) = case.heads
    size = decoder.num_key_value_groups
    other = (head // size + 1) % (decoder.num_heads // size)
    spoil_values(model, decoder, layer, other, float("nan") if case.rows[0][0] % 2 else float("inf"))
    frozen = frozen_values(case, model)
    with recorded_inputs(model) as calls:
        run(model, case.inputs())
        old = calls[layer].pop().unflatten(-1, (decoder.num_heads, -1))[0]  # [tokens, heads, head_dim]
        with made(factory, model) as implementation:
            ablate(implementation, case)
            calls[layer].clear()  # of a reference
            implementation.run(**case.inputs())
    new = calls[layer].pop().unflatten(-1, (decoder.num_heads, -1))[0]
    problem = _imputation_problem(case, new[:, head], old[:, head], frozen[layer, head][0] if frozen else None)
    assert not problem, f"the z of head {head} in layer {layer} {problem}"
    same = ((old == new) | (old.isnan() & new.isnan())).all(dim=-1).all(dim=0)  # [heads]
    changed = [index for index in range(decoder.num_heads) if not same[index] and index != head]
    assert not changed, f"head {head} of layer {layer} should be ablated, but head {changed[0]} was changed"


def assert_local(factory: Factory, case: Case, model: PreTrainedModel) -> None:
    """Compare the inputs of the projections with and without the ablation.

    Ablated heads are looked at in every layer, all other heads only up to the first layer with an ablated head: from
    there on, the ablation changes the residual stream, and so the z of every head in the layers above.
    """
    inputs = inputs_for(factory, case)
    layers = find_heads(model).layers
    real = inputs["attention_mask"].bool()
    frozen = frozen_values(case, model)
    with recorded_inputs(model) as calls:  # entered first: the implementation may wrap or replace the projections
        bare = run(model, inputs)
        clean = [layer.pop() for layer in calls.values()]
        with made(factory, model) as implementation:
            ablate(implementation, case)
            for now in calls.values():
                now.clear()  # of a reference
            logits = implementation.run(**inputs)
    moved = bool(different(logits[real], bare[real]).any())
    assert_replaced(case, layers, clean, list(calls.values()), frozen, logits_moved=moved)


def assert_replaced(
    case: Case,
    layers: Sequence[AttentionLayer],
    clean: Sequence[Tensor],
    calls: Sequence[Sequence[Tensor]],
    frozen: Mapping[tuple[int, int], Tensor],
    *,
    logits_moved: bool,
) -> None:
    """Assert that the projections received the z of an ablated run.

    clean: the input of the projection of each layer in the clean run, [rows, tokens, num_heads * head_dim]. calls: the
    inputs of all its calls in the ablated run. frozen: as `frozen_values` returns it. logits_moved: whether the ablated
    run gave other logits.
    """
    real, at = case.inputs()["attention_mask"].bool(), case.replaced()
    first = min(layer for layer, _ in case.heads)
    wrong: tuple[str, str] | None = None  # the first head with a wrong z, and what is wrong
    untouched = True  # no head of the case was edited
    for layer, was, now in zip(layers, clean, calls, strict=True):
        assert len(now) == 1, f"the projection of layer {layer.index} was called {len(now)} times, not once"
        assert now[0].dtype == was.dtype, f"the projection of layer {layer.index} got {now[0].dtype}, not {was.dtype}"
        old, new = (z.unflatten(-1, (layer.num_heads, layer.head_dim)) for z in (was, now[0]))
        targets = sorted(head for index, head in case.heads if index == layer.index)
        names = "no head" if not targets else f"head{'s' * (len(targets) > 1)} {' and '.join(map(str, targets))}"
        what = f"{names} of layer {layer.index} should be ablated"
        if layer.index <= first:
            changed = different(old, new).any(dim=-1).flatten(0, 1).any(dim=0)  # [heads]
            others = [head for head in range(layer.num_heads) if changed[head] and head not in targets]
            too = ", too" if any(changed[head] for head in targets) else ""
            assert not others, f"{what}, but head {others[0]} was changed{too}"
        untouched &= layer.index != first or not different(old, new).any()
        for head in targets:
            for row in range(len(real)):  # padding may hold anything
                here, kept = at[row], real[row] & ~at[row]
                held, own = new[row, here, head], old[row, :, head]  # [tokens, head_dim]
                values = frozen[layer.index, head][row, here] if frozen else None
                read = own[real[row]] if case.reads_row else own[here]
                problem = _imputation_problem(case, held, read if layer.index == first else None, values)
                untouched &= problem is not None
                if layer.index == first and different(new[row, kept, head], own[kept]).any():
                    problem = (
                        problem or f"is changed at other positions than {', '.join(map(str, case.positions or ()))}"
                    )
                if problem and wrong is None:
                    wrong = f"{what}; the z of head {head} in row {row}", problem
    if wrong is not None:
        place, problem = wrong
        if untouched and logits_moved:
            problem = "is unchanged at the projection, though the logits changed: the edit is downstream of it"
        raise AssertionError(f"{place} {problem}")


def _imputation_problem(case: Case, held: Tensor, own: Tensor | None, values: Tensor | None) -> str | None:
    """Return what is wrong with the imputed z of one head in one row, or None.

    held: the slices that the projection received at the tokens to be replaced, [tokens, head_dim]. own: the z that the
    imputation reads, if known: that of the row's real tokens, or of the tokens to be replaced. values: what should
    replace z, if that does not depend on the run, [tokens, head_dim].
    """
    if case.kind == "zero":
        left = int(held.count_nonzero())
        return f"holds {left} of {held.numel()} elements that are not 0" if left else None
    if case.kind not in IMPUTATIONS:
        return None
    if not held.isfinite().all():
        return "is not finite"
    if values is not None:
        allowed = 0.0 if case.kind == "values" else tolerance(values, held.dtype)
        return _difference(held, values, allowed, "the value that replaces it")
    if case.kind == "mean" and held.max() != held.min():
        return f"holds several values, from {held.min():.6g} to {held.max():.6g}"
    if case.kind == "channel-mean" and (held != held[0]).any():
        return "holds different values at different tokens"
    if own is None:
        return None
    own = own.double()
    rounding = 4 * torch.finfo(held.dtype).eps * own.abs().max().item()  # of the mean of few numbers
    match case.kind:
        case "mean":
            return _difference(held, own.mean().expand_as(held), rounding, "its mean")
        case "channel-mean":
            return _difference(held, own.mean(dim=0).expand_as(held), rounding, "the mean of that channel")
        case _:
            return _difference(held, own * float(case.factor), rounding, f"its own value times {case.factor}")


def _difference(held: Tensor, want: Tensor, allowed: float, what: str) -> str | None:
    """Return the first element that differs by more than is allowed, or None."""
    wrong = ~((held.double() - want).abs() <= allowed)
    if not wrong.any():
        return None
    token, channel = wrong.nonzero()[0].tolist()
    where = f"{held[token, channel]:.9g} in channel {channel} at the first wrong token"
    return f"holds {where}; {what} is {want[token, channel]:.9g}"


@check(
    "locality.input_untouched",
    "Two tensors are never modified in place, not even in a later forward pass: the z that the model computes, and the "
    "edited z that the projection receives.",
    cases=CaseSpec(dtypes=DTYPES),
    needs=("observable",),
)
def locality_input_untouched(factory: Factory, case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    kept: list[tuple[str, Tensor, Tensor]] = []

    def keep(place: str) -> Callable[..., None]:
        return lambda _, args, *output: kept.append((place, args[0], args[0].clone()))

    for layer in find_heads(model).layers:
        place = f"the input of the projection of layer {layer.index}, captured by a hook"
        layer.projection.register_forward_pre_hook(keep(f"{place} before the ablation"))
        layer.projection.register_forward_hook(keep(f"{place} after the projection"))
    with made(factory, model) as implementation:
        ablate(implementation, case)
        implementation.run(**inputs)
        implementation.run(**inputs | {"input_ids": other_ids(case)})
    for what, tensor, copy in kept:
        assert_identical(tensor, copy, what)
