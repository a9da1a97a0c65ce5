"""How far imputations agree on which heads matter: as values for programs, and as text. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRONGEST = 10
"""A head matters under an imputation if it is among so many heads with the largest effects."""
NAMED = 5
"""How many heads the text names."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def matters(effects: Floats, differs: Flags | None = None) -> Flags:
    """Return which heads matter under each imputation: the `STRONGEST` ones, if they also differ from 0, [I, L, H].

    effects: the change of a metric, or its mean over the prompts, [I, L, H]; NaN where there is no head. differs: [I,
    L, H] which effects differ from 0 beyond chance; None if this is not known, as for one prompt.
    """
    sizes = np.nan_to_num(np.abs(effects)).reshape(len(effects), -1)
    order = np.argsort(-sizes, axis=1, kind="stable")[:, :STRONGEST]
    strongest = np.zeros(sizes.shape, dtype=bool)
    np.put_along_axis(strongest, order, True, axis=1)
    found: Flags = (strongest & (sizes > 0)).reshape(effects.shape)
    return found if differs is None else found & differs


def disagree(effects: Floats, matter: Flags) -> Flags:
    """Return the heads that matter under one of two imputations only, or with the other sign, [L, H].

    effects, matter: of the two imputations, [2, L, H]; see `matters`.
    """
    opposite = effects[0] * effects[1] < 0
    found: Flags = (matter[0] != matter[1]) | (matter.all(axis=0) & opposite)
    return found


def rank_correlation(one: Floats, other: Floats) -> float | None:
    """Return Spearman's correlation of two maps over their heads; None if one of them does not vary."""
    from scipy import stats  # now, since scipy takes a while to import

    one, other = one[np.isfinite(one)], other[np.isfinite(other)]
    return float(stats.spearmanr(one, other).statistic) if np.ptp(one) > 0 and np.ptp(other) > 0 else None


def findings(names: Sequence[str], effects: Floats, differs: Flags | None = None) -> list[dict[str, Any]]:
    """Compare each pair of imputations, as values that JSON can hold. The pair that agrees least comes first.

    names: of the imputations, [I]. effects, differs: see `matters`. rank_correlation: see there. largest_difference:
    the head where the two effects differ most. disagreements: the heads of `disagree`, the largest difference first.
    """
    matter = matters(effects, differs)
    found = []
    for pair in combinations(range(len(names)), 2):
        one, other = (effects[i] for i in pair)
        gap = np.where(np.isfinite(one), np.abs(other - one), -1.0)  # a missing head is never the largest
        disputed = disagree(effects[list(pair)], matter[list(pair)])
        largest = int(gap.argmax())
        order = [int(i) for i in np.argsort(-gap, axis=None, kind="stable") if disputed.flat[i]]
        cells = [np.unravel_index(i, gap.shape) for i in (largest, *order)]
        far, *heads = (
            {
                "layer": int(layer),
                "head": int(head),
                "changes": {names[i]: float(effects[i, layer, head]) for i in pair},
            }
            for layer, head in cells
        )
        found.append(
            {
                "imputations": [names[i] for i in pair],
                "rank_correlation": rank_correlation(one, other),
                "largest_difference": far,
                "disagreements": heads,
            }
        )
    return sorted(found, key=lambda of: np.inf if of["rank_correlation"] is None else of["rank_correlation"])


# ---- text


def lines(found: Sequence[Mapping[str, Any]], amount: Callable[[float], str]) -> list[str]:
    """Return findings as lines of text, the pair that agrees least first; none if there are no pairs.

    amount: returns a change as text, with its unit.
    """
    if not found:
        return []
    least, most = found[0], [of for of in found if of["rank_correlation"] is not None][-1:]
    words = f"{'least between ' if found[1:] else ''}{_pair(least)}"
    if found[1:] and most and most[0] is not least:
        words += f"; most between {_pair(most[0])}"
    far, heads = least["largest_difference"], least["disagreements"]
    changes = ", ".join(f"{name} {amount(change)}" for name, change in far["changes"].items())
    more = f" and {len(heads) - NAMED} more" if len(heads) > NAMED else ""
    named = ", ".join(map(head_label, heads[:NAMED])) + more
    disputed = (
        f"they disagree on {len(heads)} head{'s' if heads[1:] else ''}: {named}" if heads else "no head is disputed"
    )
    return [f"agreement  {words}", f"  {head_label(far)} differs most: {changes}; {disputed}"]


def _pair(of: Mapping[str, Any]) -> str:
    names, r = " and ".join(of["imputations"]), of["rank_correlation"]
    return f"{names} (no rank correlation: one does not vary)" if r is None else f"{names} (rank correlation {r:.3f})"


def head_label(cell: Mapping[str, Any]) -> str:
    """Return the name of a head, such as L9H6."""
    return f"L{cell['layer']}H{cell['head']}"


def points(change: float) -> str:
    """Return a change of probability as text, in percentage points."""
    value = 100 * change
    return f"{value:+.2f} pp" if abs(value) >= 0.005 or value == 0 else f"{value:+.0e} pp"
