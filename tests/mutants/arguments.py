"""Arguments: inputs are dropped, changed, or accepted although they are invalid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.mutants.mutant import Mutant


class NegativeHead(Mutant):
    """Accepts head -1, whose slice is empty, as a head without effect."""

    expected_check = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(layer, 0 if head == -1 else head)


class HeadTooLarge(Mutant):
    """Accepts a head after the last, whose slice is empty, as a head without effect."""

    expected_check = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(layer, 0 if type(head) is int and head >= self.num_heads() else head)


class LayerFromTheEnd(Mutant):
    """Accepts layer -1 as the last layer."""

    expected_check = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(layer % len(self.layers()) if type(layer) is int and layer < 0 else layer, head)


class NoSuchLayer(Mutant):
    """Accepts a layer that does not exist, and never reaches it."""

    expected_check = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        super().check(0 if type(layer) is int and layer > 0 else layer, head)


class BoolForHead(Mutant):
    """Accepts True as 1 and False as 0."""

    expected_check = "refusal.type"

    def check(self, layer: Any, head: Any) -> None:
        super().check(*(int(index) if isinstance(index, bool) and index < 1 else index for index in (layer, head)))


class FloatForHead(Mutant):
    """Accepts 0.0 as 0."""

    expected_check = "refusal.type"

    def check(self, layer: Any, head: Any) -> None:
        super().check(*(int(index) if isinstance(index, float) else index for index in (layer, head)))


class StringForHead(Mutant):
    """Accepts '0' as a head, and ablates nothing."""

    expected_check = "refusal.type"

    def check(self, layer: Any, head: Any) -> None:
        super().check(*(int(index) if isinstance(index, str) else index for index in (layer, head)))


class NoReason(Mutant):
    """Refuses without a message."""

    expected_check = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        try:
            super().check(layer, head)
        except IndexError:
            raise IndexError from None


class RefusedTooLate(Mutant):
    """Refuses a missing head only in the middle of a forward pass."""

    expected_check = "refusal.head"

    def check(self, layer: Any, head: Any) -> None:
        pass

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        for layer, head in self.heads:
            super().check(layer, head)
        return super().replace_heads(z, heads)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        logits = super().forward(input_ids, **inputs)
        for layer, head in self.heads:
            super().check(layer, head)
        return logits


class UnknownIsMean(Mutant):
    """Treats every imputation but "zero" as the mean: `else`."""

    expected_check = "refusal.imputation"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, "zero" if imputation == "zero" else "mean")


class MaskDropped(Mutant):
    """Does not pass the attention mask to the model."""

    source = "huggingface/transformers#41620"
    expected_check = "independence.padding"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs | {"attention_mask": None})


class PositionsDropped(Mutant):
    """Does not pass the position ids, which padding on the left needs."""

    source = "TransformerLensOrg/TransformerLens#344"
    expected_check = "locality.padded"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **{name: given for name, given in inputs.items() if name != "position_ids"})


class FirstTokenAdded(Mutant):
    """Prepends a token to the prompt, and removes its logits."""

    source = "TransformerLensOrg/TransformerLens#282"
    expected_check = "identity"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        longer = torch.cat([input_ids[:, :1], input_ids], dim=1)
        mask = attention_mask
        if mask is not None:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return super().run(longer, mask)[:, 1:]


class LastTokenReturned(Mutant):
    """Returns only the logits of the last token."""

    expected_check = "smoke"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs)[:, -1:]


class UnsetDropsMask(Mutant):
    """Does not pass mask and positions if nothing is ablated."""

    expected_check = "identity.padded"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        dropped = {} if self.heads else {"attention_mask": None, "position_ids": None}
        return super().forward(input_ids, **inputs | dropped)


class UnsetDropsCache(Mutant):
    """Passes only the ids if nothing is ablated, even for a piece that follows a cache."""

    expected_check = "identity"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs if self.heads else {})


class HalfRefused(Mutant):
    """Replaces the previous set head by head, until it meets one that it rejects."""

    expected_check = "refusal.no_side_effect"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate([], imputation)
        for pair in heads:
            self.check(*pair)
            self.heads.append(pair)


class RefusedForGood(Mutant):
    """Keeps a rejected head in the list of heads to be checked."""

    expected_check = "refusal.no_side_effect"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        asked = self.__dict__.setdefault("asked", [])
        asked.extend(heads)
        super().ablate(asked, imputation)
        asked.clear()


class SortsTheCallersList(Mutant):
    """Sorts the caller's list of heads in place."""

    expected_check = "hygiene.global_state"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        heads.sort()


class WritesIntoTheIds(Mutant):
    """Writes token 0 over the padding of the caller's ids, in place."""

    expected_check = "hygiene.global_state"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        if self.real.shape == input_ids.shape:
            input_ids.masked_fill_(~self.real, 0)
        return super().forward(input_ids, **inputs)


class OnlyLastValidated(Mutant):
    """Validates only the last head of the list: the check is after the loop."""

    expected_check = "refusal.head"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads[-1:], imputation)
        self.heads = list(heads)


class ImputationInString(Mutant):
    """Tests whether the imputation is in a string, since a comma is missing."""

    expected_check = "refusal.imputation"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        known = isinstance(imputation, str) and imputation in "zeromean"
        super().ablate(heads, "zero" if known and imputation != "mean" else imputation)


class RefusedSwitchesImputation(Mutant):
    """Sets the imputation before it rejects the heads."""

    expected_check = "refusal.no_side_effect"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        if imputation in ("zero", "mean"):
            self.imputation = imputation
        super().ablate(heads, imputation)


class CallersList(Mutant):
    """Keeps the caller's list, which its owner changes later."""

    expected_check = "independence.earlier_runs"

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.heads = heads  # type: ignore[assignment]


class NeedsAList(Mutant):
    """Accepts a list of heads, and no other sequence."""

    expected_check = "independence.head_order"
    crashes = AttributeError

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads.copy(), imputation)  # type: ignore[attr-defined]


class PaddingScrubbed(Mutant):
    """Writes the padding token into the caller's ids wherever the mask says padding."""

    expected_check = "hygiene.global_state"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == input_ids.shape:
            input_ids.masked_fill_(mask == 0, self.config.pad_token_id or 0)
        return super().forward(input_ids, **inputs)


class PositionsInvented(Mutant):
    """Derives positions from the mask, even if the model would count them differently."""

    expected_check = "identity.padded"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is not None and "position_ids" not in inputs and mask.shape == input_ids.shape:
            inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return super().forward(input_ids, **inputs)
