"""Names of imputations, positions and sizes of sets, as a person writes them."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablation import choices
from ablation.choices import IMPUTATIONS, OF_REFERENCE, RESAMPLE, check_ks, parse_ks
from ablation.errors import InvalidAblation
from ablation.imputation import IMPUTATIONS as OF_ONE_PROMPT
from ablation.imputation import as_imputation
from ablation.reference import MEAN, MEAN_BY_POSITION
from ablation.studies.replacements import RESAMPLE as RESAMPLED


def test_names_are_those_of_the_package() -> None:
    plain = {name for name in IMPUTATIONS if ":" not in name}
    assert plain == {*OF_ONE_PROMPT, *OF_REFERENCE, RESAMPLE}
    assert (*OF_REFERENCE, RESAMPLE) == (MEAN, MEAN_BY_POSITION, RESAMPLED)


def test_every_imputation_has_a_meaning() -> None:
    for name in [*OF_ONE_PROMPT, *OF_REFERENCE, RESAMPLE, "scale:0.5", "values:x.npz"]:
        assert choices.meaning(name), name
    for name in ["values", "scale", "my own", "zero:1", ""]:
        assert choices.meaning(name) is None, name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("zero", "zero"),
        ("resample", "resample"),
        ("scale:0.50", "scale:0.5"),
        ("scale:2", "scale:2"),
        ("scale:-0", "scale:0"),
        ("scale:1e-3", "scale:0.001"),
        ("scale:0.1234567890123", "scale:0.1234567890123"),
    ],
)
def test_imputation_is_named_as_in_results(text: str, name: str) -> None:
    assert choices.imputation(text) == name
    if name.startswith("scale:"):
        assert as_imputation(name).name == name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("median", "invalid choice: 'median' .did you mean mean. choose from zero, mean, channel-mean, "),
        ("Zero", "did you mean zero"),
        ("reference_mean", "did you mean reference-mean"),
        ("scale", "names no finite number"),
        ("scale:", "names no finite number"),
        ("scale:nan", "names no finite number"),
        ("scale:inf", "names no finite number"),
        ("scale:1e999", "names no finite number"),
        ("scale:half", "names no finite number"),
        ("scale:0,5", "names no finite number"),
        ("values:", "names no file"),
        ("values:nowhere.npz", "names no file"),
        ("values", "names no file: pass values:FILE"),
        ("zero:1", "invalid choice: 'zero:1'"),
        ("", "invalid choice: ''"),
    ],
)
def test_unknown_imputation_is_refused(text: str, reason: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        choices.imputation(text)


def test_values_of_a_file_are_accepted(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", zeros=np.zeros((1, 2)))
    name = f"values:{tmp_path / 'v.npz'}"
    assert choices.imputation(name) == name


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("all", "all"),
        (" last ", "last"),
        ("0", (0,)),
        ("-1", (-1,)),
        ("0,3,-1", (0, 3, -1)),
        (" 0 , 3,3 ", (0, 3)),
        ("subject", "subject"),
        ("last_token", "last_token"),
    ],
)
def test_positions_are_parsed(text: str, positions: choices.Positions) -> None:
    assert choices.parse_positions(text) == positions


@pytest.mark.parametrize("text", ["", " ", "0,", ",", "1.5", "0-3", "0:3", "1 2", "--1", "1;2"])
def test_positions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidAblation, match="names no positions: pass all, last, integers such as 0,3,-1, or"):
        choices.parse_positions(text)


@pytest.mark.parametrize("text", ["all", "last", "0,3,-1", "subject"])
def test_label_of_positions_is_what_was_asked(text: str) -> None:
    assert choices.label(choices.parse_positions(text)) == text
    assert choices.label((-1,)) == "last"


@pytest.mark.parametrize("text", ["-1", "1.5", "few", "", "1e3"])
def test_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it is a whole number, at least 1"):
        choices.whole_number(1)(text)


def test_choices_import_no_torch() -> None:
    code = "import sys, ablation.choices, ablation.commands.arguments; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---- sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", [1]),
        ("1,2,4", [1, 2, 4]),
        (" 4 , 2,2 ", [2, 4]),
        ("1,2,...", [1, 2, 4, 8, 16, 20]),
        ("1,2,4,...", [1, 2, 4, 8, 16, 20]),
        ("1,2,4,…", [1, 2, 4, 8, 16, 20]),
        ("1,3,9,...", [1, 3, 9, 20]),
        ("4,6,9,...", [4, 6, 9, 13, 19, 20]),
        ("5,10,15,...", [5, 10, 15, 20]),
        ("1,2,3,...", list(range(1, 21))),
        ("2,4,6,...", [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        ("1,5,7,...", [1, 5, 7, 9, 11, 13, 15, 17, 19, 20]),
        ("10,20,...", [10, 20]),
        ("20", [20]),
        ("5,20,...", [5, 20]),
    ],
)
def test_parse_ks_reads_sizes(text: str, expected: list[int]) -> None:
    assert parse_ks(text, 20) == expected


@pytest.mark.parametrize(
    "text",
    ["", ",", "a", "1,", "1,,2", "-1", "1.5", "1 2", "...", "1,...", "1,...,4", "1;2", "²", "1,2,..", "9" * 5000],
)
def test_parse_ks_refuses_other_texts(text: str) -> None:
    with pytest.raises(InvalidAblation, match="--k is a list of sizes, such as 1,2,4,8") as error:
        parse_ks(text, 20)
    assert len(str(error.value)) < 300


def test_parse_ks_goes_on_without_rounding_of_the_factor() -> None:
    assert parse_ks("3,26,...", 2000) == [3, 26, 225, 1950, 2000]  # 26 / 3 as a float gives 1949


@pytest.mark.parametrize("text", ["2,2,...", "4,2,...", "1,4,2,..."])
def test_parse_ks_refuses_to_go_on_without_growth(text: str) -> None:
    with pytest.raises(InvalidAblation, match="does not grow"):
        parse_ks(text, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "none below 1"),
        ("0,1,...", "none below 1"),
        ("21", "no set of 21 heads: 20 heads are ranked"),
        ("1,21", "no set of 21 heads: 20 heads are ranked"),
    ],
)
def test_parse_ks_refuses_sizes_out_of_range(text: str, message: str) -> None:
    with pytest.raises(InvalidAblation, match=message):
        parse_ks(text, 20)


def test_sizes_that_go_on_end_with_all_heads() -> None:
    assert parse_ks("1,2,4,...", 3) == [1, 2, 3] and parse_ks("10,30,...", 20) == [10, 20]


def test_parse_ks_checks_the_text_before_the_model_is_known() -> None:
    assert parse_ks("4,2,30", None) == [2, 4, 30] and parse_ks("1,2,3,...", None) == [1, 2, 3]
    with pytest.raises(InvalidAblation, match="none below 1"):
        parse_ks("0", None)


@pytest.mark.parametrize("ks", [[1.5], ["1"], 3, None, [None], []])
def test_check_ks_refuses_what_is_no_list_of_integers(ks: Any) -> None:
    with pytest.raises(InvalidAblation, match="a list of integers|at least one size"):
        check_ks(ks, 20)
    assert check_ks(np.array([4, 2, 4]), 20) == [2, 4]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3000))
def test_parse_ks_goes_on_to_all_heads(first: int, step: int, heads: int) -> None:
    second = first + step
    if second > heads:
        return
    arithmetic = parse_ks(f"{first},{second},{second + step},...", heads + step)
    assert arithmetic == sorted({*range(first, heads + step, step), heads + step})
    geometric = parse_ks(f"{first},{second},...", heads)
    assert geometric[-1] == heads and geometric[:2] == [first, second][: len(geometric)]
    for before, after in itertools.pairwise(geometric[1:-1]):
        assert after == before * second // first, "rounded down"
