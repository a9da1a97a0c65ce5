"""The command `ablation sweep`. It checks its arguments before torch is imported, so errors are reported fast."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ablation import output, sources
from ablation.errors import InvalidAblation, InvalidOutput, InvalidPrompt, one_line, shortened
from ablation.processes import Processes
from ablation.prompt_files import Row, read_rows, valid_rows
from ablation.prompts import Question, check_prompt
from ablation.terminal import print_json, say, silence_transformers, status_line, warnings_as_notes

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.moved import Moved
    from ablation.results import Result

EPILOG = """\
examples:
  ablation sweep
  ablation sweep --model smollm2 --out smollm2-berlin
  ablation sweep --model gpt2 --prompt "Paris is the capital of" --target " France" --control " Germany"
  ablation sweep --model path/to/a/folder --prompt "Two and two are" --imputation zero --json
  ablation sweep --prompts capitals
  ablation sweep --model smollm2 --prompts my-prompts.jsonl --out my-study
"""
LONGEST_PROMPT = 400
"""Characters of a prompt that are printed."""


def add_command(commands: Any) -> None:
    """Add the parser of `ablation sweep`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "sweep",
        help="ablate every head in turn, and show what each does to one prediction",
        description="Ablate every attention head in turn and show what each does to the model's next token.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="capitals", help=sources.MODEL_HELP)
    add("--prompt", help="the text to continue (default: the prompt of the named model)")
    add(
        "--target",
        help="the continuation whose probability is measured (default: the target of the named model; with --prompt, "
        "the predicted token)",
    )
    add(
        "--control",
        help="a continuation that should not react (default: the control of the named model; with --prompt, the most "
        "probable other token)",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="sweep many prompts: a .jsonl or .csv file with the columns prompt and target, and optionally control and "
        "group; or capitals or smollm2, files that are part of the package",
    )
    add("--skip-bad", action="store_true", help="leave out the prompts of FILE that cannot be used")
    add("--text", metavar="FILE", help="measure the mean next-token loss on a text file instead of an answer")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens of FILE that each window scores, after a context of up to N (default: 128, or half of "
        "the model's longest input)",
    )
    add("--chat", action="store_true", help="a prompt is a user's message, rendered by the model's chat template")
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
        "--top",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="show the five tokens that rise and the five that fall most in probability, for the N ablations of each "
        "prompt with the largest effect (default: 5), and write them to top_tokens.csv",
    )
    add(
        "--out",
        metavar="FOLDER",
        help="the folder for arrays, table and figures (default: ./ablation-MODEL, with the words of --prompt). The "
        "finished prompts of an interrupted run are kept there, and the same command goes on with the others",
    )
    add("--overwrite", action="store_true", help="replace the result of other prompts or another model in FOLDER")
    add("--max-rows", type=int, metavar="N", help="rows of a forward pass (default: as many as fit in memory)")
    add("--device", help="cpu, cuda, cuda:1, mps, ..., or auto: all devices (default: a GPU if there is one)")
    add("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32", help="(default: float32)")
    add("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    source = sources.resolve(arguments.model)
    asking = _asking(arguments, source)
    if arguments.max_rows is not None and arguments.max_rows < 2:
        raise InvalidAblation(
            f"--max-rows is {arguments.max_rows}: a pass needs 2 rows, a clean one and an ablated one"
        )
    imputations = list(dict.fromkeys(arguments.imputation))
    asked = {**asking.asked, "imputations": imputations, "dtype": arguments.dtype}
    folder = _default_folder(source, asked) if arguments.out is None else arguments.out
    out = output.check_output(folder, asked, source.full, overwrite=arguments.overwrite)
    if asking.is_single and not arguments.overwrite and (out / output.UNFINISHED).exists():
        raise InvalidOutput(f"{out} holds an unfinished study of several prompts: choose another folder")
    status_line(f"loading {arguments.model} ...")
    import torch

    from ablation import models

    silence_transformers()
    with warnings_as_notes():
        loaded = models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        result = _sweep_with_progress(loaded, asking, imputations, out, arguments)
    if not Processes.current().is_first:
        return 0
    moved = None if arguments.top is None else _moved(loaded, result, arguments)
    result = dataclasses.replace(result, provenance={**result.provenance, "asked": asked})
    unprinted = None
    try:
        _print_report(result, loaded, asking, moved, arguments)
    except OSError as error:  # the output is closed, as by `| head`: the result is saved all the same
        unprinted = error
    out = _save(result, loaded, moved, out, arguments)
    if isinstance(unprinted, BrokenPipeError):
        raise unprinted
    if unprinted is not None:
        raise InvalidOutput(f"the result is in {out}, but it could not be printed: {unprinted}") from unprinted
    if not arguments.json:
        print(f"\nArrays, table, provenance and figures are in {out}")
    return 0


class _Asking(NamedTuple):
    """What a sweep is about. asked: identifies it, as values that JSON can hold. rows: questions, or none with a text.

    bad: rows that are left out.
    """

    asked: dict[str, Any]
    rows: Sequence[Row] = ()
    bad: Sequence[InvalidPrompt] = ()
    text: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether it is one question."""
        return self.text is None and len(self.rows) == 1


def _asking(arguments: argparse.Namespace, source: sources.Source) -> _Asking:
    """Return what the arguments ask. Raises InvalidPrompt."""
    ways = {"--prompts": arguments.prompts, "--text": arguments.text}
    ways |= {f"--{name}": getattr(arguments, name) for name in ("prompt", "target", "control")}
    given = [name for name, value in ways.items() if value is not None]
    if given[0:1] in (["--prompts"], ["--text"]) and len(given) > 1:
        raise InvalidPrompt(f"{given[0]} and {given[1]} exclude each other: pass one of the two")
    if arguments.skip_bad and arguments.prompts is None:
        raise InvalidPrompt("--skip-bad leaves out prompts of a file: pass one with --prompts")
    if arguments.stride is not None and (arguments.text is None or arguments.stride < 1):
        raise InvalidPrompt("--stride is a number of tokens, of at least 1, of a file that --text names")
    if arguments.top is not None and arguments.top < 1:
        raise InvalidPrompt(f"--top is {arguments.top}: it is a number of ablations, at least 1")
    if arguments.text is not None:
        if arguments.chat or arguments.top:
            raise InvalidPrompt(f"{'--chat' if arguments.chat else '--top'} is for questions, not for a --text")
        text = _read_text(arguments.text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return _Asking({"text_sha256": digest, "stride": arguments.stride}, text=text)
    if arguments.prompts is None:
        question = _question(arguments, source)
        return _Asking(dataclasses.asdict(question), [Row("", question)])
    rows, bad = valid_rows(read_rows(arguments.prompts, chat=arguments.chat), skip_bad=arguments.skip_bad)
    questions = [dataclasses.asdict(row.question) for row in rows]
    digest = hashlib.sha256(json.dumps(questions).encode()).hexdigest()
    return _Asking({"prompts": len(rows), "prompts_sha256": digest, "chat": arguments.chat}, rows, bad)


def _read_text(name: str) -> str:
    """Return the content of a text file. Raises InvalidPrompt if it cannot be read, or is empty."""
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPrompt(
            f"cannot read the text {one_line(name)}: {getattr(error, 'strerror', None) or error}"
        ) from None
    text = text.removesuffix("\n").removesuffix("\r")  # the end of the last line is not part of the text
    if not text:
        raise InvalidPrompt(f"the text {one_line(name)} is empty")
    return text


def _moved(loaded: LoadedModel, result: Result, arguments: argparse.Namespace) -> list[Moved]:
    from ablation import moved

    return moved.of_strongest(loaded, result, arguments.top, max_rows=arguments.max_rows)


def _print_report(
    result: Result,
    loaded: LoadedModel,
    asking: _Asking,
    moved: list[Moved] | None,
    arguments: argparse.Namespace,
) -> None:
    """Print the findings. Raises OSError."""
    from ablation import report, summary

    if asking.text is not None:
        heading, found, render = "a text", summary.findings_of_text(result), summary.render_text
    elif len(result.prompts) == 1:
        heading = repr(shortened(asking.rows[0].question.prompt, LONGEST_PROMPT))
        found, render = report.findings(result, loaded.decode), report.render
    else:
        heading, found, render = f"{len(result.prompts)} prompts", summary.findings(result), summary.render
    if arguments.json:
        print_json(found | {"provenance": result.provenance})
    else:
        print(f"{loaded.name}: {heading}\n\n{render(found)}", flush=True)
        if moved is not None and asking.is_single:
            from ablation.moved import render as render_moved

            print("\n" + "\n".join(render_moved(loaded, moved)), flush=True)


def _save(
    result: Result, loaded: LoadedModel, moved: list[Moved] | None, out: Path, arguments: argparse.Namespace
) -> Path:
    """Save a result with its table and figures, and without figures if they cannot be drawn. Returns its folder.

    Raises InvalidOutput if the figures or the result could not be written.
    """
    from ablation import html_report, results, tables

    undrawn = None
    try:
        with output.staging(out) as draft:
            result.write_arrays(draft)
            tables.write_csv(result, draft / "results.csv")
            if html_report.available() and results.LOSS not in result.clean:
                html_report.write_html(result, draft / "report.html", title=loaded.name, decode=loaded.decode)
            if moved is not None:
                from ablation.moved import write_csv

                write_csv(loaded, result, moved, draft / "top_tokens.csv")
            if tables.can_write_parquet():
                tables.write_parquet(result, draft / "results.parquet")
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


def _publish(result: Result, draft: Path, out: Path, overwrite: bool) -> Path:
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


def _draw(result: Result, loaded: LoadedModel, folder: Path) -> None:
    from ablation import figures, figures_of_text, results  # now, since matplotlib takes a while to import

    if results.LOSS in result.clean:
        figures_of_text.draw(result, folder, title=loaded.name)
        return
    (prompt, *others) = result.prompts
    title = loaded.name if others else f"{loaded.name}: {prompt.prompt}"
    figures.draw(result, folder, title=title, decode=loaded.decode)


def _default_folder(source: sources.Source, asked: dict[str, Any]) -> str:
    """Return the name of the folder of a sweep: ablation-MODEL, and for another question its words and a digest."""
    name = f"ablation-{_file_name(source.name.removesuffix('.gguf')) or 'model'}"
    usual = {"imputations": ["zero", "mean"], "dtype": "float32"}
    named = sources.NAMED_MODELS.get(source.full)
    if named is not None and asked == {**dataclasses.asdict(named.question), **usual}:
        return name
    digest = hashlib.sha256(json.dumps([source.full, asked]).encode()).hexdigest()[:8]
    words = "text" if "text_sha256" in asked else _file_name(asked.get("prompt") or f"{asked['prompts']} prompts")
    return "-".join(filter(None, (name, words, digest)))


def _file_name(text: str) -> str:
    """Return the letters and digits of a text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII)[:40].strip("-.").lower()


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
    loaded: LoadedModel, asking: _Asking, imputations: list[str], out: Path, arguments: argparse.Namespace
) -> Result:
    """Sweep with a progress bar if standard error is a terminal. Several prompts are kept as they are finished."""
    from tqdm import tqdm

    from ablation import experiment, texts

    count = len(asking.rows)
    shape: dict[str, Any] = {"total": 100, "bar_format": "sweeping {percentage:3.0f}% |{bar:40}| {remaining} left"}
    if count > 1:
        bar_format = "{n:.1f} of {total} prompts |{bar:40}| {rate_fmt}, {remaining} left"
        shape = {"total": count, "bar_format": bar_format, "unit": "prompt"}
    status_line("")
    with tqdm(**shape, leave=False, disable=None) as bar:  # None: only on a terminal

        def progress(share: float) -> None:
            arguments.interruptions.check()
            if not asking.is_single and (out / output.UNFINISHED).exists():
                arguments.kept = f"what is finished is kept in {out}, and the same command goes on from there"
            bar.update(bar.total * share - bar.n)

        shared: dict[str, Any] = {
            "imputations": imputations,
            "max_rows": arguments.max_rows,
            "progress": progress,
            "checkpoint": None if asking.is_single else out,
            "overwrite": arguments.overwrite,
        }
        if asking.text is not None:
            return texts.sweep_text(loaded, asking.text, arguments.stride, **shared)
        return experiment.sweep_prompts(loaded, [*asking.rows, *asking.bad], skip_bad=arguments.skip_bad, **shared)
