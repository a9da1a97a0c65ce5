"""The command line. Nothing heavy is imported before it is needed: `--help` answers at once."""

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

from ablation.errors import AblationError, InvalidPrompt

if TYPE_CHECKING:
    from ablation.models import LoadedModel, Question
    from ablation.results import SweepResult

EPILOG = """\
examples:
  python -m ablation sweep
  python -m ablation sweep --model smollm2 --out smollm2-berlin
  python -m ablation sweep --model gpt2 --prompt "Paris is the capital of" --target " France" --control " Germany"
  python -m ablation sweep --model path/to/a/folder --prompt "Two and two are" --impute zero --json
  python -m ablation heads path/to/a/folder
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for bad input, 130 when interrupted, 141 when nobody reads on."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a token may be any text, a terminal's encoding may not
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again on its way out
        return 128 + signal.SIGPIPE
    except (AblationError, OSError) as error:
        _say("")
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("")
        print("ablation: interrupted, nothing written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ablation", description="Switch off attention heads of a language model.")
    commands = parser.add_subparsers(required=True, metavar="command")
    sweep = commands.add_parser(
        "sweep",
        help="ablate every head in turn: what does each do to one prediction?",
        description="Ablate every attention head in turn and show what each does to the model's next token.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = sweep.add_argument
    add("--model", default="capitals", help="capitals (default), smollm2, gpt2, a folder, a .gguf file or a hub id")
    add("--prompt", help="the text to continue (default: the model's own, where it has one)")
    add("--target", help="the token whose probability is followed (default: the clean prediction)")
    add("--control", help="a token that should not react (default: the most probable other one)")
    add("--impute", choices=["zero", "mean", "both"], default="both", help="what replaces a head (default: both)")
    add("--out", type=Path, metavar="FOLDER", help="where arrays and figures go (default: ./ablation-MODEL)")
    add("--max-rows", type=int, metavar="N", help="rows of the batch at once (default: what 128 MB hold)")
    add(
        "--device",
        help="cpu, cuda, cuda:1, mps, ..., or auto: over all that there are (default: a GPU, if there is one)",
    )
    add("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32", help="(default: float32)")
    add("--json", action="store_true", help="print the findings as JSON")
    sweep.set_defaults(run=_sweep)
    heads = commands.add_parser(
        "heads",
        help="where the heads of a model are, or why it is refused",
        description="Show where the attention heads of a model are, or why they cannot be ablated. Loads no weights.",
    )
    heads.add_argument("model", help="capitals, smollm2, gpt2, a folder, a .gguf file or a hub id")
    heads.add_argument("--json", action="store_true", help="print the map as JSON, layer by layer")
    heads.set_defaults(run=_heads)
    return parser


def _sweep(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out or Path(f"ablation-{Path(arguments.model).name.removesuffix('.gguf') or 'model'}")
    with _staging(out) as staging:  # first, so that a folder that cannot be written is found before the work
        _say(f"loading {arguments.model} ...")
        import torch

        from ablation import figures, models, report

        _quiet()
        question = _question(arguments)
        loaded = models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        result = _with_progress(loaded, question, arguments)
        found = report.findings(result, loaded.decode)
        text = f"{loaded.name}: {question.prompt!r}\n\n{report.render(found)}\n"
        _say("drawing ...")
        result.save(staging)
        figures.draw(
            result,
            staging,
            title=f"{loaded.name}: {question.prompt}",
            token_texts={int(token): loaded.decode(token) for token in (*result.watched, result.clean_argmax)},
        )
        _say("")
    if arguments.json:
        print(json.dumps(found | {"provenance": result.provenance}, indent=2, ensure_ascii=False))
    else:
        print(f"{text}\nArrays, provenance and figures are in {out}")


def _heads(arguments: argparse.Namespace) -> None:
    _say(f"reading {arguments.model} ...")
    from ablation import models, report
    from ablation.heads import find_heads

    _quiet()
    model = models.architecture(arguments.model)
    found = {"model": arguments.model, "architecture": type(model).__name__, **report.head_map(find_heads(model))}
    _say("")
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        summary = f"{found['architecture']}, {found['heads']} heads in {len(found['layers'])} layers"
        print(f"{arguments.model}: {summary}\n\n{report.render_head_map(found)}")


def _question(arguments: argparse.Namespace) -> Question:
    """The question asked: with a prompt of its own as given, without one completed by the model's own."""
    from ablation import models

    if arguments.prompt is not None:
        return models.Question(arguments.prompt, arguments.target, arguments.control)
    own = models.question(arguments.model)
    if own is None:
        raise InvalidPrompt(f"{arguments.model} has no prompt of its own: pass one with --prompt")
    target = own.target if arguments.target is None else arguments.target
    control = own.control if arguments.control is None else arguments.control
    return models.Question(own.prompt, target, control)


def _with_progress(loaded: LoadedModel, question: Question, arguments: argparse.Namespace) -> SweepResult:
    from tqdm import tqdm

    from ablation.experiment import sweep_question

    imputations = ("zero", "mean") if arguments.impute == "both" else (arguments.impute,)
    form = "sweeping {percentage:3.0f}% |{bar:40}|"
    _say("")
    with (
        warnings.catch_warnings(record=True) as notes,
        tqdm(total=100, bar_format=form, leave=False, disable=None) as bar,  # None: not where nobody looks
    ):
        result = sweep_question(
            loaded,
            question,
            imputations,
            max_rows=arguments.max_rows,
            progress=lambda share: bar.update(100 * share - bar.n),
        )
    for note in notes:
        print(f"ablation: note: {note.message}", file=sys.stderr)
    return result


def _quiet() -> None:
    """Silence what transformers says on its own while it loads; its errors come as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _say(text: str) -> None:
    """A passing line for a person who waits."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder whose files move to `out` at the end; on any other way out nothing is left of it. Raises OSError."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OSError(f"cannot write to {out}: {existing} is not a folder")
    with tempfile.TemporaryDirectory(dir=existing, prefix=".ablation-") as staging:
        yield Path(staging)
        out.mkdir(parents=True, exist_ok=True)
        (out / "difference.png").unlink(missing_ok=True)  # of an earlier sweep; this one may have none
        for file in Path(staging).iterdir():
            file.replace(out / file.name)
