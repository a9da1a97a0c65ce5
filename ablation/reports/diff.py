"""Compares two results: two versions of a library, two dtypes, two checkpoints of a model. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablation.errors import InvalidResult, one_line
from ablation.results import LISTED, LOSS, AblationKey, PromptRecord, Result

IN_NATS = ("target_log_probability", "control_log_probability", LOSS)
"""The metrics that decide whether two results differ; the first that a result has is what figures show."""
NOT_COMPARED = ("asked", "passes", LISTED, "prompts_sha256")
"""Parts of the provenance that do not explain a difference."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two results of the same prompts and ablations, in the same order.

    only_one, only_other: how many prompts and ablations were left out since only one of the results has them.
    """

    one: Result
    other: Result
    only_one: tuple[int, int]
    only_other: tuple[int, int]


def matched(one: Result, other: Result) -> Pair:
    """Return the common prompts and ablations of two results.

    Prompts match by their texts, or by their token ids if a text is unknown. Raises InvalidResult if nothing matches.
    """
    prompts = _common([_identity(p) for p in one.prompts], [_identity(p) for p in other.prompts])
    ablations = _common(one.ablations, other.ablations)
    if not prompts or not ablations:
        what = "prompt" if not prompts else "ablation"
        raise InvalidResult(f"the two results have no {what} in common")
    return Pair(
        _taken(one, [i for i, _ in prompts], [i for i, _ in ablations]),
        _taken(other, [i for _, i in prompts], [i for _, i in ablations]),
        (len(one.prompts) - len(prompts), len(one.ablations) - len(ablations)),
        (len(other.prompts) - len(prompts), len(other.ablations) - len(ablations)),
    )


def findings(pair: Pair, tolerance: float | None = None, shown: int = 10) -> dict[str, Any]:
    """Return what differs, as values that JSON can hold.

    tolerance: in nats; a log-probability has moved if it differs by more. By default it is the rounding of the logits
    in both results together, for each token: see `ablation.measure.tie_tolerance`. shown: how many of the cells that
    moved most are listed. `differs` says whether a log-probability moved, or a prediction that rounding does not
    decide. Raises InvalidResult if only one of the results is of a text.
    """
    one, other = pair.one, pair.other
    limit = np.full(len(one.prompts), np.nan if tolerance is None else tolerance)
    if tolerance is None:
        summed = [1 if LOSS in one.clean else max(len(p.target), len(p.control)) for p in one.prompts]
        limit = np.array(summed) * (_rounding(one) + _rounding(other))
    metrics = [name for name in one.clean if name in other.clean and name != "argmax"]
    differences = {name: other.ablated[name].astype(float) - one.ablated[name] for name in metrics}
    clean = {name: other.clean[name].astype(float) - one.clean[name] for name in metrics}
    in_nats = [name for name in IN_NATS if name in metrics]
    if not in_nats:
        raise InvalidResult("one result is of a text, the other of prompts")
    moved = np.maximum.reduce([np.abs(differences[name]) for name in in_nats])
    clean_moved = np.maximum.reduce([np.abs(clean[name]) for name in in_nats])
    flips = [] if LOSS in metrics else _flips(pair, limit)
    cells = np.argwhere(moved > limit[:, None])
    worst = sorted(map(tuple, cells), key=lambda cell: -moved[cell])[:shown]
    return {
        "prompts": len(one.prompts),
        "ablations": len(one.ablations),
        "left_out": {"of_the_first": pair.only_one, "of_the_second": pair.only_other},
        "made_with": made_with(one, other),
        "tolerance": {"least": float(limit.min()), "largest": float(limit.max())},
        "clean_moved": int((clean_moved > limit).sum()),
        "moved": len(cells),
        "of": int(moved.size),
        "largest": {
            name: {"clean": float(np.abs(clean[name]).max()), "ablated": float(np.abs(differences[name]).max())}
            for name in metrics
        },
        "compared": effects(pair)[0],
        "correlation": _correlation(pair),
        "worst": [
            {**_place(one, int(prompt), int(ablation)), "difference": float(moved[prompt, ablation])}
            for prompt, ablation in worst
        ],
        "flips": flips,
        "differs": bool(len(cells) or (clean_moved > limit).any() or flips),
    }


def made_with(one: Result, other: Result) -> dict[str, list[Any]]:
    """Return {key: [first, second]} for everything in the provenance that differs."""
    keys = dict.fromkeys((*one.provenance, *other.provenance))
    values = {key: [one.provenance.get(key), other.provenance.get(key)] for key in keys if key not in NOT_COMPARED}
    return {key: both for key, both in values.items() if both[0] != both[1] and key != "rounding"}


def _identity(prompt: PromptRecord) -> Hashable:
    texts = (prompt.prompt, prompt.target_text, prompt.control_text)
    return (prompt.token_ids, prompt.target, prompt.control) if None in texts else texts


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return the pairs of indices of equal entries, in the order of the first list; of equal ones, the n-th match."""
    places: dict[Hashable, list[int]] = {}
    for index, value in enumerate(other):
        places.setdefault(value, []).append(index)
    return [(index, places[value].pop(0)) for index, value in enumerate(one) if places.get(value)]


def _taken(result: Result, prompts: Sequence[int], ablations: Sequence[int]) -> Result:
    """Return a result of some prompts and ablations."""
    both = np.ix_(prompts, ablations)
    chosen: tuple[AblationKey, ...] = tuple(result.ablations[i] for i in ablations)
    listed = result.provenance.get(LISTED, ())
    return Result(
        ablations=chosen,
        prompts=tuple(result.prompts[i] for i in prompts),
        clean={name: values[prompts] for name, values in result.clean.items()},
        ablated={name: values[both] for name, values in result.ablated.items()},
        head_mean=result.head_mean[prompts],
        calls=result.calls[both],
        replaced=result.replaced[both],
        changed=result.changed[both],
        provenance={
            key: [value[i] for i in prompts] if key in listed else value for key, value in result.provenance.items()
        },
    )


def _rounding(result: Result) -> NDArray[np.float64]:
    """The rounding of the logits of each prompt, [P]."""
    value = result.provenance.get("rounding")
    return np.broadcast_to(np.array(np.nan if value is None else value, dtype=float), len(result.prompts))


def _flips(pair: Pair, limit: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The runs whose prediction differs, clean or ablated, by margins that together exceed the rounding."""
    found = []
    for name in ("clean", "ablated"):
        one, other = (getattr(result, name) for result in (pair.one, pair.other))
        bound = limit if name == "clean" else limit[:, None]
        decided = one["margin"] + other["margin"] > bound
        for place in np.argwhere((one["argmax"] != other["argmax"]) & decided):
            index = tuple(map(int, place))
            where = _place(pair.one, *index)
            found.append({**where, "first": int(one["argmax"][index]), "second": int(other["argmax"][index])})
    return found


def _place(result: Result, prompt: int, ablation: int | None = None) -> dict[str, Any]:
    key = None if ablation is None else result.ablations[ablation]
    return {
        "prompt": result.prompts[prompt].prompt,
        "prompt_index": prompt,
        "heads": None if key is None else key.title,
        "imputation": None if key is None else key.imputation,
        "positions": None if key is None else key.positions,
    }


def effects(pair: Pair) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """Return the name of the first metric of `IN_NATS`, and its mean change over the prompts in both results, [A]."""
    name = next(name for name in IN_NATS if name in pair.one.clean)
    one, other = (result.change(name).mean(axis=0) for result in (pair.one, pair.other))
    return name, one, other


def _correlation(pair: Pair) -> float | None:
    """Pearson's r of the effects, over the ablations; None if they do not vary."""
    _, one, other = effects(pair)
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) > 0 and np.ptp(other) > 0 else None


def render(found: Mapping[str, Any], one: str, other: str) -> str:
    """Return findings as text. one, other: the names of the two results."""
    lines = [f"first   {one}", f"second  {other}", ""]
    lines += [f"{key}: {one_line(first)} -> {one_line(second)}" for key, (first, second) in found["made_with"].items()]
    if not found["made_with"]:
        lines.append("made with the same model, versions and settings")
    for name in ("of_the_first", "of_the_second"):
        prompts, ablations = found["left_out"][name]
        if prompts or ablations:
            lines.append(
                f"left out, only in the {name.split('_')[-1]}: {_number(prompts, 'prompt')}, "
                f"{_number(ablations, 'ablation')}"
            )
    tolerance, r = found["tolerance"], found["correlation"]
    bound = f"{tolerance['largest']:.2g}"
    if tolerance["least"] != tolerance["largest"]:
        bound = f"{tolerance['least']:.2g} to {bound}"
    lines += [
        "",
        f"{found['moved']} of {_number(found['of'], 'ablated run')}, and {found['clean_moved']} of "
        f"{_number(found['prompts'], 'clean run')}, "
        f"moved by more than the tolerance of {bound} nats",
        "" if r is None else f"mean changes of {found['compared']} over the prompts: correlation {r:.4f}",
        "",
        f"{'largest difference of':26}  {'clean':>10}  {'ablated':>10}",
        *(f"  {name:24}  {of['clean']:10.3g}  {of['ablated']:10.3g}" for name, of in found["largest"].items()),
    ]
    if found["worst"]:
        lines += ["", "moved most, in nats"]
        lines += [f"  {cell['difference']:9.3g}  {_where(cell)}" for cell in found["worst"]]
    flips = len(found["flips"])
    lines += ["", f"{_number(flips, 'prediction')} differ{'s' if flips == 1 else ''}"]
    lines += [f"  {_where(flip)}: token {flip['first']} -> {flip['second']}" for flip in found["flips"][:10]]
    if len(found["flips"]) > 10:
        lines.append(f"  and {len(found['flips']) - 10} more")
    verdict, prompts = "differ" if found["differs"] else "agree", _number(found["prompts"], "prompt")
    lines += ["", f"The results {verdict}, in {_number(found['ablations'], 'ablation')} of {prompts}."]
    return "\n".join(line for number, line in enumerate(lines) if line or lines[number - 1])


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _where(cell: Mapping[str, Any]) -> str:
    prompt = repr(cell["prompt"]) if cell["prompt"] is not None else f"prompt {cell['prompt_index']}"
    if cell["imputation"] is None:
        return f"clean, {prompt}"
    at = "" if cell["positions"] == "all" else f" at {cell['positions']}"
    return f"{cell['heads'] or 'no head'}, {cell['imputation']}{at}, {prompt}"
