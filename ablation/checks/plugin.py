"""pytest plugin: with --ablation-implementation MODULE:CLASS, pytest runs the specification on that adapter alone.

For example, `pytest --ablation-implementation my_adapter:Mine`. The adapter is imported from the current folder, or
from the installed packages. pytest loads the plugin where the package is installed. Without the option, it does
nothing, and it imports neither torch nor hypothesis.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ablation.checks.command import minutes
from ablation.errors import AblationError, InvalidDeclaration
from ablation.sources import MODEL_DTYPES

if TYPE_CHECKING:
    from ablation.checks.check import Check
    from ablation.checks.on_model.run import ModelRun
    from ablation.checks.runner import CheckRun, Record

RUN: pytest.StashKey[CheckRun | ModelRun] = pytest.StashKey()
RECORDS = pytest.StashKey[list["Record"]]()
VERDICT = pytest.StashKey[list[str]]()
"""The lines that end the report of pytest."""
NAMING_FILES = ("summary", "badge", "table")
FILES = pytest.StashKey[dict[str, Path]]()
"""The files to write: the name of an option -> path."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin, whose names other plugins do not use."""
    add = parser.getgroup("head ablation").addoption
    add(
        "--ablation-implementation",
        metavar="MODULE:CLASS",
        help="run the specification of head ablation, and nothing else, on this adapter (see ablation.checks.protocol)",
    )
    add(
        "--ablation-expected-failures",
        metavar="FILE",
        help="checks that this implementation is known to fail: on each line, the id of a check and a reason",
    )
    add(
        "--ablation-model",
        metavar="NAME",
        help="run the checks on this model in place of small random ones, every head: a folder, a hub id, ...",
    )
    add(
        "--ablation-summary",
        metavar="FILE",
        help="append a Markdown table of the outcomes, for the summary of a CI job",
    )
    add("--ablation-badge", metavar="FILE", help="write the data of a badge, as JSON for an endpoint of shields.io")
    add("--ablation-prompts", metavar="FILE", help="prompts for the model: a .jsonl or .csv file with a column prompt")
    add("--ablation-minutes", type=minutes, default=10.0, help="time for the comparison of every head (default: 10)")
    add("--ablation-table", metavar="FILE", help="write what was found for every head of the model, as CSV")
    add("--ablation-device", help="the device of the model (default: a GPU if there is one)")
    add(
        "--ablation-dtype",
        choices=MODEL_DTYPES,
        default="float32",
        help="the dtype of the model (default: float32)",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_configure(config: pytest.Config) -> None:
    """Read the options once. An invalid option is reported in one line, before any check runs."""
    config.stash[RECORDS] = []
    if config.getoption("--ablation-implementation") is None:
        for name in ("expected-failures", *NAMING_FILES, "model", "prompts", "device"):
            if config.getoption(f"--ablation-{name}") is not None:
                raise pytest.UsageError(f"--ablation-{name} needs --ablation-implementation")
    else:
        if hasattr(config.option, "dist"):
            config.option.dist = "no"  # the checks share what they find, so they run in this process
        config.stash[FILES] = _writable_files(config)
        adapter, expected = _load_adapter(config), _read_expected_failures(config)
        config.stash[RUN] = _on_model(config, adapter, expected) or _on_random_decoders(adapter, expected)


def _on_random_decoders(adapter: Any, expected: dict[str, str]) -> CheckRun:
    from ablation.checks.runner import CheckRun

    return CheckRun(adapter, expected)


def _on_model(config: pytest.Config, adapter: Any, expected: dict[str, str]) -> ModelRun | None:
    """Return the run of the checks on the model that the options name, or None. Raises UsageError."""
    name = config.getoption("--ablation-model")
    if name is None:
        return None
    from ablation.checks.on_model.run import ModelRun, load_own_model
    from ablation.commands.terminal import silence_transformers, status_line

    try:
        silence_transformers()
        status_line(f"loading {name} ...")
        own = load_own_model(
            name,
            config.getoption("--ablation-prompts"),
            device=config.getoption("--ablation-device"),
            dtype=config.getoption("--ablation-dtype"),
        )
    except AblationError as error:
        raise pytest.UsageError(str(error)) from None
    finally:
        status_line("")

    def progress(done: int, total: int) -> None:
        status_line(f"every head: {done} of {total} ablations" if done < total else "")

    return ModelRun(adapter, own, expected, minutes=config.getoption("--ablation-minutes"), progress=progress)


def _load_adapter(config: pytest.Config) -> Any:
    """Return the adapter class that --ablation-implementation names. Raises UsageError."""
    name = config.getoption("--ablation-implementation")
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise pytest.UsageError(f"implementation {name!r}: it should be MODULE:CLASS")
    folder = str(config.invocation_params.dir)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        adapter = importlib.import_module(module)
        for part in attribute.split("."):
            adapter = getattr(adapter, part)
    except InvalidDeclaration as error:  # of a helper that makes adapters
        raise pytest.UsageError(f"implementation {name}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's module may raise anything when it is imported, SystemExit included
        problem = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise pytest.UsageError(f"implementation {name}: {problem}") from None
    if not callable(adapter):
        raise pytest.UsageError(f"implementation {name}: it is no class; it should be MODULE:CLASS")
    from ablation.checks.signature import adapter_problem

    if unusable := adapter_problem(adapter):
        raise pytest.UsageError(f"implementation {name}: {unusable}")
    return adapter


def _writable_files(config: pytest.Config) -> dict[str, Path]:
    """Return the files that options name: option -> path. Raises UsageError."""
    files = {}
    for option in NAMING_FILES:
        if (name := config.getoption(f"--ablation-{option}")) is None:
            continue
        file = Path(name)  # pytest returns to the first folder before it finishes
        try:
            is_new = not file.exists()
            with file.open("a"):
                pass
            if is_new:
                file.unlink()  # it stays away if no check runs
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            raise pytest.UsageError(f"{option} {name}: {_reason(error)}") from None
        files[option] = file
    return files


def _reason(error: OSError | ValueError) -> str:
    """Return why a file cannot be read or written."""
    return str(error.strerror if isinstance(error, OSError) else error)


def _read_expected_failures(config: pytest.Config) -> dict[str, str]:
    """Return {check id: reason} from the file that --ablation-expected-failures names. Raises UsageError."""
    file = config.getoption("--ablation-expected-failures")
    if file is None:
        return {}
    from ablation.checks.runner import validate_ids

    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise pytest.UsageError(f"expected failures {file}: it is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise pytest.UsageError(f"expected failures {file}: {_reason(error)}") from None
    expected: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        check, *rest = line.split(maxsplit=1)
        check = check.removesuffix(":")
        place = f"expected failures {file}, line {number}"
        try:
            validate_ids({check: ""})
        except InvalidDeclaration as error:
            raise pytest.UsageError(f"{place}: {error}") from None
        if not rest:
            raise pytest.UsageError(f"{place}: a reason has to follow {check!r}")
        if check in expected:
            raise pytest.UsageError(f"{place}: {check!r} is in the file twice")
        expected[check] = rest[0]
    return expected


class CheckItem(pytest.Item):
    """One check of the implementation, as a pytest test."""

    check: Check

    @classmethod
    def of(cls, session: pytest.Session, check: Check) -> CheckItem:
        """Make the test of a check."""
        item: CheckItem = cls.from_parent(session, name=check.id, nodeid=f"specification::{check.id}")
        item.check = check
        return item

    def runtest(self) -> None:
        """Run the check, and keep its record for the verdict."""
        from ablation.checks.runner import report_to_pytest

        record = self.config.stash[RUN](self.check)
        self.config.stash[RECORDS].append(record)
        report_to_pytest(record)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *_: Any) -> str:
        """Return the message alone, since the frames of the specification do not help the reader."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return a path that pytest shows in place of a test file, no line number, and the name of the check."""
        return Path("specification"), None, self.name


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """With an implementation, collect no test files."""
    return True if config.getoption("--ablation-implementation") else None


@pytest.hookimpl(tryfirst=True)  # before -k selects
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """With an implementation, put the checks in place of all tests."""
    if config.getoption("--ablation-implementation"):
        items[:] = [CheckItem.of(session, check) for check in config.stash[RUN].checks]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the implementation under test."""
    name = config.getoption("--ablation-implementation")
    return [f"implementation: {name}"] if name else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sum up the run, write the files that options name, and let pytest fail if every check was skipped."""
    config, records = session.config, session.config.stash[RECORDS]
    if not records:
        return
    from ablation.checks.runner import NOTHING_TRIED
    from ablation.checks.summary import outcomes, shared_cause

    run = config.stash[RUN]
    cause, findings = shared_cause(run.factory, records), run.findings()
    if session.exitstatus == pytest.ExitCode.INTERRUPTED:
        findings.append("interrupted before the checks were finished")
    if {record.outcome for record in records} == {"skipped"}:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        findings.append(NOTHING_TRIED)
    config.stash[VERDICT] = [*cause, *outcomes(records, len(run.checks)), *findings]
    if problems := list(_write_files(session, cause, findings)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.stash[VERDICT] += problems


def _write_files(session: pytest.Session, cause: list[str], findings: list[str]) -> Iterator[str]:
    """Write the files that options name. Yields a line for each that cannot be written."""
    import json

    from ablation.checks.exports import badge, markdown

    config, records = session.config, session.config.stash[RECORDS]
    total, run_fails = len(config.stash[RUN].checks), session.exitstatus != pytest.ExitCode.OK
    texts = {
        "summary": markdown(_name(config), records, total, cause, findings),
        "badge": json.dumps(badge(records, total, run_fails=run_fails)) + "\n",
        "table": config.stash[RUN].table(),
    }
    for option, file in config.stash[FILES].items():
        try:
            with file.open("a" if option == "summary" else "w", encoding="utf-8") as stream:
                stream.write(texts[option])
        except OSError as error:
            yield f"{option} {file}: {_reason(error)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print a cause that failures share, how many requirements hold, and which do not."""
    if VERDICT in config.stash:
        terminalreporter.section(f"head ablation by {_name(config)}")
        for line in config.stash[VERDICT]:
            terminalreporter.line(line)


def _name(config: pytest.Config) -> str:
    return str(config.getoption("--ablation-implementation"))
