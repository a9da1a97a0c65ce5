"""A result as a long table: one row for each prompt, ablation and metric."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation.errors import AblationError
from ablation.results import AblationKey, Result
from ablation.units import MLP

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    *("prompt_index", "prompt", "target", "control", "group"),
    *("imputation", "positions", "layer", "head", "heads"),
    *("metric", "clean", "ablated", "change"),
)
"""positions: the tokens at which z was replaced. heads: all heads of the ablation, such as L0H8+L0H9; layer and head
are empty unless it is one. change: ablated - clean; empty for token ids. If sets of heads have names, a column `set`
holds them."""


def write_csv(result: Result, path: Path) -> None:
    """Write the table as a CSV file, in UTF-8. Numbers are written without loss. Raises OSError."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_columns(result))
        for rows in _blocks(result):
            writer.writerows(rows)


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same columns as a CSV file, in UTF-8; None is an empty cell. Raises OSError."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        for number, row in enumerate(rows):
            if number == 0:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def write_parquet(result: Result, path: Path) -> None:
    """Write the table as a Parquet file. Needs pandas and pyarrow. Raises AblationError and OSError."""
    to_frame(result).to_parquet(path, index=False)


def can_write_parquet() -> bool:
    """Whether pandas and pyarrow are installed."""
    return all(importlib.util.find_spec(package) for package in ("pandas", "pyarrow"))


def to_frame(result: Result) -> pandas.DataFrame:
    """Return the table as a pandas frame. Texts are categories. Raises AblationError if pandas is missing."""
    try:
        import pandas as pd
    except ImportError:
        raise AblationError("a table as a frame needs pandas: pip install 'head-ablation[tables]'") from None
    prompts, ablations, metrics = len(result.prompts), len(result.ablations), list(result.clean)
    shape = (prompts, len(metrics), ablations)

    def texts(values: list[Any], axis: int) -> Any:
        utf8 = [value if value is None else value.encode(errors="backslashreplace").decode() for value in values]
        codes, names = pd.factorize(np.array(utf8, dtype=object))
        place = [1, 1, 1]
        place[axis] = len(values)
        return pd.Categorical.from_codes(
            np.broadcast_to(codes.reshape(place), shape).ravel(), categories=pd.Index(names)
        )

    def integers(values: list[int | None]) -> Any:
        return pd.array(np.tile(pd.array(values, dtype="Int32"), prompts * len(metrics)), dtype="Int32")

    clean = np.stack([result.clean[name].astype(np.float64) for name in metrics], axis=1)[:, :, None]
    ablated = np.stack([result.ablated[name].astype(np.float64) for name in metrics], axis=1)
    change = np.where(np.array([name == "argmax" for name in metrics])[None, :, None], np.nan, ablated - clean)
    places = [_place(key) for key in result.ablations]
    columns = dict(zip(COLUMNS[1:5], zip(*map(_texts, result.prompts), strict=True), strict=True))
    return pd.DataFrame(
        {
            "prompt_index": np.repeat(np.arange(prompts, dtype=np.int32), len(metrics) * ablations),
            **{name: texts(list(values), 0) for name, values in columns.items()},
            "imputation": texts([key.imputation for key in result.ablations], 2),
            "positions": texts([key.positions for key in result.ablations], 2),
            "layer": integers([layer for layer, _ in places]),
            "head": integers([head for _, head in places]),
            "heads": texts([key.label for key in result.ablations], 2),
            "metric": texts(metrics, 1),
            "clean": np.broadcast_to(clean, shape).ravel(),
            "ablated": ablated.ravel(),
            "change": change.ravel(),
            "set": texts([key.name or None for key in result.ablations], 2),
        },
        columns=_columns(result),
    )


def _columns(result: Result) -> list[str]:
    return [*COLUMNS, "set"] if any(key.name for key in result.ablations) else list(COLUMNS)


def _place(key: AblationKey) -> tuple[int | None, int | None]:
    """Return the layer and head of a head, the layer of an MLP, and neither for several of them, or none."""
    if len(key.heads) != 1:
        return None, None
    ((layer, head),) = key.heads
    return layer, None if head == MLP else head


def _texts(prompt: Any) -> tuple[str | None, ...]:
    return prompt.prompt, prompt.target_text, prompt.control_text, prompt.group


def _blocks(result: Result) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Yield the rows of the table, one block for each prompt and metric."""
    keys = [
        (key.imputation, key.positions, *("" if index is None else index for index in _place(key)), key.label)
        for key in result.ablations
    ]
    names = [[key.name] if "set" in _columns(result) else [] for key in result.ablations]
    for index, prompt in enumerate(result.prompts):
        texts = (index, *("" if text is None else text for text in _texts(prompt)))
        for metric in result.clean:
            clean, ablated = result.clean[metric][index].item(), result.ablated[metric][index].tolist()
            has_change = metric != "argmax"
            yield (
                (*texts, *key, metric, clean, value, (value - clean if has_change else ""), *name)
                for key, value, name in zip(keys, ablated, names, strict=True)
            )
