"""Life of the hook: what is left behind, taken away, or not there when it should be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from tests.mutants.mutant import Mutant
from tests.mutants.styles import InPlaceSurgery, WrappedForward, WrappedModule


class NeverFires(Mutant):
    """Registers on modules that no forward calls."""

    source = "TransformerLensOrg/TransformerLens#1688"
    killer = "smoke"

    def projections(self) -> list[nn.Module]:
        return [nn.Identity() for _ in self.blocks()]


class LeftAfterException(Mutant):
    """Removes its hooks after the forward, which a forward that raises never reaches."""

    source = "TransformerLensOrg/TransformerLens#156"
    killer = "hygiene.exception"

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        handles = [
            projection.register_forward_pre_hook(partial(self.hook, layer))
            for layer, projection in enumerate(self.projections())
        ]
        logits = super().forward(input_ids, **inputs)
        for handle in handles:
            handle.remove()
        return logits


class LeftAfterInterrupt(Mutant):
    """Removes its hooks on `Exception`, which a KeyboardInterrupt is not."""

    killer = "hygiene.exception"

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        handles = [
            projection.register_forward_pre_hook(partial(self.hook, layer))
            for layer, projection in enumerate(self.projections())
        ]
        try:
            logits = super().forward(input_ids, **inputs)
        except Exception:
            for handle in handles:
                handle.remove()
            raise
        for handle in handles:
            handle.remove()
        return logits


class BlanketRemoval(Mutant):
    """Removes all hooks of a projection, the user's as well."""

    source = "TransformerLensOrg/TransformerLens#1636"
    killer = "hygiene.user_hooks"

    def remove(self) -> None:
        for projection in self.projections():
            projection._forward_pre_hooks.clear()


class LostHandle(Mutant):
    """Keeps one handle for all its hooks, that of the last."""

    source = "TransformerLensOrg/TransformerLens#1426"
    killer = "hygiene.restored"

    def remove(self) -> None:
        for handle in self.handles[-1:]:
            handle.remove()


class NoHandle(Mutant):
    """Keeps no handle, and only stops editing."""

    source = "TransformerLensOrg/TransformerLens#1425"
    killer = "hygiene.restored"

    def remove(self) -> None:
        pass


class WrongKind(Mutant):
    """Removes its hooks of one kind, and leaves those of another."""

    source = "TransformerLensOrg/TransformerLens#1323"
    killer = "hygiene.restored"

    def install(self) -> None:
        super().install()
        for projection in self.projections():
            projection.register_full_backward_hook(lambda *_: None)


class PartialInstall(Mutant):
    """Installs head by head, and forgets what it has installed when a later head is refused."""

    source = "TransformerLensOrg/TransformerLens#1638"
    killer = "refusal.head"

    def install(self) -> None:
        pass

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([], imputation)
        self.remove()
        handles = []
        for layer, head in heads:
            self.check(layer, head)
            hook = partial(self.hook, layer)
            handles.append(self.projections()[layer].register_forward_pre_hook(hook))
        self.handles = handles
        super().ablate(heads, imputation)


class InstalledTwice(Mutant):
    """Installs its hooks again with every set, over the old ones, and knows only the new."""

    source = "TransformerLensOrg/TransformerLens#1098"
    killer = "hygiene.restored"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.handles = []
        self.install()


class AppliedTwice(Mutant):
    """Goes half of the way in each of two hooks, where one was left from before."""

    source = "TransformerLensOrg/TransformerLens#1098"

    def install(self) -> None:
        super().install()
        super().install()

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        return (z + super().edited(z, heads)) / 2


class PositionalOnly(Mutant):
    """Reads the first positional argument of a module that is called by keywords."""

    source = "huggingface/transformers#29247"
    crashes = IndexError

    def install(self) -> None:
        super().install()
        for block in self.blocks():
            attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
            self.handles.append(attention.register_forward_pre_hook(self.look))

    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = args[0].shape[1]


class DirectForward(Mutant):
    """Calls the projection's `forward`, past every hook that the user has on it."""

    source = "pytorch/pytorch#78109"
    killer = "hygiene.user_hooks"

    def install(self) -> None:
        super().install()
        for layer, projection in enumerate(self.projections()):
            projection._call_impl = partial(self.past, layer, projection)

    def past(self, layer: int, projection: nn.Module, z: Tensor) -> Any:
        (z,) = self.hook(layer, projection, (z,)) or (z,)
        return projection.forward(z)

    def remove(self) -> None:
        super().remove()
        for projection in self.projections():
            projection.__dict__.pop("_call_impl", None)


class MovesToTheFront(Mutant):
    """Moves the user's hooks behind its own, and leaves them in another order."""

    killer = "hygiene.user_hooks"

    def install(self) -> None:
        for layer, block in enumerate(self.blocks()):
            for projection in (self.projections()[layer], block):
                hooks = projection._forward_hooks
                for key in list(hooks)[:1]:
                    hooks[-1 - key] = hooks.pop(key)
        super().install()


class SwallowsErrors(Mutant):
    """Catches what a forward raises, and gives logits of zeros."""

    killer = "hygiene.exception"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        except Exception:
            return torch.zeros(*input_ids.shape, self.config.vocab_size)


class ForeignEditLost(Mutant):
    """Edits what it captured before all other hooks, and so undoes what they edit."""

    source = "TransformerLensOrg/TransformerLens#1722"
    killer = "locality.user_hooks"

    def install(self) -> None:
        for projection in self.projections():
            self.handles.append(projection.register_forward_pre_hook(self.capture, prepend=True))
        super().install()

    def capture(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.captured = args

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, self.captured)


class AttributeLeft(Mutant):
    """Keeps notes on the modules themselves."""

    killer = "hygiene.restored"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        module.last_input = args[0]
        return super().hook(layer, module, args)


class CopyLeft(Mutant):
    """Puts an equal copy of each parameter back, which no optimiser knows."""

    killer = "hygiene.restored"

    def remove(self) -> None:
        super().remove()
        for projection in self.projections():
            projection.weight = nn.Parameter(projection.weight.detach().clone())


class WeightsLeft(Mutant):
    """Zeroes the weights that read the head, and never puts them back."""

    killer = "hygiene.restored"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        for head in self.targets(layer) if self.imputation == "zero" else []:
            weight: Any = module.weight
            block = weight if self.config.model_type == "gpt2" else weight.T
            block[self.channels(head, args[0])] = 0
        return super().hook(layer, module, args)


class ModelCast(Mutant):
    """Casts the model to float32 to read its activations."""

    source = "TransformerLensOrg/TransformerLens#1345"
    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.float())


class Trains(Mutant):
    """Puts the model into training mode, where dropout is on."""

    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.train())


class Frozen(Mutant):
    """Freezes the parameters, and leaves them so."""

    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.requires_grad_(False))


class EagerLeft(Mutant):
    """Switches to another attention implementation, and not back."""

    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.set_attn_implementation("eager")


class ConfigLeft(Mutant):
    """Switches the cache off in the configuration, and leaves it so."""

    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.config.use_cache = False


class BufferLeft(Mutant):
    """Keeps its state in a buffer of the model."""

    killer = "hygiene.restored"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.model.register_buffer("ablated", torch.tensor(heads))


class GradientsLeft(Mutant):
    """Runs a backward pass for attributions, and leaves its gradients."""

    killer = "hygiene.restored"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        with torch.enable_grad():
            logits = super().forward(input_ids, **inputs)
            logits.sum().backward()
        return logits.detach()


class OneHandle(Mutant):
    """Registers hooks when heads are named, and keeps the handle of the last layer only."""

    killer = "hygiene.restored"

    def install(self) -> None:
        pass

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.remove()
        for layer in dict(heads):
            self.handles = [self.projections()[layer].register_forward_pre_hook(partial(self.hook, layer))]


class ClosedBeforeRun(Mutant):
    """Leaves it to the run to note its hooks for removal, and so keeps those of a set that was never run."""

    killer = "hygiene.restored"
    pending: tuple[Any, ...] = ()

    def install(self) -> None:
        pass

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.remove()
        for handle in self.pending:
            handle.remove()
        self.pending = tuple(
            self.projections()[layer].register_forward_pre_hook(partial(self.hook, layer)) for layer in dict(heads)
        )

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.handles, self.pending = [*self.handles, *self.pending], ()
        return super().forward(input_ids, **inputs)


class InstallNotAtomic(Mutant):
    """Notes its handles when all hooks are registered, and so has none to remove where one cannot be."""

    killer = "hygiene.exception"

    def install(self) -> None:
        self.handles = [
            projection.register_forward_pre_hook(partial(self.hook, layer))
            for layer, projection in enumerate(self.projections())
        ]


class LeftUntilNextRun(Mutant):
    """Removes its hooks after the forward, or, where that raised, before the next."""

    killer = "hygiene.exception"

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.remove()
        super().install()
        logits = super().forward(input_ids, **inputs)
        self.remove()
        return logits


class PatchedInTurn(Mutant, WrappedForward):
    """Puts `forward` back as it found it, which is right only where the last to come is the first to go."""

    killer = "hygiene.lifecycle"

    def taken(self) -> bool:
        return False


class ClosedAgain(Mutant, WrappedForward):
    """Closes once more when it is collected, and takes the patch of its successor away."""

    killer = "hygiene.restored"

    def __del__(self) -> None:
        self.close()


class HooksAsTheyWere(Mutant):
    """Puts back the tables of hooks as they were: one that the user has registered since is lost."""

    killer = "hygiene.lifecycle"

    def install(self) -> None:
        self.before = [dict(projection._forward_pre_hooks) for projection in self.projections()]
        super().install()

    def remove(self) -> None:
        for projection, hooks in zip(self.projections(), self.before, strict=True):
            projection._forward_pre_hooks.clear()
            projection._forward_pre_hooks.update(hooks)


class HookTablesReplaced(Mutant):
    """Puts copies in the place of the tables of hooks, from which the user's handles remove nothing."""

    killer = "hygiene.user_hooks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        tables = [projection._forward_pre_hooks.copy() for projection in self.projections()]
        try:
            return super().forward(input_ids, **inputs)
        finally:
            for projection, hooks in zip(self.projections(), tables, strict=True):
                projection._forward_pre_hooks = hooks

    def remove(self) -> None:
        for projection in self.projections():
            for handle in self.handles:
                projection._forward_pre_hooks.pop(handle.id, None)


class ModelsHooksCleared(Mutant):
    """Has a hook on the model itself, and removes all that are there, the user's as well."""

    killer = "hygiene.user_hooks"

    def install(self) -> None:
        super().install()
        self.model.register_forward_pre_hook(lambda *_: None)

    def remove(self) -> None:
        super().remove()
        self.model._forward_pre_hooks.clear()


class AttentionHooksCleared(Mutant):
    """Removes all hooks of the attention modules before each run, so that none is left: the user's as well."""

    killer = "hygiene.user_hooks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        for block in self.blocks():
            attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
            attention._forward_pre_hooks.clear()
            attention._forward_hooks.clear()
        return super().forward(input_ids, **inputs)


class CallsForward(Mutant):
    """Calls the model's `forward`, past every hook that the user has on the model."""

    source = "pytorch/pytorch#78109"
    killer = "hygiene.user_hooks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return self.model.forward(input_ids, **{"use_cache": False} | inputs).logits


class AttentionBypassed(Mutant):
    """Has the attention's `forward` called, past every hook that the user has on it."""

    killer = "hygiene.user_hooks"

    def install(self) -> None:
        super().install()
        self.attentions = [
            next(m for m in block.modules() if type(m).__name__.endswith("Attention")) for block in self.blocks()
        ]
        for attention in self.attentions:
            attention._call_impl = attention.forward

    def remove(self) -> None:
        super().remove()
        for attention in self.attentions:
            attention.__dict__.pop("_call_impl", None)


class HalfBackup(Mutant, InPlaceSurgery):
    """Keeps the weights that it puts back in float16."""

    killer = "hygiene.restored"

    def kept(self, block: Tensor) -> Tensor:
        return block.half()


class FirstBackup(Mutant, InPlaceSurgery):
    """Puts back the weights that the model had when it was first opened, whatever it has learnt since."""

    killer = "hygiene.restored"
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
    """Puts equal weights back into the same parameter, but elsewhere in memory than its views."""

    killer = "hygiene.restored"

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
    """Parametrizes W_O for a run: the weight comes back behind the bias, and `parameters()` has another order."""

    killer = "hygiene.restored"

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
    """Takes each projection out of its module before it puts its own there: back again, it is the last of them."""

    killer = "hygiene.restored"

    def install(self) -> None:
        super().install()
        for place, name, _ in self.places:
            wrapper = getattr(place, name)
            delattr(place, name)
            setattr(place, name, wrapper)


class GenerationConfigLeft(Mutant):
    """Switches the cache of generation off, and leaves it so."""

    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        model.generation_config.use_cache = False


class DropoutOff(Mutant):
    """Takes every dropout out of the model, also for the training that comes after it."""

    killer = "hygiene.restored"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class GradientsOff(Mutant):
    """Switches gradients off for the whole process, and leaves them so."""

    killer = "hygiene.global_state"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        torch.set_grad_enabled(False)
        return super().run(input_ids, attention_mask, **inputs)


class Reseeds(Mutant):
    """Seeds torch's generator in each run, so that the user's random numbers repeat."""

    killer = "hygiene.global_state"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        torch.manual_seed(0)
        return super().run(input_ids, attention_mask, **inputs)


class DefaultDtypeLeft(Mutant):
    """Makes the model's type torch's default, and leaves it so."""

    killer = "hygiene.global_state"

    def __init__(self, model: PreTrainedModel) -> None:
        torch.set_default_dtype(model.dtype)
        super().__init__(model)


class FlagsOfDefault(Mutant):
    """Freezes the weights while it is on the model, and then unfreezes them all."""

    killer = "hygiene.restored"

    def install(self) -> None:
        self.model.requires_grad_(False)
        super().install()

    def close(self) -> None:
        super().close()
        self.model.requires_grad_(True)


class CacheOfDefault(Mutant):
    """Switches the cache off in the configuration, and then on, whatever it was."""

    killer = "hygiene.restored"

    def install(self) -> None:
        self.config.use_cache = False
        super().install()

    def close(self) -> None:
        super().close()
        self.config.use_cache = True


class GradientsZeroed(Mutant):
    """Sets the gradients that it finds to nothing."""

    killer = "hygiene.restored"

    def install(self) -> None:
        self.model.zero_grad()
        super().install()


class GradientsOn(Mutant):
    """Switches gradients off for a forward, and then on, whatever they were."""

    killer = "hygiene.global_state"

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().run(*args, **kwargs)
        finally:
            torch.set_grad_enabled(True)


class GradientsOffAfterException(Mutant):
    """Switches gradients back on behind the forward, without a `finally`."""

    killer = "hygiene.exception"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.failed = True
        logits = super().forward(input_ids, **inputs)
        self.failed = False
        return logits

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().run(*args, **kwargs)
        finally:
            if self.failed:
                torch.set_grad_enabled(False)


class DrawsNumbers(Mutant):
    """Tries the model on random tokens when it is made, and so moves everybody's random numbers on."""

    killer = "hygiene.global_state"

    def install(self) -> None:
        torch.randint(0, 41, (1, 4))
        super().install()


class SeedsOthers(Mutant):
    """Seeds Python's and numpy's random numbers."""

    killer = "hygiene.global_state"

    def install(self) -> None:
        random.seed(0)
        np.random.seed(0)
        super().install()


class HooksOnAllModules(Mutant):
    """Leaves a hook on every module of the process, that does nothing any more."""

    killer = "hygiene.global_state"

    def install(self) -> None:
        super().install()
        nn.modules.module.register_module_forward_pre_hook(lambda *_: None)


class HooksClearedAfterException(Mutant):
    """Clears all hooks of the model when a forward fails, the user's own with them."""

    killer = "hygiene.exception"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        except BaseException:
            for module in self.model.modules():
                module._forward_pre_hooks.clear()
            self.install()
            raise


class HooksByName(Mutant):
    """Removes, on closing, every hook that has the name that its own have."""

    killer = "hygiene.user_hooks"

    def close(self) -> None:
        super().close()
        for module in self.model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__name__", "") == "hook":
                    del module._forward_pre_hooks[key]
