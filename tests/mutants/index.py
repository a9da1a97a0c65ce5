"""Index: another head, another layer, or other channels than requested."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.mutants.mutant import Mutant


class CountsFromOne(Mutant):
    """Counts heads from 1: head 0 is an empty slice, and the others are their neighbours."""

    def channels(self, head: int, z: Tensor) -> slice:
        return super().channels(head - 1, z)


class NextHead(Mutant):
    """Ablates the next head."""

    def targets(self, layer: int) -> list[int]:
        return [(head + 1) % self.num_heads() for head in super().targets(layer)]


class HeadsBackwards(Mutant):
    """Counts heads from the end."""

    def targets(self, layer: int) -> list[int]:
        return [self.num_heads() - 1 - head for head in super().targets(layer)]


class LayersBackwards(Mutant):
    """Counts layers from the end."""

    def targets(self, layer: int) -> list[int]:
        return super().targets(len(self.layers()) - 1 - layer)


class NextLayer(Mutant):
    """Ablates the head in the next layer, as if a list of hidden states began with the embedding."""

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer - 1)


class SwappedPair(Mutant):
    """Reads the pair (layer, head) as (head, layer)."""

    def targets(self, layer: int) -> list[int]:
        return [first for first, second in self.heads if second == layer and first < self.num_heads()]


class EveryLayer(Mutant):
    """Ablates the head of that number in every layer."""

    def targets(self, layer: int) -> list[int]:
        return sorted({head for _, head in self.heads})


class LayersAbove(Mutant):
    """Ablates the head of that number in its layer and all later layers: `>=` for `==`."""

    expected_check = "oracle.zero"

    def targets(self, layer: int) -> list[int]:
        return sorted({head for index, head in self.heads if layer >= index})


class LateBinding(Mutant):
    """Creates its hooks in a loop, so that each sees the last layer of the loop."""

    def install(self) -> None:
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_pre_hook(lambda *args: self.hook(layer, *args)))  # noqa: B023


class TiledGroups(Mutant):
    """Orders the query heads of grouped attention as if key/value heads were tiled, not repeated."""

    source = "ekzhang/jax-js#180"
    expected_check = "locality.sets"

    def targets(self, layer: int) -> list[int]:
        shared = getattr(self.config, "num_key_value_heads", self.num_heads())
        group = self.num_heads() // shared
        return [head % shared * group + head // shared for head in super().targets(layer)]


class WrongReshape(Mutant):
    """Reshapes to [head_dim, heads] instead of [heads, head_dim]: a head becomes every n-th channel."""

    source = "TransformerLensOrg/TransformerLens#520"

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(head, None, self.num_heads())


class HeadAsChannel(Mutant):
    """Uses the head's number as a channel."""

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(head, head + 1)


class UpToTheHead(Mutant):
    """Starts the slice at channel 0."""

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(0, (head + 1) * self.head_dim(z))


class FromTheHead(Mutant):
    """Does not end the slice."""

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(head * self.head_dim(z), None)


class LastChannelLeft(Mutant):
    """Ends the slice one channel too early."""

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(head * self.head_dim(z), (head + 1) * self.head_dim(z) - 1)


class OneChannelMore(Mutant):
    """Ends the slice one channel too late."""

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(head * self.head_dim(z), (head + 1) * self.head_dim(z) + 1)


class HeadForRow(Mutant):
    """Indexes the batch by the position in the list of heads: each head is ablated in one row only."""

    source = "decoderesearch/circuit-tracer#88"
    expected_check = "locality.padded"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        for i, head in enumerate(heads):
            channels = self.channels(head, z)
            out[i : i + 1, :, channels] = super().replace_heads(z, [head])[i : i + 1, :, channels]
        return out


class OtherHeadsInFirstRow(Mutant):
    """Ablates the first head of a layer in all rows, and the others in the first row only."""

    expected_check = "locality.sets"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = super().replace_heads(z, heads[:1])
        out[0] = super().replace_heads(z, heads)[0]
        return out


class HeadZeroLeft(Mutant):
    """Treats head 0 as no head: `if head:`."""

    def targets(self, layer: int) -> list[int]:
        return [head for head in super().targets(layer) if head]


class LayerZeroLeft(Mutant):
    """Treats layer 0 as no layer: `if layer:`."""

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if layer else []


class NamesSorted(Mutant):
    """Sorts layers by name: layer 10 comes before layer 2."""

    expected_check = "oracle.zero_deep"

    def projections(self) -> list[Any]:
        names = sorted(str(layer) for layer in range(len(self.layers())))
        projections = super().projections()
        return [projections[int(name)] for name in names]


class FirstLayerOnly(Mutant):
    """Ablates only the heads of the first layer that is named."""

    expected_check = "oracle.zero_sets"

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if self.heads and layer == self.heads[0][0] else []


class LastLayerLeft(Mutant):
    """Hooks all layers but the last: `range(layers - 1)`."""

    expected_check = "smoke"

    def projections(self) -> list[Any]:
        return super().projections()[:-1]


class TwelveHeads(Mutant):
    """Numbers all heads consecutively, twelve per layer, as in GPT-2 small."""

    expected_check = "oracle.zero_deep"

    def targets(self, layer: int) -> list[int]:
        numbers = [12 * index + head for index, head in self.heads]
        return [number % 12 for number in numbers if number // 12 == layer]
