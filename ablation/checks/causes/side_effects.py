"""What an implementation leaves in a model, does to the hooks of the user, or changes in the process."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ablation.checks.causes.histories import Experiment, History
from ablation.checks.causes.simulation import Attempt, same_logits
from ablation.checks.driving import ablate, discard, made, run
from ablation.checks.hygiene import register_everywhere, rounds, without_experts
from ablation.checks.observe import changes, hooks, state


def residue(history: History) -> str | None:
    """Make, use and close implementations on a model, as hygiene.restored does, and say what has changed."""
    model = history.case.model()
    for ablations, runs in rounds(model):
        before = state(model)
        kept = {name: _kept(weight) for name, weight in model.named_parameters()}
        implementation = history.factory(model)
        for _ in range(ablations):
            discard(ablate, implementation, history.case)
        for _ in range(runs):
            implementation.run(**history.inputs)
        in_training = model.training
        discard(implementation.close)
        if in_training:
            return "the model is put into training mode, where dropout is active"
        if changed := changes(model, before):
            return _of_hooks(before, state(model), changed, ablations, runs) or _of_state(model, before, changed, kept)
    return None


def _kept(weight: torch.Tensor) -> tuple[Any, ...]:
    return id(weight), weight.data_ptr(), weight.dtype, weight.requires_grad, weight.detach().clone()


def _of_hooks(
    before: dict[str, Any], after: dict[str, Any], changed: list[str], ablations: int, runs: int
) -> str | None:
    places = [place for place in changed if "_hooks" in place]
    if not places:
        return None
    if any(len(after.get(place, ())) < len(before.get(place, ())) for place in places):
        return "hooks that the implementation did not register are removed"
    place, _, kind = places[0].rpartition(".")
    what = f"hooks of {place} ({kind})"
    if ablations > 1:
        return f"{what} remain after `close` if `ablate` was called twice: the handles of the first call are lost"
    if not runs:
        return f"{what} remain after `close` if no run came before it: hooks are removed only after a run"
    return f"{what} remain after `close`: not all handles are kept, or not all hooks are removed by them"


def _of_state(model: nn.Module, before: dict[str, Any], changed: list[str], kept: dict[str, Any]) -> str | None:
    after, tensors = state(model), dict(model.named_parameters())
    for name in (name for name in changed if name in tensors and name in kept):
        was, weight = kept[name], tensors[name]
        if weight.dtype != was[2]:
            return f"the weights of the model are cast to {weight.dtype}, and back at most"
        if id(weight) != was[0]:
            return f"the parameter {name} is replaced by another object, which no optimiser knows"
        if not torch.equal(weight, was[4]):
            return _of_weight(name, weight, was[4])
        if weight.requires_grad != was[3]:
            return "`requires_grad` of the weights is not as it was found: keep the flag of each weight"
        if weight.grad is None:
            return "the gradients of the weights are set to None, although they belong to the user"
        if (weight.grad != 1).any():
            return "a backward pass leaves gradients in the weights"
        if weight.data_ptr() != was[1]:
            return f"the parameter {name} is restored in other memory, so views of it are cut off: copy into it"
    names = (
        sorted(before["the order of modules and weights"][1]),
        sorted(after["the order of modules and weights"][1]),
    )
    if names[0] != names[1]:
        return "a buffer or parameter is added to the model, or removed from it"
    for place, text in PLACES:
        if any(re.search(place, name) for name in changed):
            return text
    return None


def _of_weight(name: str, weight: torch.Tensor, was: torch.Tensor) -> str:
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(weight, was.to(dtype).to(weight.dtype)) or torch.equal(
            weight, was.where(weight == was, was.to(dtype).to(weight.dtype))
        ):
            return f"the weight {name} is restored from a copy in {dtype}"
    if not (weight[weight != was]).any():
        return f"the weight {name} is set to 0, and not restored"
    return f"the weight {name} is restored from a copy that is out of date"


PLACES = (
    (r"^generation_config$", "the generation configuration is changed, and not restored"),
    (r"^config\._attn_implementation$", "the attention implementation is switched, and not switched back"),
    (r"^config$", "the configuration is changed, and not restored to the value that was found"),
    (r"\.training$", "the model is left in training mode"),
    (r"\.p$", "the rate of a dropout is changed, and not restored"),
    (r": its attributes$", "an attribute is left on modules of the model"),
    (r"\.forward$", "a `forward` that was replaced is not restored"),
    (r": the module itself$", "a module of the model is replaced, and not restored"),
    (
        r"^the order of modules and weights$",
        "a module or weight is restored at another place in the order of its module, which `parameters()` shows",
    ),
)


def users_hooks(history: History) -> str | None:
    """Register hooks of a user on every module, and see what becomes of them."""
    model, fired = history.case.model(), list[str]()
    handles = register_everywhere(model, fired)
    before = hooks(model)
    run(model, history.inputs)
    expected = without_experts(fired)
    with made(history.factory, model) as implementation:
        ablate(implementation, history.case)
        fired.clear()
        implementation.run(**history.inputs)
        missing = [place.partition(" ")[2] for place in expected if place not in fired]
        during = hooks(model)
    if lost := _lost(before, during):
        return f"hooks of the user are removed from {lost[0].rpartition('.')[0]} before or in a run"
    if missing:
        return f"`forward` of {missing[0]} is called directly, which skips the user's hooks: call the module instead"
    after = hooks(model)
    if lost := _lost(before, after):
        where = lost[0].rpartition(".")[0]
        return (
            f"the user's hooks on {where} are removed with those of the implementation: remove hooks by their handles"
        )
    if any(table != after[place] for place, table in before.items() if len(table) == len(after[place])):
        return "the user's hooks are put into another order"
    for handle in handles:
        handle.remove()
    fired.clear()
    run(model, history.inputs)
    if fired:
        return "the tables of hooks are replaced by copies, from which the user's handles remove nothing"
    return None


def _lost(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the tables in which a hook is missing, whatever its key and its place."""
    return [
        place
        for place, table in before.items()
        if not {hook for _, hook in table} <= {hook for _, hook in after.get(place, ())}
    ]


def rejected(history: History) -> str | None:
    """Reject a head that does not exist, and run again."""
    missing = (0, history.case.decoder.num_heads)
    every, beside = history.every, [history.case.another_head()]
    want, bare = history.fresh(every), history.bare()
    for name in ("zero", "mean"):
        with history.made() as implementation:
            history.ablated(implementation, every)
            with Attempt():
                implementation.ablate([*beside, missing], name)
            got = implementation.run(**history.inputs).detach()
        if same_logits(got, want):
            continue
        if same_logits(got, history.fresh(beside)):
            return "a call of `ablate` that is rejected has replaced the heads before it: validate all heads first"
        if same_logits(got, bare):
            return "a call of `ablate` that is rejected has removed the heads before it: validate all heads first"
        if name != history.case.imputation:
            return "a call of `ablate` that is rejected has set its imputation: validate the heads first"
    return None


EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "hygiene.restored": (residue,),
    "hygiene.user_hooks": (users_hooks,),
    "refusal.no_side_effect": (rejected,),
}
"""Check -> the experiments that may show why it fails."""
