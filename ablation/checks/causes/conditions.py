"""Why nothing is ablated: in which models it is, and whether the hooks of the implementation are called at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ablation.checks.cases import Case
from ablation.checks.causes.simulation import NOTHING, RIGHT, Attempt, Setting, observed, same_logits, simulated
from ablation.checks.decoders import Decoder
from ablation.checks.driving import ablate, made
from ablation.checks.observe import hooks
from ablation.checks.protocol import Factory
from ablation.heads import find_heads

FAMILY_FACTS = {
    "gpt2": ("llama", "in gpt2, whose projections are of the class Conv1D, not nn.Linear"),
    "qwen3": ("llama", "in qwen3, where head_dim is not hidden_size / heads"),
    "mixtral": ("llama", "in mixtral, a mixture of experts"),
    "gemma3": ("qwen3", "in gemma3, whose layers have a sliding window"),
    "gemma3_vision": ("gemma3", "in a vision-language model: the hooks have to be in its text decoder"),
    "lfm2": ("qwen3", "in lfm2, where some layers have no heads"),
}
"""Family -> a similar one, and what to say if only the similar one is ablated."""


def no_effect(factory: Factory, case: Case) -> str | None:
    """Return in which models nothing is ablated, or what happens to the hooks; None if something is ablated."""
    if not _ablates_nothing(factory, case):
        return None
    if _acts_in_second_run(factory, case):
        return "nothing is ablated in the first run: the heads take effect only from the second run on"
    for where, other in _exchanged(case):
        with Attempt():
            if _is_right(factory, other):
                return f"nothing is ablated {where}"
    cause = _lost(factory, case)
    if cause == NO_HOOK and _ablates_another(factory, case):
        layer, head = case.heads[0]
        return f"nothing is ablated for head {head} of layer {layer}, but other heads are: the code leaves it out"
    return cause


NO_HOOK = "no hook is registered on any module of this model: the code does not find its modules"

NOT_CALLED = "the hooks are on modules that the forward pass does not call, such as {}"


def _ablates_another(factory: Factory, case: Case) -> bool:
    """Return whether one of a few other heads is ablated as it should be."""
    every = case.decoder.heads()
    others = [pair for pair in every if pair not in case.heads][:: max(1, len(every) // 4)]
    return any(_is_right(factory, replace(case, heads=(pair,))) for pair in others)


def _ablates_nothing(factory: Factory, case: Case) -> bool:
    got, setting = observed(factory, case), Setting(case, case.model(), case.inputs())
    return got.fits(simulated(setting, NOTHING)) and not got.fits(simulated(setting, RIGHT))


def _is_right(factory: Factory, case: Case) -> bool:
    got, setting = observed(factory, case), Setting(case, case.model(), case.inputs())
    return got.fits(simulated(setting, RIGHT)) and not got.fits(simulated(setting, NOTHING))


def _acts_in_second_run(factory: Factory, case: Case) -> bool:
    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        first, second = (implementation.run(**case.inputs()).detach().clone() for _ in range(2))
    real = case.inputs()["attention_mask"].bool()
    return not same_logits(second[real], first[real])


def _exchanged(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield the case with one property exchanged, and the name of the property that it had."""
    decoder = case.decoder
    if isinstance(decoder, Decoder):
        other = "eager" if decoder.attention == "sdpa" else "sdpa"
        yield (
            f"under the attention implementation {decoder.attention!r}, but it is under {other!r}",
            replace(case, decoder=decoder._replace(attention=other)),
        )
        if decoder.num_key_value_groups > 1:
            without = replace(case, decoder=decoder._replace(num_key_value_groups=1))
            yield "if query heads share key/value heads", without
        if decoder.family in FAMILY_FACTS:
            family, where = FAMILY_FACTS[decoder.family]
            yield where, replace(case, decoder=decoder._replace(family=family))
    if len(case.rows) > 1:
        yield "in a batch of several rows", replace(case, rows=case.rows[:1])


def _lost(factory: Factory, case: Case) -> str | None:
    """Return what happens to the hooks of an implementation that ablates nothing."""
    model = case.model()
    found = find_heads(model)
    seen: dict[str, Any] = {}
    called: set[str] = set()

    def look(*_: Any) -> None:
        seen.update(hooks(model))

    # In the run, since an implementation may register its hooks only there.
    watch = found.decoder.register_forward_pre_hook(look)
    before = hooks(model)
    with made(factory, model) as implementation:
        ablate(implementation, case)
        seen.update(hooks(model))
        implementation.run(**case.inputs())
        mine = sorted(
            {place.rpartition(".")[0] for place, table in seen.items() if len(table) > len(before.get(place, ()))}
        )
        names = {name or "the model": module for name, module in model.named_modules()}
        counters = [names[name].register_forward_pre_hook(_noting(called, name)) for name in mine if name in names]
        implementation.run(**case.inputs())
        for counter in (*counters, watch):
            counter.remove()
    if not mine:
        return NO_HOOK
    if not called:
        return NOT_CALLED.format(mine[0])
    layer = case.heads[0][0]
    here = [name for name in mine if f".{layer}." in f".{name}."]
    if not here and any(re.search(r"\.\d+(\.|$)", name) for name in mine):
        return f"no hook is registered in layer {layer}, only in others, such as on {mine[0]}"
    acting = [name for name in here or mine if name in called]
    if not acting:
        return NOT_CALLED.format(here[0])
    return (
        f"the hook on {acting[0]} is called, but changes nothing that is read afterwards: it edits a copy that is not "
        "returned, its slice is empty, or it skips this head"
    )


def _noting(called: set[str], name: str) -> Callable[..., None]:
    return lambda *_: called.add(name)
