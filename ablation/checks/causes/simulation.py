"""Simulated ablations: what the inputs of the projections and the logits would be if z were edited in some wrong way.

A failing implementation that gives the results of one simulated mistake, and of no other, most likely makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.assertions import different, is_measured, tolerance
from ablation.checks.cases import Case, token_positions
from ablation.checks.check import unsupported_features
from ablation.checks.driving import ablate, made, run
from ablation.checks.imputed import Pair, frozen_values, recorded_z
from ablation.checks.observe import recorded_inputs
from ablation.checks.protocol import FROM_REFERENCE, KEYWORDS, Factory
from ablation.heads import AttentionLayer, HeadMap, find_heads


@dataclass(frozen=True)
class Outcome:
    """The results of one run. z: the input of each projection, {layer: [real tokens, channels]}; empty if unknown.

    logits: [real tokens, vocabulary]. calls: how often each projection was called.
    """

    logits: Tensor
    z: dict[int, Tensor]
    calls: dict[int, int]

    def fits(self, other: Outcome) -> bool:
        """Return whether this outcome is the other one up to rounding, as far as both are known."""
        return _close(self.logits, other.logits, tolerance(other.logits, self.logits.dtype)) and all(
            same_z(z, other.z[layer]) for layer, z in self.z.items() if layer in other.z
        )


def same_logits(got: Tensor, want: Tensor) -> bool:
    """Return whether logits are equal up to rounding."""
    return _close(got.detach(), want.detach(), tolerance(want, got.dtype))


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Return whether logits are identical, as `assert_identical` asks for it: NaN equals NaN."""
    return got.shape == want.shape and not bool(different(got, want).any())


def same_z(got: Tensor, want: Tensor) -> bool:
    """Return whether inputs of a projection are equal up to the rounding of a mean; 0 has to be 0.

    In a real model, rounding in lower layers matters more; its tolerance is measured.
    """
    allowed = tolerance(want, got.dtype) / (1 if is_measured() else 32)
    return _close(got, want, allowed) and not (got != 0)[want == 0].any()


def _close(got: Tensor, want: Tensor, allowed: float) -> bool:
    if got.shape != want.shape:
        return False
    same = (got == want) | (got.isnan() & want.isnan())
    return bool((same | ((got.double() - want.double()).abs() <= allowed)).all())


def _outcome(logits: Tensor, calls: dict[int, list[Tensor]], real: Tensor) -> Outcome:
    z = {layer: z[0][real] for layer, z in calls.items() if len(z) == 1 and z[0].shape[:2] == real.shape}
    return Outcome(logits.detach()[real], z, {layer: len(z) for layer, z in calls.items()})


class Attempt:
    """Context manager: ignore what an experiment raises, even SystemExit, but not the user's KeyboardInterrupt."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and not issubclass(kind, KeyboardInterrupt)


def real_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return which tokens are not padding, bool [rows, tokens]."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()


def observed(factory: Factory, case: Case, inputs: dict[str, Any] | None = None) -> Outcome:
    """Return the outcome of an implementation that ablates the heads of a case. inputs: by default those of the case.

    The inputs of the projections are unknown if the implementation declares that they cannot be observed.
    """
    model, inputs = case.model(), inputs or case.inputs()
    with recorded_inputs(model) as calls, made(factory, model) as implementation:
        ablate(implementation, case)
        for z in calls.values():
            z.clear()  # of a reference
        logits = implementation.run(**inputs)
    seen = not {"observable", "single_forward"} & set(unsupported_features(factory))
    return _outcome(logits, calls if seen else {}, real_tokens(inputs))


@dataclass
class Setting:
    """A case in a simulation: a bare model, and the inputs of the run."""

    case: Case
    model: PreTrainedModel
    inputs: dict[str, Any]

    @cached_property
    def found(self) -> HeadMap:
        """The heads of the model."""
        return find_heads(self.model)

    @cached_property
    def real(self) -> Tensor:
        """Which tokens are real, [rows, tokens]."""
        return real_tokens(self.inputs)

    @cached_property
    def position(self) -> Tensor:
        """The position of each token, [rows, tokens]."""
        return token_positions(self.real)

    def __post_init__(self) -> None:
        # Before any simulation, since they record runs of the model, too.
        if self.case.kind in KEYWORDS:
            _ = self.frozen
        if self.case.kind in FROM_REFERENCE:
            _ = self.reference

    @cached_property
    def at(self) -> Tensor:
        """Which tokens the ablation replaces, [rows, tokens]: at no positions in particular, also padding."""
        return self.at_positions(self.case.positions)

    def at_positions(self, positions: tuple[int, ...] | None) -> Tensor:
        """Return which tokens are at some positions, [rows, tokens]."""
        if positions is None:
            return torch.ones_like(self.real)
        length = self.real.sum(dim=1, keepdim=True)
        wanted = [self.position == (at if at >= 0 else length + at) for at in positions]
        return self.real & torch.stack([*wanted, torch.zeros_like(self.real)]).any(dim=0)

    @cached_property
    def frozen(self) -> dict[Pair, Tensor]:
        """What replaces z in each head of the case if this does not depend on the run, [rows, tokens, head_dim]."""
        return frozen_values(self.case, self.model)

    @cached_property
    def reference(self) -> list[tuple[dict[int, Tensor], Tensor]]:
        """The z of the reference, batch by batch, {layer: [rows, tokens, heads, head_dim]}, and its mask."""
        return [(recorded_z(self.model, batch), batch["attention_mask"].bool()) for batch in self.case.reference()]


@dataclass
class Site:
    """One call of a projection, or of another edited module, in a simulation.

    x: the tensor that is edited, [rows, tokens, channels]. named: the heads of the case in this layer, in their order.
    """

    setting: Setting
    layer: AttentionLayer
    x: Tensor
    named: list[int]

    def own(self, head: int) -> Tensor:
        """Return the z of one head, [rows, tokens, head_dim]."""
        return self.x[..., self.layer.channels(head)]


def row_means(z: Tensor, real: Tensor) -> Tensor:
    """Return the mean of z over the real tokens and all channels of each row, [rows, 1, 1]."""
    per_token = z.double().mean(dim=-1).where(real, 0)
    return (per_token.sum(dim=-1) / real.sum(dim=-1))[:, None, None]


def channel_means(z: Tensor, real: Tensor) -> Tensor:
    """Return the mean of each channel over the real tokens of each row, [rows, 1, head_dim]."""
    return (z.double().where(real[..., None], 0).sum(dim=1) / real.sum(dim=-1, keepdim=True))[:, None]


def right_value(site: Site, own: Tensor, pair: Pair) -> Any:
    """Return the right replacement of z, to which it broadcasts."""
    match site.setting.case.kind:
        case "zero":
            return 0.0
        case "mean":
            return row_means(own, site.setting.real)
        case "channel-mean":
            return channel_means(own, site.setting.real)
        case "scale":
            return own * float(site.setting.case.factor)
    return site.setting.frozen[pair]


Places = Callable[[Setting], list[tuple[AttentionLayer, nn.Module, bool]]]


def right_places(setting: Setting) -> list[tuple[AttentionLayer, nn.Module, bool]]:
    """Return the modules that are edited for each layer, and whether at their output."""
    return [(layer, layer.projection, False) for layer in setting.found.layers]


@dataclass(frozen=True)
class Mistake:
    """A wrong ablation: one step of the right one is exchanged.

    cause: the sentence that a failure prints. pairs: (setting) -> the heads that are ablated, [(named, edited)].
    channels: (site, head) -> the channels of a head. tokens: (site, number of the head in the layer) -> which tokens
    are replaced. value: (site, z, pair) -> what replaces z. rest: (site, edited) -> the tensor after all edits. output:
    (site, output of the projection) -> its output in layers with an ablated head. places: which modules are edited.
    needs: whether the mistake matters in a case.
    """

    cause: str
    pairs: Callable[[Setting], list[tuple[Pair, Pair]]] = lambda setting: [(p, p) for p in setting.case.heads]
    channels: Callable[[Site, int], Any] = lambda site, head: site.layer.channels(head)
    tokens: Callable[[Site, int], Tensor] = lambda site, number: site.setting.at
    value: Callable[[Site, Tensor, Pair], Any] = right_value
    rest: Callable[[Site, Tensor], Tensor] = lambda site, edited: edited
    output: Callable[[Site, Tensor], Tensor] | None = None
    places: Places = right_places
    needs: Callable[[Case], bool] = lambda case: True


RIGHT = Mistake("")
NOTHING = Mistake("", pairs=lambda setting: [])


class Differs(Exception):
    """A simulation is over, since it does not give what was observed."""


def simulated(setting: Setting, mistake: Mistake, got: Outcome | None = None) -> Outcome:
    """Return the outcome of a run with a mistake, or of the right ablation (RIGHT) or of none (NOTHING).

    got: an outcome that this one should fit; Differs is raised at the first projection whose input does not.
    """
    with while_ablated(setting, mistake), ExitStack() as undo:
        for layer in setting.found.layers:
            if got is not None and layer.index in got.z:
                compare = partial(_compared, got.z[layer.index], setting.real)
                undo.enter_context(hooked(layer.projection, compare, is_output=False))
        calls = undo.enter_context(recorded_inputs(setting.model))
        logits = run(setting.model, setting.inputs)
    return _outcome(logits, calls, setting.real)


@contextmanager
def while_ablated(setting: Setting, mistake: Mistake) -> Iterator[None]:
    """Context manager: runs of the model are ablated, with a mistake."""
    pairs = mistake.pairs(setting)
    with ExitStack() as undo:
        for layer, module, is_output in mistake.places(setting):
            here = [(named, edited) for named, edited in pairs if edited[0] == layer.index]
            if not here:
                continue
            edit = partial(_edited, setting, mistake, layer, here)
            undo.enter_context(hooked(module, edit, is_output=is_output))
            if mistake.output is not None:
                site = Site(setting, layer, torch.empty(0, device=setting.real.device), [head for _, (_, head) in here])
                undo.enter_context(hooked(layer.projection, partial(mistake.output, site), is_output=True))
        yield


def _compared(got: Tensor, real: Tensor, z: Tensor) -> Tensor:
    if z.shape[:2] == real.shape and not same_z(got, z[real]):
        raise Differs
    return z


def _edited(setting: Setting, mistake: Mistake, layer: AttentionLayer, here: list[Any], x: Tensor) -> Tensor:
    site, out = Site(setting, layer, x, [edited[1] for _, edited in here]), x.clone()
    for number, (named, (_, head)) in enumerate(here):
        channels, at = mistake.channels(site, head), mistake.tokens(site, number)
        own = x[..., channels]
        value = torch.as_tensor(mistake.value(site, own, named), device=x.device).to(x.dtype).expand_as(own)
        out[..., channels] = torch.where(at[..., None], value, out[..., channels])
    return mistake.rest(site, out)


@contextmanager
def hooked(module: nn.Module, edit: Callable[[Tensor], Tensor], *, is_output: bool) -> Iterator[None]:
    """Context manager: edit the first input or the output of a module."""
    if is_output:
        handle = module.register_forward_hook(lambda _, args, out: edit(out))
    else:
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: ((edit(args[0]), *args[1:]), kwargs), with_kwargs=True
        )
    try:
        yield
    finally:
        handle.remove()
