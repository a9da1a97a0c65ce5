"""The tokens that the strongest ablations of each prompt raise and lower most."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ablation import choices
from ablation.edits import Ablation
from ablation.engine import MovedToken, moved_tokens
from ablation.models import LoadedModel
from ablation.results import AblationKey, Result

COLUMNS = (
    "prompt_index",
    "prompt",
    "imputation",
    "positions",
    "heads",
    "direction",
    "token_id",
    "token",
    "clean",
    "ablated",
    "change",
)


class Moved(NamedTuple):
    """What one ablation does to the tokens after one prompt, those that move most first."""

    prompt: int
    ablation: AblationKey
    rising: list[MovedToken]
    falling: list[MovedToken]


def of_strongest(
    loaded: LoadedModel,
    result: Result,
    strongest: int,
    *,
    ablations: Callable[[int], Iterable[Ablation]] | None = None,
    count: int = 5,
    max_rows: int | None = None,
) -> list[Moved]:
    """Return the tokens that move most, for the ablations with the largest KL divergence of each prompt.

    loaded: the model of the result. strongest: the number of ablations for each prompt. ablations: returns those of a
    prompt, given its index; without it, the imputations of the result have to be known by their names. Of several draws
    of `resample`, the first is shown. count: of the tokens that rise, and of those that fall. Raises the errors of
    `ablation.run`.
    """
    found = []
    for number, prompt in enumerate(result.prompts):
        order = np.argsort(-result.ablated["kl"][number], kind="stable")[:strongest]
        keys = [result.ablations[index] for index in order]
        known = {} if ablations is None else _by_heads(ablations(number))
        chosen = [known.get((key.heads, key.imputation)) or _by_name(key) for key in keys]
        moved = moved_tokens(loaded.model, prompt.token_ids, chosen, count, max_rows=max_rows)
        found += [Moved(number, key, *both) for key, both in zip(keys, moved, strict=True)]
    return found


def _by_heads(ablations: Iterable[Ablation]) -> dict[tuple[Any, str], Ablation]:
    """Return {(heads, name of the imputation): ablation}, with the first of equal ones."""
    found: dict[tuple[Any, str], Ablation] = {}
    for ablation in ablations:
        found.setdefault((ablation.heads, ablation.imputation.name), ablation)
    return found


def _by_name(key: AblationKey) -> Ablation:
    """Return the ablation of a key. Raises UnknownImputation, and InvalidAblation for the positions of a column."""
    return Ablation(key.heads, key.imputation, choices.parse_positions(key.positions))


def write_csv(loaded: LoadedModel, result: Result, moved: list[Moved], path: Path) -> None:
    """Write a table with a row for each token that moves. Raises OSError."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for of in moved:
            key = of.ablation
            for direction, tokens in (("rises", of.rising), ("falls", of.falling)):
                for t in tokens:
                    where = (of.prompt, result.prompts[of.prompt].prompt, key.imputation, key.positions, key.title)
                    values = (t.clean, t.clean + t.change, t.change)
                    writer.writerow((*where, direction, t.token, loaded.decode(t.token), *values))


def render(loaded: LoadedModel, moved: list[Moved]) -> Iterator[str]:
    """Yield lines of text for the ablations of one prompt, with changes in percentage points."""
    for of in moved:
        yield str(of.ablation)
        for direction, tokens in (("rise", of.rising), ("fall", of.falling)):
            texts = (f"{loaded.decode(t.token)!r} {_points(t.change)}" for t in tokens)
            yield f"  {direction}  {', '.join(texts) or 'none'}"


def _points(change: float) -> str:
    """A change of probability in percentage points; a small one with one digit, since no token moves by 0."""
    points = 100 * change
    return f"{points:+.2f}" if abs(points) >= 0.005 else f"{points:+.0e}"
