"""The findings of a sweep of several prompts, as values for programs and as text for people."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ablation.errors import InvalidResult
from ablation.reports.report import ablated_line, trend, where
from ablation.results import LOSS, Result
from ablation.studies import agreement, statistics
from ablation.studies.agreement import points
from ablation.studies.statistics import Effects, Share

RANKED_BY = "target_probability"
"""The metric by whose mean change heads are ranked."""
FEW = 10
"""With fewer prompts, the report warns of intervals that are too short."""
SHOWN = ("target_probability", "logit_difference", "kl", "correct")
"""The metrics that are listed for each of the strongest heads."""


def findings(result: Result, strongest: int = 10) -> dict[str, Any]:
    """Return the content of the report as values that JSON can hold; `ablation.studies.statistics` has the intervals.

    result: of one-head ablations and at least two prompts. strongest: how many heads are listed for each imputation,
    those with the largest mean change of the target's probability. Probabilities are in [0, 1]. Raises InvalidResult
    for a result of a text, or of sets of heads.
    """
    if LOSS in result.clean:
        raise InvalidResult("this is a result of a text: see `findings_of_text`")
    effects = {name: statistics.effects(result, name) for name in SHOWN}
    control = statistics.effects(result, "control_probability")
    has_head, head_mean = result.has_head, result.head_mean.mean(axis=0)
    means = head_mean[has_head]
    mean, differs = (result.grid(getattr(effects[RANKED_BY], name)) for name in ("mean", "differs"))
    found: dict[str, Any] = {
        "prompts": len(result.prompts),
        "heads": int(has_head.sum()),
        "layers": len(has_head),
        "clean": {
            "correct": share_of(statistics.share(result.clean["correct"] > 0)),
            **{name: float(result.clean[name].mean()) for name in ("target_probability", "control_probability")},
            **{name: float(result.clean[name].mean()) for name in ("logit_difference", "margin")},
        },
        "ablated": where(result),
        "imputations": {name: _of_imputation(result, name, effects, control, strongest) for name in result.imputations},
        "agreement": agreement.findings(result.imputations, mean, differs),
        "groups": {
            name: {
                "prompts": len(members),
                "correct": share_of(statistics.share(result.clean["correct"][members] > 0)),
                "strongest": {
                    imputation: _strongest(result, imputation, {RANKED_BY: of_group}, 1)[0]
                    for imputation in result.imputations
                },
            }
            for name, members in statistics.groups(result).items()
            for of_group in [statistics.effects(result, RANKED_BY, members)]
        },
        "head_means": {
            "mean": float(means.mean()),
            "std": float(means.std()),
            "min": float(means.min()),
            "max": float(means.max()),
            **{f"trend_{name}": value for name, value in trend(head_mean)._asdict().items()},
        },
    }
    return found


def _of_imputation(
    result: Result, imputation: str, effects: dict[str, Effects], control: Effects, strongest: int
) -> dict[str, Any]:
    """What the heads do under one imputation."""
    own = np.array([key.imputation == imputation for key in result.ablations])
    largest = int(np.argmax(np.where(own, np.abs(control.mean), -1.0)))
    return {
        "runs": int(own.sum()) * len(result.prompts),
        "kept": int(result.kept[:, own].sum()),
        "correct": int(result.ablated["correct"][:, own].sum()),
        "heads_that_differ": int(effects[RANKED_BY].differs[own].sum()),
        "strongest": _strongest(result, imputation, effects, strongest),
        "control_largest": {"head": result.ablations[largest].label, **interval(control, largest)},
        "changed_nothing": int((result.changed[:, own] == 0).sum()),
    }


def _strongest(
    result: Result, imputation: str, effects: dict[str, Effects], count: int, by: str = RANKED_BY
) -> list[dict[str, Any]]:
    """The heads with the largest mean change of a metric, the largest first, with all given metrics."""
    own = [index for index, key in enumerate(result.ablations) if key.imputation == imputation]
    order = sorted(own, key=lambda index: -abs(effects[by].mean[index]))[:count]
    return [
        {
            "head": result.ablations[index].label,
            **{name: interval(of, index) for name, of in effects.items()},
            **({} if LOSS in result.clean else {"kept": share_of(statistics.share(result.kept[:, index]))}),
        }
        for index in order
    ]


def interval(effects: Effects, index: int) -> dict[str, Any]:
    """The mean change of one ablation, with its interval and its adjusted p value; None in place of NaN."""
    values = {name: float(getattr(effects, name)[index]) for name in ("mean", "low", "high", "adjusted_p")}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def share_of(share: Share) -> dict[str, Any]:
    """Return a share as values that JSON can hold."""
    return dataclasses.asdict(share)


def findings_of_text(result: Result, strongest: int = 10) -> dict[str, Any]:
    """Return the content of the report on a text, as values that JSON can hold. Losses are in nats per token.

    result: of `ablation.studies.texts.sweep_text`. strongest: how many heads are listed for each imputation, those with
    the largest mean change of the loss over the windows. Raises InvalidResult for a result of prompts.
    """
    if LOSS not in result.clean:
        raise InvalidResult("this is a result of prompts, not of a text: see `findings`")
    effects = {LOSS: statistics.effects(result, LOSS)}
    mean, differs = (result.grid(getattr(effects[LOSS], name)) for name in ("mean", "differs"))
    return {
        "windows": len(result.prompts),
        "scored_tokens": sum(len(prompt.target) for prompt in result.prompts),
        "heads": int(result.has_head.sum()),
        "ablated": where(result),
        "clean": {LOSS: float(result.clean[LOSS].mean())},
        "imputations": {
            name: {
                "heads_that_differ": sum(
                    bool(differs) and key.imputation == name
                    for key, differs in zip(result.ablations, effects[LOSS].differs, strict=True)
                ),
                "strongest": _strongest(result, name, effects, strongest, LOSS),
            }
            for name in result.imputations
        },
        "agreement": agreement.findings(result.imputations, mean, differs if len(result.prompts) > 1 else None),
    }


# ---- text


def render_text(found: dict[str, Any]) -> str:
    """Return the findings on a text as text. found: the result of `findings_of_text`."""
    lines = [
        f"clean      loss {found['clean'][LOSS]:.4f} nats per token, over {found['scored_tokens']} tokens in "
        f"{found['windows']} window{'' if found['windows'] == 1 else 's'}"
    ]
    lines += ablated_line(found)
    for name, of in found["imputations"].items():
        lines += [
            "",
            f"{name:10} {of['heads_that_differ']} of {found['heads']} heads change the loss on average "
            "(false discovery rate 5%)",
        ]
        lines += [f"  {head['head']:8} {numbers(head[LOSS], '+.4f'):>28}" for head in of["strongest"]]
    if found["agreement"]:
        lines += ["", *agreement.lines(found["agreement"], lambda change: f"{change:+.4f} nats")]
    if found["windows"] > 1:
        lines += [
            "",
            "Intervals in brackets are of 95%: bootstrap over the windows, not corrected for many heads.",
        ]
    return "\n".join(lines)


def render(found: dict[str, Any]) -> str:
    """Return findings as text, with changes of probability in percentage points. found: the result of `findings`."""
    clean = found["clean"]
    lines = [
        f"clean      {correct(clean['correct'])}; on average P(target) = {clean['target_probability']:.1%}, "
        f"P(control) = {small(clean['control_probability'])}, margin {clean['margin']:.2f} logits"
    ]
    lines += ablated_line(found)
    for name, of in found["imputations"].items():
        lines += [
            "",
            f"{name:10} {of['kept']} of {of['runs']} runs keep the prediction; {of['correct']} are correct",
            f"           {of['heads_that_differ']} of {found['heads']} heads change P(target) on average "
            "(false discovery rate 5%)",
            f"  {'head':8} {'P(target), pp':>26}  {'logit difference':>24}  {'KL, nats':>22}  prediction kept",
        ]
        lines += [f"  {head['head']:8} {_row(head)}" for head in of["strongest"]]
        lines.append(
            f"  {'control':8} {points_of(of['control_largest'], 26)}  at most, by {of['control_largest']['head']}"
        )
        if of["changed_nothing"]:
            lines.append(f"  in {of['changed_nothing']} runs, the ablation changed no element of z")
    if found["agreement"]:
        lines += ["", *agreement.lines(found["agreement"], points)]
    if found["groups"]:
        width = max(map(len, found["groups"]))
        lines += ["", "groups, with the head that changes P(target) most"]
        for name, of in found["groups"].items():
            heads = ", ".join(
                f"{imputation} {head['head']} {points_of(head[RANKED_BY]).strip()}"
                for imputation, head in of["strongest"].items()
            )
            lines.append(f"  {name:{width}}  {of['correct']['count']} of {of['prompts']} correct; {heads}")
    means = found["head_means"]
    lines += [
        "",
        f"head means {means['mean']:+.3f} on average, std {means['std']:.3f}, "
        f"from {means['min']:+.3f} to {means['max']:+.3f}; "
        f"trend {means['trend_slope']:+.4f} per layer (r² {means['trend_r_squared']:.2f})",
        "",
        "Intervals in brackets are of 95%: bootstrap over the prompts for means, Wilson for shares. They are not",
        "corrected for the number of heads; the false discovery rate is." + few(found["prompts"]),
    ]
    return "\n".join(lines)


def few(prompts: int) -> str:
    """A warning about bootstrap intervals, which are too short if there are few prompts."""
    return f" With {prompts} prompts, bootstrap intervals are too short." if prompts < FEW else ""


def _row(head: dict[str, Any]) -> str:
    logits, kl, kept = head["logit_difference"], head["kl"], head["kept"]
    return (
        f"{points_of(head[RANKED_BY], 26)}  {numbers(logits, '+.2f'):>24}  {numbers(kl, '.3f'):>22}  "
        f"{kept['count']} of {kept['of']}"
    )


def points_of(effect: dict[str, Any], width: int = 0) -> str:
    """Return the mean of a change of probability in percentage points, with its interval."""
    points = {name: None if effect[name] is None else 100 * effect[name] for name in ("mean", "low", "high")}
    return f"{numbers(points, '+.2f'):>{width}}"


def numbers(effect: dict[str, Any], form: str) -> str:
    """Return a mean with its interval, if it has one."""
    if effect["low"] is None:
        return f"{effect['mean']:{form}}"
    return f"{effect['mean']:{form}} [{effect['low']:{form}}, {effect['high']:{form}}]"


def correct(share: dict[str, Any]) -> str:
    """Return in words how many prompts are answered correctly."""
    return f"{share['count']} of {share['of']} correct [{share['low']:.1%}, {share['high']:.1%}]"


def small(probability: float) -> str:
    """Return a probability in percent; a small one with one digit."""
    return f"{probability:.1%}" if probability >= 0.0005 else f"{100 * probability:.0e}%"
