"""Options, hypothesis profiles and fixtures; what is tested is said at the head and at the end of the report."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# Before any test module is imported: settings freeze when a test is decorated.
_CI = settings.get_profile("ci")  # derandomised, no deadline, no database: named as parent, since the default depends
# on the environment
settings.register_profile("ci", _CI, max_examples=20, report_multiple_bugs=False)
settings.register_profile(
    "quick",
    _CI,
    max_examples=10,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    report_multiple_bugs=False,
)
settings.register_profile("deep", settings.get_profile("quick"), max_examples=1000)
settings.register_profile("mutants", _CI, max_examples=15, phases=[Phase.explicit, Phase.generate])
settings.load_profile("ci" if os.environ.get("CI") else "quick")

from ablation import models, provenance  # noqa: E402
from ablation.checks import CHECKS  # noqa: E402
from ablation.errors import ModelUnavailable  # noqa: E402
from ablation.experiment import sweep_question  # noqa: E402
from ablation.sweep import SweepResult  # noqa: E402
from tests.golden import FOLDER, Golden  # noqa: E402

pytest_plugins = ["pytester"]

# One thread: as fast on small models, the same bits on every machine of a kind, and steady under load.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation",
        metavar="MODULE:CLASS",
        help="run the specification, and nothing else, against this adapter (see ablation.checks.protocol)",
    )
    parser.addoption(
        "--expected-failures",
        metavar="FILE",
        help="checks that this implementation is known to fail: a line each, the check's id and the reason",
    )
    parser.addoption(
        "--models",
        metavar="NAMES",
        help=f"test these models and no others, comma-separated, of {', '.join(models.NAMED_MODELS)}; NAME=FOLDER takes the "
        "weights from a folder. One that is not to be had is an error. Default: whatever is on this machine.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") and (config.getoption("force_regen") or config.getoption("regen_all")):
        raise pytest.UsageError("golden arrays are never rewritten in CI")
    adapter(config), expected_failures(config)  # a bad option ends here, in one line
    for name, source in asked(config).items():
        if name not in models.NAMED_MODELS:
            raise pytest.UsageError(f"--models: no model {name!r}; there are {', '.join(models.NAMED_MODELS)}")
        folder = Path(source.partition("=")[2])
        if source != name and not (folder / "config.json").is_file():
            problem = "it has no config.json" if folder.exists() else "it does not exist"
            raise pytest.UsageError(f"--models {source}: cannot load a model from {folder}: {problem}")
        if source == name and name != "gpt2":  # gpt2 may still be downloaded
            try:
                models.NAMED_MODELS[name].locate()
            except ModelUnavailable as error:
                raise pytest.UsageError(f"--models: {error}") from None


OURS = "tests.implementations.ours:Ours"


def adapter(config: pytest.Config) -> Any:
    """The adapter that the specification is run against."""
    name = config.getoption("--implementation") or OURS
    module, _, attribute = name.partition(":")
    if str(config.invocation_params.dir) not in sys.path:
        sys.path.insert(0, str(config.invocation_params.dir))  # an adapter lies where pytest is called
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--implementation {name}: {error}; it should be MODULE:CLASS") from None


def expected_failures(config: pytest.Config) -> dict[str, str]:
    """Check id -> reason."""
    file = config.getoption("--expected-failures")
    if file is None:
        return {}
    try:
        lines = (line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise pytest.UsageError(f"--expected-failures: {error}") from None
    expected = {}
    for check, _, reason in (line.partition(" ") for line in lines if line and not line.startswith("#")):
        if check not in {known.id for known in CHECKS} or not reason.strip():
            raise pytest.UsageError(f"--expected-failures: {check!r} is no check's id, or has no reason after it")
        expected[check] = reason.strip()
    return expected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "requirement" in metafunc.fixturenames:
        expected = expected_failures(metafunc.config)
        metafunc.parametrize(
            "requirement",
            [
                pytest.param(
                    check,
                    id=check.id,
                    marks=pytest.mark.xfail(reason=expected[check.id], raises=AssertionError, strict=True)
                    if check.id in expected
                    else (),
                )
                for check in CHECKS
            ],
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--implementation"):
        specification = [item for item in items if "requirement" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in specification])
        items[:] = specification


def asked(config: pytest.Config) -> dict[str, str]:
    """The models asked for by name, and where each comes from."""
    sources = filter(None, map(str.strip, (config.getoption("--models") or "").split(",")))
    return {source.partition("=")[0]: source for source in sources}


def untested(config: pytest.Config) -> dict[str, str]:
    """The models that are not tested, and why."""
    if named := asked(config):
        return {name: "not asked for" for name in models.NAMED_MODELS if name not in named}
    reasons = {}
    for name, known in models.NAMED_MODELS.items():
        try:
            known.locate()
        except ModelUnavailable as error:
            reasons[name] = str(error)
    return reasons


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"made with: {', '.join(f'{key} {value}' for key, value in provenance.environment().items())}",
        f"hypothesis profile: {settings.get_current_profile_name()}",
        f"implementation: {config.getoption('--implementation') or OURS}",
        *([] if config.getoption("--implementation") else model_lines(config)),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            if "::test_requirement[" in report.nodeid and (report.when == "call" or outcome == "skipped"):
                check = report.nodeid.partition("[")[2][:-1]
                reason = f" ({report.longrepr[2].removeprefix('Skipped: ')})" if outcome == "skipped" else ""
                expected = outcome == "failed" and str(report.longrepr).startswith("[XPASS(strict)]")
                outcomes.setdefault("xpassed" if expected else outcome, []).append(check + reason)
    if outcomes:
        terminalreporter.section(f"head ablation by {config.getoption('--implementation') or OURS}")
        run = sum(map(len, outcomes.values()))
        held = len(outcomes.get("passed", [])) + len(outcomes.get("xpassed", []))
        rest = f"; {len(CHECKS) - run} were not run" if run < len(CHECKS) else ""
        terminalreporter.line(f"{held} of {run} requirements hold{rest}")
        words = {
            "failed": "broken",
            "xfailed": "known to be broken",
            "xpassed": "no longer broken, take it from the expected failures",
            "skipped": "not tried",
        }
        for outcome, word in words.items():
            for check in outcomes.get(outcome, []):
                terminalreporter.line(f"{word}: {check}")
    if config.getoption("--implementation"):
        return
    terminalreporter.section("models")
    for line in model_lines(config):
        terminalreporter.line(line)


def model_lines(config: pytest.Config) -> list[str]:
    missing = untested(config)
    tested = [asked(config).get(name, name) for name in models.NAMED_MODELS if name not in missing]
    return [f"models tested: {', '.join(tested)}", *(f"NOT tested: {name}: {why}" for name, why in missing.items())]


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest) -> Any:
    """The adapter under test."""
    return adapter(request.config)


@pytest.fixture(params=list(models.NAMED_MODELS), scope="session")
def known(request: pytest.FixtureRequest) -> models.LoadedModel:
    """Each of the models that go by a name. Skips where it is not to be had, unless it was asked for."""
    named = asked(request.config)
    if reason := untested(request.config).get(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return _loaded(named.get(request.param, request.param), request.param in named)


@pytest.fixture(scope="session")
def capitals() -> models.LoadedModel:
    """The model that is always there."""
    return _loaded("capitals", False)


@pytest.fixture(scope="session")
def swept() -> Callable[[models.LoadedModel], SweepResult]:
    """The sweep of a known model on its own question, run once a session."""
    return _swept


@cache
def _loaded(source: str, download: bool) -> models.LoadedModel:
    return models.load(source, download=download, device="cpu")  # what is pinned, is pinned there


@cache
def _swept(loaded: models.LoadedModel) -> SweepResult:
    return sweep_question(loaded, models.NAMED_MODELS[loaded.name].question)


@pytest.fixture(scope="session")
def original_datadir() -> Path:
    """Where pytest-regressions keeps its files. `lazy_datadir` stays its own, so that nothing else is written there."""
    return FOLDER


@pytest.fixture
def golden(ndarrays_regression: Any, request: pytest.FixtureRequest) -> Iterator[Golden]:
    """Compare arrays with golden/MODEL/NAME.npz; see `Golden`."""
    regenerate = request.config.getoption("force_regen") or request.config.getoption("regen_all")
    return Golden(ndarrays_regression.check, regenerate=bool(regenerate))
