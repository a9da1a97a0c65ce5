"""Imputations at positions, against an oracle; and what each imputation promises by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.decoders import FAMILIES, Decoder
from ablation.edits import Ablation, Edit, apply_edits
from ablation.errors import InvalidAblation, UnknownImputation
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation, Reads, Scale, Site, Values, as_imputation
from ablation.reference import record_z
from ablation.rows import Rows
from tests.surgery import KINDS, kind
from tests.test_hook import logits

LLAMA = Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


# ---- single imputations


def with_z(z: Tensor, imputation: str | Imputation, positions: Any = None, rows: Rows | None = None) -> Tensor:
    """Return z, [rows, tokens, 4 * 8], as the projection of layer 1 receives it with head 2 ablated in every row."""
    ablation = Ablation([(1, 2)], imputation, positions)
    edit = Edit(2, ablation.imputation, None, ablation.positions)
    return apply_edits(z, find_heads(LLAMA.shared()).layer(1), [edit], rows or Rows())[0]


NON_FINITE = torch.tensor([0.0, -0.0, 1e-45, -3.5, float("inf"), -float("inf"), float("nan"), 65504.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [None, (0, -1)])
def test_scale_by_one_changes_no_bit(dtype: torch.dtype, positions: Any) -> None:
    """Also where z is infinite, -0 or subnormal; NaN stays NaN."""
    z = NON_FINITE.to(dtype).repeat(2, 5, 4)
    edited = with_z(z, "scale:1", positions)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(edited.isnan(), z.isnan())
    assert torch.equal(edited.where(~z.isnan(), 0).view(bits), z.where(~z.isnan(), 0).view(bits))


@pytest.mark.parametrize("factor", ["scale:0", "scale:-0", "scale:0e9"])
@pytest.mark.parametrize("positions", [None, (0, -1)])
def test_scale_by_zero_is_zero_imputation(factor: str, positions: Any) -> None:
    """Bit for bit, also where z is NaN or infinite: 0 times NaN would be NaN, and 0 times -1 would be -0."""
    z = NON_FINITE.repeat(2, 5, 4)
    bits = with_z(z, factor, positions).view(torch.int32)
    assert torch.equal(bits, with_z(z, "zero", positions).view(torch.int32))


def test_scale_rounds_once() -> None:
    z = torch.linspace(-3, 3, 160).reshape(1, 5, 32).bfloat16()
    want = (z.double() * 0.3).bfloat16()[..., 16:24]
    assert torch.equal(with_z(z, "scale:0.3")[..., 16:24], want)


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (0.5, "scale:0.5"),
        (1, "scale:1"),
        (1.0, "scale:1"),
        (-0.0, "scale:0"),
        (np.float64(0.25), "scale:0.25"),
        (0.1234567, "scale:0.1234567"),
        (0.1234568, "scale:0.1234568"),
        (10**30, "scale:1e+30"),
    ],
)
def test_scale_is_named_by_all_digits_of_its_factor(factor: Any, name: str) -> None:
    """Two factors of one name would be averaged as draws of one imputation."""
    assert Scale(factor).name == name
    assert as_imputation(name) == Scale(factor) and hash(as_imputation(name)) == hash(Scale(factor))


@pytest.mark.parametrize(
    "factor", [True, "0.5", None, float("nan"), float("inf"), 10**400, -(10**4000), 1j, torch.tensor(0.5)]
)
def test_scale_by_no_finite_number_is_refused(factor: Any) -> None:
    with pytest.raises(UnknownImputation, match="^scale multiplies z by a"):
        Scale(factor)


@pytest.mark.parametrize("name", ["scale", "scale:", "scale:x", "scale:nan", "scale:inf", "scale:1e400", "Scale:1"])
def test_name_without_a_factor_is_unknown(name: str) -> None:
    with pytest.raises(UnknownImputation, match="use one of 'zero', 'mean', 'channel-mean', 'scale:0.5', or an"):
        as_imputation(name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mean", "channel-mean"])
def test_means_ignore_padding_that_is_not_finite(name: str, side: str) -> None:
    z = torch.linspace(-3, 3, 160).reshape(1, 5, 32)
    alone = with_z(z, name)
    pad = torch.full((1, 2, 32), float("nan"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 1, 0, 0]])
    padded = with_z(torch.cat([pad, z] if side == "left" else [z, pad], dim=1), name, rows=Rows(mask))
    real = mask[0].bool()
    torch.testing.assert_close(padded[:, real], alone, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_imputation_leaves_its_argument_as_it_was(name: str) -> None:
    z = torch.linspace(-3, 3, 160).reshape(1, 5, 32)
    before, imputation = z.clone(), kind(name, LLAMA).imputation
    edited = with_z(z, imputation, [1])
    assert torch.equal(z, before)
    assert torch.equal(edited[:, [0, 2, 3, 4]], z[:, [0, 2, 3, 4]]) and not torch.equal(edited, z)


# ---- given values


@pytest.mark.parametrize(
    "values",
    [
        None,
        [torch.zeros(4, 8)],
        {},
        {0: [[0.0] * 8] * 4},
        {0: torch.zeros(8)},
        {0: torch.zeros(1, 1, 4, 8)},
        {0: torch.zeros(4, 8, dtype=torch.long)},
        {0: torch.zeros(4, 8), 1: torch.zeros(2, 4, 8)},
        {0: torch.zeros(3, 4, 8), 1: torch.zeros(2, 4, 8)},
    ],
    ids=["None", "list", "empty", "lists", "1-D", "4-D", "integers", "both kinds", "lengths"],
)
def test_values_of_other_kinds_are_refused(values: Any) -> None:
    with pytest.raises(UnknownImputation, match="^values "):
        Values(values)


def test_values_of_another_model_are_refused() -> None:
    """In `ablate` and in lists of ablations alike, before anything runs."""
    model = LLAMA.shared()
    narrow, short = ({layer: torch.zeros(shape) for layer in range(3)} for shape in ((4, 6), (3, 8)))
    with HeadAblation(model) as hook:
        for values, reason in (
            (
                narrow,
                r"in layer \d are of 4 heads of 6 channels, but the layer has 4 heads of 8: they are of an",
            ),
            (short, r"in layer \d are of 3 heads of 8 channels, but the layer has 4 heads of 8"),
            ({0: torch.zeros(4, 8)}, "do not include layer 1"),
        ):
            with pytest.raises(InvalidAblation, match=reason):
                hook.ablate([(1, 2)], Values(values))
            with pytest.raises(InvalidAblation, match=reason):
                Ablation([(0, 1), (1, 2)], Values(values)).validated(hook.heads)
        assert hook.edits == {}
        hook.ablate([(0, 1)], Values({0: torch.zeros(4, 8)}))  # other layers need no values
        logits(model, IDS)


def test_prompt_beyond_the_values_is_refused() -> None:
    model, values = LLAMA.shared(), Values({layer: torch.zeros(4, 4, 8) for layer in range(3)}, "mine")
    with HeadAblation(model) as hook:
        hook.ablate([(1, 2)], values)
        with pytest.raises(InvalidAblation, match="the values of 'mine' end at position 3, the prompt at 4"):
            logits(model, IDS)
        logits(model, IDS[:, :4])
        hook.ablate([(1, 2)], values, [0, 3])  # tokens that stay as they are need no values
        logits(model, IDS)


def test_padding_needs_no_values() -> None:
    """Four real tokens in a row of seven."""
    model, values = LLAMA.shared(), Values({layer: torch.ones(4, 4, 8) for layer in range(3)})
    with HeadAblation(model) as hook:
        hook.ablate([(1, 2)], values)
        alone = logits(model, IDS[:, :4])
        for left, right in ((3, 0), (0, 3), (1, 2)):
            mask = torch.tensor([[0] * left + [1] * 4 + [0] * right])
            ids = torch.nn.functional.pad(IDS[:, :4], (left, right))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            padded = logits(model, ids, attention_mask=mask, position_ids=positions)
            assert_close(padded[:, left : left + 4], alone, f"the logits with padding of {left} and {right}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_rounded_to_the_dtype_of_z(dtype: torch.dtype) -> None:
    z = torch.zeros(1, 5, 32, dtype=dtype)
    value = torch.full((4, 8), 1 / 3, dtype=torch.float64)
    assert torch.equal(with_z(z, Values({1: value}))[..., 16:24], value[0].to(dtype).expand(1, 5, 8))


def test_z_of_the_same_prompt_is_the_identity() -> None:
    """Bit for bit, in every layer at once: the shapes are the same."""
    for family in FAMILIES:
        decoder = Decoder(family, num_layers=2, num_heads=2, head_dim=8)
        model = decoder.shared()
        own = Values(record_z(model, IDS[0].tolist()), "own")
        with HeadAblation(model) as hook:
            clean = logits(model, IDS)
            hook.ablate(decoder.heads(), own)
            assert_identical(logits(model, IDS), clean, f"the logits of {family} with its own z")
            assert {count.changed for counts in hook.receipt.counts.values() for count in counts} == {0}


# ---- imputations of the user


@dataclass
class Unhashable(Imputation):
    name = "unhashable"
    reads = "nothing"
    factor: float = 0.5


class Undecided(Imputation):
    name = "undecided"
    reads = "nothing"
    by_position = 1  # type: ignore[assignment]


class Reading(Imputation):
    name = "reading"
    reads = "tokens"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("imputation", "reason"),
    [
        (Unhashable(), "Unhashable has to be hashable, as a dataclass is with `frozen=True` or `eq=False`"),
        (Undecided(), "and `by_position`, a bool"),
        (Reading(), "`reads`, which is 'nothing' or 'token' or 'row'"),
    ],
)
def test_incomplete_imputation_is_a_named_error(imputation: Imputation, reason: str) -> None:
    with pytest.raises(UnknownImputation, match=reason):
        Ablation([(0, 1)], imputation)


class Other(Imputation):
    name = "other"
    reads: Reads = "token"  # type: ignore[misc]

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        return z.double()


@pytest.mark.parametrize("positions", [None, (0,)])
def test_values_of_another_dtype_are_refused(positions: Any) -> None:
    with pytest.raises(InvalidAblation, match="'other' returned torch.float64 on cpu, but z is torch.float32 on cpu"):
        with_z(torch.zeros(1, 5, 32), Other(), positions)


class Seen(Imputation):
    """Remembers its sites."""

    name = "seen"
    reads = "row"

    def __init__(self, by_position: bool) -> None:
        self.by_position = by_position  # type: ignore[misc]
        self.sites: list[Site] = []

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        self.sites.append(site)
        return z.new_zeros(())


def test_site_tells_layer_heads_mask_and_positions() -> None:
    model, mask = LLAMA.shared(), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    for by_position in (False, True):
        seen = Seen(by_position)
        with HeadAblation(model) as hook:
            hook.ablate([(2, 3), (2, 0)], seen)
            logits(model, torch.zeros(2, 5, dtype=torch.long), attention_mask=mask)
        (site,) = seen.sites
        assert (site.layer, site.heads.tolist(), site.longest) == (2, [3, 3, 0, 0], 5)
        assert site.mask is not None and site.mask.tolist() == mask.tolist() * 2
        if by_position:
            assert site.positions is not None and site.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]] * 2
        else:
            assert site.positions is None


# ---- many imputations


class Counted(Imputation):
    """Counts how often two of its kind are compared or hashed."""

    name = "counted"
    reads = "nothing"
    asked = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        Counted.asked += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Counted.asked += 1
        return isinstance(other, Counted) and other.number == self.number

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        Counted.asked += 1
        return z.new_full((), self.number)


def test_work_grows_linearly_with_the_imputations() -> None:
    """An object for each edit: none is compared with all others."""
    layer = find_heads(LLAMA.shared()).layer(1)

    def asked(edits: int) -> int:
        z, of = torch.zeros(edits, 1, 32), [Edit(0, Counted(number), number) for number in range(edits)]
        Counted.asked = 0
        edited, counts = apply_edits(z, layer, of, Rows())
        assert edited[:, 0, 0].tolist() == list(range(edits)) and (counts[:, 1] == 8).all()
        return Counted.asked

    assert asked(400) <= 4.5 * asked(100)


def test_equal_imputations_are_one_group() -> None:
    """Objects of equal value are imputed in one call, as are strings."""
    calls = []

    @dataclass(frozen=True)
    class Grouped(Imputation):
        factor: float
        name = "grouped"
        reads = "token"

        def __call__(self, z: Tensor, site: Site) -> Tensor:
            calls.append(len(z))
            return z * self.factor

    layer = find_heads(LLAMA.shared()).layer(1)
    edits = [Edit(row % 4, Grouped(row % 2), row, (0,) if row % 3 else None) for row in range(12)]
    apply_edits(torch.ones(12, 5, 32), layer, edits, Rows())
    assert sorted(calls) == [2, 2, 4, 4]
