"""Arguments: what is passed in is dropped, changed, or taken where it should be refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.mutants.mutant import Mutant


class NegativeHead(Mutant):
    """Takes head -1, whose slice is empty, for a head that changes nothing."""

    killer = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(layer, 0 if head == -1 else head)


class HeadTooLarge(Mutant):
    """Takes a head past the last, whose slice is empty, for a head that changes nothing."""

    killer = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(layer, 0 if type(head) is int and head >= self.count() else head)


class LayerFromTheEnd(Mutant):
    """Takes layer -1 for the last."""

    killer = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(layer % len(self.blocks()) if type(layer) is int and layer < 0 else layer, head)


class NoSuchLayer(Mutant):
    """Takes a layer that is not there, and never meets it."""

    killer = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(0 if type(layer) is int and layer > 0 else layer, head)


class BoolForHead(Mutant):
    """Takes True for 1 and False for 0."""

    killer = "refusal.type"

    def check(self, layer: Any, head: Any) -> None:
        super().check(*(int(index) if isinstance(index, bool) and index < 1 else index for index in (layer, head)))


class FloatForHead(Mutant):
    """Takes 0.0 for 0."""

    killer = "refusal.type"

    def check(self, layer: Any, head: Any) -> None:
        super().check(*(int(index) if isinstance(index, float) else index for index in (layer, head)))


class StringForHead(Mutant):
    """Takes '0' for 0, and ablates nothing."""

    killer = "refusal.type"

    def check(self, layer: Any, head: Any) -> None:
        super().check(*(int(index) if isinstance(index, str) else index for index in (layer, head)))


class NoReason(Mutant):
    """Refuses without a word."""

    killer = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        try:
            super().check(layer, head)
        except IndexError:
            raise IndexError from None


class RefusedTooLate(Mutant):
    """Finds out in the middle of a forward that a head is not there."""

    killer = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        pass

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        for layer, head in self.heads:
            super().check(layer, head)
        return super().edited(z, heads)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        logits = super().forward(input_ids, **inputs)
        for layer, head in self.heads:
            super().check(layer, head)
        return logits


class UnknownIsMean(Mutant):
    """Takes every imputation but "zero" for the mean: `else`."""

    killer = "refusal.imputation"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, "zero" if imputation == "zero" else "mean")


class MaskDropped(Mutant):
    """Does not pass the attention mask on to the model."""

    source = "huggingface/transformers#41620"
    killer = "independence.padding"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs | {"attention_mask": None})


class PositionsDropped(Mutant):
    """Does not pass the position ids on, which padding on the left needs."""

    source = "TransformerLensOrg/TransformerLens#344"
    killer = "locality.padded"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **{name: given for name, given in inputs.items() if name != "position_ids"})


class FirstTokenAdded(Mutant):
    """Puts a token of its own before the prompt, and takes its logits away again."""

    source = "TransformerLensOrg/TransformerLens#282"
    killer = "identity"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        longer = torch.cat([input_ids[:, :1], input_ids], dim=1)
        mask = attention_mask
        if mask is not None:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return super().run(longer, mask)[:, 1:]


class LastTokenReturned(Mutant):
    """Returns the logits of the last token only."""

    killer = "smoke"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs)[:, -1:]


class UnsetDropsMask(Mutant):
    """Does not pass mask and positions on where nothing is ablated."""

    killer = "identity.padded"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        dropped = {} if self.heads else {"attention_mask": None, "position_ids": None}
        return super().forward(input_ids, **inputs | dropped)


class UnsetDropsCache(Mutant):
    """Passes nothing but the ids on where nothing is ablated, also those of a piece that follows a cache."""

    killer = "identity"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs if self.heads else {})


class HalfRefused(Mutant):
    """Replaces the set before head by head, until it meets one that it refuses."""

    killer = "refusal.no_side_effect"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([], imputation)
        for pair in heads:
            self.check(*pair)
            self.heads.append(pair)


class RefusedForGood(Mutant):
    """Keeps a head that it has refused in the list of those to be checked."""

    killer = "refusal.no_side_effect"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        asked = self.__dict__.setdefault("asked", [])
        asked.extend(heads)
        super().ablate(asked, imputation)
        asked.clear()


class SortsTheCallersList(Mutant):
    """Sorts the list of heads that it is given, in place."""

    killer = "hygiene.global_state"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        heads.sort()


class WritesIntoTheIds(Mutant):
    """Writes token 0 over the padding of the ids that it is given, in place."""

    killer = "hygiene.global_state"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        if self.real.shape == input_ids.shape:
            input_ids.masked_fill_(~self.real, 0)
        return super().forward(input_ids, **inputs)


class OnlyLastValidated(Mutant):
    """Looks at the last head of the list only: the check stands behind the loop."""

    killer = "refusal.head"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads[-1:], imputation)
        self.heads = list(heads)


class ImputationInString(Mutant):
    """Asks whether the imputation is in a string, where a comma is missing."""

    killer = "refusal.imputation"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        known = isinstance(imputation, str) and imputation in "zeromean"
        super().ablate(heads, "zero" if known and imputation != "mean" else imputation)


class RefusedSwitchesImputation(Mutant):
    """Takes the imputation over before it refuses the heads."""

    killer = "refusal.no_side_effect"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        if imputation in ("zero", "mean"):
            self.imputation = imputation
        super().ablate(heads, imputation)


class CallersList(Mutant):
    """Keeps the list that it was given, which its owner changes later."""

    killer = "independence.earlier_runs"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.heads = heads  # type: ignore[assignment]


class NeedsAList(Mutant):
    """Takes a list of heads, and no other sequence."""

    killer = "independence.head_order"
    crashes = AttributeError

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads.copy(), imputation)  # type: ignore[attr-defined]


class PaddingScrubbed(Mutant):
    """Writes the padding token into the ids that it was given, where the mask says padding."""

    killer = "hygiene.global_state"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == input_ids.shape:
            input_ids.masked_fill_(mask == 0, self.config.pad_token_id or 0)
        return super().forward(input_ids, **inputs)


class PositionsInvented(Mutant):
    """Counts positions from the mask, where the model would count them otherwise."""

    killer = "identity.padded"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is not None and "position_ids" not in inputs and mask.shape == input_ids.shape:
            inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return super().forward(input_ids, **inputs)
