"""The command `ablation diff`. It imports neither torch nor transformers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ablation.errors import InvalidOutput, InvalidResult
from ablation.terminal import print_json

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
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError
    return value


def _diff(arguments: argparse.Namespace) -> int:
    from ablation import diff
    from ablation.results import Result

    if arguments.out is not None and (Path(arguments.out).exists() or Path(arguments.out).suffix != ".png"):
        raise InvalidOutput(f"cannot draw to {arguments.out}: name a new file that ends with .png")
    pair = diff.matched(Result.load(arguments.first), Result.load(arguments.second))
    found = diff.findings(pair, arguments.tolerance)
    if math.isnan(found["tolerance"]["least"]):
        raise InvalidResult("a result does not say how its logits were rounded: pass --tolerance")
    if arguments.out is not None:
        from ablation import figures_of_diff

        figures_of_diff.draw(pair, Path(arguments.out), (arguments.first, arguments.second))
    if arguments.json:
        print_json(found)
    else:
        print(diff.render(found, arguments.first, arguments.second))
    return int(found["differs"])
