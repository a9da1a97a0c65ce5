"""The interactive page in a real browser: pointer, keyboard, sorting, filters, hostile texts, no requests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.reports import html_report
from ablation.results import AblationKey, Result
from ablation.studies import statistics
from tests.synthetic import synthetic
from tests.test_html_report import EVIL, decode, evil_result

pytest.importorskip("bokeh")

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,1400"),
)
LIBRARY = """
const deep = (root, selector) => [...root.querySelectorAll(selector),
  ...[...root.querySelectorAll("*")].flatMap((e) => e.shadowRoot ? deep(e.shadowRoot, selector) : [])];
const by_place = (a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top
  || a.getBoundingClientRect().left - b.getBoundingClientRect().left;
const texts = (id, selector) => deep(document.getElementById(id), selector).sort(by_place).map((e) => e.textContent);
"""


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, result: Result, folder: Path, decode: Callable[..., str] = decode, title: str = "title") -> None:
        html_report.write_html(result, folder / "report.html", title=title, decode=decode)
        self.driver.get((folder / "report.html").as_uri())
        self.wait(lambda: self.run("return document.body.dataset.ready"))

    def run(self, script: str) -> Any:
        return self.driver.execute_script(LIBRARY + script)

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "the page does not show what is expected"
            time.sleep(0.05)
        return found

    def text(self, id: str) -> str:
        return str(self.run(f"return document.getElementById({id!r}).textContent"))

    def column(self, index: int, id: str = "heads") -> list[str]:
        """The texts of a column of a table, in the rows that are drawn."""
        return list(self.run(f"return texts({id!r}, '.slick-cell.l{index}')"))

    def headers(self, id: str = "heads") -> list[str]:
        return list(self.run(f"return texts({id!r}, '.slick-column-name')"))

    def sort(self, name: str) -> None:
        index = self.headers().index(name)
        self.run(f"deep(document.getElementById('heads'), '.slick-header-column').sort(by_place)[{index}].click()")

    def click(self, selector: str, index: int, id: str = "heads") -> None:
        """Click with the mouse on one of the elements of a table."""
        from selenium.webdriver import ActionChains

        element = self.run(
            f"const e = deep(document.getElementById({id!r}), {selector!r}).sort(by_place)[{index}];"
            "e.scrollIntoView({block: 'center'}); return e"
        )
        ActionChains(self.driver).click(element).perform()

    def point(self, layer: int, head: int, click: bool = False) -> None:
        """Move the pointer to a cell of the map."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        x, y = self.run(
            "document.getElementById('map').scrollIntoView();"
            "const view = [...Bokeh.index.roots].find((view) => view.model.type == 'Figure');"
            "const box = view.canvas_view.el.getBoundingClientRect();"
            f"return [box.left + view.frame.x_scale.compute({head}), box.top + view.frame.y_scale.compute({layer})]"
        )
        actions: Any = ActionBuilder(self.driver)
        actions.pointer_action.move_to_location(round(x) + 1, round(y) + 1)
        actions.pointer_action.move_to_location(round(x), round(y))
        if click:
            actions.pointer_action.click()
        actions.perform()

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()

    def choose(self, id: str, text: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.driver.find_element("id", id)).select_by_visible_text(text)


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a browser. In the end, check that no error was logged and no request left the page."""
    pytest.importorskip("selenium")
    from selenium import webdriver

    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(programs[1])))
    try:
        yield Browser(driver)
        assert [entry for entry in driver.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")] == []
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        loaded = {
            url for url in urls if not url.startswith(("data:", "chrome:"))
        }  # chrome: is the browser's first page
        assert loaded == {driver.current_url}
    finally:
        driver.quit()


def large_effects(prompts: int) -> Result:
    """Return an invented result in which L1H2 and L11H10 do most, the latter to all predictions."""
    target, argmax = np.full((2, 12, 11), 0.3), np.zeros((2, 12, 11))
    target += 1e-3 * np.arange(132).reshape(12, 11) / 132
    target[0, 1, 2], target[0, 11, 10], argmax[0, 11, 10] = 0.55, 0.02, 1
    noise = 1e-3 * np.random.RandomState(0).randn(prompts, 1, 1, 1)
    return synthetic(12, 11, prompts=prompts, target_probability=target + noise, argmax=argmax)


@pytest.mark.end_to_end
@pytest.mark.parametrize("prompts", [1, 5])
def test_pointer_on_a_cell_shows_its_values(browser: Browser, tmp_path: Path, prompts: int) -> None:
    result = large_effects(prompts)
    browser.open(result, tmp_path)
    browser.point(1, 2)
    browser.wait(lambda: browser.run("return deep(document, '.tip').length"))
    text = str(browser.run("return deep(document, '.tip').map((e) => e.textContent).join()"))
    index = result.ablations.index(AblationKey(((1, 2),), "zero"))
    effects = statistics.effects(result, "target_probability")
    value = f"{100 * effects.mean[index]:+.2f} pp"
    if prompts > 1:
        value += f" [{100 * effects.low[index]:+.2f}, {100 * effects.high[index]:+.2f}], corrected p "
    kept = "the prediction is kept" if prompts == 1 else "5 of 5 prompts keep the prediction (100%)"
    for expected in ("L1H2, zero", value, kept, "projection called once, 1 elements of z replaced, 1 changed"):
        assert expected in text, text


@pytest.mark.end_to_end
def test_click_on_a_cell_shows_each_prompt(browser: Browser, tmp_path: Path) -> None:
    result = large_effects(5)
    browser.open(result, tmp_path)
    assert "L11H10, zero" in browser.text("selected")  # the strongest
    browser.point(1, 2, click=True)
    browser.wait(lambda: "L1H2, zero" in browser.text("selected"))
    change = 100 * result.change("target_probability")[:, result.ablations.index(AblationKey(((1, 2),), "zero"))]
    browser.wait(lambda: browser.column(6, "prompts") == [f"{value:+.2f}" for value in change])
    assert browser.headers("prompts")[:7] == [
        *("prompt", "target", "clean prediction", "ablated prediction"),
        *("clean P(target), %", "ablated P(target), %", "change of P(target), pp"),
    ]
    assert browser.column(0, "prompts") == [f"prompt {number}" for number in range(5)]
    assert browser.column(3, "prompts") == ["' word0'"] * 5
    assert browser.column(5, "prompts") == [f"{30 + value:.2f}" for value in change]
    browser.point(11, 10, click=True)
    browser.wait(lambda: browser.column(3, "prompts") == ["' word1'"] * 5)


@pytest.mark.end_to_end
def test_metric_and_imputation_of_the_map_can_be_chosen(browser: Browser, tmp_path: Path) -> None:
    result = large_effects(5)
    browser.open(result, tmp_path)
    browser.choose("metric", "KL divergence")
    browser.choose("imputation", "mean")
    assert browser.text("shown").startswith("Mean change of KL divergence, in nats, when a head is ablated with mean")
    room = browser.run(
        "const view = [...Bokeh.index.roots].find((view) => view.model.type == 'Figure');"
        "return view.canvas_view.bbox.width - view.frame.bbox.right"
    )
    assert room > 45  # for the scale and its numbers
    kl = statistics.effects(result, "kl").mean[result.ablations.index(AblationKey(((11, 10),), "mean"))]
    assert f"mean change of KL divergence +{kl:.6f} nats" in browser.text("readout")
    assert "L11H10, mean" in browser.text("selected")


@pytest.mark.end_to_end
def test_table_sorts_by_any_column(browser: Browser, tmp_path: Path) -> None:
    browser.open(large_effects(5), tmp_path)
    headers = browser.headers()
    assert headers[:7] == ["imputation", "head", "P(target), pp", "95% low", "95% high", "corrected p", "kept of 5"]
    browser.sort("P(target), pp")
    browser.wait(lambda: browser.column(1)[0] == "L1H2")
    browser.sort("P(target), pp")
    browser.wait(lambda: browser.column(1)[0] == "L11H10")
    browser.sort("head")
    browser.wait(lambda: browser.column(1)[:6] == ["L0H0", "L0H0", "L0H1", "L0H1", "L0H2", "L0H2"])
    browser.sort("head")
    browser.wait(lambda: browser.column(1)[:4] == ["L11H10", "L11H10", "L11H9", "L11H9"])
    browser.sort("kept of 5")
    browser.sort("kept of 5")
    browser.wait(lambda: browser.column(6)[:2] == ["0", "5"])


@pytest.mark.end_to_end
def test_table_filters_by_text_and_imputation(browser: Browser, tmp_path: Path) -> None:
    browser.open(large_effects(1), tmp_path)
    assert browser.text("count") == "264 of 264 rows"
    browser.driver.find_element("id", "filter").send_keys("l11h10")
    browser.wait(lambda: browser.column(1) == ["L11H10", "L11H10"])
    browser.choose("filter-imputation", "mean")
    browser.wait(lambda: browser.column(0) == ["mean"])
    assert browser.text("count") == "1 of 264 rows"
    browser.driver.find_element("id", "filter").clear()
    browser.driver.find_element("id", "filter").send_keys("nothing")
    browser.wait(lambda: browser.column(0) == [])
    browser.driver.find_element("id", "filter").clear()
    browser.driver.find_element("id", "filter").send_keys(" ")
    browser.wait(lambda: browser.text("count") == "132 of 264 rows" and set(browser.column(0)) == {"mean"})


@pytest.mark.end_to_end
def test_click_on_a_row_selects_its_head(browser: Browser, tmp_path: Path) -> None:
    browser.open(large_effects(2), tmp_path)
    browser.driver.find_element("id", "filter").send_keys("L3H4 mean")
    browser.wait(lambda: browser.column(1) == ["L3H4"])
    browser.click(".slick-cell.l2", 0)
    browser.wait(lambda: "L3H4, mean" in browser.text("selected"))
    assert "mean imputation" in browser.text("shown")
    assert browser.run("return document.getElementById('imputation').value") == "mean"
    browser.click(".slick-cell.l0", 1, "prompts")
    browser.wait(lambda: browser.text("prompt") == "prompt 1")


@pytest.mark.end_to_end
def test_page_can_be_used_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    browser.open(large_effects(2), tmp_path)
    browser.run("document.getElementById('imputation').focus()")
    browser.press("TAB", "ARROW_UP", "ARROW_LEFT")
    browser.wait(lambda: "L10H9, zero" in browser.text("selected"))
    browser.press(*["ARROW_DOWN"] * 3)  # the last layer is 11
    browser.wait(lambda: "L11H9, zero" in browser.text("selected"))
    browser.run("deep(document.getElementById('heads'), '.slick-header-column')[2].focus()")
    browser.press("ENTER")
    browser.wait(lambda: browser.column(1)[0] == "L1H2")
    browser.press(*["TAB"] * (len(browser.headers()) - 2), "ARROW_DOWN")
    browser.wait(lambda: "L11H9, zero" not in browser.text("selected"))


@pytest.mark.end_to_end
def test_evil_texts_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    browser.open(evil_result(), tmp_path, lambda *_: EVIL, EVIL)
    browser.choose("imputation", EVIL)
    browser.point(1, 2)
    browser.wait(lambda: browser.run("return deep(document, '.tip').length"))
    assert EVIL in browser.run("return deep(document, '.tip')[0].textContent")
    browser.choose("metric", EVIL)
    assert browser.headers()[-1] == EVIL and browser.headers("prompts")[-1] == f"change of {EVIL}"
    assert browser.column(0, "prompts") == [EVIL, EVIL]
    browser.click(".slick-cell.l0", 1, "prompts")
    browser.wait(lambda: browser.text("prompt") == EVIL)
    assert browser.driver.title == " ".join(EVIL.split())
    assert browser.run("return deep(document, '#evil, img').length") == 0


@pytest.mark.end_to_end
@pytest.mark.parametrize("width", [360, 1200])
def test_page_is_no_wider_than_the_window(browser: Browser, tmp_path: Path, width: int) -> None:
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
    )
    browser.open(evil_result(), tmp_path, lambda *_: "long" * 300, "title" * 300)
    browser.wait(lambda: browser.run("return document.documentElement.scrollWidth") <= width)


@pytest.mark.end_to_end
def test_left_out_values_are_announced(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_report, "MAX_SINGLE_VALUES", 1)
    browser.open(large_effects(2), tmp_path)
    assert len(browser.column(0, "prompts")) == 2
    browser.point(5, 5, click=True)
    browser.wait(lambda: "only for the 1 ablations with" in browser.text("of-prompts"))
    assert not browser.run("return document.getElementById('prompts').offsetHeight")
    browser.point(11, 10, click=True)
    browser.wait(lambda: browser.column(3, "prompts") == ["' word1'"] * 2)


@pytest.mark.end_to_end
def test_small_changes_are_not_rounded_to_zero(browser: Browser, tmp_path: Path) -> None:
    result = large_effects(1)
    result.ablated["target_probability"][0, 7] = 0.3 - 3.3e-7
    browser.open(result, tmp_path)
    browser.driver.find_element("id", "filter").send_keys(
        f"{result.ablations[7].label} {result.ablations[7].imputation}"
    )
    browser.wait(lambda: "-3.3e-5" in browser.column(2))
    browser.click(".slick-cell.l2", 0)
    browser.wait(lambda: "-3.3e-5 pp" in browser.text("readout"))


@pytest.mark.end_to_end
def test_numbers_that_are_not_finite_are_said(browser: Browser, tmp_path: Path) -> None:
    result = large_effects(1)
    result.ablated["target_probability"][0, 7] = np.nan
    browser.open(result, tmp_path)
    browser.driver.find_element("id", "filter").send_keys(
        f"{result.ablations[7].label} {result.ablations[7].imputation}"
    )
    browser.wait(lambda: "not finite" in browser.column(2))
