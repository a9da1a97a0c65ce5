"""The README shows what the program really prints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from transformers import Qwen3NextConfig

from ablation.checks import CHECKS
from ablation.cli import main
from ablation.errors import ModelUnavailable
from ablation.sources import NAMED_MODELS
from tests.families.configurations import tiny

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_sweep_it_shows_is_the_sweep_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        NAMED_MODELS["smollm2"].locate()
    except ModelUnavailable as error:
        pytest.skip(str(error))
    (shown,) = re.findall(r"\$ python -m (ablation sweep --model smollm2 .*)\n((?:.*\n)+?)```", README)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(shown[0])[1:]) == 0
    printed, _, _ = capsys.readouterr().out.rpartition("\nArrays")
    assert printed.strip() == shown[1].strip()


def test_the_map_of_heads_it_shows_is_the_one_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = re.findall(r"\$ python -m (ablation heads .*)\n((?:.*\n)+?)```", README)
    arguments = shlex.split(shown[0])[1:]
    monkeypatch.chdir(tmp_path)
    tiny(Qwen3NextConfig).save_pretrained(arguments[-1])
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == shown[1].strip()


def test_the_python_it_shows_prints_what_it_says() -> None:
    shown = re.findall(r"```python\n([^`]*?)```\s*```\n(.*?)```", README, re.DOTALL)
    assert len(shown) == 2
    names: dict[str, object] = {}
    for code, output in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)  # noqa: S102 (our own README)
        assert printed.getvalue() == output


def test_the_table_of_checks_is_the_specification() -> None:
    for check in CHECKS:
        level = " (should)" if check.level == "SHOULD" else ""
        assert f"| `{check.id}`{level} | {check.requirement} |" in README
    assert README.count("\n| `") - README.count("| `sweep") - len(NAMED_MODELS) == len(CHECKS)
