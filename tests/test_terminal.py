"""What a shell and a terminal do to a command: signals, closed and full streams, encodings, warnings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from ablation import __main__, cli, models
from ablation.commands import arguments
from ablation.commands.terminal import Interruptions, print_json
from ablation.figures import of_sweeps
from ablation.results import Result
from ablation.studies import experiment
from tests.test_cli import FILES, Run, run  # noqa: F401 (fixture)
from tests.test_output import contents, quick  # noqa: F401 (fixture)

ZERO = ["--imputation", "zero"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("where", [(experiment, "run"), (of_sweeps, "draw")])
def test_signal_ends_a_sweep_and_leaves_nothing(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[Any, str],
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr(*where, lambda *_, **__: os.kill(os.getpid(), number))
    status, out, err = run(*ZERO)
    assert (status, err) == (128 + number, "ablation: interrupted, nothing written\n")
    assert bool(out) == (where == (of_sweeps, "draw")) and contents(".") == {}
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def caught_by_a_library() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        raise RuntimeError("drawing failed") from error


def ignored_by_a_library() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        return


@pytest.mark.parametrize("swallow", [caught_by_a_library, ignored_by_a_library])
def test_swallowed_interrupt_ends_the_command(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    swallow: Callable[[], None],
) -> None:
    monkeypatch.setattr(of_sweeps, "draw", lambda *_, **__: swallow())
    status, _, err = run(*ZERO)
    assert (status, err) == (130, "ablation: interrupted, nothing written\n") and contents(".") == {}


def test_interrupt_that_a_callback_drops_ends_the_sweep(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sweep(*_: Any, progress: Callable[[float], None], **__: Any) -> None:
        ignored_by_a_library()
        progress(0.5)
        pytest.fail("the sweep goes on")

    monkeypatch.setattr(experiment, "run", sweep)
    assert run(*ZERO)[0] == 130


def test_signal_while_files_move_waits_for_them(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    quick: None,  # noqa: F811
) -> None:
    publish = Result.publish

    def interrupted(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        publish(*arguments, **options)

    monkeypatch.setattr(Result, "publish", interrupted)
    status, out, _ = run(*ZERO, "--out", "out")
    assert status == 143 and "are in out" in out and contents("out").keys() == FILES - {"agreement.png"}


def test_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptions() as interruptions:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interruptions.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


class Closed:
    """A stream that raises the error of a closed pipe or a full disk on each write."""

    encoding = "utf-8"

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, _: str) -> int:
        raise self.error

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BrokenPipeError(), 141, ""),
        (OSError(28, "No space left"), 2, "ablation: the result is in out, but it could not be printed: [Errno 28] No"),
    ],
)
def test_closed_or_full_output_does_not_lose_the_result(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    quick: None,  # noqa: F811
    error: OSError,
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(error))
    found, _, err = run(*ZERO, "--out", "out")
    assert found == status and err.startswith(message) and err.count("\n") == bool(message)
    assert contents("out").keys() == FILES - {"agreement.png"}


def test_missing_standard_output_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As after `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    status, _, err = run()
    assert status == 2 and err.startswith("ablation: standard output is closed") and err.count("\n") == 1
    assert contents(".") == {}


def test_missing_standard_error_changes_nothing(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    quick: None,  # noqa: F811
) -> None:
    """As after `2>&-`."""
    monkeypatch.setattr(sys, "stderr", None)
    status, out, _ = run(*ZERO, "--out", "out")
    sys.stderr.close()
    assert status == 0 and "are in out" in out


def test_broken_standard_error_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "stderr", Closed(BrokenPipeError()))
    assert run("--model", "./nowhere")[:2] == (2, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_valid_in_every_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    value = {"text": "Zürich \u65e5 \udcff"}
    with (tmp_path / "out").open("w", encoding=encoding, errors="backslashreplace") as stream:
        assert isinstance(stream, TextIOWrapper)
        monkeypatch.setattr(sys, "stdout", stream)
        print_json(value)
        monkeypatch.undo()
    assert json.loads((tmp_path / "out").read_text(encoding=encoding)) == value


@pytest.mark.parametrize("locale", ["ascii", "utf-8"])
def test_arguments_are_utf8_in_every_locale(monkeypatch: pytest.MonkeyPatch, locale: str) -> None:
    given = "Zürich".encode().decode(locale, "surrogateescape")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: locale)
    assert arguments._utf8(given, "--prompt") == "Zürich"


def test_warning_is_a_note_at_once(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick: None,  # noqa: F811
) -> None:
    real, seen = experiment.run, []

    def falls_back(*arguments: Any, **options: Any) -> Result:
        warnings.warn("the growing batch does not suit it:\nrunning one forward per ablation", stacklevel=2)
        seen.append(capsys.readouterr().err)
        return real(*arguments, **options)

    monkeypatch.setattr(experiment, "run", falls_back)
    assert run(*ZERO)[0] == 0
    assert seen == ["ablation: note: the growing batch does not suit it: running one forward per ablation\n"]


@pytest.mark.end_to_end
def test_terminated_process_leaves_nothing(tmp_path: Path) -> None:
    """The whole process, from the shell's side: SIGTERM comes while it draws."""
    code = (
        "import os, signal, sys\nfrom ablation import cli\nfrom ablation.figures import of_sweeps\n"
        "of_sweeps.draw = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(['sweep', '--imputation', 'zero']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "ablation: interrupted, nothing written\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [ImportError("cannot load module more than once"), RuntimeError(), OSError(5, "x")])
def test_import_that_an_interrupt_breaks_is_one_line(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    broken: Exception,
) -> None:
    """An extension module turns the interruption into an error of its own."""

    def half_imported(*_: Any, **__: Any) -> None:
        ignored_by_a_library()
        raise broken

    monkeypatch.setattr(models, "load", half_imported)
    assert run(*ZERO) == (130, "", "ablation: interrupted, nothing written\n")


def test_error_without_an_interrupt_keeps_its_traceback(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake of the package")

    monkeypatch.setattr(models, "load", fails)
    with pytest.raises(RuntimeError, match="a mistake of the package"):
        run(*ZERO)


def test_interrupt_in_a_destructor_ends_the_command_quietly(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(of_sweeps, "draw", lambda *_, **__: Dropped())
    hook = sys.unraisablehook
    assert run(*ZERO)[::2] == (130, "ablation: interrupted, nothing written\n") and contents(".") == {}
    assert sys.unraisablehook is hook


def test_interrupt_before_the_command_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    assert __main__.main() == 130
    assert capsys.readouterr() == ("", "ablation: interrupted, nothing written\n")
