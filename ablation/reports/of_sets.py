"""The findings of studies of sets of heads, as values for programs and as text for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ablation.reports.report import Decode, ablated_line, where
from ablation.reports.summary import RANKED_BY, correct, few, interval, numbers, points_of, share_of, small
from ablation.results import Result
from ablation.studies import statistics
from ablation.studies.curves import BAND, ORDERED, Curve, first_halving
from ablation.studies.pairs import Pairs
from ablation.units import pair_label

OF_SETS = ("target_probability", "control_probability", "logit_difference", "kl", "correct")
"""The metrics whose changes are reported for each set."""
MOST_SIZES = 16
"""So many sizes of a removal curve are listed."""
KIND_NAMES = {ORDERED: "ordered heads", "uniform": "random heads", "layers": "random, same layers"}


def clean_findings(result: Result, decode: Decode) -> dict[str, Any]:
    """Return what the clean runs do, as values that JSON can hold."""
    found: dict[str, Any] = {
        "correct": share_of(statistics.share(result.clean["correct"] > 0)),
        **{
            name: float(result.clean[name].mean())
            for name in ("target_probability", "control_probability", "logit_difference", "margin")
        },
    }
    if len(result.prompts) == 1:
        found["prediction"] = decode(int(result.clean["argmax"][0]))
        found["target"], found["control"] = result.prompts[0].target_text, result.prompts[0].control_text
    return found


def clean_line(clean: dict[str, Any]) -> str:
    """Return a line on the clean runs. clean: of `clean_findings`."""
    if "prediction" in clean:
        return (
            f"clean      {clean['prediction']!r}, margin {clean['margin']:.2f} logits; "
            f"P({clean['target']!r}) = {clean['target_probability']:.1%}, "
            f"P({clean['control']!r}) = {small(clean['control_probability'])}"
        )
    return (
        f"clean      {correct(clean['correct'])}; on average P(target) = {clean['target_probability']:.1%}, "
        f"P(control) = {small(clean['control_probability'])}, margin {clean['margin']:.2f} logits"
    )


# ---- named sets


def findings_of_sets(result: Result, decode: Decode) -> dict[str, Any]:
    """Return what each set does, as values that JSON can hold. Probabilities are in [0, 1]. decode: of a token id.

    replaced, changed: the receipt of the set: elements of z, summed over its heads and the prompts.
    """
    effects = {name: statistics.effects(result, name) for name in OF_SETS}
    single = len(result.prompts) == 1
    return {
        "prompts": len(result.prompts),
        "clean": clean_findings(result, decode),
        "ablated": where(result),
        "sets": [
            {
                "name": key.title,
                "heads": [pair_label(pair) for pair in key.heads],
                "imputation": key.imputation,
                **{name: interval(of, number) for name, of in effects.items()},
                "kept": share_of(statistics.share(result.kept[:, number])),
                **({"prediction": decode(int(result.ablated["argmax"][0, number]))} if single else {}),
                "replaced": int(result.replaced[:, number].sum()),
                "changed": int(result.changed[:, number].sum()),
            }
            for number, key in enumerate(result.ablations)
        ],
    }


def render_sets(found: dict[str, Any]) -> str:
    """Return the findings on sets as text, with changes of probability in percentage points."""
    single = found["prompts"] == 1
    width = min(40, max(len(of["name"]) for of in found["sets"]))
    lines = [clean_line(found["clean"]), *ablated_line(found)]
    wide = (13, 14, 10) if single else (26, 24, 22)
    for imputation in dict.fromkeys(of["imputation"] for of in found["sets"]):
        heading = ("P(target), pp", "P(control), pp", "KL, nats")
        columns = "  ".join(f"{text:>{size}}" for text, size in zip(heading, wide, strict=True))
        answer = "prediction" if single else "prediction kept"
        lines += ["", imputation, f"  {'set':{width}}  heads  {columns}  {answer}"]
        for of in found["sets"]:
            if of["imputation"] == imputation:
                target, control = (points_of(of[f"{name}_probability"]) for name in ("target", "control"))
                cells = (target, control, numbers(of["kl"], ".3f"))
                row = "  ".join(f"{text:>{size}}" for text, size in zip(cells, wide, strict=True))
                kept = of["kept"]
                last = repr(of["prediction"]) if single else f"{kept['count']} of {kept['of']}"
                flip = "" if not single or kept["count"] else "  (changed)"
                lines.append(f"  {_cut(of['name'], width):{width}}  {len(of['heads']):5}  {row}  {last}{flip}")
    unchanged = [_cut(of["name"], width) for of in found["sets"] if not of["changed"]]
    lines += _receipts({name: sum(of[name] for of in found["sets"]) for name in ("replaced", "changed")})
    if 0 < len(unchanged) < len(found["sets"]):
        lines.append(f"           {', '.join(unchanged)}: no element of z changed its value")
    return "\n".join(lines + _about_intervals(found["prompts"]))


def counted(number: int, noun: str) -> str:
    """Return a number of things, in the singular or the plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _receipts(found: dict[str, Any]) -> list[str]:
    """Return lines on what the hooks did."""
    nothing = [] if found["changed"] else ["           no element of z changed its value"]
    line = f"receipts   every projection was called once; {found['replaced']} elements of z were replaced"
    return ["", line, *nothing]


def _cut(text: str, width: int) -> str:
    """Return a name for a column of the terminal: what cannot be printed, such as an escape sequence, is escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _about_intervals(prompts: int) -> list[str]:
    if prompts == 1:
        return []
    return ["", "Intervals in brackets are of 95%: bootstrap over the prompts." + few(prompts)]


# ---- removal curves


def findings_of_curve(result: Result, decode: Decode) -> dict[str, Any]:
    """Return a removal curve as values that JSON can hold.

    as_harmful: see `Curve.as_harmful`. half: the smallest k at which the accuracy is at most half of the clean one; of
    random orders, that of their mean; None if there is none.
    """
    curve = Curve.of(result)
    found: dict[str, Any] = {
        "prompts": len(result.prompts),
        "clean": clean_findings(result, decode),
        "ablated": where(result),
        "replaced": int(result.replaced.sum()),
        "changed": int(result.changed.sum()),
        "ks": list(curve.ks),
        "study": result.provenance.get("study", {}),
        "imputations": {},
    }
    for i, imputation in enumerate(curve.imputations):
        of: dict[str, Any] = {"metrics": {}, "half": {}}
        for metric, clean in curve.clean.items():
            ends = {name: _listed(getattr(curve, name)[metric][i]) for name in ("low", "high")}
            of["metrics"][metric] = {ORDERED: {"mean": curve.ordered[metric][i].tolist(), **ends}}
            for kind, values in curve.random.items():
                mean, low, high = curve.band(kind, metric)
                of["metrics"][metric][kind] = {
                    "orders": values[metric].shape[1],
                    **{"mean": mean[i].tolist(), "low": low[i].tolist(), "high": high[i].tolist()},
                    "as_harmful": curve.as_harmful(kind, metric)[i].tolist(),
                }
            if metric == "correct":
                means = {kind: values["mean"] for kind, values in of["metrics"][metric].items()}
                of["half"] = {kind: first_halving(mean, clean, curve.ks) for kind, mean in means.items()}
        found["imputations"][imputation] = of
    return found


def _listed(values: Any) -> list[float] | None:
    return None if np.isnan(values).any() else values.tolist()


def render_curve(found: dict[str, Any]) -> str:
    """Return the findings on a removal curve as text."""
    lines = [clean_line(found["clean"]), *ablated_line(found), *_about_order(found["study"])]
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("correct", "accuracy", lambda value: f"{value:.1%}"),
        ("logit_difference", "logit difference", lambda value: f"{value:+.2f}"),
        ("kl", "KL, nats", lambda value: f"{value:.3f}"),
    )
    for imputation, of in found["imputations"].items():
        for metric, name, form in shown:
            kinds = of["metrics"][metric]
            lines += ["", f"{imputation}, {name}"]
            wide = {kind: 31 if metric == "kl" and kind != ORDERED else 24 for kind in kinds}
            lines.append("  " + "  ".join(["   k", *(f"{KIND_NAMES[kind]:>{wide[kind]}}" for kind in kinds)]))
            for j in _shown(found["ks"]):
                cells = [
                    f"{_cell(of_kind, j, form, shows_p=metric == 'kl'):>{wide[kind]}}"
                    for kind, of_kind in kinds.items()
                ]
                lines.append("  " + "  ".join([f"{found['ks'][j]:4}", *cells]))
    if len(_shown(found["ks"])) < len(found["ks"]):
        lines += ["", f"{len(found['ks'])} sizes were run; curve.csv has all of them."]
    if any(set(of["metrics"]["kl"]) - {ORDERED} for of in found["imputations"].values()):
        low, high = (f"{end:.0f}" for end in BAND)
        lines += [
            "",
            f"Brackets after random heads hold the {low}th and {high}th percentile of the orders. p is their share,",
            "counting one more, with a KL of at least that of the ordered heads; it is not corrected for many sizes.",
        ]
    return "\n".join([*lines, *_receipts(found), *_about_intervals(found["prompts"])])


def _shown(ks: list[int]) -> list[int]:
    """Return the indices of the sizes that are listed: all, or some of many, denser where they are small."""
    if len(ks) <= MOST_SIZES:
        return list(range(len(ks)))
    wanted = np.geomspace(1, len(ks), MOST_SIZES)
    return sorted({round(number) - 1 for number in wanted})


def _cell(values: dict[str, Any], index: int, form: Callable[[float], str], *, shows_p: bool) -> str:
    text = form(values["mean"][index])
    if values["low"] is not None:
        text += f" [{form(values['low'][index])}, {form(values['high'][index])}]"
    return f"{text} p={values['as_harmful'][index]:.2f}" if shows_p and "as_harmful" in values else text


def _about_order(study: dict[str, Any]) -> list[str]:
    """Return lines on where the order of the heads is from. study: of the provenance; empty if it is from Python."""
    if "order" not in study:
        return []
    lines = [f"order      {study['order']}"]
    if study.get("evaluated_on") is not None:
        lines.append(f"           {study['evaluated_on']}")
    return lines


# ---- pairs


def findings_of_pairs(result: Result, decode: Decode, strongest: int = 10, by: str = RANKED_BY) -> dict[str, Any]:
    """Return what pairs of heads do beyond their single effects, as values that JSON can hold.

    strongest: how many pairs are listed for each imputation, those with the largest mean interaction of a metric, `by`.
    compensating: in how many runs, of those in which neither head alone changes the prediction, both together do.
    restoring: in how many runs both together keep a prediction that one of them alone changes.
    """
    found: dict[str, Any] = {
        "prompts": len(result.prompts),
        "clean": clean_findings(result, decode),
        "ablated": where(result),
        "by": by,
        "replaced": int(result.replaced.sum()),
        "changed": int(result.changed.sum()),
        "imputations": {},
    }
    for imputation in result.imputations:
        pairs = Pairs.of(result, imputation)
        interaction, together = pairs.interaction(by), pairs.effect(by)
        ends = statistics.bootstrap_interval(interaction)
        mean = interaction.mean(axis=0)
        in_logits = pairs.interaction("logit_difference").mean(axis=0)
        order = np.argsort(-np.abs(mean), kind="stable")[:strongest]
        lower, upper = (of.mean(axis=0) for of in pairs.alone(by))
        flips = pairs.compensates.sum(axis=0)
        found["imputations"][imputation] = {
            "heads": len(pairs.heads),
            "pairs": len(pairs.pairs),
            "compensating": {"count": int(pairs.compensates.sum()), "of": int(pairs.both_kept_alone.sum())},
            "compensating_pairs": int((flips > 0).sum()),
            "restoring": int(pairs.restores.sum()),
            "strongest": [
                {
                    "lower": pair_label(pairs.pairs[n][0]),
                    "upper": pair_label(pairs.pairs[n][1]),
                    "effect_lower": float(lower[n]),
                    "effect_upper": float(upper[n]),
                    "effect": float(together[:, n].mean()),
                    "interaction": {
                        "mean": float(mean[n]),
                        **{
                            name: float(end[n]) if np.isfinite(end[n]) else None
                            for name, end in zip(("low", "high"), ends, strict=True)
                        },
                    },
                    "interaction_in_logits": float(in_logits[n]),
                    "compensates": int(flips[n]),
                    "prediction": decode(int(result.ablated["argmax"][0, pairs.together[n]])),
                }
                for n in map(int, order)
            ],
        }
    return found


def render_pairs(found: dict[str, Any]) -> str:
    """Return the findings on pairs as text, with changes of probability in percentage points."""
    single = found["prompts"] == 1
    lines = [clean_line(found["clean"]), *ablated_line(found)]
    for imputation, of in found["imputations"].items():
        both = of["compensating"]
        runs = "pairs" if single else "runs"
        lines += ["", f"{imputation:10} {counted(of['pairs'], 'pair')} of {of['heads']} heads"]
        if both["of"]:
            lines.append(
                f"           of {both['of']} {runs} in which neither head alone changes the prediction, "
                f"{both['count']} ({both['count'] / both['of']:.2%}) change it with both"
            )
        others = of["pairs"] * found["prompts"] - both["of"]
        if others:
            lines.append(
                f"           of {others} {runs} in which a head alone changes it, {of['restoring']} keep it with both"
            )
        last = "prediction of both" if single else "changed by both only"
        lines.append(
            f"  {'heads':15} {'alone, pp':>18}  {'both, pp':>9}  {'interaction, pp':>{16 if single else 26}}  "
            f"{'in logits':>9}  {last}"
        )
        for pair in of["strongest"]:
            alone = f"{100 * pair['effect_lower']:+.2f} {100 * pair['effect_upper']:+.2f}"
            beyond = points_of(pair["interaction"], 16 if single else 26)
            end = repr(pair["prediction"]) if single else f"{pair['compensates']} of {found['prompts']}"
            lines.append(
                f"  {pair['lower'] + ' ' + pair['upper']:15} {alone:>18}  {100 * pair['effect']:+9.2f}  {beyond}  "
                f"{pair['interaction_in_logits']:+9.2f}  {end}"
            )
    lines += [
        "",
        "interaction = effect of both - effect of one - effect of the other, on P(target); in logits: on the logit",
        "difference. Effects on probabilities need not add up even for independent heads, so compare the two.",
        *_receipts(found),
    ]
    return "\n".join(lines + _about_intervals(found["prompts"]))
