"""The specification from outside: the pytest plugin, three lines in a user's tests, and `ablation check`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from ablation.checks import CHECKS
from ablation.checks.runner import requirements_table
from ablation.cli import main

ROOT = Path(__file__).parent.parent

HOOK = '''
from contextlib import contextmanager
import torch

@contextmanager
def knock_out(model, heads):
    """Zero (layer, head) pairs of a GPT-2; no try/finally."""
    head_dim = model.config.n_embd // model.config.n_head
    def hook_of(layer):
        def hook(module, args):
            z = args[0].clone()
            for l, h in heads:
                if l == layer:
                    z[..., h * head_dim:(h + 1) * head_dim] = 0
            return (z,)
        return hook
    handles = [b.attn.c_proj.register_forward_pre_hook(hook_of(i)) for i, b in enumerate(model.transformer.h)]
    yield
    for handle in handles:
        handle.remove()

class KnockOut:
    families = ("gpt2",)
    unsupported = {"mean": "not written yet"}
    def __init__(self, model):
        self.model, self.heads = model, []
    def ablate(self, heads, imputation):
        if imputation != "zero":
            raise ValueError(f"no imputation {imputation}")
        for layer, head in heads:
            if type(layer) is not int or type(head) is not int:
                raise TypeError("not integers")
            if not (0 <= layer < self.model.config.n_layer and 0 <= head < self.model.config.n_head):
                raise IndexError("no such head")
        self.heads = list(heads)
    def run(self, input_ids, attention_mask=None, **inputs):
        with torch.no_grad(), knock_out(self.model, self.heads):
            return self.model(input_ids, attention_mask=attention_mask, **inputs).logits
    def clear(self):
        self.heads = []
    def close(self):
        pass

class Nothing(KnockOut):
    unsupported = {"zero": "another imputation", "mean": "another imputation"}

class TakesOnlyIds(KnockOut):
    def run(self, ids):
        return self.model(ids).logits

class HasNoClose(KnockOut):
    close = None

class Silent(KnockOut):
    def ablate(self, heads, imputation):
        pass

class NoLlama(KnockOut):
    families = ("gpt2", "llama")

class Stopped(KnockOut):
    def run(self, *args, **inputs):
        if len(self.heads) > 1:
            raise KeyboardInterrupt
        return super().run(*args, **inputs)

class Hopeless:
    unsupported = {"meen": "misspelt"}
'''
THREE_LINES = """
from ablation.checks import parametrize_with_checks
from my_hook import KnockOut

@parametrize_with_checks(KnockOut, expected_failures={"locality": "it holds"})
def test_head_ablation(check):
    check()
"""
FEWER = """
from hypothesis import settings
settings.register_profile("fewer", settings.get_profile("ci"), max_examples=3)
settings.load_profile("fewer")
"""


@pytest.fixture
def user_folder(pytester: pytest.Pytester) -> Iterator[Path]:
    """Another project's folder: a hook that is a context manager, an adapter, and a test that would fail."""
    pytester.makepyfile(my_hook=HOOK, test_my_hook=THREE_LINES, test_other="def test_other():\n    assert False")
    pytester.makeconftest(FEWER)
    pytester.syspathinsert(ROOT)
    profile = settings.get_current_profile_name()
    yield pytester.path
    settings.load_profile(profile)


Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run_pytest(user_folder: Path, pytester: pytest.Pytester) -> Run:
    """Runs pytest in the user's folder, in this process."""
    return partial(pytester.runpytest_inprocess, "-p", "no:cacheprovider")


# ---- in the user's own tests


@pytest.mark.end_to_end
def test_three_lines_check_a_hook(run_pytest: Run) -> None:
    done = run_pytest("-q", "test_my_hook.py")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    failed = [line for line in done.outlines if line.startswith("FAILED")]
    assert len(failed) == 2
    assert "test_head_ablation[locality]" in failed[0] and "test_head_ablation[hygiene.exception]" in failed[1]
    output = done.stdout.str()
    assert "locality passes, but is expected to fail: it holds" in output
    assert "KnockOut breaks hygiene.exception (MUST)" in output
    assert "the model is not as it was found: transformer.h.0.attn.c_proj._forward_pre_hooks" in output
    assert re.search(r"in: gpt2, fail [a-z ]+ \d \w+\n", output)  # the shortest sequence of steps
    assert "Traceback" not in output and len(done.outlines) < 60


# ---- the plugin


@pytest.fixture
def run_plugin(run_pytest: Run) -> Run:
    return partial(
        run_pytest, "-p", "ablation.checks.plugin", "--hypothesis-profile=mutants", "--ablation-implementation"
    )


def test_plugin_runs_the_specification_and_nothing_else(run_plugin: Run) -> None:
    done = run_plugin(
        "my_hook:KnockOut", "-k", "smoke or exception or oracle.mean and not sets", "--junitxml=report.xml"
    )  # three, to be quick
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    head, _, verdict = done.stdout.str().partition("= head ablation by my_hook:KnockOut =")
    assert "implementation: my_hook:KnockOut" in head and "test_other" not in head
    assert f"2 of 3 requirements hold; {len(CHECKS) - 3} were not run" not in verdict
    assert f"1 of 3 requirements hold; {len(CHECKS) - 3} were not run" in verdict
    assert "broken: hygiene.exception" in verdict
    assert "not tried: oracle.mean (does not support 'mean': not written yet)" in verdict
    assert 'failures="1" skipped="1" tests="3"' in Path("report.xml").read_text()


@pytest.mark.parametrize(
    ("known", "status", "verdict"),
    [
        ("hygiene.exception:  no try/finally yet", pytest.ExitCode.OK, "known to be broken: hygiene.exception"),
        (
            "smoke  it starts",
            pytest.ExitCode.TESTS_FAILED,
            "no longer broken, so remove it from the expected failures: smoke",
        ),
    ],
)
def test_expected_failures_are_part_of_the_verdict(
    known: str, status: pytest.ExitCode, verdict: str, run_plugin: Run
) -> None:
    Path("known.txt").write_text(f"# our issue 7\n\n{known}\n")
    selection = "exception or smoke" if status == pytest.ExitCode.OK else "smoke"
    done = run_plugin("my_hook:KnockOut", "--ablation-expected-failures", "known.txt", "-k", selection)
    assert done.ret == status and verdict in done.stdout.str()


def test_run_that_tries_no_check_fails(run_plugin: Run) -> None:
    done = run_plugin("my_hook:Nothing", "-k", "oracle or smoke")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert "no check was tried, so this run fails" in done.stdout.str()


def test_broken_adapter_is_one_short_failure(run_plugin: Run) -> None:
    done = run_plugin("my_hook:Silent", "-q", "-rN")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert done.stdout.str().count("changed no logit") == 1 and len(done.outlines) < 25
    assert "the adapter works with no model" in done.stdout.str() and "Traceback" not in done.stdout.str()


def test_verdict_begins_with_the_cause_that_failures_share(run_plugin: Run) -> None:
    done = run_plugin("my_hook:NoLlama", "-q", "-k", "locality or zero and not deep")
    verdict = done.stdout.str().partition("= head ablation by my_hook:NoLlama =")[2].splitlines()
    assert re.match(r"if you declare unsupported = {'llama': ...}, (\d) of the \1 failures go away", verdict[1])


def test_interrupted_run_says_so_in_the_summary(run_plugin: Run) -> None:
    done = run_plugin(
        "my_hook:Stopped", "--ablation-summary=summary.md", "--ablation-badge=badge.json", no_reraise_ctrlc=True
    )
    assert done.ret == pytest.ExitCode.INTERRUPTED
    assert "\n- interrupted before the checks were finished\n" in Path("summary.md").read_text()
    assert "interrupted before the checks were finished" in done.stdout.str()
    assert json.loads(Path("badge.json").read_text())["color"] == "red"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["nowhere:X"], "implementation nowhere:X: No module named 'nowhere'"),
        (["my_hook:X"], "implementation my_hook:X: module 'my_hook' has no attribute 'X'"),
        (["my_hook:"], "implementation 'my_hook:': it should be MODULE:CLASS"),
        (["my_hook"], "it should be MODULE:CLASS"),
        ([""], "it should be MODULE:CLASS"),
        (["my_hook:__name__"], "it is no class; it should be MODULE:CLASS"),
        (["broken:X"], "implementation broken:X: ZeroDivisionError: division by zero"),
        (["script:X"], "implementation script:X: SystemExit: 3"),
        (["my_hook:knock_out"], "it is a function, not an adapter: make one with adapter_from_context or"),
        (["my_hook:TakesOnlyIds"], "TakesOnlyIds: run cannot be called as run(input_ids, attention_mask=...): got an"),
        (["my_hook:Hopeless"], "`unsupported` names 'meen', which does not exist; did you mean 'mean'?"),
        (["my_hook:HasNoClose"], "my_hook:HasNoClose: the adapter has no method close"),
    ],
)
def test_bad_option_is_one_line(options: list[str], reason: str, run_plugin: Run) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("script.py").write_text("import sys\nsys.exit(3)\n")
    done = run_plugin(*options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert reason in done.stderr.str() and len(done.stderr.str().splitlines()) == 1


@pytest.mark.parametrize("option", ["model=capitals", "summary=x", "table=x", "prompts=x", "expected-failures=x"])
def test_option_without_an_implementation_is_refused(option: str, run_pytest: Run) -> None:
    done = run_pytest("-p", "ablation.checks.plugin", f"--ablation-{option}", "test_my_hook.py")
    name = option.partition("=")[0]
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.str() == f"ERROR: --ablation-{name} needs --ablation-implementation\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "known.txt: No such file or directory"),
        ("a folder", "known.txt: Is a directory"),
        ("smoke na\N{LATIN SMALL LETTER I WITH DIAERESIS}f".encode("latin-1"), "known.txt: it is not UTF-8"),
        (
            b"# ours\n\noracle.zeros why",
            "line 3: the expected failures name 'oracle.zeros', which does not exist; did you",
        ),
        (
            b"smoke why\nxyz why",
            "line 2: the expected failures name 'xyz', which does not exist; `ablation check --list`",
        ),
        (b"smoke\n", "line 1: a reason has to follow 'smoke'"),
        (b"smoke why\r\nidentity why\r\nsmoke\tagain\r\n", "line 3: 'smoke' is in the file twice"),
    ],
)
def test_bad_file_of_expected_failures_is_one_line(content: bytes | str | None, reason: str, run_plugin: Run) -> None:
    known = Path("known.txt")
    if isinstance(content, bytes):
        known.write_bytes(content)
    elif content:
        known.mkdir()
    done = run_plugin("my_hook:KnockOut", "--ablation-expected-failures", "known.txt")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "expected failures known.txt" in done.stderr.str() and reason in done.stderr.str()
    assert len(done.stderr.str().splitlines()) == 1


def test_plugin_alone_imports_no_torch() -> None:
    code = "import sys, ablation.checks.plugin; sys.exit('torch' in sys.modules or 'hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- ablation check


def check_command(*arguments: str) -> tuple[int, str]:
    """Run `ablation check` as a process of its own, in this folder."""
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ablation.cli as c; sys.exit(c.main())",
    ]
    done = subprocess.run([*command, "check", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.end_to_end
def test_check_command_ignores_the_folders_configuration(user_folder: Path) -> None:
    Path("pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
    Path("conftest.py").write_text("1 / 0\n")
    status, output = check_command("my_hook:KnockOut", "-k", "smoke or refusal.type", "--junit-xml", "report.xml")
    assert status == 0 and "2 of 2 requirements hold" in output
    assert 'failures="0" skipped="0" tests="2"' in Path("report.xml").read_text()


@pytest.mark.end_to_end
def test_selection_without_a_check_says_what_to_do(user_folder: Path) -> None:
    status, output = check_command("my_hook:KnockOut", "-k", "smokes")
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED
    assert output.endswith("ablation: no check matches 'smokes': `ablation check --list` lists the checks\n")


@pytest.mark.parametrize("arguments", [["-k", "smoke"], ["my_hook:KnockOut"]])
def test_list_takes_no_selection(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list", *arguments]) == 2
    assert capsys.readouterr().err == "ablation: --list prints all requirements, and takes neither an adapter nor -k\n"


@pytest.mark.parametrize("arguments", [[], [""]])
def test_check_command_needs_an_adapter(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    assert "name an adapter, as MODULE:CLASS, or use --list" in capsys.readouterr().err


def test_check_command_lists_the_requirements(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list"]) == 0
    assert capsys.readouterr().out == requirements_table()


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert main(["check", "my_hook:KnockOut"]) == 2
    assert "pip install 'head-ablation[checks]'" in capsys.readouterr().err
