"""Sets of heads and MLPs, as a person writes them: `L9H6 L9H9`, `L9`, `KV9.2`, `MLP9`, `L*`.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ablation.errors import InvalidHead, one_line, shortened

if TYPE_CHECKING:
    from ablation.heads import AttentionLayer, HeadMap

MLP: Literal["mlp"] = "mlp"
"""Stands in a pair for the MLP of the layer: (9, "mlp")."""
Pair = tuple[int, int | Literal["mlp"]]
"""A (layer, head) pair, or (layer, "mlp")."""
ALLOWED = (
    "L9H6 (a head), L9 or L9H* (all heads of layer 9), L* (all heads), L*H6 (head 6 of every layer), KV9.2 (the query "
    "heads of a key/value head), MLP9, MLP*; quote the * in a shell"
)

_NUMBER = "([0-9]{1,9}|[*])"
_FORMS = (
    ("L", re.compile(f"L{_NUMBER}", re.IGNORECASE)),
    ("LH", re.compile(f"L{_NUMBER}H{_NUMBER}", re.IGNORECASE)),
    ("KV", re.compile(f"KV{_NUMBER}[.]{_NUMBER}", re.IGNORECASE)),
    ("MLP", re.compile(f"MLP{_NUMBER}", re.IGNORECASE)),
)
_MEANT = (
    (re.compile(r"[(\[]?\s*[al]?([0-9]+|\*)\s*(?:[.:,/_-]\s*h?|h)([0-9]+|\*)\s*[)\]]?", re.IGNORECASE), "L{0}H{1}"),
    (re.compile(r"h([0-9]+|\*)[.:_-]?l([0-9]+|\*)", re.IGNORECASE), "L{1}H{0}"),
    (re.compile(r"l([0-9]+)h-[0-9]+", re.IGNORECASE), "L{0}H0 (heads are counted from 0)"),
    (
        re.compile(r"l([0-9]+)h([0-9]+)(?:-|:|[.][.])h?([0-9]+)", re.IGNORECASE),
        "L{0}H{1} ... L{0}H{2}, each head by its name",
    ),
    (re.compile(r"h([0-9]+)", re.IGNORECASE), "L9H{0}, with its layer and no space"),
    (re.compile(r"kv([0-9]+|\*)[:_h-]([0-9]+|\*)|kv[.]?l?([0-9]+|\*)[.]?h([0-9]+|\*)", re.IGNORECASE), "KV{0}.{1}"),
    (re.compile(r"kv[._-]?l?([0-9]+|\*)", re.IGNORECASE), "KV{0}.*"),
    (re.compile(r"m(?:lp)?[._:-]?l?([0-9]+|\*)|l([0-9]+|\*)[._:-]?m(?:lp)?", re.IGNORECASE), "MLP{0}"),
    (re.compile(r"(?:layer)?[._:-]?([0-9]+)", re.IGNORECASE), "L{0}"),
    (re.compile(r"mlps?", re.IGNORECASE), "MLP*"),
    (re.compile(r"\*|all", re.IGNORECASE), "L*"),
)
"""(mistake, the right form), for hints."""


class Unit(NamedTuple):
    """One part of a set, such as L9H6.

    kind: "L" for all heads of a layer, "LH" for heads (L9H* is the set L9, but `each` takes its heads one by one), "KV"
    for the query heads of a key/value head, "MLP". layer: None for every layer (`*`). head: of "LH" and "KV"; None for
    every one (`*`).
    """

    kind: str
    layer: int | None
    head: int | None = None

    def __str__(self) -> str:
        layer, head = ("*" if number is None else number for number in (self.layer, self.head))
        return {"L": f"L{layer}", "LH": f"L{layer}H{head}", "KV": f"KV{layer}.{head}", "MLP": f"MLP{layer}"}[self.kind]

    def split(self, head_map: HeadMap) -> list[Unit]:
        """Return the units of one layer, head or key/value head that a pattern stands for; a unit alone stands for one.

        Layers without heads, and layers that lack the head, are skipped by a `*`. Raises InvalidHead if a layer or head
        that is named does not exist, or nothing is left.
        """
        if self.kind == "MLP":
            layers = range(head_map.num_layers) if self.layer is None else [self.layer]
            return [self._replace(layer=head_map.validate((layer, MLP))[0]) for layer in layers]
        found = []
        what = "key/value head" if self.kind == "KV" else "head"
        for layer in head_map.layers if self.layer is None else [head_map.layer(self.layer)]:
            of_layer = self._replace(layer=layer.index)
            if self.kind == "L":
                found.append(of_layer)
                continue
            count = _checked_groups(layer) if self.kind == "KV" else layer.num_heads
            if self.head is None:
                found += [of_layer._replace(head=head) for head in range(count)]
            elif self.head < count:
                found.append(of_layer)
            elif self.layer is not None:
                raise InvalidHead(f"no {what} {self.head}: layer {layer.index} has {count} {what}s, 0 to {count - 1}")
        if not found:
            raise InvalidHead(f"no {what} {self.head}: no layer has so many {what}s")
        return found

    def pairs(self, head_map: HeadMap) -> list[Pair]:
        """Return what a unit ablates, as pairs. Raises InvalidHead as `split` does."""
        found: list[Pair] = []
        for unit in self.split(head_map):
            assert unit.layer is not None
            if unit.kind == "MLP":
                found.append((unit.layer, MLP))
                continue
            layer = head_map.layer(unit.layer)
            heads: Iterable[int] = range(layer.num_heads)
            if unit.kind == "KV":  # query heads that share a key/value head lie side by side
                assert unit.head is not None
                size = layer.num_heads // layer.key_value_heads
                heads = range(unit.head * size, (unit.head + 1) * size)
            elif unit.head is not None:
                heads = [unit.head]
            found += [(unit.layer, head) for head in heads]
        return found


def _checked_groups(layer: AttentionLayer) -> int:
    """Return the number of key/value heads of a layer. Raises InvalidHead unless the query heads share them equally."""
    if layer.num_heads % layer.key_value_heads:
        raise InvalidHead(
            f"layer {layer.index} has {layer.num_heads} query heads for {layer.key_value_heads} key/value heads, so it "
            "is unknown which query heads share one"
        )
    return layer.key_value_heads


@dataclass(frozen=True)
class Units:
    """A set of heads and MLPs, before it is known which the model has. units: in the order as written, each once."""

    units: tuple[Unit, ...]

    @property
    def text(self) -> str:
        """The set in its normal form, such as L9H6+KV9.2; `parse_set` reads it."""
        return "+".join(map(str, self.units))

    def __str__(self) -> str:
        return self.text

    def heads(self, head_map: HeadMap) -> tuple[Pair, ...]:
        """Return the set as pairs, each once, sorted; MLPs as (layer, "mlp"), after the heads of their layer.

        Raises InvalidHead if the model lacks a layer or head, or if an MLP cannot be ablated.
        """
        return tuple(sorted({pair for unit in self.units for pair in unit.pairs(head_map)}, key=pair_order))


def pair_order(pair: Pair) -> tuple[int, bool, int]:
    """Return a sort key: layer by layer, heads before the MLP, as they run."""
    layer, head = pair
    return (layer, True, 0) if head == MLP else (layer, False, head)


def pair_label(pair: Pair) -> str:
    """Return a pair as text: L9H6 or MLP9."""
    layer, head = pair
    return f"MLP{layer}" if head == MLP else f"L{layer}H{head}"


def pair_of_label(label: str) -> Pair:
    """Return the pair that `pair_label` has written. Raises ValueError for any other text."""
    if label.startswith("MLP"):
        return int(label[3:]), MLP
    layer, head = label.removeprefix("L").split("H")
    return int(layer), int(head)


def parse_set(text: str) -> Units:
    """Return a set of heads and MLPs. text: units with spaces, commas or + between them, in any case.

    Raises InvalidHead, with the part that is no unit, and the form that was probably meant.
    """
    if not isinstance(text, str):
        raise InvalidHead(f'a {type(text).__name__} is not the text of a set: pass a text such as "L9H6 L9H9"')
    parts = re.findall(r"[(\[][^()\[\]]*[)\]]|[^\s,+]+", text)
    if not parts:
        raise InvalidHead(f"{shortened(text, 80)!r} names no heads: pass {ALLOWED}")
    return Units(tuple(dict.fromkeys(map(_unit, parts))))


def _unit(part: str) -> Unit:
    """Return the unit that a part of a text names. Raises InvalidHead."""
    for kind, form in _FORMS:
        if found := form.fullmatch(part):
            return Unit(kind, *(None if number == "*" else int(number) for number in found.groups()))
    hint = ""
    for mistake, right in _MEANT:
        if found := mistake.fullmatch(part):
            hint = f"did you mean {right.format(*(group for group in found.groups() if group is not None))}? "
            break
    raise InvalidHead(f"{shortened(part, 80)!r} is no head, layer or MLP: {hint}pass {ALLOWED}")


def each(text: str, head_map: HeadMap) -> list[Units]:
    """Return a set for each unit that the patterns of a text stand for, each once.

    L* stands for every layer, L*H* and L9H* for heads, KV*.* for key/value heads, MLP* for MLPs. Raises InvalidHead.
    """
    units = [unit for pattern in parse_set(text).units for unit in pattern.split(head_map)]
    return [Units((unit,)) for unit in dict.fromkeys(units)]


def _is_other_set(name: str, units: Units) -> bool:
    """Whether a name reads as a set of its own, and not as these units."""
    try:
        return set(parse_set(name).units) != set(units.units)
    except InvalidHead:
        return False


def read_sets(path: Path | str) -> list[tuple[str, Units]]:
    """Read a file of sets: (name, set) for each line, `NAME: UNITS` or `UNITS`, whose name is its normal form.

    The file is UTF-8, with or without a byte order mark; blank lines, and the rest of a line after #, are ignored.
    Raises InvalidHead, with the line, for a set that `parse_set` rejects and a name that is empty or not the first of
    its kind; and if the file cannot be read or has no sets.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason: Any = getattr(error, "strerror", None) or error
        raise InvalidHead(f"cannot read sets of heads from {one_line(path)}: {reason}") from None
    found: dict[str, Units] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, colon, rest = (part.strip() for part in line.partition(":"))
        try:
            units = parse_set(rest if colon else line)
            name = name if colon else units.text
            if not name:
                raise InvalidHead("the name before the colon is empty")
            if _is_other_set(name, units):
                raise InvalidHead(f"the name {shortened(name, 80)!r} is that of other heads: take another name")
            if name in found:
                raise InvalidHead(f"line {lines[name]} has the name {shortened(name, 80)!r} already: rename one")
        except InvalidHead as error:
            raise InvalidHead(f"{one_line(path.name)}, line {number}: {error}") from None
        found[name], lines[name] = units, number
    if not found:
        raise InvalidHead(f"{one_line(path)} has no sets of heads: write one a line, such as name movers: L9H6 L9H9")
    return list(found.items())
