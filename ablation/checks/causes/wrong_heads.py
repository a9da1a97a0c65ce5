"""Known mistakes in heads and layers: which heads are ablated instead of the named ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ablation.checks.causes.simulation import Mistake, Setting
from ablation.checks.imputed import Pair

Renamed = Callable[[int, int, Setting], list[Pair]]
"""(layer, head, setting) -> the heads that are ablated for this one."""


def _pairs(renamed: Renamed) -> Callable[[Setting], list[tuple[Pair, Pair]]]:
    def pairs(setting: Setting) -> list[tuple[Pair, Pair]]:
        known = set(setting.found)
        of_heads = [((layer, head), renamed(layer, head, setting)) for layer, head in setting.case.heads]
        return [(named, edited) for named, many in of_heads for edited in many if edited in known]

    return pairs


def _heads(setting: Setting) -> int:
    return setting.found.layers[0].num_heads


def _last(setting: Setting) -> int:
    return setting.found.num_layers - 1


def _group(setting: Setting) -> int:
    """Return how many query heads share a key/value head."""
    layer = setting.found.layers[0]
    return layer.num_heads // layer.key_value_heads


def _tiled(layer: int, head: int, setting: Setting) -> list[Pair]:
    shared, group = _heads(setting) // _group(setting), _group(setting)
    return [(layer, head % shared * group + head // shared)]


def _sorted_by_name(layer: int, head: int, setting: Setting) -> list[Pair]:
    return [(int(sorted(map(str, range(setting.found.num_layers)))[layer]), head)]


def _twelve(layer: int, head: int, setting: Setting) -> list[Pair]:
    return [divmod(12 * layer + head, 12)] if _heads(setting) <= 12 else [((12 * layer + head) // 12, head % 12)]


def _by_order(layer: int, head: int, setting: Setting) -> list[Pair]:
    layers = setting.found.layers
    return [(layers[layer].index, head)] if layer < len(layers) else []


NEXT_HEAD = "the head after the named one is ablated: heads are counted from another number than 0"
HEAD_BEFORE = "the head before the named one is ablated: the code counts heads from 1, the specification from 0"
OTHER_HEADS: tuple[tuple[str, Renamed], ...] = (
    (NEXT_HEAD, lambda layer, head, setting: [(layer, (head + 1) % _heads(setting))]),
    (NEXT_HEAD, lambda layer, head, setting: [(layer, head + 1)]),
    (HEAD_BEFORE, lambda layer, head, setting: [(layer, head - 1)]),
    (HEAD_BEFORE, lambda layer, head, setting: [(layer, (head - 1) % _heads(setting))]),
    (
        "heads are counted from the end: head 0 ablates the last one",
        lambda layer, head, setting: [(layer, _heads(setting) - 1 - head)],
    ),
    (
        "layers are counted from the end: layer 0 ablates the last one",
        lambda layer, head, setting: [(_last(setting) - layer, head)],
    ),
    ("the head is ablated in the next layer", lambda layer, head, setting: [(layer + 1, head)]),
    (
        "the head is ablated in the layer before: the code counts layers from 1, the specification from 0",
        lambda layer, head, setting: [(layer - 1, head)],
    ),
    ("the pair (layer, head) is read as (head, layer)", lambda layer, head, setting: [(head, layer)]),
    (
        "the head is ablated in every layer, not only in the named one",
        lambda layer, head, setting: [(other.index, head) for other in setting.found.layers],
    ),
    (
        "the head is also ablated in all layers after the named one",
        lambda layer, head, setting: [(o.index, head) for o in setting.found.layers if o.index >= layer],
    ),
    (
        "the head is also ablated in all layers before the named one",
        lambda layer, head, setting: [(o.index, head) for o in setting.found.layers if o.index <= layer],
    ),
    (
        "the hooks of all layers act as that of the last layer: a function that is created in a loop sees the last "
        "value of the loop's variable",
        lambda layer, head, setting: [(o.index, head) for o in setting.found.layers if layer == _last(setting)],
    ),
    (
        "all heads of the layer are ablated, not only the named one",
        lambda layer, head, setting: [(layer, other) for other in range(_heads(setting))],
    ),
    (
        "all query heads that share the key/value head are ablated, not only the named one",
        lambda layer, head, setting: [
            (layer, head // _group(setting) * _group(setting) + at) for at in range(_group(setting))
        ],
    ),
    (
        "query heads are counted as if key/value heads were tiled; they are repeated: the query heads of a key/value "
        "head are neighbours",
        _tiled,
    ),
    (
        "head 0 is not ablated: the code tests `if head`, and 0 is false",
        lambda layer, head, setting: [(layer, head)][:head],
    ),
    (
        "layer 0 is not ablated: the code tests `if layer`, and 0 is false",
        lambda layer, head, setting: [(layer, head)][:layer],
    ),
    *(
        (
            f"only the first {count} layers are ablated",
            lambda layer, head, setting, count=count: [(layer, head)] * (layer < count),
        )
        for count in (1, 2, 3, 4, 6, 8, 10, 12)
    ),
    (
        "the last layer is not ablated: the loop over the layers ends one too early",
        lambda layer, head, setting: [(layer, head)] * (layer < _last(setting)),
    ),
    (
        "layers are sorted by their names, so layer 10 comes before layer 2",
        _sorted_by_name,
    ),
    (
        "heads are numbered through all layers with 12 heads per layer, as in GPT-2 small",
        _twelve,
    ),
    (
        "the layers with heads are numbered on their own: layers without heads count, too",
        _by_order,
    ),
)


def _only(setting: Setting, kept: Callable[[list[Pair], Pair], bool]) -> list[tuple[Pair, Pair]]:
    heads = list(setting.case.heads)
    return [(pair, pair) for pair in heads if kept(heads, pair)]


SETS: tuple[tuple[str, Callable[[list[Pair], Pair], bool]], ...] = (
    (
        "of several heads of a layer, only the one named last is ablated: each head overwrites the one before it",
        lambda heads, pair: pair == [other for other in heads if other[0] == pair[0]][-1],
    ),
    (
        "of several heads of a layer, only the one named first is ablated",
        lambda heads, pair: pair == next(other for other in heads if other[0] == pair[0]),
    ),
    (
        "of heads in several layers, only those of the layer named first are ablated",
        lambda heads, pair: pair[0] == heads[0][0],
    ),
    (
        "of heads in several layers, only those of the layer named last are ablated",
        lambda heads, pair: pair[0] == heads[-1][0],
    ),
    ("of several heads, only the first is ablated", lambda heads, pair: pair == heads[0]),
    ("of several heads, only the last is ablated", lambda heads, pair: pair == heads[-1]),
)


LATE_HEAD = (
    "the hooks of all heads act as that of the last one: a function that is created in a loop sees the last value of "
    "the loop's variable"
)


def _late_head(setting: Setting) -> list[tuple[Pair, Pair]]:
    """Each named head's layer ablates the head that is named last."""
    last, known = setting.case.heads[-1][1], set(setting.found)
    return [((layer, head), (layer, last)) for layer, head in setting.case.heads if (layer, last) in known]


def _late_heads(setting: Setting) -> list[tuple[Pair, Pair]]:
    """Each named layer ablates the heads of the layer that is named last."""
    heads, known = setting.case.heads, set(setting.found)
    of_last = [head for layer, head in heads if layer == heads[-1][0]]
    first = {layer: (layer, head) for layer, head in reversed(heads)}
    return [(first[layer], (layer, head)) for layer in first for head in of_last if (layer, head) in known]


def _inverted(setting: Setting) -> list[tuple[Pair, Pair]]:
    """Each named layer ablates all heads but the named ones."""
    first = {layer: (layer, head) for layer, head in reversed(setting.case.heads)}
    return [(first[pair[0]], pair) for pair in setting.found if pair[0] in first and pair not in setting.case.heads]


WRONG_HEADS = (
    Mistake("all heads of the layer are ablated but the named ones: the mask of heads is inverted", pairs=_inverted),
    *(Mistake(LATE_HEAD, pairs=pairs, needs=lambda case: len(case.heads) > 1) for pairs in (_late_head, _late_heads)),
    *(Mistake(cause, pairs=_pairs(renamed)) for cause, renamed in OTHER_HEADS),
    *(Mistake(cause, pairs=partial(_only, kept=kept), needs=lambda case: len(case.heads) > 1) for cause, kept in SETS),
)
