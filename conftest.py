"""What only this project's tests need: hypothesis profiles, real models, golden arrays, perturbed kernels."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# Before any test module is imported, since settings are fixed when a test is decorated. The parent is named because
# hypothesis chooses its default profile by the environment.
_CI = settings(
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
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
from ablation.errors import ModelUnavailable  # noqa: E402
from ablation.results import Result  # noqa: E402
from ablation.sources import NAMED_MODELS  # noqa: E402
from ablation.studies.experiment import sweep_prompts  # noqa: E402
from tests.golden import FOLDER, Golden  # noqa: E402
from tests.kernels import batch_dependent_kernels  # noqa: E402

pytest_plugins = ["pytester", "ablation.checks.plugin"]

MOST_WORKERS = 4
"""Each process takes about 1 GB of memory."""
# One thread, unless the environment says otherwise: as fast on small models, and steady under load.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption(
        "--models",
        metavar="NAMES",
        help=f"test these models and no others, comma-separated, of {', '.join(NAMED_MODELS)}; NAME=FOLDER takes "
        "the weights from a folder. A missing model is then an error. Default: the models on this machine",
    )
    parser.addoption(
        "--batch-dependent-kernels",
        action="store_true",
        help="run all tests with linear layers whose last bits depend on the number of rows",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share the whole suite among processes, but run a selection in this one: each process imports torch again."""
    is_selection = config.args_source is pytest.Config.ArgsSource.ARGS or bool(config.getoption("keyword"))
    return 0 if is_selection or config.getoption("usepdb") else min(MOST_WORKERS, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Report bad options before anything runs, in one line."""
    if os.environ.get("CI") and (config.getoption("force_regen") or config.getoption("regen_all")):
        raise pytest.UsageError("golden arrays are never rewritten in CI")
    for name, source in requested_models(config).items():
        if name not in NAMED_MODELS:
            raise pytest.UsageError(f"--models: no model {name!r}; there are {', '.join(NAMED_MODELS)}")
        folder = Path(source.partition("=")[2])
        if source != name and not (folder / "config.json").is_file():
            problem = "it has no config.json" if folder.exists() else "it does not exist"
            raise pytest.UsageError(f"--models {source}: cannot load a model from {folder}: {problem}")
        if source == name:
            try:
                _make_available(name)
            except ModelUnavailable as error:
                raise pytest.UsageError(f"--models: {error}") from None


def _make_available(name: str) -> None:
    """Raise ModelUnavailable unless a named model is on this machine, or can be downloaded."""
    try:
        NAMED_MODELS[name].locate()
    except ModelUnavailable:
        if not NAMED_MODELS[name].source().is_hub:
            raise
        _loaded(name, True)


def requested_models(config: pytest.Config) -> dict[str, str]:
    """Return the models that --models names, and the source of each."""
    sources = filter(None, map(str.strip, (config.getoption("--models") or "").split(",")))
    return {source.partition("=")[0]: source for source in sources}


def untested_models(config: pytest.Config) -> dict[str, str]:
    """Return the models that are not tested, and why."""
    if requested := requested_models(config):
        return {name: "not asked for" for name in NAMED_MODELS if name not in requested}
    reasons = {}
    for name, known in NAMED_MODELS.items():
        try:
            known.locate()
        except ModelUnavailable as error:
            reasons[name] = str(error)
    return reasons


def model_lines(config: pytest.Config) -> list[str]:
    """Say which models are tested, and why the others are not."""
    missing = untested_models(config)
    tested = [requested_models(config).get(name, name) for name in NAMED_MODELS if name not in missing]
    return [f"models tested: {', '.join(tested)}", *(f"NOT tested: {name}: {why}" for name, why in missing.items())]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what the run is made with."""
    kernels = ["kernels: last bits depend on the number of rows"] if config.getoption("batch_dependent_kernels") else []
    return [
        f"made with: {', '.join(f'{key} {value}' for key, value in provenance.environment().items())}",
        f"hypothesis profile: {settings.get_current_profile_name()}",
        *kernels,
        *([] if config.getoption("--ablation-implementation") else model_lines(config)),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Repeat at the end which models were tested."""
    if not config.getoption("--ablation-implementation"):
        terminalreporter.section("models")
        for line in model_lines(config):
            terminalreporter.line(line)


@pytest.fixture(scope="session", autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --batch-dependent-kernels, perturb linear layers for the whole session."""
    if request.config.getoption("batch_dependent_kernels"):
        with batch_dependent_kernels():
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """Handle signals as at a terminal: a job in the background ignores some, and so do its children."""
    handlers: dict[int, Any] = dict.fromkeys((signal.SIGHUP, signal.SIGTERM), signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    before: dict[int, Any] = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=list(NAMED_MODELS), scope="session")
def known(request: pytest.FixtureRequest) -> models.LoadedModel:
    """Return each named model. Skips a model that is missing, unless --models names it."""
    requested = requested_models(request.config)
    if reason := untested_models(request.config).get(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return _loaded(requested.get(request.param, request.param), request.param in requested)


@pytest.fixture(scope="session")
def capitals() -> models.LoadedModel:
    """Return the model that ships with the package."""
    return _loaded("capitals", False)


@pytest.fixture(scope="session")
def swept() -> Callable[[models.LoadedModel], Result]:
    """Return a function that sweeps a named model on its own question, once per session."""
    return _swept


@cache
def _loaded(source: str, download: bool) -> models.LoadedModel:
    return models.load(source, download=download, device="cpu")  # golden arrays are pinned on the CPU


@cache
def _swept(loaded: models.LoadedModel) -> Result:
    return sweep_prompts(loaded, [NAMED_MODELS[loaded.name].question])


@pytest.fixture(scope="session")
def original_datadir() -> Path:
    """Return the folder of pytest-regressions. Its `lazy_datadir` stays elsewhere, so nothing else is written here."""
    return FOLDER


@pytest.fixture
def golden(ndarrays_regression: Any, request: pytest.FixtureRequest) -> Golden:
    """Compare arrays with golden/MODEL/NAME.npz; see `Golden`."""
    regenerate = request.config.getoption("force_regen") or request.config.getoption("regen_all")
    return Golden(ndarrays_regression.check, regenerate=bool(regenerate))
