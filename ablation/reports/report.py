"""The findings of a sweep of one prompt, as values for programs and as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablation.errors import InvalidResult
from ablation.results import LOSS, Result
from ablation.studies import agreement
from ablation.studies.agreement import head_label, points

if TYPE_CHECKING:
    from ablation.heads import HeadMap

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


def flips(sweep: Result, imputation: str) -> list[tuple[int, int, int]]:
    """Return (layer, head, new argmax) for every ablation with this imputation that changes the argmax.

    sweep: of one prompt. Raises InvalidResult for sets of heads and MLPs.
    """
    index = sweep.imputations.index(imputation)
    lost, argmax = (sweep.grid(values[0])[index] for values in (~sweep.kept, sweep.ablated["argmax"]))
    return [(int(layer), int(head), int(argmax[layer, head])) for layer, head in np.argwhere(lost)]


def findings(sweep: Result, decode: Decode, strongest: int = 3) -> dict[str, Any]:
    """Return the content of the report as values that JSON can hold.

    sweep: of one prompt. strongest: how many heads are listed that raise, or lower, the probability of the target most.
    Changes of probability are in [-1, 1]. Raises InvalidResult for several prompts, a text, or sets of heads.
    """
    if LOSS in sweep.clean or len(sweep.prompts) != 1:
        what = "a text" if LOSS in sweep.clean else f"{len(sweep.prompts)} prompts"
        raise InvalidResult(f"these are the findings of one prompt, not of {what}: see `ablation.reports.summary`")
    (prompt,) = sweep.prompts
    clean = {name: values[0] for name, values in sweep.clean.items()}
    prediction = int(clean["argmax"])
    has_head = sweep.has_head
    kept, margin, changed = (sweep.grid(values[0]) for values in (sweep.kept, sweep.ablated["margin"], sweep.changed))
    of_target, of_control = (sweep.grid(sweep.change(f"{name}_probability")[0]) for name in ("target", "control"))
    means = sweep.head_mean[0][has_head]
    found: dict[str, Any] = {
        "clean": {
            "prediction": decode(prediction),
            "prediction_id": prediction,
            "margin": float(clean["margin"]),
            **{
                name: {
                    "token": "".join(map(decode, tokens)) if text is None else text,
                    "ids": list(tokens),
                    "probability": float(clean[f"{name}_probability"]),
                }
                for name, tokens, text in (
                    ("target", prompt.target, prompt.target_text),
                    ("control", prompt.control, prompt.control_text),
                )
            },
        },
        "heads": int(has_head.sum()),
        "layers": len(has_head),
        "layers_without_heads": [int(layer) for layer in np.flatnonzero(~has_head.any(axis=1))],
        "ablated": where(sweep),
        "imputations": {},
        "agreement": agreement.findings(sweep.imputations, of_target),
        "head_means": {
            "mean": float(means.mean()),
            "std": float(means.std()),
            "min": float(means.min()),
            "max": float(means.max()),
            **{f"trend_{name}": value for name, value in trend(sweep.head_mean[0])._asdict().items()},
        },
    }
    for index, name in enumerate(sweep.imputations):
        change, control = of_target[index], of_control[index]
        order = np.argsort(change, axis=None)[: has_head.sum()]  # NaN, where there is no head, is last
        found["imputations"][name] = {
            "kept": int(kept[index].sum()),
            "flips": [
                {
                    "layer": layer,
                    "head": head,
                    "token": decode(token),
                    "id": token,
                    "margin": float(margin[index, layer, head]),
                }
                for layer, head, token in flips(sweep, name)
            ],
            "target_raised": [_change_at(change, i) for i in order[::-1][:strongest] if change.flat[i] > 0],
            "target_lowered": [_change_at(change, i) for i in order[:strongest] if change.flat[i] < 0],
            "control_largest": _change_at(control, _largest(control)),
            "changed_nothing": int((changed[index] == 0).sum()),
        }
    return found


def where(sweep: Result) -> str:
    """Return at which tokens the heads of a sweep are ablated, in words, such as "at the last token"."""
    places = dict.fromkeys(key.positions for key in sweep.ablations)
    return ", ".join(map(_place, places))


def _place(positions: str) -> str:
    numbers = positions.split(",")
    if positions == "all":
        return "at every token"
    if positions in ("last", "-1"):
        return "at the last token"
    if not all(number.lstrip("-").isdecimal() for number in numbers):
        return f"at the tokens of {positions!r}"  # a column of the table of prompts
    return f"at token {numbers[0]}" if len(numbers) == 1 else f"at tokens {', '.join(numbers[:-1])} and {numbers[-1]}"


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
    answers = {name: clean[name] for name in ("target", "control")}
    texts = {of["ids"][0]: of["token"] for of in answers.values() if len(of["ids"]) == 1}
    texts |= {flip["id"]: flip["token"] for of in found["imputations"].values() for flip in of["flips"]}
    labels = token_labels({clean["prediction_id"]: clean["prediction"], **texts})
    prediction = labels[clean["prediction_id"]]

    def probability(of: dict[str, Any]) -> str:
        label = labels[of["ids"][0]] if len(of["ids"]) == 1 else repr(of["token"])
        return f"P({label}) = {_percent(of['probability'])}"

    lines = [
        f"clean      {prediction}, margin {clean['margin']:.2f} logits; "
        + ", ".join(map(probability, answers.values()))
    ]
    lines += ablated_line(found)
    for name, of in found["imputations"].items():
        lines += ["", f"{name:10} {of['kept']} of {found['heads']} ablations keep {prediction}"]
        for flip in of["flips"]:
            lines.append(f"           {head_label(flip)} turns it to {labels[flip['id']]} ({_margin(flip)})")
        for label, key in (("target up", "target_raised"), ("target down", "target_lowered")):
            lines.append(f"  {label:12} " + (", ".join(map(_signed_change, of[key])) or "by no head"))
        lines.append(f"  {'control':12} at most {_signed_change(of['control_largest'])}")
        if of["changed_nothing"]:
            lines.append(f"  {'no effect':12} {of['changed_nothing']} ablations changed no element of z")
    if found["agreement"]:
        lines += ["", *agreement.lines(found["agreement"], points)]
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


def ablated_line(found: Mapping[str, Any]) -> list[str]:
    """Return the line that says at which tokens heads are ablated; none if at every token."""
    return [] if found["ablated"] == "at every token" else [f"ablated    {found['ablated']}"]


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.0005 else f"{100 * probability:.0e}%"


def _margin(flip: dict[str, Any]) -> str:
    return f"margin {flip['margin']:.2f}" if flip["margin"] else "a tie"


def _signed_change(cell: dict[str, Any]) -> str:
    return f"{head_label(cell)} {points(cell['change'])}"


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
