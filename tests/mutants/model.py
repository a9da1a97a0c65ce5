"""Model: weights, modules, flags or configuration of the model are not as they were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from tests.mutants.correct_variants import InPlaceSurgery, WrappedForward, WrappedModule
from tests.mutants.mutant import Mutant


class AttributeLeft(Mutant):
    """Leaves attributes on the modules."""

    expected_check = "hygiene.restored"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        module.last_input = args[0]
        return super().hook(layer, module, args)


class CopyLeft(Mutant):
    """Restores equal copies of the parameters, which no optimiser knows."""

    expected_check = "hygiene.restored"

    def remove(self) -> None:
        super().remove()
        for projection in self.projections():
            projection.weight = nn.Parameter(projection.weight.detach().clone())


class WeightsLeft(Mutant):
    """Zeroes the weights that read the head, and never restores them."""

    expected_check = "hygiene.restored"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        for head in self.targets(layer) if self.imputation == "zero" else []:
            weight: Any = module.weight
            block = weight if self.config.model_type == "gpt2" else weight.T
            block[self.channels(head, args[0])] = 0
        return super().hook(layer, module, args)


class ModelCast(Mutant):
    """Casts the model to float32 to read its activations."""

    source = "TransformerLensOrg/TransformerLens#1345"
    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.float())


class Trains(Mutant):
    """Puts the model into training mode, where dropout is active."""

    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.train())


class Frozen(Mutant):
    """Freezes the parameters, and leaves them frozen."""

    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.requires_grad_(False))


class EagerLeft(Mutant):
    """Switches to another attention implementation, and does not switch back."""

    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.set_attn_implementation("eager")


class ConfigLeft(Mutant):
    """Disables the cache in the configuration, and leaves it disabled."""

    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.config.use_cache = False


class BufferLeft(Mutant):
    """Keeps its state in a buffer of the model."""

    expected_check = "hygiene.restored"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.model.register_buffer("ablated", torch.tensor(heads))


class GradientsLeft(Mutant):
    """Runs a backward pass for attributions, and leaves its gradients."""

    expected_check = "hygiene.restored"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        with torch.enable_grad():
            logits = super().forward(input_ids, **inputs)
            logits.sum().backward()
        return logits.detach()


class PatchedInTurn(Mutant, WrappedForward):
    """Restores `forward` as it found it, which is right only if implementations close in reverse order."""

    expected_check = "hygiene.lifecycle"

    def taken(self) -> bool:
        return False


class ClosedAgain(Mutant, WrappedForward):
    """Closes once more when it is collected, and so removes the patch of its successor."""

    expected_check = "hygiene.restored"

    def __del__(self) -> None:
        self.close()


class HalfBackup(Mutant, InPlaceSurgery):
    """Restores the weights from a copy in float16."""

    expected_check = "hygiene.restored"

    def kept(self, block: Tensor) -> Tensor:
        return block.half()


class FirstBackup(Mutant, InPlaceSurgery):
    """Restores the weights that the model had when it was first opened, whatever it has learnt since."""

    expected_check = "hygiene.restored"
    backups: ClassVar[WeakKeyDictionary[nn.Module, list[Tensor]]] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        weights = [projection.weight.detach().clone() for projection in self.projections()]
        self.backup = self.backups.setdefault(model, weights)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        finally:
            for projection, weight in zip(self.projections(), self.backup, strict=True):
                projection.weight.copy_(weight)


class OtherStorage(Mutant, InPlaceSurgery):
    """Restores equal weights in the same parameter, but in other memory than its views."""

    expected_check = "hygiene.restored"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        kept = [projection.weight.data.clone() for projection in self.projections()]
        try:
            return super().forward(input_ids, **inputs)
        finally:
            for projection, weight in zip(self.projections(), kept, strict=True):
                projection.weight.data = weight


class Kept(nn.Module):
    """A weight [in, out] or [out, in] with zeros where it is not to be kept."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


class Parametrized(Mutant, InPlaceSurgery):
    """Parametrizes W_O for a run, after which the weight follows the bias in the order of `parameters()`."""

    expected_check = "hygiene.restored"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        chosen = [self.projections()[layer] for layer in dict(self.heads)]
        kept = {projection: torch.ones_like(projection.weight) for projection in chosen}
        for layer, head in self.heads:
            mask = kept[self.projections()[layer]]
            by_input = mask if self.config.model_type == "gpt2" else mask.T
            by_input[self.channels(head, by_input.T)] = 0
        try:
            for projection, mask in kept.items():
                parametrize.register_parametrization(projection, "weight", Kept(mask))
            return Mutant.forward(self, input_ids, **inputs)
        finally:
            for projection in kept:
                if parametrize.is_parametrized(projection):
                    parametrize.remove_parametrizations(projection, "weight", leave_parametrized=False)


class Reordered(Mutant, WrappedModule):
    """Replaces each projection in its module, after which the restored projection is the last submodule."""

    expected_check = "hygiene.restored"

    def install(self) -> None:
        super().install()
        for place, name, _ in self.places:
            wrapper = getattr(place, name)
            delattr(place, name)
            setattr(place, name, wrapper)


class GenerationConfigLeft(Mutant):
    """Disables the cache of generation, and leaves it disabled."""

    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.generation_config.use_cache = False


class DropoutOff(Mutant):
    """Removes every dropout from the model, also for the training that follows."""

    expected_check = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class FlagsOfDefault(Mutant):
    """Freezes the weights while it is on the model, and then unfreezes all of them."""

    expected_check = "hygiene.restored"

    def install(self) -> None:
        self.model.requires_grad_(False)
        super().install()

    def close(self) -> None:
        super().close()
        self.model.requires_grad_(True)


class CacheOfDefault(Mutant):
    """Disables the cache in the configuration, and then enables it, whatever it was before."""

    expected_check = "hygiene.restored"

    def install(self) -> None:
        self.config.use_cache = False
        super().install()

    def close(self) -> None:
        super().close()
        self.config.use_cache = True


class GradientsZeroed(Mutant):
    """Sets existing gradients to None."""

    expected_check = "hygiene.restored"

    def install(self) -> None:
        self.model.zero_grad()
        super().install()
