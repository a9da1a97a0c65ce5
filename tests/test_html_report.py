"""The interactive page: its numbers and texts. tests/test_html_in_browser.py tests how it behaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.errors import AblationError, InvalidResult
from ablation.reports import html_report
from ablation.results import METRICS, AblationKey, Result
from ablation.studies import statistics
from tests.synthetic import synthetic

pytest.importorskip("bokeh")

EVIL = '</script><b id="evil">&amp;</b><img src=x onerror="document.title=\'evil\'"> $$\\frac{1}{2}$$ <!--'
ATTRIBUTES = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background"}


def decode(*tokens: int) -> str:
    return "".join(f" word{token}" for token in tokens)


def two_metrics(result: Result) -> Result:
    """Return a result with fewer metrics, which is faster."""
    kept = ("target_probability", "control_probability", "correct", "argmax")
    return replace(result, clean={n: result.clean[n] for n in kept}, ablated={n: result.ablated[n] for n in kept})


class Page(HTMLParser):
    """What a browser sees in a page, without running scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw, self.tags, self.urls, self.texts = text, list[str](), list[str](), list[str]()
        self.json: dict[str | None, Any] = {}
        self.element: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(text)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.element = tag, dict(attrs)
        self.urls += [str(value) for name, value in attrs if name in ATTRIBUTES]

    def handle_data(self, data: str) -> None:
        tag, attributes = self.element
        if attributes.get("type") == "application/json":
            self.json[attributes["id"]] = json.loads(data)
        elif tag not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.element = ("", {})

    @property
    def content(self) -> Any:
        return self.json["content"]


def page(result: Result, folder: Path, title: str = "title", decode: Callable[..., str] = decode) -> Page:
    html_report.write_html(result, folder / "report.html", title=title, decode=decode)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def evil_result() -> Result:
    result = synthetic(2, 3, prompts=2)
    prompts = [replace(prompt, prompt=EVIL, target_text=EVIL, control_text=EVIL) for prompt in result.prompts]
    clean, ablated = ({**values, EVIL: values["kl"] + 0} for values in (result.clean, result.ablated))
    keys = tuple(AblationKey(key.heads, key.imputation.replace("zero", EVIL)) for key in result.ablations)
    return replace(
        result,
        ablations=keys,
        prompts=tuple(prompts),
        clean=clean,
        ablated=ablated,
        provenance={EVIL: [EVIL], "a": EVIL},
    )


# ---- content


@pytest.mark.end_to_end
def test_page_embeds_mean_changes_and_intervals(tmp_path: Path) -> None:
    result = synthetic(3, 4, prompts=5)
    content = page(result, tmp_path).content
    metrics = {metric["name"]: metric for metric in content["metrics"]}
    assert list(metrics) == [name for name in METRICS if name != "argmax"]
    for name, factor in (("target_probability", 100), ("kl", 1), ("correct", 1)):
        effects = statistics.effects(result, name)
        for field in ("mean", "low", "high"):
            assert np.allclose(metrics[name][field], factor * getattr(effects, field), rtol=6e-4, atol=1e-12)
    assert content["place"] == [list(key.heads[0]) for key in result.ablations]
    assert content["kept"] == result.kept.sum(axis=0).tolist()
    assert {content["imputations"][i] for i in content["imputation"]} == {"zero", "mean"}


def test_page_embeds_the_values_of_each_prompt(tmp_path: Path) -> None:
    result = synthetic(3, 4, prompts=5)
    content = page(result, tmp_path).content
    assert sorted(content["listed"]) == list(range(24))
    for metric in content["metrics"]:
        factor = 100 if metric["unit"] == "pp" else 1
        assert np.allclose(metric["clean"], factor * result.clean[metric["name"]], rtol=6e-5)
        change = factor * result.change(metric["name"])[:, content["listed"]].T
        assert np.allclose(metric["single"], change, rtol=6e-4, atol=1e-12), metric["name"]
    predictions = [[content["texts"][index] for index in row] for row in content["argmax"]]
    expected = [[repr(decode(token)) for token in row] for row in result.ablated["argmax"][:, content["listed"]].T]
    assert predictions == expected and content["prompts"][3] == "prompt 3"


def test_page_of_one_prompt_has_no_intervals(tmp_path: Path) -> None:
    several, one = (page(synthetic(2, 3, prompts=prompts), tmp_path) for prompts in (2, 1))
    for found, expected in ((several, True), (one, False)):
        assert all(("low" in metric, "high" in metric) == (expected,) * 2 for metric in found.content["metrics"])
        assert ("95% interval" in found.text) is expected and ("95% low" in found.raw) is expected
    assert "prompt 0" in one.text and "nan" not in json.dumps(one.content).lower()


def test_large_page_keeps_single_values_of_strongest_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = two_metrics(synthetic(4, 5, prompts=3))
    monkeypatch.setattr(html_report, "MAX_SINGLE_VALUES", 12 * 10 + 11)
    found = page(result, tmp_path)
    strongest = np.argsort(-np.abs(result.change("target_probability").mean(axis=0)))[:10]
    assert found.content["listed"] == strongest.tolist() and found.content["strongest"] == strongest[0]
    assert all(len(metric["single"]) == 10 and len(metric["mean"]) == 40 for metric in found.content["metrics"])
    assert "10 of 40 ablations" in " ".join(found.text.split())


@pytest.mark.slow
@pytest.mark.end_to_end
def test_page_of_a_large_model_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = synthetic(40, 40, prompts=100)
    effects = statistics.effects(result, "target_probability")
    monkeypatch.setattr(statistics, "effects", lambda *_: effects)  # their intervals take most of the time
    found = page(result, tmp_path)
    assert len(found.content["listed"]) == 200 and (tmp_path / "report.html").stat().st_size < 5_000_000


def test_missing_heads_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    means = np.zeros((1, 3, 4))
    means[:, 1], means[:, 2, 3] = np.nan, np.nan
    result = synthetic(3, 4, head_mean=means)
    result.ablated["kl"][0, :2] = np.nan, np.inf
    content = page(result, tmp_path).content
    assert len(content["place"]) == 14 and [1, 0] not in content["place"] and [2, 3] not in content["place"]
    kl = next(metric for metric in content["metrics"] if metric["name"] == "kl")
    assert kl["mean"][:2] == [None, None] and None not in kl["mean"][2:]


def test_receipts_are_ranges_over_the_prompts(tmp_path: Path) -> None:
    replaced = np.array([40, 56])[:, None, None, None]
    content = page(synthetic(1, 2, prompts=2, replaced=replaced), tmp_path).content
    assert content["receipts"] == ["projection called once, 40 to 56 elements of z replaced, 1 changed for each prompt"]


def test_texts_are_escaped(tmp_path: Path) -> None:
    plain = page(synthetic(2, 3, prompts=2), tmp_path)
    evil = page(evil_result(), tmp_path, EVIL, lambda *_: EVIL)
    more = Counter(evil.tags) - Counter(plain.tags)
    assert more == {
        "option": 1,
        "tr": 2,
        "th": 2,
        "td": 2,
    }  # a metric more, provenance, no zero imputation
    assert not Counter(plain.tags) - Counter(evil.tags)
    assert (
        EVIL in evil.text and evil.content["prompts"] == [EVIL, EVIL] and evil.content["metrics"][-1]["title"] == EVIL
    )


def test_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    assert page(synthetic(1, 2), tmp_path, "\ud800", lambda *_: "\udfff").content["texts"]


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    found = page(synthetic(2, 3), tmp_path)
    assert found.urls == [] and not {"link", "iframe", "object", "embed", "base"} & set(found.tags)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', found.raw)
    assert policy is not None and policy[1].startswith("default-src 'none'; ")
    assert "http" not in policy[1] and "script-src 'unsafe-eval' 'sha256-" in policy[1]


def test_page_ends_with_the_provenance(tmp_path: Path) -> None:
    result = replace(synthetic(2, 3), provenance={"model": "tiny", "threads": 1, "for_each_prompt": ["x"]})
    text = page(result, tmp_path).text
    assert re.search(r'Provenance\s*model\s*tiny\s*threads\s*1\s*for_each_prompt\s*\["x"\]\s*$', text)


def test_sets_of_heads_are_refused(tmp_path: Path) -> None:
    result = synthetic(1, 2, imputations=["zero"])
    keys = (AblationKey(((0, 0), (0, 1)), "zero"), result.ablations[1])
    with pytest.raises(InvalidResult):
        page(replace(result, ablations=keys), tmp_path)


def test_missing_bokeh_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert html_report.available()
    monkeypatch.setitem(sys.modules, "bokeh", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not html_report.available()
    with pytest.raises(AblationError, match="pip install"):
        page(synthetic(1, 2), tmp_path)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_import_loads_neither_bokeh_nor_torch() -> None:
    code = (
        "import sys, ablation.reports.html_report; print([name for name in ('bokeh', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
