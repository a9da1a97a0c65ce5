"""pytest plugin: with --implementation MODULE:CLASS, pytest runs the specification on that adapter, and nothing else.

`pytest -p ablation.checks.plugin --implementation my_adapter:Mine`, in any folder. The adapter is imported from the
folder in which pytest is called, or from the environment. Without the option, the plugin does nothing.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ablation.errors import InvalidDeclaration

if TYPE_CHECKING:
    from ablation.checks.check import Check
    from ablation.checks.runner import CheckRun, Record

RUN: pytest.StashKey[CheckRun] = pytest.StashKey()
RECORDS = pytest.StashKey[list["Record"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("head ablation")
    group.addoption(
        "--implementation",
        metavar="MODULE:CLASS",
        help="run the specification of head ablation, and nothing else, on this adapter (see ablation.checks.protocol)",
    )
    group.addoption(
        "--expected-failures",
        metavar="FILE",
        help="checks that this implementation is known to fail: a line for each, the id of the check and the reason",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the options once; report bad ones before anything runs, in one line."""
    config.stash[RECORDS] = []
    if config.getoption("--implementation"):
        adapter = _load_adapter(config)
        from ablation.checks.runner import CheckRun

        config.stash[RUN] = CheckRun(adapter, _read_expected_failures(config))


def _load_adapter(config: pytest.Config) -> Any:
    """Return the adapter class that --implementation names. Raises UsageError."""
    name = config.getoption("--implementation")
    module, _, attribute = name.partition(":")
    folder = str(config.invocation_params.dir)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        adapter = importlib.import_module(module)
        for part in attribute.split("."):
            adapter = getattr(adapter, part)
    except Exception as error:  # whatever the user's module raises when it is imported
        problem = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError | AttributeError) else error
        raise pytest.UsageError(f"--implementation {name}: {problem}; it should be MODULE:CLASS") from None
    if not callable(adapter):
        raise pytest.UsageError(f"--implementation {name}: it is no class; it should be MODULE:CLASS")
    from ablation.checks.signature import adapter_problem

    if unusable := adapter_problem(adapter):
        raise pytest.UsageError(f"--implementation {name}: {unusable}")
    return adapter


def _read_expected_failures(config: pytest.Config) -> dict[str, str]:
    """Return {check id: reason} of the file that --expected-failures names. Raises UsageError."""
    file = config.getoption("--expected-failures")
    if file is None:
        return {}
    from ablation.checks.runner import validate_ids

    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise pytest.UsageError(f"--expected-failures {file}: it is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise pytest.UsageError(f"--expected-failures {file}: {reason}") from None
    expected: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        check, *rest = line.split(maxsplit=1)
        place = f"--expected-failures {file}, line {number}"
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
        """The message alone: no frame of the specification helps the reader."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return where the test is: in no file of the user."""
        return Path("specification"), None, self.name


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """With --implementation, collect no file."""
    return True if config.getoption("--implementation") else None


@pytest.hookimpl(tryfirst=True)  # before -k selects
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --implementation, the tests are the checks."""
    if config.getoption("--implementation"):
        from ablation.checks.runner import CHECKS

        items[:] = [CheckItem.of(session, check) for check in CHECKS]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the implementation under test."""
    name = config.getoption("--implementation")
    return [f"implementation: {name}"] if name else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that tried no check is not a success."""
    if _tried_nothing(session.config.stash[RECORDS]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _tried_nothing(records: list[Record]) -> bool:
    return {record.outcome for record in records} == {"skipped"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The verdict: a cause that failures share, how many requirements hold, and the others by name."""
    records = config.stash[RECORDS]
    if not records:
        return
    from ablation.checks.runner import NOTHING_TRIED
    from ablation.checks.summary import verdict

    terminalreporter.section(f"head ablation by {config.getoption('--implementation')}")
    for line in verdict(config.stash[RUN].factory, records):
        terminalreporter.line(line)
    if _tried_nothing(records):
        terminalreporter.line(NOTHING_TRIED)
