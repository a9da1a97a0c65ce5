"""Hooks: an implementation's hooks are missing, left behind, or registered wrongly, or the user's hooks suffer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.mutants.correct_variants import WrappedForward
from tests.mutants.mutant import Mutant


class NeverFires(Mutant):
    """Registers on modules that no forward calls."""

    source = "TransformerLensOrg/TransformerLens#1688"
    expected_check = "smoke"

    def projections(self) -> list[Any]:
        return [nn.Identity() for _ in self.layers()]


class LeftAfterException(Mutant):
    """Removes its hooks after the forward pass, a step that an exception skips."""

    source = "TransformerLensOrg/TransformerLens#156"
    expected_check = "hygiene.exception"

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
    """Removes its hooks on `Exception`, which does not include KeyboardInterrupt."""

    expected_check = "hygiene.exception"

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
    """Removes all hooks of a projection, including the user's."""

    source = "TransformerLensOrg/TransformerLens#1636"
    expected_check = "hygiene.user_hooks"

    def remove(self) -> None:
        for projection in self.projections():
            projection._forward_pre_hooks.clear()


class LostHandle(Mutant):
    """Keeps only the last of its handles."""

    source = "TransformerLensOrg/TransformerLens#1426"
    expected_check = "hygiene.restored"

    def remove(self) -> None:
        for handle in self.handles[-1:]:
            handle.remove()


class NoHandle(Mutant):
    """Keeps no handle, and only stops editing."""

    source = "TransformerLensOrg/TransformerLens#1425"
    expected_check = "hygiene.restored"

    def remove(self) -> None:
        pass


class WrongKind(Mutant):
    """Removes its hooks of one kind, and leaves those of another."""

    source = "TransformerLensOrg/TransformerLens#1323"
    expected_check = "hygiene.restored"

    def install(self) -> None:
        super().install()
        for projection in self.projections():
            projection.register_full_backward_hook(lambda *_: None)


class PartialInstall(Mutant):
    """Installs head by head, and leaves the installed hooks if a later head is rejected."""

    source = "TransformerLensOrg/TransformerLens#1638"
    expected_check = "refusal.head"

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
    """Registers its hooks again for every set, on top of the old ones, and keeps only the new handles."""

    source = "TransformerLensOrg/TransformerLens#1098"
    expected_check = "hygiene.restored"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.handles = []
        self.install()


class AppliedTwice(Mutant):
    """Replaces half of z in each of two hooks, one of which was left from before."""

    source = "TransformerLensOrg/TransformerLens#1098"

    def install(self) -> None:
        super().install()
        super().install()

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return (z + super().replace_heads(z, heads)) / 2


class PositionalOnly(Mutant):
    """Reads the first positional argument of a module that is called by keywords."""

    source = "huggingface/transformers#29247"
    crashes = IndexError

    def install(self) -> None:
        super().install()
        for block in self.layers():
            attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
            self.handles.append(attention.register_forward_pre_hook(self.look))

    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = args[0].shape[1]


class DirectForward(Mutant):
    """Calls the projection's `forward`, and so skips every user hook on it."""

    source = "pytorch/pytorch#78109"
    expected_check = "hygiene.user_hooks"

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
    """Moves the user's hooks after its own, and leaves them in another order."""

    expected_check = "hygiene.user_hooks"

    def install(self) -> None:
        for layer, block in enumerate(self.layers()):
            for projection in (self.projections()[layer], block):
                hooks = projection._forward_hooks
                for key in list(hooks)[:1]:
                    hooks[-1 - key] = hooks.pop(key)
        super().install()


class SwallowsErrors(Mutant):
    """Catches what a forward pass raises, and returns logits of zeros."""

    expected_check = "hygiene.exception"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        except Exception:
            return torch.zeros(*input_ids.shape, self.config.vocab_size)


class ForeignEditLost(Mutant):
    """Edits a tensor that it captured before all other hooks, and so discards their edits."""

    source = "TransformerLensOrg/TransformerLens#1722"
    expected_check = "locality.user_hooks"

    def install(self) -> None:
        for projection in self.projections():
            self.handles.append(projection.register_forward_pre_hook(self.capture, prepend=True))
        super().install()

    def capture(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.captured = args

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, self.captured)


class OneHandle(Mutant):
    """Registers hooks when heads are named, and keeps only the handle of the last layer."""

    expected_check = "hygiene.restored"

    def install(self) -> None:
        pass

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.remove()
        for layer in dict(heads):
            self.handles = [self.projections()[layer].register_forward_pre_hook(partial(self.hook, layer))]


class ClosedBeforeRun(Mutant):
    """Notes its hooks for removal only during a run, and so leaves those of a set that never ran."""

    expected_check = "hygiene.restored"
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
    """Stores its handles after all hooks are registered, and so cannot remove them if one registration fails."""

    expected_check = "hygiene.exception"

    def install(self) -> None:
        self.handles = [
            projection.register_forward_pre_hook(partial(self.hook, layer))
            for layer, projection in enumerate(self.projections())
        ]


class LeftUntilNextRun(Mutant):
    """Removes its hooks after the forward pass or, after an exception, only before the next one."""

    expected_check = "hygiene.exception"

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.remove()
        super().install()
        logits = super().forward(input_ids, **inputs)
        self.remove()
        return logits


class HooksAsTheyWere(Mutant):
    """Restores the tables of hooks as they were, and so loses a hook that the user has registered since."""

    expected_check = "hygiene.lifecycle"

    def install(self) -> None:
        self.before = [dict(projection._forward_pre_hooks) for projection in self.projections()]
        super().install()

    def remove(self) -> None:
        for projection, hooks in zip(self.projections(), self.before, strict=True):
            projection._forward_pre_hooks.clear()
            projection._forward_pre_hooks.update(hooks)


class HookTablesReplaced(Mutant):
    """Replaces the tables of hooks by copies, from which the user's handles remove nothing."""

    expected_check = "hygiene.user_hooks"

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
    """Has a hook on the model itself, and removes all hooks there, including the user's."""

    expected_check = "hygiene.user_hooks"

    def install(self) -> None:
        super().install()
        self.model.register_forward_pre_hook(lambda *_: None)

    def remove(self) -> None:
        super().remove()
        self.model._forward_pre_hooks.clear()


class AttentionHooksCleared(Mutant):
    """Removes all hooks of the attention modules before each run, including the user's."""

    expected_check = "hygiene.user_hooks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        for block in self.layers():
            attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
            attention._forward_pre_hooks.clear()
            attention._forward_hooks.clear()
        return super().forward(input_ids, **inputs)


class CallsForward(Mutant):
    """Calls the model's `forward`, and so skips every user hook on the model."""

    source = "pytorch/pytorch#78109"
    expected_check = "hygiene.user_hooks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return self.model.forward(input_ids, **{"use_cache": False} | inputs).logits


class AttentionBypassed(Mutant):
    """Calls the attention's `forward`, and so skips every user hook on it."""

    expected_check = "hygiene.user_hooks"

    def install(self) -> None:
        super().install()
        self.attentions = [
            next(m for m in block.modules() if type(m).__name__.endswith("Attention")) for block in self.layers()
        ]
        for attention in self.attentions:
            attention._call_impl = attention.forward

    def remove(self) -> None:
        super().remove()
        for attention in self.attentions:
            attention.__dict__.pop("_call_impl", None)


class HooksClearedAfterException(Mutant):
    """Clears all hooks of the model when a forward pass fails, including the user's."""

    expected_check = "hygiene.exception"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        except BaseException:
            for module in self.model.modules():
                module._forward_pre_hooks.clear()
            self.install()
            raise


class HooksByName(Mutant):
    """Removes, on closing, every hook that has the same name as its own."""

    expected_check = "hygiene.user_hooks"

    def close(self) -> None:
        super().close()
        for module in self.model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__name__", "") == "hook":
                    del module._forward_pre_hooks[key]


class SetNotAtomic(Mutant):
    """Registers a hook for each layer when heads are named, and forgets the first ones if a later one fails."""

    expected_check = "hygiene.exception"

    def install(self) -> None:
        pass

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.remove()
        self.handles = [
            self.projections()[layer].register_forward_pre_hook(partial(self.hook, layer)) for layer in dict(heads)
        ]


class LaterHookOverruled(Mutant):
    """Computes the projection's output again, after all hooks, and so discards what a later hook made of it."""

    expected_check = "hygiene.later_hooks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        handles = [
            projection.register_forward_hook(self.again)
            for layer, projection in enumerate(self.projections())
            if self.targets(layer)
        ]
        try:
            return super().forward(input_ids, **inputs)
        finally:
            for handle in handles:
                handle.remove()

    def again(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        weight: Any = module.weight if self.config.model_type == "gpt2" else module.weight.T  # [in, out]
        product: Tensor = args[0] @ weight
        return product if module.bias is None else product + module.bias


class LaterHooksRemoved(Mutant):
    """Removes all hooks that were not there when it was made."""

    expected_check = "hygiene.later_hooks"

    def install(self) -> None:
        self.found = [set(projection._forward_hooks) for projection in self.projections()]
        super().install()

    def close(self) -> None:
        super().close()
        for projection, found in zip(self.projections(), self.found, strict=True):
            for key in set(projection._forward_hooks) - found:
                del projection._forward_hooks[key]


class LaterPatchDeleted(Mutant, WrappedForward):
    """Deletes the `forward` of each projection on closing, although the user has replaced it since."""

    expected_check = "hygiene.later_patch"
    unsupported: ClassVar[dict[str, str]] = {}


class LaterPatchSkipped(Mutant):
    """Calls the `forward` of a projection that it kept when it was made, whatever the user has put in its place."""

    expected_check = "hygiene.later_patch"

    def install(self) -> None:
        super().install()
        for projection in self.projections():
            kept = projection.forward
            self.handles.append(projection.register_forward_hook(lambda _, args, out, kept=kept: self.kept(kept, args)))

    def kept(self, forward: Any, args: Any) -> Any:
        return forward(*args) if self.heads else None
