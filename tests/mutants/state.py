"""State: an implementation remembers or forgets something between runs, sets and clears."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.protocol import CACHE
from tests.mutants.mutant import Mutant


class StaleMean(Mutant):
    """Uses the mean that it captured in the previous run."""

    source = "TransformerLensOrg/TransformerLens#1687"
    expected_check = "independence.earlier_runs"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.layer = layer
        return super().hook(layer, module, args)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        captured = self.__dict__.setdefault("captured", {})
        now = super().mean(z, real)
        before = captured.get(self.layer, now)
        captured[self.layer] = now
        return before if before.shape == now.shape else now


class FirstMeanKept(Mutant):
    """Measures the mean in the first run, and uses it in all later runs."""

    expected_check = "independence.earlier_runs"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.place = layer, len(args[0])
        return super().hook(layer, module, args)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("kept", {})
        return kept.setdefault((*self.place, tuple(self.heads)), super().mean(z, real))


class MeanKeptByPrompt(Mutant):
    """Caches means by prompt only, and not by head."""

    expected_check = "independence.earlier_runs"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.layer = layer
        return super().hook(layer, module, args)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.prompt = str(input_ids), str(attention_mask)
        return super().run(input_ids, attention_mask, **inputs)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("kept", {})
        return kept.setdefault((self.layer, *self.prompt), super().mean(z, real))


class StaleMask(Mutant):
    """Reuses the attention mask of an earlier run in a run without a mask."""

    expected_check = "independence.earlier_masks"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        before = self.real
        if attention_mask is None and before is not None and before.shape == input_ids.shape:
            attention_mask = before.long()
        return super().run(input_ids, attention_mask, **inputs)


class OneRunLate(Mutant):
    """Applies a set of heads only from the second run on."""

    expected_check = "smoke"
    set: Any = ()

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        before = self.heads
        super().ablate(heads, imputation)
        self.set, self.heads = self.heads, before

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        logits = super().forward(input_ids, **inputs)
        self.heads = list(self.set)
        return logits

    def clear(self) -> None:
        super().clear()
        self.set = ()


class FirstRunOnly(Mutant):
    """Removes its hooks in the first run."""

    expected_check = "independence.earlier_runs"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.targets(layer):
            self.handles[layer].remove()
        return super().hook(layer, module, args)


class EveryOtherRun(Mutant):
    """Counts calls, and treats every second call as a recomputation for a backward pass."""

    source = "huggingface/peft#2826"
    expected_check = "independence.earlier_runs"
    runs = 0

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.runs += bool(self.heads)
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if self.runs % 2 else []


class SetsAdd(Mutant):
    """Adds the named heads to the previous ones."""

    expected_check = "independence.earlier_runs"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([*self.heads, *heads], imputation)


class FirstSetKept(Mutant):
    """Ignores a second set until it is cleared."""

    expected_check = "independence.earlier_runs"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        before = self.heads
        super().ablate(heads, imputation)
        self.heads = before or self.heads


class FirstImputationKept(Mutant):
    """Ignores a second imputation."""

    expected_check = "independence.earlier_runs"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(
            heads, self.__dict__.setdefault("first", imputation) if imputation in ("zero", "mean") else imputation
        )


class EmptySetIgnored(Mutant):
    """Ignores an empty set: `if heads:`."""

    expected_check = "identity"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        before = self.heads
        super().ablate(heads, imputation)
        self.heads = self.heads or before


class EmptySetIsAll(Mutant):
    """Treats an empty set as all heads."""

    expected_check = "identity"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        every = [(layer, head) for layer in range(len(self.layers())) for head in range(self.num_heads())]
        super().ablate(heads or every, imputation)


class ClearsNothing(Mutant):
    """Stays active after `clear`, so the next clean run is measured with the hook on."""

    expected_check = "identity"

    def clear(self) -> None:
        pass


class ClearsOneLayer(Mutant):
    """Clears the heads of one layer only."""

    expected_check = "independence.earlier_runs"

    def clear(self) -> None:
        self.heads = [(layer, head) for layer, head in self.heads if layer]


class NotAfterClear(Mutant):
    """Removes its hooks in `clear`, and never registers them again."""

    expected_check = "independence.earlier_runs"

    def clear(self) -> None:
        super().clear()
        self.remove()


class NotAfterInterrupt(Mutant):
    """Disables itself permanently when a forward pass raises."""

    expected_check = "independence.earlier_runs"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        except BaseException:
            self.heads = []
            raise


class CountsLayers(Mutant):
    """Counts its calls to know the layer, and is out of step after an interrupted forward pass."""

    expected_check = "independence.earlier_runs"
    calls = 0

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        layer = self.calls % len(self.layers())
        self.calls += 1
        return super().hook(layer, module, args)


class TwiceIsNotAtAll(Mutant):
    """Toggles a head each time it is named."""

    expected_check = "independence.head_order"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([pair for pair in dict.fromkeys(heads) if list(heads).count(pair) % 2], imputation)
        for pair in heads:
            self.check(*pair)


class LastHeadWins(Mutant):
    """Edits the same input once for each head of a layer, and keeps only the last edit."""

    source = "TransformerLensOrg/TransformerLens#1722"
    expected_check = "locality.sets"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().replace_heads(z, heads[-1:])


class OneHeadALayer(Mutant):
    """Keeps its heads in a dict by layer, one for each."""

    expected_check = "locality.sets"

    def targets(self, layer: int) -> list[int]:
        return [head for index, head in dict(self.heads).items() if index == layer]


class InPlace(Mutant):
    """Writes in place into the tensor that it receives, which others may have kept."""

    source = "TransformerLensOrg/TransformerLens#336"
    expected_check = "locality.input_untouched"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        z.copy_(super().replace_heads(z, heads))
        return z


class ForgotReturn(Mutant):
    """Edits a copy, and does not return it."""

    expected_check = "smoke"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        super().hook(layer, module, args)


class CleanPrefix(Mutant):
    """Fills the cache with a clean prefix, and ablates only what is decoded after it."""

    source = "UFO-101/auto-circuit@a50da28"
    expected_check = "independence.cache"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        self.prefix = past is not None and past.get_seq_length() == 0
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return [] if self.prefix else super().targets(layer)


class PrefixOnly(Mutant):
    """Ablates the first forward pass, and not the tokens that are decoded from its cache."""

    expected_check = "independence.cache"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        self.decoding = past is not None and past.get_seq_length() > 0
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return [] if self.decoding else super().targets(layer)


class PiecesLeft(Mutant):
    """Treats a piece of several tokens that follows a cache as a prompt that was ablated already."""

    expected_check = "independence.cache"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        self.piece = past is not None and past.get_seq_length() > 0 and input_ids.shape[1] > 1
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return [] if self.piece else super().targets(layer)


class RemembersLogits(Mutant):
    """Returns the logits of the first run on the same prompt, whatever is ablated."""

    expected_check = "smoke"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        known: dict[Any, Tensor] = self.__dict__.setdefault("known", {})
        key = str(input_ids), str(inputs.get("attention_mask")), CACHE in inputs
        if key not in known or CACHE in inputs:
            known[key] = super().forward(input_ids, **inputs)
        return known[key]


class Noise(Mutant):
    """Draws a new number in each run."""

    expected_check = "independence.earlier_runs"

    def value(self, z: Tensor) -> Tensor | float:
        return super().value(z) + 1e-4 * torch.rand(()).item()


class SharedSet(Mutant):
    """Keeps its heads on the class, where the next implementation finds them."""

    expected_check = "identity"
    shared: list[tuple[int, int]] = []  # noqa: RUF012 (the bug)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.heads = self.shared

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        type(self).shared = self.heads = [pair for pair in self.heads if pair[0] < len(self.layers())]


class MeanKeptByHead(MeanKeptByPrompt):
    """Caches means by prompt and head, although they depend on the heads that are ablated in lower layers."""

    def channels(self, head: int, z: Tensor) -> slice:
        self.head = head
        return super().channels(head, z)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("kept", {})
        return kept.setdefault((self.layer, self.head, *self.prompt), Mutant.mean(self, z, real))


class MaskKeptByShape(Mutant):
    """Prepares a mask once for each shape, and uses it for every other mask of that shape."""

    expected_check = "independence.earlier_masks"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("kept", {})
        if inputs["attention_mask"] is not None:
            self.real = kept.setdefault(self.real.shape, self.real)
        return super().forward(input_ids, **inputs)


class MaskQueued(Mutant):
    """Queues the mask before each layer, so the mask of an interrupted forward pass reaches the next one."""

    expected_check = "independence.earlier_masks"

    def install(self) -> None:
        self.queues: list[deque[Any]] = [deque() for _ in self.layers()]
        for block, queue in zip(self.layers(), self.queues, strict=True):
            self.handles.append(block.register_forward_pre_hook(lambda *_, queue=queue: queue.append(self.real)))
        super().install()

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        now, self.real = self.real, self.queues[layer].popleft()
        edited = super().hook(layer, module, args)
        self.real = now
        return edited


class OutputQueued(Mutant):
    """Queues z to correct the attention's output, so the z of an interrupted forward pass reaches the next one."""

    expected_check = "independence.earlier_runs"
    unsupported: ClassVar[dict[str, str]] = {"observable": "it corrects what the attention gives"}

    def install(self) -> None:
        for layer, (block, projection) in enumerate(zip(self.layers(), self.projections(), strict=True)):
            queue: deque[Tensor] = deque()
            attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
            self.handles.append(
                projection.register_forward_pre_hook(lambda _, args, queue=queue: queue.append(args[0]))
            )
            self.handles.append(attention.register_forward_hook(partial(self.correct, layer, projection, queue)))

    def correct(
        self, layer: int, projection: nn.Module, queue: deque[Tensor], attention: nn.Module, args: Any, output: Any
    ) -> Any:
        z, (out, *rest) = queue.popleft(), output
        weight: Any = projection.weight if self.config.model_type == "gpt2" else projection.weight.T  # [in, out]
        for channels in [self.channels(head, z) for head in set(self.targets(layer))]:
            out = out + (self.value(z[..., channels]) - z[..., channels]) @ weight[channels]
        return (out, *rest)


class LogitsOverwritten(Mutant):
    """Returns logits in one tensor for each set of heads, as CUDA graphs do, so the next run overwrites them."""

    expected_check = "independence.earlier_runs"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        logits = super().forward(input_ids, **inputs)
        static: dict[Any, Tensor] = self.__dict__.setdefault("static", {})
        key = logits.shape, self.imputation, tuple(sorted(self.heads))
        return static.setdefault(key, torch.empty_like(logits)).copy_(logits)


class BufferReused(Mutant):
    """Writes the ablated z of a layer into one buffer, so a kept tensor shows the z of the next run."""

    expected_check = "locality.input_untouched"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.layer = layer
        return super().hook(layer, module, args)

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        buffers: dict[Any, Tensor] = self.__dict__.setdefault("buffers", {})
        return buffers.setdefault((self.layer, z.shape), torch.empty_like(z)).copy_(super().replace_heads(z, heads))


class PaddedDecoding(Mutant):
    """Uses the first columns of the mask for the tokens that are decoded."""

    expected_check = "independence.cache_padded"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().replace_heads(z, heads).where(self.real[:, : z.shape[1], None], z)


class OneSetForAll(Mutant):
    """Keeps its heads on the class, so a second implementation changes the first."""

    expected_check = "independence.other_models"
    shared: list[tuple[int, int]] = []  # noqa: RUF012 (the bug)

    @property
    def heads(self) -> list[tuple[int, int]]:
        return OneSetForAll.shared

    @heads.setter
    def heads(self, heads: list[tuple[int, int]]) -> None:
        OneSetForAll.shared = heads


class OneStackForAll(Mutant):
    """Keeps its heads on a stack of the class, so a second implementation covers the first."""

    expected_check = "independence.other_models"
    stack: list[list[tuple[int, int]]] = []  # noqa: RUF012 (the bug)

    def __init__(self, model: PreTrainedModel) -> None:
        self.stack.append([])
        super().__init__(model)

    @property
    def heads(self) -> list[tuple[int, int]]:
        return self.stack[-1] if self.stack else []

    @heads.setter
    def heads(self, heads: list[tuple[int, int]]) -> None:
        self.stack[-1:] = [heads]

    def close(self) -> None:
        super().close()
        self.stack.pop()


class MeansWithoutMask(Mutant):
    """Caches the means of a prompt, and reuses them for the same tokens under another mask."""

    expected_check = "independence.earlier_masks"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.prompt = str(input_ids.tolist())
        return super().run(input_ids, attention_mask, **inputs)

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.layer = layer
        return super().hook(layer, module, args)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        known: dict[Any, Tensor] = self.__dict__.setdefault("known", {})
        key = (self.prompt, self.layer, str(self.heads), z.storage_offset())
        return known.setdefault(key, super().mean(z, real))


class SetInConfiguration(Mutant):
    """Keeps its heads in the configuration, which other models may share."""

    expected_check = "independence.other_models"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        SHARED[id(self.config)] = list(heads)

    def targets(self, layer: int) -> list[int]:
        return [head for index, head in SHARED.get(id(self.config), []) if index == layer]

    def clear(self) -> None:
        SHARED.pop(id(self.config), None)


SHARED: dict[int, list[tuple[int, int]]] = {}


class OneBufferForAllLayers(Mutant):
    """Writes the ablated z of every layer into one buffer, so that a later layer overwrites an earlier one's."""

    expected_check = "locality.input_untouched"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        edited = super().hook(layer, module, args) or args
        buffers: dict[Any, Tensor] = self.__dict__.setdefault("buffers", {})
        return (buffers.setdefault(edited[0].shape, torch.empty_like(edited[0])).copy_(edited[0]),)


class CacheEmptied(Mutant):
    """Writes zeros over the values of the ablated head in the caller's cache."""

    expected_check = "independence.cache_kept"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        for layer, head in self.heads if past is not None and past.get_seq_length() else []:
            values = past.layers[layer].values  # [rows, key/value heads, tokens, head_dim]
            if values.shape[1] == self.num_heads():  # no other head reads it
                values[:, head] = 0
        return super().forward(input_ids, **inputs)


class CopyAblated(Mutant):
    """Has hooks that refer to it, so a copy of the model refers to a copy of it, which ablates the same heads."""

    source = "ndif-team/nnsight#723"
    expected_check = "hygiene.copies"
    __deepcopy__ = None  # type: ignore[assignment]
