"""The findings of a sweep, as values for programs and as text for people.

The first watched token is the target. The last is the control; a single watched token is both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablation.heads import HeadMap
from ablation.results import SweepResult

Decode = Callable[[int], str]
"""Returns the text of a token id."""


class Trend(NamedTuple):
    """The least-squares line of the head means as a function of the layer.

    slope: per layer. drift: the change from the first to the last layer of the model. r_squared: the share of the
    variance that the line explains.
    """

    slope: float
    drift: float
    r_squared: float


def trend(head_mean: NDArray[np.float64]) -> Trend:
    """Return the trend of head means with depth. head_mean: [layer, head]; NaN marks a missing head.

    If only one layer has heads, the slope and r squared are 0.
    """
    layers, _ = np.nonzero(np.isfinite(head_mean))
    means = head_mean[np.isfinite(head_mean)]
    x, y = layers - layers.mean(), means - means.mean()
    slope = float(x @ y / (x @ x)) if x.any() else 0.0
    explained = slope**2 * (x @ x) / (y @ y) if y.any() else 0.0
    return Trend(slope, slope * (len(head_mean) - 1), float(explained))


def flips(sweep: SweepResult, imputation: str) -> list[tuple[int, int, int]]:
    """Return (layer, head, new argmax) for every ablation with this imputation that changes the argmax."""
    index = sweep.imputations.index(imputation)
    return [
        (int(layer), int(head), int(sweep.argmax[index, layer, head]))
        for layer, head in np.argwhere(sweep.flipped[index])
    ]


def findings(sweep: SweepResult, decode: Decode, strongest: int = 3) -> dict[str, Any]:
    """Return the content of the report as values that JSON can hold.

    strongest: how many heads are listed that raise, or lower, the probability of the target most. Changes of
    probability are in [-1, 1].
    """
    target, control = int(sweep.watched[0]), int(sweep.watched[-1])
    has_head = sweep.has_head
    means = sweep.head_mean[has_head]
    found: dict[str, Any] = {
        "clean": {
            "prediction": decode(sweep.clean_argmax),
            "prediction_id": sweep.clean_argmax,
            "margin": sweep.clean_margin,
            "target": {"token": decode(target), "id": target, "probability": float(sweep.clean_probability[0])},
            "control": {"token": decode(control), "id": control, "probability": float(sweep.clean_probability[-1])},
        },
        "heads": int(has_head.sum()),
        "layers": len(has_head),
        "layers_without_heads": [int(layer) for layer in np.flatnonzero(~has_head.any(axis=1))],
        "imputations": {},
        "head_means": {
            "mean": float(means.mean()),
            "std": float(means.std()),
            "min": float(means.min()),
            "max": float(means.max()),
            **{f"trend_{name}": value for name, value in trend(sweep.head_mean)._asdict().items()},
        },
    }
    for index, name in enumerate(sweep.imputations):
        change = sweep.probability_change[0, index]
        order = np.argsort(change, axis=None)[: has_head.sum()]  # NaN, where there is no head, is last
        found["imputations"][name] = {
            "kept": int(sweep.kept[index].sum()),
            "flips": [
                {
                    "layer": layer,
                    "head": head,
                    "token": decode(token),
                    "id": token,
                    "margin": float(sweep.margin[index, layer, head]),
                }
                for layer, head, token in flips(sweep, name)
            ],
            "target_raised": [_change_at(change, i) for i in order[::-1][:strongest] if change.flat[i] > 0],
            "target_lowered": [_change_at(change, i) for i in order[:strongest] if change.flat[i] < 0],
            "control_largest": _change_at(
                sweep.probability_change[-1, index], _largest(sweep.probability_change[-1, index])
            ),
            "changed_nothing": int((sweep.changed[index] == 0).sum()),
        }
    if {"zero", "mean"} <= set(sweep.imputations):
        found["agreement"] = agreement(sweep)
    return found


def agreement(sweep: SweepResult) -> dict[str, Any]:
    """Compare the change of the target's probability under mean imputation with that under zero imputation.

    largest_difference: at the head where the two differ most, mean - zero. correlation: over all heads, or None if one
    of the two does not vary.
    """
    zero, mean = (sweep.probability_change[0, sweep.imputations.index(name)] for name in ("zero", "mean"))
    largest = _change_at(mean - zero, _largest(mean - zero))
    zero, mean = zero[sweep.has_head], mean[sweep.has_head]
    both_vary = zero.std() > 0 and mean.std() > 0
    return {
        "largest_difference": largest,
        "correlation": float(np.corrcoef(zero, mean)[0, 1]) if both_vary else None,
    }


def _largest(change: NDArray[np.float64]) -> int:
    return int(np.nanargmax(np.abs(change)))


def _change_at(change: NDArray[np.float64], index: int) -> dict[str, Any]:
    layer, head = np.unravel_index(index, change.shape)
    return {"layer": int(layer), "head": int(head), "change": float(change.flat[index])}


def token_labels(texts: Mapping[int, str], quote: Callable[[str], str] = repr) -> dict[int, str]:
    """Return the quoted text of each token id, with the id where the text is empty, incomplete or not unique.

    A token that holds only a part of the bytes of a character reads as U+FFFD.
    """
    counts = Counter(texts.values())
    unclear = {token for token, text in texts.items() if not text or "\ufffd" in text or counts[text] > 1}
    return {token: quote(text) + (f" (token {token})" if token in unclear else "") for token, text in texts.items()}


def render(found: dict[str, Any]) -> str:
    """Return findings as text, with changes in percentage points. found: the result of `findings`."""
    clean, means = found["clean"], found["head_means"]
    tokens = [
        clean["target"],
        clean["control"],
        *(flip for of in found["imputations"].values() for flip in of["flips"]),
    ]
    texts = {clean["prediction_id"]: clean["prediction"], **{token["id"]: token["token"] for token in tokens}}
    labels = token_labels(texts)
    prediction = labels[clean["prediction_id"]]
    lines = [
        f"clean      {prediction}, margin {clean['margin']:.2f} logits; "
        + ", ".join(f"P({labels[clean[k]['id']]}) = {_percent(clean[k]['probability'])}" for k in ("target", "control"))
    ]
    for name, of in found["imputations"].items():
        lines += ["", f"{name:10} {of['kept']} of {found['heads']} ablations keep {prediction}"]
        for flip in of["flips"]:
            lines.append(f"           {_head_label(flip)} turns it to {labels[flip['id']]} ({_margin(flip)})")
        for label, key in (("target up", "target_raised"), ("target down", "target_lowered")):
            lines.append(f"  {label:12} " + (", ".join(map(_signed_change, of[key])) or "by no head"))
        lines.append(f"  {'control':12} at most {_signed_change(of['control_largest'])}")
        if of["changed_nothing"]:
            lines.append(f"  {'no effect':12} {of['changed_nothing']} ablations changed no element of z")
    if "agreement" in found:
        far, r = found["agreement"]["largest_difference"], found["agreement"]["correlation"]
        lines += [
            "",
            f"mean - zero at most {_signed_change(far)} on the target"
            + ("" if r is None else f"; correlation {r:.3f}"),
        ]
    if found["layers_without_heads"]:
        without, of_all = ", ".join(map(str, found["layers_without_heads"])), found["layers"]
        lines += ["", f"no attention heads in {len(found['layers_without_heads'])} of {of_all} layers: {without}"]
    lines += [
        "",
        f"head means {means['mean']:+.3f} on average, std {means['std']:.3f}, "
        f"from {means['min']:+.3f} to {means['max']:+.3f}; "
        f"trend {means['trend_slope']:+.4f} per layer (r² {means['trend_r_squared']:.2f})",
    ]
    return "\n".join(lines)


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.0005 else f"{100 * probability:.0e}%"


def _margin(flip: dict[str, Any]) -> str:
    return f"margin {flip['margin']:.2f}" if flip["margin"] else "a tie"


def _head_label(cell: dict[str, Any]) -> str:
    return f"L{cell['layer']}H{cell['head']}"


def _signed_change(cell: dict[str, Any]) -> str:
    points = 100 * cell["change"]
    return f"{_head_label(cell)} {points:+.2f} pp" if abs(points) >= 0.005 else f"{_head_label(cell)} {points:+.0e} pp"


def head_map(heads: HeadMap) -> dict[str, Any]:
    """Return where the heads of a model are, as values that JSON can hold.

    For a layer without heads, `projection` and `type` are None.
    """
    by_index = {layer.index: layer for layer in heads.layers}
    rows = []
    for index in range(heads.num_layers):
        layer = by_index.get(index)
        rows.append(
            {
                "layer": index,
                "heads": layer.num_heads if layer else 0,
                "key_value_heads": layer.key_value_heads if layer else 0,
                "head_dim": layer.head_dim if layer else 0,
                "projection": layer.projection_name if layer else None,
                "type": type(layer.projection).__name__ if layer else None,
            }
        )
    return {"heads": len(list(heads)), "layers": rows}


def render_head_map(found: dict[str, Any]) -> str:
    """Return the result of `head_map` as a table of text, with one line for all layers that are alike."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for row in found["layers"]:
        if row["heads"]:
            name = row["projection"].replace(f".{row['layer']}.", ".{layer}.", 1)
            key = (*(str(row[k]) for k in ("heads", "key_value_heads", "head_dim")), f"{name} ({row['type']})")
        else:
            key = ("none", "", "", "")
        alike.setdefault(key, []).append(row["layer"])
    lines: list[tuple[str, ...]] = [("layers", "heads", "key/value", "head_dim", "projection")]
    lines += [(_ranges(layers), *key) for key, layers in alike.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{word:{w}}" for word, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text with ranges: "0-2, 5" for 0, 1, 2, 5. numbers: in ascending order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
