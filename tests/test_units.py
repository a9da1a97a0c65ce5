"""Sets of heads and MLPs, as a person writes them."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ablation.errors import InvalidHead
from ablation.heads import AttentionLayer, HeadMap
from ablation.units import Pair, Unit, Units, each, pair_order, parse_set, read_sets


def layer(index: int, num_heads: int, key_value_heads: int) -> AttentionLayer:
    block = nn.Linear(2, 2)
    return AttentionLayer(index, block, f"layers.{index}.o_proj", block, num_heads, 1, key_value_heads)


HYBRID = HeadMap(nn.Identity(), 4, (layer(0, 4, 2), layer(1, 2, 2), layer(3, 6, 1)))
"""Layer 2 has no heads."""
EVERY = list(HYBRID)


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("L0H1", [(0, 1)]),
        ("L3H5 L0H1, L0H1+l00h00", [(0, 0), (0, 1), (3, 5)]),
        ("L0", [(0, head) for head in range(4)]),
        ("l0h*", [(0, head) for head in range(4)]),
        ("L*", EVERY),
        ("L*H*", EVERY),
        ("L*H2", [(0, 2), (3, 2)]),
        ("KV0.1", [(0, 2), (0, 3)]),
        ("kv1.1", [(1, 1)]),
        ("KV3.*", [(3, head) for head in range(6)]),
        ("KV*.0", [(0, 0), (0, 1), (1, 0), *((3, head) for head in range(6))]),
        ("KV*.*", EVERY),
        ("L1H1 L1 KV1.0", [(1, 0), (1, 1)]),
    ],
)
def test_set_stands_for_heads(text: str, heads: list[tuple[int, int]]) -> None:
    assert list(parse_set(text).heads(HYBRID)) == heads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L2", "layer 2 has no attention heads"),
        ("L2H0", "layer 2 has no attention heads"),
        ("KV2.0", "layer 2 has no attention heads"),
        ("L4", "no layer 4: the model has 4 layers, 0 to 3"),
        ("L0H4", "no head 4: layer 0 has 4 heads, 0 to 3"),
        ("L1 KV0.2", "no key/value head 2: layer 0 has 2 key/value heads, 0 to 1"),
        ("L*H6", "no head 6: no layer has so many heads"),
        ("KV*.2", "no key/value head 2: no layer has so many key/value heads"),
    ],
)
def test_set_that_the_model_lacks_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidHead, match=f"^{re.escape(message)}$"):
        parse_set(text).heads(HYBRID)
    with pytest.raises(InvalidHead, match=f"^{re.escape(message)}$"):
        each(text, HYBRID)


def test_unequal_groups_are_refused() -> None:
    heads = HeadMap(nn.Identity(), 1, (layer(0, 5, 2),))
    assert len(parse_set("L0").heads(heads)) == 5
    for text in ("KV0.0", "KV*.*"):
        with pytest.raises(InvalidHead, match="layer 0 has 5 query heads for 2 key/value heads, so it is unknown"):
            parse_set(text).heads(heads)


@pytest.mark.parametrize(
    ("text", "part", "meant"),
    [
        ("L0H1 9.6", "9.6", "L9H6"),
        ("9:6", "9:6", "L9H6"),
        ("(9, 6), (9, 7)", "(9, 6)", "L9H6"),
        ("[9,6]", "[9,6]", "L9H6"),
        ("L9.6", "L9.6", "L9H6"),
        ("a9.h6", "a9.h6", "L9H6"),
        ("9H6", "9H6", "L9H6"),
        ("H6L9", "H6L9", "L9H6"),
        ("L9H-1", "L9H-1", "L9H0 (heads are counted from 0)"),
        ("L9H6-9", "L9H6-9", "L9H6 ... L9H9, each head by its name"),
        ("L9 H6", "H6", "L9H6, with its layer and no space"),
        ("96", "96", "L96"),
        ("layer9", "layer9", "L9"),
        ("M9", "M9", "MLP9"),
        ("L9.mlp", "L9.mlp", "MLP9"),
        ("MLP", "MLP", "MLP*"),
        ("KV9", "KV9", "KV9.*"),
        ("KV9H2", "KV9H2", "KV9.2"),
        ("*", "*", "L*"),
        ("MLP9H0", "MLP9H0", None),
        ("L9H", "L9H", None),
        ("L٩H6", "L٩H6", None),
        ("L" + "9" * 5000, None, None),
        ("LICENSE", "LICENSE", None),
    ],
)
def test_text_that_is_no_set_names_what_was_meant(text: str, part: str | None, meant: str | None) -> None:
    with pytest.raises(InvalidHead) as caught:
        parse_set(text)
    message = str(caught.value)
    assert part is None or message.startswith(f"{part!r} is no head, layer or MLP: ")
    assert ("did you mean" in message) == (meant is not None)
    assert "pass L9H6 (a head), " in message and len(message) < 500
    if meant is not None:
        assert f"did you mean {meant}? " in message
        parse_set(meant.split(",")[0].split(" ")[0])


@pytest.mark.parametrize("text", ["", " ", ",", "+"])
def test_empty_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidHead, match="names no heads: pass L9H6"):
        parse_set(text)


def test_set_is_a_text() -> None:
    with pytest.raises(InvalidHead, match="a list is not the text of a set"):
        parse_set([(0, 1)])  # type: ignore[arg-type]


numbers = st.none() | st.integers(0, 4)
units = st.one_of(
    st.tuples(st.sampled_from(["L", "MLP"]), numbers).map(lambda parts: Unit(*parts)),
    st.tuples(st.sampled_from(["LH", "KV"]), numbers, numbers).map(lambda parts: Unit(*parts)),
)
sets = st.lists(units, min_size=1, max_size=4, unique=True).map(lambda found: Units(tuple(found)))


@given(sets, st.sampled_from(["+", " ", ", ", " + "]), st.booleans())
def test_text_of_a_set_is_read_as_the_set(found: Units, separator: str, lower: bool) -> None:
    assert parse_set(str(found)) == found
    written = found.text.replace("+", separator)
    assert parse_set(written.lower() if lower else written) == found


def enumerated(unit: Unit) -> list[tuple[int, int]]:
    """What a unit stands for, by looking at every head of the model."""
    found = []
    for layer, head in EVERY:
        heads, groups = {0: (4, 2), 1: (2, 2), 3: (6, 1)}[layer]
        number = head * groups // heads if unit.kind == "KV" else head
        if unit.layer in (None, layer) and unit.head in (None, number):
            found.append((layer, head))
    return found


@given(sets)
def test_set_stands_for_what_an_enumeration_finds(found: Units) -> None:
    heads_only = [unit for unit in found.units if unit.kind != "MLP"]
    expected = [enumerated(unit) for unit in heads_only]
    if not heads_only:
        return
    if not all(expected):
        with pytest.raises(InvalidHead):
            Units(tuple(heads_only)).heads(HYBRID)
        return
    assert list(Units(tuple(heads_only)).heads(HYBRID)) == sorted(set(itertools.chain(*expected)))
    # Patterns one by one are parts of the set, and name themselves.
    parts = each("+".join(map(str, heads_only)), HYBRID)
    assert {pair for part in parts for pair in part.heads(HYBRID)} == set(itertools.chain(*expected))
    assert [each(part.text, HYBRID) for part in parts if "H" in part.text] == [
        [part] for part in parts if "H" in part.text
    ]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("L*", ["L0", "L1", "L3"]),
        ("L0", ["L0"]),
        ("L1H*", ["L1H0", "L1H1"]),
        ("L*H3", ["L0H3", "L3H3"]),
        ("KV*.*", ["KV0.0", "KV0.1", "KV1.0", "KV1.1", "KV3.0"]),
        ("L1H1 L1H* L1", ["L1H1", "L1H0", "L1"]),
    ],
)
def test_each_gives_a_set_for_each_unit(text: str, texts: list[str]) -> None:
    assert [found.text for found in each(text, HYBRID)] == texts


def test_mlp_comes_after_the_heads_of_its_layer() -> None:
    pairs: list[Pair] = [(1, 0), (0, "mlp"), (0, 11), (0, 2)]
    assert sorted(pairs, key=pair_order) == [(0, 2), (0, 11), (0, "mlp"), (1, 0)]


def test_file_has_a_set_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "sets.txt"
    path.write_bytes(
        "\ufeff# heads of a paper\r\n\r\nname movers: L9H6, L9H9 # both\r\nL10\r\n  späte Köpfe :KV0.1\r\n".encode()
    )
    found = [("name movers", "L9H6+L9H9"), ("L10", "L10"), ("späte Köpfe", "KV0.1")]
    assert [(name, units.text) for name, units in read_sets(path)] == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L0\n\na: L9.6", "sets.txt, line 3: 'L9.6' is no head"),
        ("a: L0\nb: L1\na : L2", "sets.txt, line 3: line 1 has the name 'a' already: rename one"),
        ("L0H1 L1\nl0h01,L1", r"sets.txt, line 2: line 1 has the name 'L0H1\+L1' already"),
        (": L0", "sets.txt, line 1: the name before the colon is empty"),
        ("a:", "sets.txt, line 1: '' names no heads"),
        ("# nothing\n", "sets.txt has no sets of heads: write one a line"),
        ("", "sets.txt has no sets of heads"),
        (b"L0\xff", "cannot read sets of heads from .*sets.txt: .*utf-8"),
    ],
)
def test_file_with_a_fault_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "sets.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidHead, match=message):
        read_sets(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InvalidHead, match="cannot read sets of heads from"):
            read_sets(path)


def test_notation_needs_no_torch() -> None:
    code = "import sys, ablation.units; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_name_of_a_set_is_not_that_of_other_heads(tmp_path: Path) -> None:
    path = tmp_path / "sets.txt"
    path.write_text("l0h5: L0H5\nearly: L0H9\n")
    assert [name for name, _ in read_sets(path)] == ["l0h5", "early"]
    path.write_text("L0H5: L0H9\n")
    with pytest.raises(InvalidHead, match="line 1: the name 'L0H5' is that of other heads: take another name"):
        read_sets(path)
