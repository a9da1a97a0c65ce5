"""The command `ablation diff`. It imports neither torch nor transformers."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablation.commands.terminal import print_json
from ablation.errors import InvalidOutput, InvalidResult

FIGURE = "diff.png"
DESCRIPTION = """\
Compare two results of `ablation sweep`, such as those of two versions of torch, two dtypes or two checkpoints.
The exit status is 0 if they agree, 1 if they differ, 2 for an error."""


def add_command(commands: Any) -> None:
    """Add the parser of `ablation diff`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "diff",
        help="compare two results, and exit with 1 if they differ",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="FOLDER", help="the folder of a result")
    parser.add_argument("second", metavar="FOLDER", help="the folder of another result")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="NATS",
        help="the difference of a log-probability from which results differ (default: the rounding of the logits)",
    )
    parser.add_argument("--out", metavar="FILE.png", help="draw the two results against each other")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_diff)


def _tolerance(text: str) -> float:
    with suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= 0:
            return value
    raise argparse.ArgumentTypeError(f"it is a number of nats, at least 0, not {text!r}")


def _check_figure(path: Path) -> None:
    """Raise InvalidOutput unless a figure can be drawn to a new file at this path."""
    folder = path.absolute().parent
    reason = "it exists already" if path.exists() else None if folder.is_dir() else f"there is no folder {folder}"
    if path.suffix != ".png":
        reason = "its name does not end with .png"
    if reason is not None:
        raise InvalidOutput(f"cannot draw to {path}: {reason}")


def _diff(arguments: argparse.Namespace) -> int:
    from ablation.reports import diff
    from ablation.results import Result

    if arguments.out is not None:
        _check_figure(Path(arguments.out))
    pair = diff.matched(Result.load(arguments.first), Result.load(arguments.second))
    found = diff.findings(pair, arguments.tolerance)
    if math.isnan(found["tolerance"]["least"]):
        raise InvalidResult("a result does not say how its logits were rounded: pass --tolerance")
    if arguments.out is not None:
        from ablation.figures import of_diff

        of_diff.draw(pair, found, Path(arguments.out), (arguments.first, arguments.second))
    if arguments.json:
        print_json(found)
    else:
        print(diff.render(found, arguments.first, arguments.second))
    return int(found["differs"])
