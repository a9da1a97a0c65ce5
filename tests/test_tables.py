"""The long table of a result: the CSV file, the frame and the Parquet file hold the same values."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation import tables
from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run
from ablation.errors import AblationError
from ablation.results import METRICS, Result
from ablation.tables import COLUMNS, to_frame, write_csv, write_parquet
from tests.comparing import IDS
from tests.synthetic import synthetic

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
INTEGERS = ["prompt_index", "layer", "head"]
NUMBERS = ["clean", "ablated", "change"]
TEXTS = ["prompt", "target", "control", "group", "imputation", "positions", "heads", "metric"]
AWKWARD = ['say "yes"', "two\nlines", "a,b", "\t $x$ '", "日本 \u2028", ' " Germany" ', "=1+1", "r\r", ""]
"""Texts that a CSV file must quote, or that a spreadsheet could misread."""

pd = pytest.importorskip("pandas")


def with_texts(*texts: str, group: str | None = "Europe") -> Result:
    """An invented result with one prompt for each text, which is also the target."""
    result = synthetic(2, 3, prompts=len(texts))
    prompts = [
        replace(prompt, prompt=text, target_text=text, group=group)
        for prompt, text in zip(result.prompts, texts, strict=True)
    ]
    return replace(result, prompts=tuple(prompts))


def of_sets() -> Result:
    """A result of ablations of no head, of one, and of two."""
    return run(GPT2.shared(), IDS, [Ablation([]), Ablation([(1, 2)]), Ablation([(0, 1), (1, 0)], "mean")])


def written_csv(result: Result, folder: Path) -> Path:
    write_csv(result, folder / "results.csv")
    return folder / "results.csv"


def read_csv(path: Path) -> Any:
    """Read a table as a user of pandas would; empty texts are NaN. Before version 3, pandas rounds unless told."""
    return pd.read_csv(path, **({"float_precision": "round_trip"} if pd.__version__ < "3" else {}))


def assert_same_rows(one: Any, other: Any) -> None:
    """Assert that two frames hold the same values, whatever their dtypes; empty and missing texts are the same."""
    assert list(one.columns) == list(other.columns) == list(COLUMNS) and len(one) == len(other)
    for column in [*INTEGERS, *NUMBERS]:
        values = [frame[column].astype(float).to_numpy() for frame in (one, other)]
        assert np.array_equal(values[0], values[1], equal_nan=True), column
    for column in TEXTS:
        texts = [frame[column].astype(object).where(frame[column].notna(), "").tolist() for frame in (one, other)]
        assert texts[0] == texts[1], column


def test_frame_has_a_row_for_each_prompt_ablation_and_metric() -> None:
    result = synthetic(2, 3, prompts=2)
    frame = to_frame(result)
    assert list(frame.columns) == list(COLUMNS) and len(frame) == 2 * 12 * len(METRICS)
    for metric in METRICS:
        for index in range(2):
            rows = frame[(frame.metric == metric) & (frame.prompt_index == index)]
            assert rows.ablated.tolist() == result.ablated[metric][index].tolist()
            assert rows.clean.unique().tolist() == [result.clean[metric][index]]
            keys = list(zip(rows.imputation, rows.layer, rows["head"], rows.heads, strict=True))
            assert keys == [(key.imputation, *key.heads[0], key.label) for key in result.ablations]
            expected = np.full(12, np.nan) if metric == "argmax" else result.change(metric)[index]
            assert np.array_equal(rows.change.to_numpy(), expected, equal_nan=True), metric


def test_frame_has_small_dtypes() -> None:
    dtypes = to_frame(synthetic(2, 3, prompts=2)).dtypes
    assert dtypes["prompt_index"] == np.int32 and {str(dtypes[name]) for name in ("layer", "head")} == {"Int32"}
    assert all(dtypes[name] == np.float64 for name in NUMBERS)
    assert all(isinstance(dtypes[name], pd.CategoricalDtype) for name in TEXTS)


def test_frame_is_that_of_the_result_method() -> None:
    result = synthetic(2, 3, prompts=2)
    pd.testing.assert_frame_equal(result.to_frame(), to_frame(result))


def test_csv_opens_in_pandas_with_the_right_dtypes(tmp_path: Path) -> None:
    result = with_texts("Berlin is", "Paris is")
    frame = read_csv(written_csv(result, tmp_path))
    assert all(frame[name].dtype == np.int64 for name in INTEGERS)
    assert all(frame[name].dtype == np.float64 for name in NUMBERS)
    assert all(pd.api.types.is_string_dtype(frame[name]) for name in TEXTS)


@pytest.mark.parametrize("prompts", [1, 3])
def test_csv_equals_the_frame(tmp_path: Path, prompts: int) -> None:
    result = synthetic(2, 3, prompts=prompts)
    assert_same_rows(read_csv(written_csv(result, tmp_path)), to_frame(result))


def test_csv_of_a_real_result_loses_no_digit(tmp_path: Path) -> None:
    result = run(
        GPT2.shared(), IDS, [Ablation([(0, 1)]), Ablation([(1, 2)], "mean")], metrics={"own": lambda x: x[:, 0]}
    )
    frame = read_csv(written_csv(result, tmp_path))
    assert_same_rows(frame, to_frame(result))
    for metric in (*METRICS, "own"):
        rows = frame[frame.metric == metric]
        assert rows.ablated.tolist() == result.ablated[metric][0].tolist(), metric
        assert rows.clean.tolist() == 2 * result.clean[metric].tolist(), metric


def test_awkward_texts_survive_csv(tmp_path: Path) -> None:
    result = with_texts(*AWKWARD)
    path = written_csv(result, tmp_path)
    assert_same_rows(read_csv(path), to_frame(result))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert list(dict.fromkeys(row["prompt"] for row in rows)) == AWKWARD
    assert {row["group"] for row in rows} == {"Europe"}


def test_lone_surrogate_is_escaped(tmp_path: Path) -> None:
    """It stands for a byte that is not UTF-8. JSON can hold it, unlike CSV and Parquet."""
    result = with_texts("a \udcff b", group="\udcff")
    for frame in (read_csv(written_csv(result, tmp_path)), to_frame(result)):
        assert frame.prompt.unique().tolist() == [r"a \udcff b"] and frame.group.unique().tolist() == [r"\udcff"]


def test_texts_that_read_as_missing_stay_texts_in_the_frame() -> None:
    frame = to_frame(with_texts("NA", "nan", "None", ""))
    assert frame.prompt.unique().tolist() == ["NA", "nan", "None", ""] and not frame.prompt.isna().any()


def test_equal_texts_of_two_prompts_share_a_category() -> None:
    frame = to_frame(with_texts("same", "same"))
    assert frame.prompt.cat.categories.tolist() == ["same"] and frame.prompt_index.unique().tolist() == [0, 1]


def test_unknown_texts_are_missing(tmp_path: Path) -> None:
    """`sweep` knows token ids only."""
    result = run(GPT2.shared(), IDS, [Ablation([(0, 1)])])
    for frame in (to_frame(result), read_csv(written_csv(result, tmp_path))):
        assert all(frame[name].isna().all() for name in ("prompt", "target", "control", "group"))


def test_groups_of_some_prompts_may_be_missing(tmp_path: Path) -> None:
    result = synthetic(1, 2, prompts=2)
    result = replace(result, prompts=(replace(result.prompts[0], group="x"), result.prompts[1]))
    for frame in (to_frame(result), read_csv(written_csv(result, tmp_path))):
        assert frame[frame.prompt_index == 0].group.unique().tolist() == ["x"]
        assert frame[frame.prompt_index == 1].group.isna().all()


def test_sets_of_heads_have_no_layer_and_head(tmp_path: Path) -> None:
    result = of_sets()
    for frame in (to_frame(result), read_csv(written_csv(result, tmp_path))):
        rows = frame[frame.metric == "kl"]
        assert rows.layer.isna().tolist() == rows["head"].isna().tolist() == [True, False, True]
        assert (rows.layer.tolist()[1], rows["head"].tolist()[1]) == (1, 2)
        assert rows.heads.astype(object).where(rows.heads.notna(), "").tolist() == ["", "L1H2", "L0H1+L1H0"]
        assert rows.imputation.tolist() == ["zero", "zero", "mean"]
    assert_same_rows(read_csv(written_csv(result, tmp_path)), to_frame(result))


def test_change_of_a_token_id_is_empty(tmp_path: Path) -> None:
    with written_csv(synthetic(1, 2), tmp_path).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "argmax"]
    assert len(rows) == 4 and {row["change"] for row in rows} == {""}
    assert {row["clean"] for row in rows} == {"0"} and {row["ablated"] for row in rows} <= {"0", "1"}


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    result = synthetic(1, 2)
    strange = {**result.ablated, "kl": np.array([[np.inf, np.nan, -np.inf, 0.0]])}
    result = replace(result, ablated=strange)
    frame = read_csv(written_csv(result, tmp_path))
    assert np.array_equal(frame[frame.metric == "kl"].ablated, strange["kl"][0], equal_nan=True)


@pytest.mark.parametrize("result", [with_texts(*AWKWARD), of_sets(), synthetic(2, 3)], ids=["texts", "sets", "plain"])
def test_parquet_round_trip(tmp_path: Path, result: Result) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(result, tmp_path / "results.parquet")
    again, frame = pd.read_parquet(tmp_path / "results.parquet"), to_frame(result)
    assert_same_rows(again, frame)
    assert all(again[name].dtype == frame[name].dtype for name in [*INTEGERS, *NUMBERS])


def test_lone_surrogate_does_not_stop_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(with_texts("a \udcff b"), tmp_path / "results.parquet")
    assert pd.read_parquet(tmp_path / "results.parquet").prompt.unique().tolist() == [r"a \udcff b"]


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_parquet_is_not_offered_without_its_packages(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find_spec = tables.importlib.util.find_spec
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert not tables.can_write_parquet()


def test_frame_without_pandas_is_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for make in (to_frame, lambda result: result.to_frame(), lambda result: write_parquet(result, tmp_path / "x")):
        with pytest.raises(AblationError, match=r"needs pandas: pip install 'head-ablation\[tables\]'"):
            make(synthetic(1, 2))
    assert written_csv(synthetic(1, 2), tmp_path).read_text().startswith(",".join(COLUMNS))
