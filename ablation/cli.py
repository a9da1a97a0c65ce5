"""The command line. It checks the arguments before it imports torch and transformers, so errors are reported fast."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ablation
from ablation import output, sources
from ablation.checks.command import add_command
from ablation.errors import AblationError, InvalidAblation, InvalidOutput, InvalidPrompt, one_line, shortened
from ablation.prompts import Question, check_prompt
from ablation.terminal import (
    Interruptions,
    discard_output,
    prepare_streams,
    print_json,
    say,
    status_line,
    warnings_as_notes,
)

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
LONGEST_PROMPT = 400
"""Characters of a prompt that are printed."""

MODEL_HELP = "capitals (default), smollm2, gpt2, NAME=FOLDER, a folder, a .gguf file or a hub id"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    argv: the arguments, by default those of the process. The status is 0 for success, 2 for an invalid input or a
    result that cannot be saved, 128 + n after signal n (130 after Ctrl-C), 141 if the output is closed (as by
    `| head`), and for `check` the exit status of pytest.
    """
    with Interruptions() as interruptions:
        try:
            prepare_streams()
            try:
                arguments = _parser().parse_args(argv)
                arguments.interruptions = interruptions
                status: int = arguments.run(arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # as in `| head`
            status = 128 + signal.SIGPIPE
        except (AblationError, OSError) as error:
            status_line("")
            say(f"ablation: {one_line(str(error))}")
            status = 2
        except KeyboardInterrupt:
            status_line("")
            say("ablation: interrupted, nothing written")
            status = 128 + signal.SIGINT
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
    add(
        "--out",
        metavar="FOLDER",
        help="the folder for arrays and figures (default: ./ablation-MODEL, with the words of --prompt)",
    )
    add("--overwrite", action="store_true", help="replace the result of another question or model in FOLDER")
    add("--max-rows", type=int, metavar="N", help="rows of a forward pass (default: as many as fit in memory)")
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
    source = sources.resolve(arguments.model)
    question = _question(arguments, source)
    if arguments.max_rows is not None and arguments.max_rows < 2:
        raise InvalidAblation(
            f"--max-rows is {arguments.max_rows}: a pass needs 2 rows, a clean one and an ablated one"
        )
    imputations = list(dict.fromkeys(arguments.imputation))
    asked = {**dataclasses.asdict(question), "imputations": imputations, "dtype": arguments.dtype}
    folder = _default_folder(source, asked) if arguments.out is None else arguments.out
    out = output.check_output(folder, asked, source.full, overwrite=arguments.overwrite)
    status_line(f"loading {arguments.model} ...")
    import torch

    from ablation import models, report

    _silence_transformers()
    with warnings_as_notes():
        loaded = models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        result = _sweep_with_progress(loaded, question, imputations, arguments)
    result = dataclasses.replace(result, provenance={**result.provenance, "asked": asked})
    found = report.findings(result, loaded.decode)
    unprinted = None
    try:
        if arguments.json:
            print_json(found | {"provenance": result.provenance})
        else:
            prompt = shortened(question.prompt, LONGEST_PROMPT)
            print(f"{loaded.name}: {prompt!r}\n\n{report.render(found)}", flush=True)
    except OSError as error:  # the output is closed, as by `| head`: the result is saved all the same
        unprinted = error
    out = _save(result, loaded, out, arguments)
    if isinstance(unprinted, BrokenPipeError):
        raise unprinted
    if unprinted is not None:
        raise InvalidOutput(f"the result is in {out}, but it could not be printed: {unprinted}") from unprinted
    if not arguments.json:
        print(f"\nArrays, provenance and figures are in {out}")
    return 0


def _save(result: SweepResult, loaded: LoadedModel, out: Path, arguments: argparse.Namespace) -> Path:
    """Save a result with its figures, and without them if they cannot be drawn. Returns its folder.

    Raises InvalidOutput if the figures or the result could not be written.
    """
    undrawn = None
    try:
        with output.staging(out) as draft:
            result.write_arrays(draft)
            status_line("drawing ...")
            try:
                _draw(result, loaded, draft)
            except Exception as error:  # of matplotlib, or of the disk
                undrawn = error
                for file in draft.glob("*.png"):
                    file.unlink()
            status_line("")
            arguments.interruptions.check()
            with arguments.interruptions.deferred():
                out = _publish(result, draft, out, arguments.overwrite)
    except OSError as error:
        raise InvalidOutput(f"the result was not saved in {out}: {error}") from error
    if undrawn is not None:
        raise InvalidOutput(f"the arrays are in {out}, but no figures: {one_line(undrawn)}") from undrawn
    return out


def _publish(result: SweepResult, draft: Path, out: Path, overwrite: bool) -> Path:
    """Move a result to its folder, or to a new one in it if another result has come there meanwhile."""
    try:
        result.publish(draft, out, overwrite=overwrite)
        return out
    except InvalidOutput as error:
        numbered = (out / f"result-{number}" for number in range(2, 1000))
        free = next(path for path in numbered if not path.exists())
        result.publish(draft, free, overwrite=False)
        say(f"ablation: note: {error}; this result is in {free}")
        return free


def _draw(result: SweepResult, loaded: LoadedModel, folder: Path) -> None:
    from ablation import figures  # now, since matplotlib takes a while to import

    figures.draw(
        result,
        folder,
        title=f"{loaded.name}: {result.provenance['prompt']}",
        token_texts={int(token): loaded.decode(token) for token in (*result.watched, result.clean_argmax)},
    )


def _default_folder(source: sources.Source, asked: dict[str, Any]) -> str:
    """Return the name of the folder of a sweep: ablation-MODEL, and for another question its words and a digest."""
    name = f"ablation-{_file_name(source.name.removesuffix('.gguf')) or 'model'}"
    usual = {"imputations": ["zero", "mean"], "dtype": "float32"}
    named = sources.NAMED_MODELS.get(source.full)
    if named is not None and asked == {**dataclasses.asdict(named.question), **usual}:
        return name
    digest = hashlib.sha256(json.dumps([source.full, asked]).encode()).hexdigest()[:8]
    return "-".join(filter(None, (name, _file_name(asked["prompt"]), digest)))


def _file_name(text: str) -> str:
    """Return the letters and digits of a text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII)[:40].strip("-.").lower()


def _heads(arguments: argparse.Namespace) -> int:
    sources.resolve(arguments.model)
    status_line(f"reading {arguments.model} ...")
    from ablation import models, report
    from ablation.heads import find_heads

    _silence_transformers()
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


def _question(arguments: argparse.Namespace, source: sources.Source) -> Question:
    """Return the question of the arguments; without --prompt, the model's own, with --target and --control if given."""
    target = _utf8(arguments.target, "--target")
    control = _utf8(arguments.control, "--control")
    if arguments.prompt is not None:
        prompt = _utf8(arguments.prompt, "--prompt")
        check_prompt(prompt)
        return Question(prompt, target, control, arguments.chat)
    default = sources.default_question(arguments.model)
    if default is None:
        source.check_exists()
        raise InvalidPrompt(f"{source.name} has no prompt of its own: pass one with --prompt")
    return Question(
        default.prompt,
        default.target if target is None else target,
        default.control if control is None else control,
        arguments.chat,
    )


def _utf8(text: Any, option: str) -> Any:
    """Return an argument as text, also if the locale is not UTF-8. Raises InvalidPrompt if its bytes are not UTF-8."""
    try:
        return text if text is None else text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
    except UnicodeError:
        try:
            text.encode("utf-8")
        except UnicodeError:
            raise InvalidPrompt(f"{option} is not valid UTF-8: {shortened(text, LONGEST_PROMPT)!a}") from None
        return text  # passed by a Python program, not by the shell


def _sweep_with_progress(
    loaded: LoadedModel, question: Question, imputations: list[str], arguments: argparse.Namespace
) -> SweepResult:
    """Sweep with a progress bar if standard error is a terminal."""
    from tqdm import tqdm

    from ablation.experiment import sweep_question

    bar_format = "sweeping {percentage:3.0f}% |{bar:40}|"
    status_line("")
    with tqdm(total=100, bar_format=bar_format, leave=False, disable=None) as bar:  # None: only on a terminal

        def progress(share: float) -> None:
            arguments.interruptions.check()
            bar.update(100 * share - bar.n)

        return sweep_question(loaded, question, imputations, max_rows=arguments.max_rows, progress=progress)


def _silence_transformers() -> None:
    """Silence the log and the progress bars of transformers; errors are exceptions, which still propagate."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
