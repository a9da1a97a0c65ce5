"""The command line. It checks the arguments before it imports torch and transformers, so errors are reported fast."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ablation
from ablation import sources
from ablation.checks.command import add_command
from ablation.errors import AblationError, InvalidAblation, InvalidPrompt
from ablation.prompts import Question, check_prompt

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.results import SweepResult

EPILOG = """\
examples:
  ablation sweep
  ablation sweep --model smollm2 --out smollm2-berlin
  ablation sweep --model gpt2 --prompt "Paris is the capital of" --target " France" --control " Germany"
  ablation sweep --model path/to/a/folder --prompt "Two and two are" --imputation zero --json
"""
MODEL_HELP = "capitals (default), smollm2, gpt2, NAME=FOLDER, a folder, a .gguf file or a hub id"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    argv: the arguments, by default those of the process. The status is 0 for success, 2 for an invalid input, 130 after
    an interrupt, 141 if the output is closed (as by `| head`), and for `check` the exit status of pytest.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the encoding of a terminal may lack the text of a token
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits
        return 128 + signal.SIGPIPE
    except (AblationError, OSError) as error:
        _status_line("")
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _status_line("")
        print("ablation: interrupted, nothing written", file=sys.stderr)
        return 128 + signal.SIGINT
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
    sweep = commands.add_parser(
        "sweep",
        help="ablate every head in turn, and show what each does to one prediction",
        description="Ablate every attention head in turn and show what each does to the model's next token.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = sweep.add_argument
    add("--model", default="capitals", help=MODEL_HELP)
    add("--prompt", help="the text to continue (default: the prompt of the named model)")
    add(
        "--target",
        help="the token whose probability is measured (default: the target of the named model; with --prompt, the "
        "prediction)",
    )
    add(
        "--control",
        help="a token that should not react (default: the control of the named model; with --prompt, the most probable "
        "other token)",
    )
    add("--chat", action="store_true", help="the prompt is a user's message, rendered by the model's chat template")
    add(
        "--imputation",
        nargs="+",
        choices=["zero", "mean"],
        default=["zero", "mean"],
        metavar="NAME",
        help="what replaces the output of a head (z): zero, mean (one number, the mean of z over tokens and channels), "
        "or both (default: both)",
    )
    add("--out", type=Path, metavar="FOLDER", help="the folder for arrays and figures (default: ./ablation-MODEL)")
    add("--max-rows", type=int, metavar="N", help="rows of a forward pass (default: as many as fit in 128 MB)")
    add("--device", help="cpu, cuda, cuda:1, mps, ..., or auto: all devices (default: a GPU if there is one)")
    add("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32", help="(default: float32)")
    add("--json", action="store_true", help="print the findings as JSON")
    sweep.set_defaults(run=_sweep)
    heads = commands.add_parser(
        "heads",
        help="show where the heads of a model are, or why the model is refused",
        description="Show where the attention heads of a model are, or why they cannot be ablated. Loads no weights.",
    )
    heads.add_argument("--model", default="capitals", help=MODEL_HELP)
    heads.add_argument("--json", action="store_true", help="print the map as JSON, layer by layer")
    heads.set_defaults(run=_heads)
    add_command(commands)
    return parser


def _sweep(arguments: argparse.Namespace) -> int:
    sources.resolve(arguments.model)
    question = _question(arguments)
    if arguments.max_rows is not None and arguments.max_rows < 2:
        raise InvalidAblation(
            f"--max-rows is {arguments.max_rows}: a pass needs 2 rows, a clean one and an ablated one"
        )
    out: Path = arguments.out or Path(f"ablation-{Path(arguments.model).name.removesuffix('.gguf') or 'model'}")
    with _staging(out) as staging:
        _status_line(f"loading {arguments.model} ...")
        import torch

        from ablation import models, report

        _silence_transformers()
        loaded = models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        result = _sweep_with_progress(loaded, question, arguments)
        found = report.findings(result, loaded.decode)
        _status_line("")
        if arguments.json:
            print(json.dumps(found | {"provenance": result.provenance}, indent=2, ensure_ascii=False), flush=True)
        else:
            print(f"{loaded.name}: {question.prompt!r}\n\n{report.render(found)}", flush=True)
        _status_line("drawing ...")
        from ablation import figures  # now, since matplotlib takes a while to import

        result.save(staging)
        figures.draw(
            result,
            staging,
            title=f"{loaded.name}: {question.prompt}",
            token_texts={int(token): loaded.decode(token) for token in (*result.watched, result.clean_argmax)},
        )
        _status_line("")
    if not arguments.json:
        print(f"\nArrays, provenance and figures are in {out}")
    return 0


def _heads(arguments: argparse.Namespace) -> int:
    sources.resolve(arguments.model)
    _status_line(f"reading {arguments.model} ...")
    from ablation import models, report
    from ablation.heads import find_heads

    _silence_transformers()
    model = models.architecture(arguments.model)
    found = {"model": arguments.model, "architecture": type(model).__name__, **report.head_map(find_heads(model))}
    _status_line("")
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        summary = f"{found['architecture']}, {found['heads']} heads in {len(found['layers'])} layers"
        print(f"{arguments.model}: {summary}\n\n{report.render_head_map(found)}")
    return 0


def _question(arguments: argparse.Namespace) -> Question:
    """Return the question of the arguments; without --prompt, the model's own, with --target and --control if given."""
    if arguments.prompt is not None:
        check_prompt(arguments.prompt)
        return Question(arguments.prompt, arguments.target, arguments.control, arguments.chat)
    default = sources.default_question(arguments.model)
    if default is None:
        raise InvalidPrompt(f"{arguments.model} has no prompt of its own: pass one with --prompt")
    target = default.target if arguments.target is None else arguments.target
    control = default.control if arguments.control is None else arguments.control
    return Question(default.prompt, target, control, arguments.chat)


def _sweep_with_progress(loaded: LoadedModel, question: Question, arguments: argparse.Namespace) -> SweepResult:
    """Sweep with a progress bar if standard error is a terminal. Warnings are printed as notes on standard error."""
    from tqdm import tqdm

    from ablation.experiment import sweep_question

    bar_format = "sweeping {percentage:3.0f}% |{bar:40}|"
    _status_line("")
    with (
        warnings.catch_warnings(record=True) as notes,
        tqdm(total=100, bar_format=bar_format, leave=False, disable=None) as bar,  # None: only on a terminal
    ):
        result = sweep_question(
            loaded,
            question,
            list(dict.fromkeys(arguments.imputation)),
            max_rows=arguments.max_rows,
            progress=lambda share: bar.update(100 * share - bar.n),
        )
    for note in notes:
        print(f"ablation: note: {note.message}", file=sys.stderr)
    return result


def _silence_transformers() -> None:
    """Silence the log and the progress bars of transformers; errors are exceptions, which still propagate."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _status_line(text: str) -> None:
    """If standard error is a terminal, show a line there that replaces the previous status line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `out` at the end; after an error, it is deleted. Raises OSError."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OSError(f"cannot write to {out}: {existing} is not a folder")
    with tempfile.TemporaryDirectory(dir=existing, prefix=".ablation-") as staging:
        yield Path(staging)
        out.mkdir(parents=True, exist_ok=True)
        (out / "difference.png").unlink(missing_ok=True)  # of an earlier sweep: this one may not have it
        for file in Path(staging).iterdir():
            file.replace(out / file.name)
