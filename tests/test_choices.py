"""Names of imputations and positions, as a person writes them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ablation import choices
from ablation.choices import IMPUTATIONS, OF_REFERENCE, RESAMPLE
from ablation.errors import InvalidAblation
from ablation.imputation import IMPUTATIONS as OF_ONE_PROMPT
from ablation.imputation import as_imputation
from ablation.reference import MEAN, MEAN_BY_POSITION
from ablation.replacements import RESAMPLE as RESAMPLED


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
    code = "import sys, ablation.choices, ablation.sweep_arguments; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
