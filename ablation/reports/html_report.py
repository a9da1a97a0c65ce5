"""The report of a sweep as one interactive page that works from a file, without network. Does not import torch.

The page uses Bokeh rather than Plotly: its scripts add 2 MB to the page instead of 4.8 MB, and it has a table that
sorts, filters, reports clicks and follows the arrow keys, none of which Plotly's table does.

Every number is embedded once, as JSON with 4 or 5 significant digits; html_report.js makes the map and the tables of
it. Texts of models and prompts enter the page as JSON or escaped, and a content security policy allows no script but
those of this module and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablation import choices
from ablation.errors import AblationError
from ablation.reports.html_parts import RANKED_BY, map_of_heads, table_of_heads, table_of_prompts
from ablation.reports.report import token_labels, where
from ablation.results import METRICS, Result
from ablation.studies import statistics

MAX_SINGLE_VALUES = 200_000
"""How many values of single prompts a page holds; those of the weaker heads are left out."""
CHANGE_DIGITS, CLEAN_DIGITS = 4, 5
"""Significant digits of a change, and of a clean value."""
MAX_DECIMALS = 6


class Shown(NamedTuple):
    """How the page shows a metric.

    title: a short name. unit: of a change. clean_unit: of a value. factor: converts values to this unit. definition: by
    default that of `METRICS`.
    """

    title: str
    unit: str = ""
    clean_unit: str = ""
    factor: float = 1.0
    definition: str = ""


PROBABILITY = "probability that the text goes on with the {}, in %; changes are in percentage points (pp)"
SHOWN = {
    "target_probability": Shown("P(target)", "pp", "%", 100.0, PROBABILITY.format("target")),
    "target_log_probability": Shown("log P(target)", "nats", "nats"),
    "control_probability": Shown("P(control)", "pp", "%", 100.0, PROBABILITY.format("control")),
    "control_log_probability": Shown("log P(control)", "nats", "nats"),
    "logit_difference": Shown("logit difference", "nats", "nats"),
    "kl": Shown("KL divergence", "nats", "nats"),
    "target_rank": Shown("target rank", "ranks"),
    "margin": Shown("margin", "logits", "logits"),
    "correct": Shown("correct"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; script-src 'unsafe-eval'"
"""'unsafe-eval' is for Bokeh, which compiles the order of a table's column; inline scripts are allowed by digest."""


def available() -> bool:
    """Whether Bokeh is installed, which `write_html` needs."""
    return importlib.util.find_spec("bokeh") is not None


def write_html(result: Result, path: Path, *, title: str, decode: Callable[..., str]) -> None:
    """Write the page. result: of one-head ablations. decode: returns the text of token ids.

    Raises AblationError if Bokeh is missing, InvalidResult if an ablation has several heads or none, and OSError.
    """
    if not available():
        raise AblationError("an interactive page needs Bokeh: pip install 'head-ablation[html]'")
    from bokeh.embed import json_item
    from bokeh.resources import Resources

    content = page_content(result, decode)
    items = {
        "map": json_item(map_of_heads(*result.head_mean.shape[1:])),
        "heads": json_item(table_of_heads(content)),
        "prompts": json_item(table_of_prompts(content)),
    }
    resources = Resources(mode="inline", minified=True, components=["bokeh", "bokeh-widgets", "bokeh-tables"])
    own = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    scripts = [script.replace("\r", "") for script in (*resources.js_raw, own)]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.substitute(
        policy=" ".join([POLICY, *(f"'sha256-{digest}'" for digest in digests)]),
        title=html.escape(title),
        lead=_lead(result, decode),
        metrics="".join(f'<option value="{i}">{html.escape(m["title"])}' for i, m in enumerate(content["metrics"])),
        imputations="".join(f"<option>{html.escape(name)}" for name in result.imputations),
        notes=_notes(result, content),
        mean_changes="mean changes" if len(result.prompts) > 1 else "changes",
        provenance=_rows(result.provenance),
        content=_script_json(content),
        items=_script_json(items),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


# ---- the numbers


def page_content(result: Result, decode: Callable[..., str]) -> dict[str, Any]:
    """Return the numbers and texts of the page, as values that JSON can hold; None in place of NaN and infinity.

    Changes are ablated - clean, in the unit of the metric. Values of single prompts are listed for as many ablations as
    `MAX_SINGLE_VALUES` allows, those with the largest mean change of `RANKED_BY`.
    """
    result.grid(result.kept)  # raises InvalidResult
    names = [name for name in result.clean if name != "argmax"]
    prompts, ablations = result.kept.shape
    effects = {name: statistics.effects(result, name) for name in names}
    order = np.argsort(-np.abs(effects[RANKED_BY].mean), kind="stable")
    listed = order[: max(1, MAX_SINGLE_VALUES // (prompts * (len(names) + 1)))]
    clean_argmax, argmax = result.clean["argmax"], result.ablated["argmax"][:, listed]
    tokens, numbers = np.unique(np.append(clean_argmax[:, None], argmax, axis=1).T, return_inverse=True)
    texts = token_labels({token: decode(token) for token in tokens.tolist()})
    receipts = [_receipt(result, index) for index in range(ablations)]
    receipt_texts = list(dict.fromkeys(receipts))
    metrics = []
    for name in names:
        shown, of = SHOWN.get(name, Shown(name)), effects[name]
        change, clean = shown.factor * result.change(name), shown.factor * result.clean[name]
        metrics.append(
            {
                "name": name,
                **dict(zip(shown._fields[:3], shown[:3], strict=True)),
                "decimals": _decimals(shown.factor * of.mean),
                "mean": _rounded(shown.factor * of.mean),
                **{side: _rounded(shown.factor * getattr(of, side)) for side in ("low", "high") if prompts > 1},
                **({"adjusted_p": _rounded(of.adjusted_p)} if prompts > 1 else {}),
                "single_decimals": max(_decimals(change), _decimals(np.append(change, clean))),
                "clean": _rounded(clean, CLEAN_DIGITS),
                "single": [_rounded(change[:, index]) for index in listed],
            }
        )
    return {
        "ranked_by": RANKED_BY,
        "imputations": list(result.imputations),
        "imputation": [result.imputations.index(key.imputation) for key in result.ablations],
        "place": [list(key.heads[0]) for key in result.ablations],
        "kept": result.kept.sum(axis=0).tolist(),
        "receipts": receipt_texts,
        "receipt": [receipt_texts.index(text) for text in receipts],
        "strongest": int(order[0]),
        "metrics": metrics,
        "prompts": [_text(prompt.prompt, prompt.token_ids, decode) for prompt in result.prompts],
        "targets": [repr(_text(prompt.target_text, prompt.target, decode)) for prompt in result.prompts],
        "listed": listed.tolist(),
        "texts": list(texts.values()),
        "clean_argmax": numbers[0].tolist(),
        "argmax": numbers[1:].tolist(),
    }


def _rounded(values: NDArray[Any], digits: int = CHANGE_DIGITS) -> list[float | None]:
    """Return values with few significant digits, and None in place of NaN and infinity."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def _decimals(values: NDArray[np.float64]) -> int:
    """Return the decimals of a column of these values: 4 significant digits of the largest, or 0 for integers."""
    finite = values[np.isfinite(values)]
    largest = np.abs(finite).max(initial=0.0)
    if np.array_equal(finite, np.round(finite)):
        return 0
    return int(np.clip(3 - np.floor(np.log10(largest)), 0, MAX_DECIMALS))


def _receipt(result: Result, index: int) -> str:
    """Return the receipts of one ablation for all prompts, as text."""
    calls, replaced, changed = (_range(getattr(result, name)[:, index]) for name in ("calls", "replaced", "changed"))
    times = "once" if calls == "1" else f"{calls} times"
    each = " for each prompt" if len(result.prompts) > 1 else ""
    return f"projection called {times}, {replaced} elements of z replaced, {changed} changed{each}"


def _range(values: NDArray[np.int64]) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _text(text: str | None, tokens: tuple[int, ...], decode: Callable[..., str]) -> str:
    """Return a text, or that of the tokens if it is not known."""
    return decode(*tokens) if text is None else text


# ---- the texts


def _lead(result: Result, decode: Callable[..., str]) -> str:
    """Return the question and the clean run, in words."""
    heads, layers = int(result.has_head.sum()), len(result.has_head)
    *ways, last = result.imputations
    of = f"{', '.join(ways)} and {last}" if ways else last
    runs = (
        f"Each of the {heads} heads in {layers} layers was ablated {where(result)} of the prompt, with {of} imputation."
    )
    clean = {name: float(values.mean()) for name, values in result.clean.items()}
    if len(result.prompts) > 1:
        right = statistics.share(result.clean["correct"] > 0)
        return (
            f"<p>{html.escape(runs)} {len(result.prompts)} prompts; without ablation, {right.count} of {right.of} are "
            f"answered correctly, and the target has a probability of {100 * clean['target_probability']:.3g}% on "
            f"average, the control one of {100 * clean['control_probability']:.3g}%.</p>"
        )
    prompt = result.prompts[0]
    answers = (
        f"{role} <q>{html.escape(_text(text, tokens, decode))}</q> {100 * clean[f'{role}_probability']:.3g}%"
        for role, text, tokens in (
            ("target", prompt.target_text, prompt.target),
            ("control", prompt.control_text, prompt.control),
        )
    )
    return (
        f'<p class="prompt">{html.escape(_text(prompt.prompt, prompt.token_ids, decode))}</p>'
        f"<p>{html.escape(runs)} Without ablation, the model predicts "
        f"<q>{html.escape(decode(int(result.clean['argmax'][0])))}</q>; probabilities: {', '.join(answers)}.</p>"
    )


def _notes(result: Result, content: Mapping[str, Any]) -> str:
    """Return the definitions that depend on the result, as the rows of a table."""
    several = len(result.prompts) > 1
    meanings = {name: text for name in result.imputations if (text := choices.meaning(name)) is not None}
    notes = {
        **{f"{name} imputation": f"z of the head is replaced by: {text}." for name, text in meanings.items()},
        "change": "the value with the ablation - the value without (clean)"
        + (", averaged over the prompts." if several else "."),
    }
    if several:
        notes["95% interval"] = (
            "bootstrap interval of the mean change, from resampled prompts. It describes prompts like these, says "
            "nothing about other prompts, and is not corrected for the number of heads."
        )
        notes["corrected p"] = (
            "two-sided p value of a t-test over the prompts that the mean change is 0, corrected for the number of "
            "ablations (Benjamini and Hochberg). A dot in the map marks a value below 0.05: at most 5% of the dots are "
            "expected to be there by chance. The report counts the same heads."
        )
    notes["kept"] = (
        "for how many prompts the prediction stays that of the clean run. The area of a ring in the map is the share "
        "of prompts for which it changes."
        if several
        else "1 if the prediction stays that of the clean run, 0 if it changes. A ring in the map marks a head whose "
        "ablation changes it."
    )
    for metric in content["metrics"]:
        shown = SHOWN.get(metric["name"], Shown(metric["name"]))
        notes[metric["title"]] = f"{shown.definition or METRICS.get(metric['name'], 'a metric of this sweep')}."
    if len(content["listed"]) < len(result.ablations):
        notes["single prompts"] = (
            f"to keep this page small, it holds the values of single prompts only for the {len(content['listed'])} of "
            f"{len(result.ablations)} ablations with the largest mean change of P(target). The other files of the "
            "result hold all values."
        )
    return _rows(notes)


def _rows(values: Mapping[str, Any]) -> str:
    """Return the rows of a table of names and values, escaped."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return "\n".join(
        f'<tr><th scope="row">{html.escape(str(name))}<td>{html.escape(text)}' for name, text in texts.items()
    )


def _script_json(value: Any) -> str:
    """Return a value as JSON that can stand in a script element: no tag can begin in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
