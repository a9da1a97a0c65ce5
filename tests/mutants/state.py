"""State: what an implementation remembers between runs, sets and clears, and what it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.protocol import CACHE
from tests.mutants.mutant import Mutant


class StaleMean(Mutant):
    """Uses the mean that it captured in the run before."""

    source = "TransformerLensOrg/TransformerLens#1687"
    killer = "history"

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
    """Measures the mean in the first run, and uses it in all others."""

    killer = "history"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.place = layer, len(args[0])
        return super().hook(layer, module, args)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("kept", {})
        return kept.setdefault((*self.place, tuple(self.heads)), super().mean(z, real))


class MeanKeptByPrompt(Mutant):
    """Keeps the means of a prompt, and forgets that they are of one head."""

    killer = "history"

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
    """Keeps the attention mask of the run before where a run has none."""

    killer = "history.padded"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        before = self.real
        if attention_mask is None and before is not None and before.shape == input_ids.shape:
            attention_mask = before.long()
        return super().run(input_ids, attention_mask, **inputs)


class OneRunLate(Mutant):
    """Applies a set of heads from the second run on."""

    killer = "smoke"
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
    """Takes its hooks off in the first run."""

    killer = "history"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.targets(layer):
            self.handles[layer].remove()
        return super().hook(layer, module, args)


class EveryOtherRun(Mutant):
    """Counts calls, and takes every other one for a backward pass that computes the forward again."""

    source = "huggingface/peft#2826"
    killer = "history"
    runs = 0

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.runs += bool(self.heads)
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if self.runs % 2 else []


class SetsAdd(Mutant):
    """Adds the heads that are named to those that were."""

    killer = "history"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([*self.heads, *heads], imputation)


class FirstSetKept(Mutant):
    """Ignores a second set until it is cleared."""

    killer = "history"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        before = self.heads
        super().ablate(heads, imputation)
        self.heads = before or self.heads


class FirstImputationKept(Mutant):
    """Ignores a second imputation."""

    killer = "history"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(
            heads, self.__dict__.setdefault("first", imputation) if imputation in ("zero", "mean") else imputation
        )


class EmptySetIgnored(Mutant):
    """Takes an empty set for no set at all: `if heads:`."""

    killer = "identity"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        before = self.heads
        super().ablate(heads, imputation)
        self.heads = self.heads or before


class EmptySetIsAll(Mutant):
    """Takes an empty set for all heads."""

    killer = "identity"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        every = [(layer, head) for layer in range(len(self.blocks())) for head in range(self.count())]
        super().ablate(heads or every, imputation)


class ClearsNothing(Mutant):
    """Goes on after `clear`: the next clean run is measured with the hook on."""

    killer = "identity"

    def clear(self) -> None:
        pass


class ClearsOneLayer(Mutant):
    """Clears the heads of one layer only."""

    killer = "history"

    def clear(self) -> None:
        self.heads = [(layer, head) for layer, head in self.heads if layer]


class NotAfterClear(Mutant):
    """Takes its hooks off in `clear`, and never puts them back."""

    killer = "history"

    def clear(self) -> None:
        super().clear()
        self.remove()


class NotAfterInterrupt(Mutant):
    """Switches itself off for good when a forward raises."""

    killer = "history"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            return super().forward(input_ids, **inputs)
        except BaseException:
            self.heads = []
            raise


class CountsLayers(Mutant):
    """Counts its calls to know the layer, and is out of step after a forward that stopped half way."""

    killer = "history"
    calls = 0

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        layer = self.calls % len(self.blocks())
        self.calls += 1
        return super().hook(layer, module, args)


class TwiceIsNotAtAll(Mutant):
    """Toggles a head each time that it is named."""

    killer = "sets.order"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([pair for pair in dict.fromkeys(heads) if list(heads).count(pair) % 2], imputation)
        for pair in heads:
            self.check(*pair)


class LastHeadWins(Mutant):
    """Edits the same input once for each head of a layer, and keeps the last edit."""

    source = "TransformerLensOrg/TransformerLens#1722"
    killer = "locality.sets"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().edited(z, heads[-1:])


class OneHeadALayer(Mutant):
    """Keeps its heads in a dict by layer."""

    killer = "locality.sets"

    def targets(self, layer: int) -> list[int]:
        return [head for index, head in dict(self.heads).items() if index == layer]


class InPlace(Mutant):
    """Writes into the tensor that it is given, which others may have kept."""

    source = "TransformerLensOrg/TransformerLens#336"
    killer = "input.untouched"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        z.copy_(super().edited(z, heads))
        return z


class ForgotReturn(Mutant):
    """Edits a copy, and does not return it."""

    killer = "smoke"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        super().hook(layer, module, args)


class CleanPrefix(Mutant):
    """Fills the cache with a clean prefix, and ablates only what is decoded after it."""

    source = "UFO-101/auto-circuit@a50da28"
    killer = "cache"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        self.prefix = past is not None and past.get_seq_length() == 0
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return [] if self.prefix else super().targets(layer)


class PrefixOnly(Mutant):
    """Ablates the first forward, and not the tokens that are decoded from its cache."""

    killer = "cache"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        self.decoding = past is not None and past.get_seq_length() > 0
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return [] if self.decoding else super().targets(layer)


class PiecesLeft(Mutant):
    """Takes a piece of several tokens that follows a cache for a prompt that was ablated already."""

    killer = "cache"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        past = inputs.get(CACHE)
        self.piece = past is not None and past.get_seq_length() > 0 and input_ids.shape[1] > 1
        return super().forward(input_ids, **inputs)

    def targets(self, layer: int) -> list[int]:
        return [] if self.piece else super().targets(layer)


class RemembersLogits(Mutant):
    """Returns the logits of the first run on the same prompt, whatever is ablated."""

    killer = "smoke"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        known: dict[Any, Tensor] = self.__dict__.setdefault("known", {})
        key = str(input_ids), str(inputs.get("attention_mask")), CACHE in inputs
        if key not in known or CACHE in inputs:
            known[key] = super().forward(input_ids, **inputs)
        return known[key]


class Noise(Mutant):
    """Draws a new number each time."""

    killer = "history"

    def value(self, z: Tensor) -> Tensor | float:
        return super().value(z) + 1e-4 * torch.rand(()).item()


class SharedSet(Mutant):
    """Keeps its heads on the class, where the next implementation finds them."""

    killer = "identity"
    shared: list[tuple[int, int]] = []  # noqa: RUF012 (the bug)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.heads = self.shared

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        type(self).shared = self.heads = [pair for pair in self.heads if pair[0] < len(self.blocks())]
