"""What a command shares with the terminal and the shell: signals, notes, standard streams. Importing it is cheap."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ablation.errors import one_line


class Interruptions:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; a signal that is ignored (nohup) stays so."""

    def __init__(self) -> None:
        self.received = 0
        """The first signal, 0 if there was none."""
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._drop
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt after a signal: Python drops an exception that is raised in a callback of its own."""
        if self.received:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While entered, signals wait: they are known to `check`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _drop(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Print nothing of an interruption that Python drops in a destructor: `received` keeps it."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._unraisable(unraisable)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        if not self._deferred:
            raise KeyboardInterrupt


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """While entered, a warning is one line on standard error, at once, without the place in the code."""

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        status_line("")
        say(f"ablation: note: {one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=UserWarning)
        warnings.showwarning = note
        yield


def prepare_streams() -> None:
    """Make standard output and standard error take any text. Raises OSError if standard output is closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (takes the free descriptor, before another file does)
    if sys.stdout is None:
        raise OSError("standard output is closed: send it to /dev/null if it is not wanted")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the encoding of a terminal may lack the text of a token


def discard_output() -> None:
    """Drop what standard output still holds, since Python writes it again when it exits."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Print JSON, in ASCII if the output cannot encode all letters. Raises OSError."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_utf8), flush=True)


def say(line: str) -> None:
    """Print a line on standard error, if it is open."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def status_line(text: str) -> None:
    """Show a line that the next one replaces, to a person at a terminal."""
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def silence_transformers() -> None:
    """Silence the log and the progress bars of transformers; errors are exceptions, which still propagate."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
