"""Finished prompts of an unfinished run, on disk, from which the same run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablation import output
from ablation.errors import InvalidOutput, one_line
from ablation.results import ARRAYS, Result

SETTINGS = "settings.json"


class Checkpoint:
    """The folder `unfinished` in an output folder: one saved `Result` for each finished prompt.

    Several processes may write to one checkpoint, each its own prompts.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open the checkpoint of a run, or begin one.

        settings: everything that the bits of the results depend on, as values that JSON can hold. Raises InvalidOutput
        if there is a checkpoint of other settings, unless `overwrite` is set: it is then removed. Raises OSError.
        """
        self.folder = out / output.UNFINISHED
        wanted = json.loads(json.dumps(settings))
        if overwrite and self._holds_other(wanted):
            self.remove()
        found = self._settings()
        if found is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with output.staging(self.folder) as draft:
                text = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
                (draft / SETTINGS).write_text(text, encoding="utf-8", errors="backslashreplace")
                (draft / SETTINGS).replace(self.folder / SETTINGS)
        elif found != wanted:
            other = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
            values = f"{one_line(found.get(other[0]))} there, {one_line(wanted.get(other[0]))} now"
            raise InvalidOutput(
                f"{self.folder} holds an unfinished run with other settings ({other[0]}: {values}): finish it with the "
                "same settings, choose another folder, or discard it with --overwrite (in "
                "Python, overwrite=True)"
            )

    def _holds_other(self, wanted: Mapping[str, Any]) -> bool:
        """Whether there is a checkpoint of other settings, or a damaged one."""
        try:
            return self._settings() not in (None, wanted)
        except InvalidOutput:
            return True

    def _settings(self) -> Any:
        """Return the settings of the checkpoint on disk, or None if there is none. Raises InvalidOutput."""
        try:
            return json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, NotADirectoryError) as error:
            raise InvalidOutput(f"{self.folder} is in the way: {one_line(error)}") from None

    def _of_prompt(self, index: int) -> Path:
        return self.folder / f"{index:06}"

    def has(self, index: int) -> bool:
        """Whether the prompt is finished."""
        return (self._of_prompt(index) / output.MANIFEST).exists()

    def load(self, index: int) -> Result:
        """Return the result of a finished prompt. Raises InvalidResult if it is missing or damaged."""
        return Result.load(self._of_prompt(index))

    def save(self, index: int, result: Result) -> None:
        """Write the result of a prompt, as a whole or not at all. Raises OSError."""
        result.save(self._of_prompt(index))

    def remove(self) -> None:
        """Remove what was saved, and nothing else: folders that hold other files stay. Raises OSError."""
        for folder in self.folder.glob("[0-9]" * 6):
            for name in (output.MANIFEST, ARRAYS):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
        (self.folder / SETTINGS).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
