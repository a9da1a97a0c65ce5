"""The command line. It checks the arguments before it imports torch and transformers, so errors are reported fast."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import ablation
from ablation import sources
from ablation.checks import command as check_command
from ablation.commands import curve, diff, generate, pairs, sets, sweep
from ablation.commands.terminal import (
    Interruptions,
    discard_output,
    prepare_streams,
    print_json,
    say,
    silence_transformers,
    status_line,
    warnings_as_notes,
)
from ablation.errors import AblationError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    argv: the arguments, by default those of the process. The status is 0 for success, 2 for an invalid input or a
    result that cannot be saved, 128 + n after signal n (130 after Ctrl-C), 141 if the output is closed (as by
    `| head`), and for `check` the exit status of pytest.
    """
    arguments = argparse.Namespace()
    with Interruptions() as interruptions:
        try:
            prepare_streams()
            try:
                _parser().parse_args(argv, arguments)
                arguments.interruptions = interruptions
                status: int = arguments.run(arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # as in `| head`
            status = 128 + signal.SIGPIPE
        except (Exception, KeyboardInterrupt) as error:
            # An interrupted import fails with any error.
            interrupted = isinstance(error, KeyboardInterrupt) or bool(interruptions.received)
            if not interrupted and not isinstance(error, AblationError | OSError):
                raise
            status_line("")
            kept = getattr(arguments, "kept", None) or "nothing written"
            say(f"ablation: interrupted, {kept}" if interrupted else f"ablation: {one_line(str(error))}")
            status = 128 + signal.SIGINT if interrupted else 2
        if interruptions.received:  # a library may have caught it
            status = 128 + interruptions.received
        try:
            sys.stdout.flush()
        except (AttributeError, OSError):  # it is closed, or its disk is full
            discard_output()
    return status


class _Version(argparse.Action):
    """Looks the version up only for `--version`, since the look-up takes longer than parsing the arguments."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"ablation {ablation.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ablation", description="Switch off attention heads of a language model.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (sweep, sets, curve, pairs):
        command.add_command(commands)
    heads = commands.add_parser(
        "heads",
        help="show where the heads of a model are, or why the model is refused",
        description="Show where the attention heads of a model are, or why they cannot be ablated. Loads no weights.",
    )
    heads.add_argument("--model", default="capitals", help=sources.MODEL_HELP)
    heads.add_argument("--json", action="store_true", help="print the map as JSON, layer by layer")
    heads.set_defaults(run=_heads)
    generate.add_command(commands)
    diff.add_command(commands)
    check_command.add_command(commands)
    return parser


def _heads(arguments: argparse.Namespace) -> int:
    sources.resolve(arguments.model)
    status_line(f"reading {arguments.model} ...")
    from ablation import models
    from ablation.heads import find_heads
    from ablation.reports import report

    silence_transformers()
    with warnings_as_notes():
        model = models.architecture(arguments.model)
        heads = find_heads(model)
        models.check_projections(model, heads)
    found = {"model": arguments.model, "architecture": type(model).__name__, **report.head_map(heads)}
    status_line("")
    if arguments.json:
        print_json(found)
    else:
        summary = f"{found['architecture']}, {found['heads']} heads in {len(found['layers'])} layers"
        print(f"{arguments.model}: {summary}\n\n{report.render_head_map(found)}")
    return 0
