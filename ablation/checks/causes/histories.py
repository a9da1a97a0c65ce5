"""What an implementation keeps from one call to the next: short sequences of calls, each with one known outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ablation.checks.cases import Case
from ablation.checks.causes.simulation import Mistake, Setting, hooked, row_means, same_bits, same_logits, simulated
from ablation.checks.check import offered_imputations
from ablation.checks.driving import ablate, discard, made, other_ids, other_keywords, run
from ablation.checks.imputed import Pair, frozen_values, recorded_z
from ablation.checks.independence import interrupt
from ablation.checks.protocol import Factory
from ablation.heads import find_heads


class History:
    """A case as a sequence of calls: the first head, another one, the prompt and another one."""

    def __init__(self, factory: Factory, case: Case) -> None:
        self.factory, self.case, self.steps = factory, replace(case, steps=()), case.steps
        self.every = sorted(case.heads, reverse=True)
        self.first = self.every[:1]
        self.inputs = case.inputs()
        self.other_inputs: dict[str, Any] = {"input_ids": other_ids(case), "use_cache": False}

    @property
    def another(self) -> list[Pair]:
        """Another head than the first."""
        return [replace(self.case, heads=tuple(self.every)).another_head()]

    def bare(self, inputs: dict[str, Any] | None = None) -> Tensor:
        """Return the logits of the bare model."""
        return run(self.case.model(), inputs or self.inputs)

    def fresh(self, heads: list[Pair], inputs: dict[str, Any] | None = None, **changes: Any) -> Tensor:
        """Return the logits of a new implementation that has not run before. changes: to the keywords of `ablate`."""
        with self.made() as implementation:
            ablate(implementation, self.case, heads, **changes)
            logits: Tensor = implementation.run(**inputs or self.inputs).detach().clone()
            return logits

    @contextmanager
    def made(self) -> Iterator[Any]:
        """Context manager: an implementation on a model."""
        with made(self.factory, self.case.model()) as implementation:
            yield implementation

    def ablated(self, implementation: Any, heads: list[Pair], inputs: dict[str, Any] | None = None) -> Tensor:
        """Ablate heads, and return the logits."""
        ablate(implementation, self.case, heads)
        logits: Tensor = implementation.run(**inputs or self.inputs).detach().clone()
        return logits


Experiment = Callable[[History], str | None]
EACH_ADDS = "heads of earlier calls of `ablate` stay ablated: each call adds to them"


def repeated(history: History) -> str | None:
    """Run three times."""
    bare = history.bare()
    with history.made() as implementation:
        one = history.ablated(implementation, history.first)
        two, three = (implementation.run(**history.inputs).detach().clone() for _ in range(2))
    if same_logits(one, bare):
        return None
    if same_logits(two, bare):
        if same_logits(three, one):
            return "every second run ablates nothing"
        return "only the first run ablates: the hooks are gone after it"
    if not same_bits(one, two) and not same_bits(two, three) and same_logits(one, two):
        return "equal runs give slightly different logits: the imputed value is random, or depends on earlier runs"
    return None


def replaced(history: History) -> str | None:
    """Ablate a head, run, and ablate another one."""
    want, old = history.fresh(history.another), history.fresh(history.first)
    with history.made() as implementation:
        history.ablated(implementation, history.first)
        got = history.ablated(implementation, history.another)
    if same_logits(got, want):
        return None
    if same_logits(got, old):
        return "a second call of `ablate` is ignored: the heads of the first one stay in force"
    return EACH_ADDS if same_logits(got, history.fresh([*history.first, *history.another])) else None


def replaced_imputation(history: History) -> str | None:
    """Ablate a head by one imputation, and then by another one."""
    names = [n for n in ("zero", "mean") if n in offered_imputations(history.factory) and n != history.case.imputation]
    other = History(history.factory, replace(history.case, imputation=names[0], by_position=False))
    want, old = other.fresh(history.first), history.fresh(history.first)
    with history.made() as implementation:
        ablate(implementation, history.case, history.first)
        discard(ablate, implementation, other.case, history.first)
        got = implementation.run(**history.inputs)
    if not same_logits(got, want) and same_logits(got, old):
        return "the imputation of a second call of `ablate` is ignored: the first one stays in force"
    return None


def cleared(history: History) -> str | None:
    """Ablate heads, run, clear, and ablate again."""
    bare, old = history.bare(), history.fresh(history.every)
    with history.made() as implementation:
        history.ablated(implementation, history.every)
        implementation.clear()
        got = implementation.run(**history.inputs).detach().clone()
        again = history.ablated(implementation, history.every)
    if same_logits(got, old):
        return "`clear` has no effect: the heads stay ablated"
    if not same_logits(got, bare):
        for layer in dict(history.every):
            for kept in ([p for p in history.every if p[0] == layer], [p for p in history.every if p[0] != layer]):
                if kept and same_logits(got, history.fresh(kept)):
                    return "`clear` removes the heads of some layers only"
        return None
    if same_logits(again, bare):
        return (
            "after `clear`, a call of `ablate` has no effect: the hooks that `clear` removes are not registered again"
        )
    return None


def emptied(history: History) -> str | None:
    """Ablate heads, run, and ablate no head."""
    bare, old = history.bare(), history.fresh(history.every)
    every = history.fresh(history.case.decoder.heads())
    with history.made() as implementation:
        history.ablated(implementation, history.every)
        got = history.ablated(implementation, [])
    if same_logits(got, bare):
        return None
    if same_logits(got, every):
        return "an empty list of heads is treated as all heads"
    if same_logits(got, old):
        return "an empty list of heads is ignored, for example by `if heads:`, so the previous heads stay ablated"
    return None


def interrupted(history: History) -> str | None:
    """Run after forward passes that an exception has interrupted."""
    model = history.case.model()
    layer, bare = find_heads(model).layer(history.first[0][0]), run(model, history.other_inputs)
    with made(history.factory, model) as implementation:
        ablate(implementation, history.case, history.every)
        want = implementation.run(**history.other_inputs).detach().clone()
        again = implementation.run(**history.other_inputs).detach().clone()
        for register in (layer.block.register_forward_pre_hook, layer.projection.register_forward_hook):
            for _ in range(2):
                interrupt(implementation, register, history.inputs)
                got = implementation.run(**history.other_inputs).detach().clone()
                if not same_bits(want, again) or same_bits(got, want):
                    continue
                if same_logits(got, bare):
                    return "after an exception in a forward pass, nothing is ablated any more"
                return (
                    "a forward pass that is interrupted by an exception leaves something for the next one, such as a "
                    "counter of layers or a queue that is not reset"
                )
    return None


def callers_list(history: History) -> str | None:
    """Change the list of heads that was passed in."""
    bare, heads = history.bare(), list(history.every)
    with history.made() as implementation:
        ablate(implementation, history.case, heads)
        heads.clear()
        got = implementation.run(**history.inputs)
    return (
        "the caller's list of heads is kept, not copied, so later changes of it matter"
        if same_logits(got, bare)
        else None
    )


def kept_logits(history: History) -> str | None:
    """Keep the logits of a run during the next one."""
    with history.made() as implementation:
        ablate(implementation, history.case, history.first)
        kept = implementation.run(**history.inputs)
        was = kept.detach().clone()
        implementation.run(**history.other_inputs)
    return None if same_bits(kept, was) else "the logits are returned in a tensor that the next run overwrites"


def remembered(history: History) -> str | None:
    """Run a prompt before and after heads are ablated, and then another prompt."""
    with history.made() as implementation:
        clean = implementation.run(**history.inputs).detach().clone()
        got = history.ablated(implementation, history.first)
        other = implementation.run(**history.other_inputs)
    acts = not same_logits(other, history.bare(history.other_inputs))
    if same_logits(got, clean) and acts:
        return "the logits of an earlier run on the same prompt are returned, whatever is ablated"
    return None


def _simulated_with(history: History, inputs: dict[str, Any], heads: list[Pair], value: Any) -> Tensor:
    """Return the logits of a run with other values, [tokens of all rows that are real, vocabulary]."""
    case = replace(history.case, heads=tuple(heads))
    return simulated(Setting(case, case.model(), inputs), Mistake("", value=value)).logits


def _means(history: History, inputs: dict[str, Any], heads: list[Pair]) -> dict[Pair, Tensor]:
    mask = inputs.get("attention_mask")
    given = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"]) if mask is None else mask}
    z = recorded_z(history.case.model(), given)
    return {(layer, head): row_means(z[layer][:, :, head], given["attention_mask"].bool()) for layer, head in heads}


def earlier_value(history: History) -> str | None:
    """Run a prompt, and then another one."""
    if history.case.kind != "mean":
        return None
    means = _means(history, history.inputs, history.first)
    with history.made() as implementation:
        history.ablated(implementation, history.first)
        got = implementation.run(**history.other_inputs).detach()
    want = _simulated_with(history, history.other_inputs, history.first, lambda site, own, pair: means[pair])
    if same_logits(got.flatten(0, 1), want):
        return "the imputed value is that of an earlier run: it is kept although the prompt is another one"
    return None


def earlier_heads(history: History) -> str | None:
    """Run with one head, and then with several."""
    if history.case.kind != "mean" or history.case.is_padded:
        return None
    means = _means(history, history.inputs, history.first)
    with history.made() as implementation:
        history.ablated(implementation, history.first)
        got = history.ablated(implementation, history.every)

    def by_head(site: Any, own: Tensor, pair: Pair) -> Tensor:
        return means.get(pair, row_means(own, site.setting.real))

    kept: dict[int, Tensor] = {}

    def by_layer(site: Any, own: Tensor, pair: Pair) -> Tensor:
        if pair[0] == history.first[0][0]:
            return means[history.first[0]]
        return kept.setdefault(pair[0], row_means(own, site.setting.real))

    if same_logits(got, history.fresh(history.every)):
        return None
    if same_logits(got.flatten(0, 1), _simulated_with(history, history.inputs, history.every, by_head)):
        return (
            "the imputed value of a head is kept for a prompt, but it depends on the heads that are ablated in lower "
            "layers"
        )
    if same_logits(got.flatten(0, 1), _simulated_with(history, history.inputs, history.every, by_layer)):
        return "the imputed value is kept for a prompt, and used for other heads, too"
    return None


def earlier_reference(history: History) -> str | None:
    """Give one reference, or other values, and then another one."""
    changed = other_keywords(history.case)
    if not changed:
        return None
    want, old = history.fresh(history.another), history.fresh(history.another, **changed)
    with history.made() as implementation:
        ablate(implementation, history.case, history.another, **changed)
        implementation.run(**history.inputs)
        got = history.ablated(implementation, history.another)
    if not same_logits(got, want) and same_logits(got, old):
        return "the reference, or the values, of an earlier call of `ablate` are used"
    return None


def reference_while_ablated(history: History) -> str | None:
    """Give a reference while another head is ablated, as reference.clean does."""
    layers = sorted(dict(history.case.decoder.heads()))
    head = history.case.heads[0][1]
    last, lower = (layers[-1], head), (layers[0], head)
    want = history.fresh([last])
    with history.made() as implementation:
        history.ablated(implementation, [lower])
        got = history.ablated(implementation, [last])
    if same_logits(got, want):
        return None
    if history.case.kind != "resample":  # which puts back the z of the reference, so that nothing changes in its runs
        values = _contaminated(history, lower, last)
        contaminated = _simulated_with(history, history.inputs, [last], lambda site, own, pair: values[pair])
        if same_logits(got[history.inputs["attention_mask"].bool()], contaminated):
            return "the reference is measured while the previous heads are still ablated"
    return EACH_ADDS if same_logits(got, history.fresh([lower, last])) else None


def _contaminated(history: History, lower: Pair, last: Pair) -> dict[Pair, Tensor]:
    """Return what replaces z in a head if its reference is measured while another one is ablated."""
    model = history.case.model()
    layer = find_heads(model).layer(lower[0])
    longest = max(batch["input_ids"].shape[1] for batch in history.case.reference())
    by_position = frozen_values(replace(history.case, heads=(lower,), rows=((0,) * longest,)), model)[lower][0]

    def edit(z: Tensor) -> Tensor:
        out = z.clone()
        out[..., layer.channels(lower[1])] = by_position[: z.shape[1]].to(z.dtype)
        return out

    with hooked(layer.projection, edit, is_output=False):
        return frozen_values(replace(history.case, heads=(last,)), model)


def earlier_mask(history: History) -> str | None:
    """Run with a mask, and then with another one, or with none."""
    mask, every = history.inputs["attention_mask"], history.every
    real = mask.bool()
    unmasked = {"input_ids": history.inputs["input_ids"], "use_cache": False}
    reversed_rows = replace(history.case, rows=history.case.rows[::-1]).inputs()
    want = history.fresh(every, history.other_inputs)
    with_old = history.fresh(every, {**history.other_inputs, "attention_mask": mask})
    with history.made() as implementation:
        history.ablated(implementation, every)
        got = implementation.run(**history.other_inputs).detach().clone()
    if not same_logits(got, want):
        return (
            "the attention mask of an earlier run is used in a run without a mask"
            if same_logits(got, with_old)
            else None
        )
    if history.case.kind != "mean":
        return None
    with history.made() as implementation:
        history.ablated(implementation, every)
        got = implementation.run(**reversed_rows).detach()[reversed_rows["attention_mask"].bool()]
    if same_logits(
        got, _simulated_with(history, reversed_rows, every, lambda site, own, pair: row_means(own, real))
    ) and not same_logits(got, history.fresh(every, reversed_rows)[reversed_rows["attention_mask"].bool()]):
        return "the attention mask of an earlier run of the same shape is used for the imputed value"
    with history.made() as implementation:
        history.ablated(implementation, every)
        got = implementation.run(**unmasked).detach().clone()
    if not same_logits(got, history.fresh(every, unmasked)):
        return "the imputed value of an earlier run on the same tokens is used, although the mask is another one"
    return None


def named_twice(history: History) -> str | None:
    """Name a head twice, and pass a tuple."""
    once, without = history.fresh(history.every), history.fresh(history.every[1:])
    with history.made() as implementation:
        got = history.ablated(implementation, [*history.every, history.every[0]])
    if not same_logits(got, once) and same_logits(got, without):
        return "a head that is named twice is not ablated: naming it switches it on and off"
    try:
        with history.made() as implementation:
            ablate(implementation, history.case, tuple(history.every))
            implementation.run(**history.inputs)
    except Exception as error:
        return f"heads are accepted only in a list: a tuple of the same heads raises {type(error).__name__}"
    return None


EARLIER = (
    repeated,
    replaced,
    replaced_imputation,
    cleared,
    callers_list,
    kept_logits,
    earlier_value,
    earlier_heads,
    earlier_reference,
    interrupted,
)
EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "smoke": (remembered,),
    "identity": (emptied, cleared),
    "identity.padded": (emptied, cleared),
    "independence.earlier_runs": EARLIER,
    "independence.earlier_masks": (earlier_mask, *EARLIER),
    "independence.head_order": (named_twice,),
    "reference.clean": (reference_while_ablated,),
}
"""Check -> the sequences that may show why it fails, in this order."""
