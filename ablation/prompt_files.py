"""Files and tables of prompts, as questions. This module imports neither torch nor transformers."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ablation.errors import InvalidPrompt, one_line
from ablation.prompts import Question, check_spans, check_text, is_integer

T = TypeVar("T")

COLUMNS = ("prompt", "target", "control", "group", "resample")
REQUIRED = COLUMNS[:2]
SIMILARITY = dict.fromkeys(COLUMNS, 0.8) | {"resample": 0.9}
"""A column whose name is at least this similar counts as misspelt; `sample` and `example` are other columns."""
NAMED = 5
"""So many rows that are left out are named."""
SHIPPED = Path(__file__).parent / "data"
"""Files of prompts that are part of the package: NAME.jsonl."""


class Row(NamedTuple):
    """A question of a table. where: its place in messages, such as `capitals.jsonl, line 3`, or empty."""

    where: str
    question: Question

    def problem(self, reason: object) -> InvalidPrompt:
        """Return an error that names the row."""
        return InvalidPrompt(f"{self.where}: {reason}" if self.where else str(reason))


class Columns(NamedTuple):
    """The columns of a table. text: those that hold texts. required: those that each row has. spans: one with spans."""

    text: tuple[str, ...] = COLUMNS
    required: tuple[str, ...] = REQUIRED
    spans: str | None = None


OF_QUESTIONS, PROMPTS_ONLY = Columns(), Columns(("prompt",), ("prompt",))
"""The columns of questions, and of reference prompts."""
TO_CONTINUE = Columns(("prompt", "target", "group"), ("prompt",))
"""The columns of prompts from which text is generated."""


def read_rows(name: str, *, chat: bool = False, columns: Columns = OF_QUESTIONS) -> Iterator[Row | InvalidPrompt]:
    """Yield the questions of a .jsonl or .csv file, and an InvalidPrompt for each row that is not a question.

    name: a path, or the name of a shipped file without its ending. The columns `prompt` and `target` are required,
    `control`, `group` and `resample` optional, others ignored. In a CSV file, an empty optional cell is none. chat: see
    `Question`. columns: which others are read, or required; see `spans_of` for a column of spans. Raises InvalidPrompt
    if the file cannot be read, or has no rows.
    """
    path = _path(name)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # read_text would change line ends inside of CSV cells
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidPrompt(f"cannot read prompts from {one_line(path)}: {reason}") from None
    records = _csv_records(text) if path.suffix == ".csv" else _jsonl_records(text)
    empty = True
    try:
        for line, record in records:
            empty = False
            yield _row(f"{path.name}, line {line}", record, chat, columns)
    except csv.Error as error:
        raise InvalidPrompt(f"cannot read prompts from {one_line(path)}: {error}") from None
    if empty:
        raise InvalidPrompt(f"{one_line(path)} has no prompts")


def as_rows(
    records: Iterable[Any], *, chat: bool = False, columns: Columns = OF_QUESTIONS
) -> Iterator[Row | InvalidPrompt]:
    """Yield the questions of records, and an InvalidPrompt for each record that is not a question.

    records: rows, with their problems, or `Question` objects; or mappings with the columns of `read_rows`, as in a list
    of dicts, a `datasets.Dataset` or a pandas frame. In a mapping, None and NaN stand for a missing value. Raises
    InvalidPrompt if there are none, or if they cannot be iterated over.
    """
    if hasattr(records, "iterrows"):  # a frame iterates over the names of its columns
        records = [row.to_dict() for _, row in records.iterrows()]
    if isinstance(records, Question | Mapping | str) or not isinstance(records, Iterable):
        raise InvalidPrompt(f"prompts are a list of records, not a {type(records).__name__}")
    empty = True
    for number, record in enumerate(records, start=1):
        empty, where = False, f"prompt {number}"
        if isinstance(record, Row | InvalidPrompt):
            yield record
        else:
            yield Row(where, record) if isinstance(record, Question) else _row(where, record, chat, columns)
    if empty:
        raise InvalidPrompt("there are no prompts")


def valid_rows(rows: Iterable[T | InvalidPrompt], *, skip_bad: bool) -> tuple[list[T], list[InvalidPrompt]]:
    """Return the rows and the problems. Raises the first problem without `skip_bad`, and if no row is left."""
    good, bad = list[T](), list[InvalidPrompt]()
    for row in rows:
        if not isinstance(row, InvalidPrompt):
            good.append(row)
        elif skip_bad:
            bad.append(row)
        else:
            raise row
    if not good:
        raise InvalidPrompt(f"no row is usable; the first problem: {bad[0]}")
    return good, bad


def left_out(bad: Sequence[InvalidPrompt]) -> str:
    """Return a sentence about the rows that are left out, with the reasons for the first ones."""
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    reasons = "; ".join(map(str, bad[:NAMED]))
    return f"{len(bad)} {'prompt is' if len(bad) == 1 else 'prompts are'} left out: {reasons}{more}"


def _path(name: str) -> Path:
    """Return the path of a file of prompts. Raises InvalidPrompt."""
    path, shipped = Path(name).expanduser(), sorted(file.stem for file in SHIPPED.glob("*.jsonl"))
    if name in shipped and not path.exists():
        return SHIPPED / f"{name}.jsonl"
    if path.suffix not in (".jsonl", ".csv"):
        raise InvalidPrompt(
            f"cannot read prompts from {one_line(name)!r}: pass a .jsonl or .csv file, or {' or '.join(shipped)}"
        )
    return path


def _jsonl_records(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, record); a line that is not JSON becomes an error in place of the record."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_without_duplicates)
            except (ValueError, RecursionError) as error:
                yield number, error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError if a key occurs twice: only its last value would be read."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has several values of {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _csv_records(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, record). Raises csv.Error, also for columns that share a name."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = list(reader.fieldnames or ())
    for name in header:
        if header.count(name) > 1:
            raise csv.Error(f"it has several columns {name!r}")
        if len(header) == 1 and any(mark in name for mark in ";\t|"):
            raise csv.Error(f"its header has the one column {name!r}: is this a CSV with commas?")
    for record in reader:
        if None in record or None in record.values():
            yield reader.line_num, ValueError(f"it does not have {len(header)} cells, as the header has")
        else:
            yield (
                reader.line_num,
                {name: value if name in REQUIRED else value or None for name, value in record.items()},
            )


def _row(where: str, record: Any, chat: bool, columns: Columns) -> Row | InvalidPrompt:
    """Return the question of a record, or what is wrong with it."""
    if isinstance(record, Exception):
        return InvalidPrompt(f"{where}: {one_line(str(record))}")
    if not isinstance(record, Mapping):
        return InvalidPrompt(f"{where}: a record has columns, unlike {one_line(repr(record))}")
    values = {name: record[name] for name in columns.text if not _is_missing(record.get(name))}
    for name in columns.text:
        if (meant := _misspelt(name, record)) is not None:
            return InvalidPrompt(f"{where}, column {meant}: is this {name}?")
        if name in columns.required and name not in values:
            return InvalidPrompt(f"{where}, column {name}: it is missing")
        if name in values and not isinstance(values[name], str):
            return InvalidPrompt(f"{where}, column {name}: a text is needed, not {one_line(repr(values[name]))}")
        if values.get(name) == "":
            return InvalidPrompt(f"{where}, column {name}: it is empty")
        try:
            check_text(values.get(name, ""), name)
        except InvalidPrompt as error:
            return InvalidPrompt(f"{where}, column {name}: {error}")
    question = Question(**values, chat=chat)
    if columns.spans is None:
        return Row(where, question)
    try:
        return Row(where, replace(question, spans=spans_of(question.prompt, columns.spans, record)))
    except InvalidPrompt as error:
        return InvalidPrompt(f"{where}, column {columns.spans}: {error}")


def _misspelt(name: str, record: Mapping[Any, Any]) -> str | None:
    """Return the column of a record that is similar to a column that it lacks."""
    others = [str(key) for key in record]
    meant = difflib.get_close_matches(name, others, n=1, cutoff=SIMILARITY.get(name, 0.8))
    return meant[0] if meant and name not in record else None


def spans_of(prompt: str, column: str, record: Mapping[Any, Any]) -> tuple[tuple[int, int], ...]:
    """Return the spans of a prompt that a column names: (start, end) pairs of characters, counted from 0.

    The column holds a list of pairs [start, end], one such pair, or a text that occurs once in the prompt. Raises
    InvalidPrompt if it holds anything else, or is missing.
    """
    value: Any = record.get(column)
    if hasattr(value, "tolist"):  # an array, as in a frame
        value = value.tolist()
    if _is_missing(value):
        meant = _misspelt(column, record)
        raise InvalidPrompt("it is missing" if meant is None else f"it is missing: is this {meant}?")
    if isinstance(value, str):
        if not value:
            raise InvalidPrompt("it is empty")
        start = prompt.find(value)
        if start < 0 or prompt.find(value, start + 1) >= 0:
            often = "does not occur" if start < 0 else "occurs more than once"
            raise InvalidPrompt(f"{one_line(repr(value))} {often} in the prompt: pass spans [start, end] of characters")
        return ((start, start + len(value)),)
    if isinstance(value, list | tuple):
        value = [pair.tolist() if hasattr(pair, "tolist") else pair for pair in value]
        if value and all(is_integer(end) for end in value):
            value = [value]
    check_spans(prompt, value)
    return tuple((int(start), int(end)) for start, end in value)


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or pandas' NA."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"
