"""What the commands of studies share: options, the model, progress, and the folder of the result."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ablation import choices, output, sources
from ablation.commands.arguments import LONGEST_PROMPT, Asking, default_folder
from ablation.commands.terminal import print_json, say, silence_transformers, status_line
from ablation.errors import InvalidAblation, InvalidOutput, one_line, shortened

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.passes import Progress
    from ablation.results import Result
    from ablation.studies.experiment import Study
    from ablation.studies.texts import TextStudy
    from ablation.sweeps import HeadSet

NEGATIVE = re.compile(r"-\d[\d,-]*")
"""An argument that is a list of positions, not an option."""


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model answers which questions."""
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
        "group, and others that --positions and resample name; or capitals or smollm2, files that are part of the "
        "package",
    )
    add("--skip-bad", action="store_true", help="leave out the prompts of FILE that cannot be used")
    add("--chat", action="store_true", help="a prompt is a user's message, rendered by the model's chat template")


def add_imputation_options(
    parser: argparse.ArgumentParser, default: Sequence[str], seed_of: str = "of the draws of resample"
) -> None:
    """Add the options that say what replaces z, and where. default: the imputations without --imputation."""
    add = parser.add_argument
    add(
        "--imputation",
        nargs="+",
        type=choices.imputation,
        default=list(default),
        metavar="NAME",
        help="what replaces the output of a head (z), one or several "
        f"(default: {' '.join(default)}): "
        + "; ".join(f"{name}: {meaning}" for name, meaning in choices.IMPUTATIONS.items()),
    )
    add(
        "--reference",
        metavar="FILE",
        help="the prompts of the reference means, and those from which resample draws: a .jsonl or .csv file with the "
        "column prompt, capitals or smollm2; or reference.npz of an earlier sweep, for the means (default: the prompts "
        "of --prompts, or the windows of --text)",
    )
    add(
        "--positions",
        default="all",
        metavar="WHERE",
        help="the tokens at which z is replaced: all, last, integers such as 0,3,-1, or a column of --prompts with "
        "spans [start, end] of characters, or with a text that occurs once in the prompt (default: all)",
    )
    add(
        "--draws",
        type=choices.whole_number(1),
        metavar="N",
        help="prompts that resample draws for each prompt; metrics are averaged over them (default: 1)",
    )
    add("--seed", type=choices.whole_number(0), metavar="N", help=f"{seed_of} (default: 0)")
    parser._negative_number_matcher = NEGATIVE  # otherwise, argparse takes -2,-1 for an option


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to run, and where the result goes."""
    add = parser.add_argument
    add(
        "--out",
        metavar="FOLDER",
        help="the folder for arrays, table and figures (default: ./ablation-MODEL, with the words of --prompt). The "
        "finished prompts of an interrupted run are kept there, and the same command goes on with the others",
    )
    add("--overwrite", action="store_true", help="replace the result of other prompts or another model in FOLDER")
    add("--max-rows", type=int, metavar="N", help="rows of a forward pass (default: as many as fit in memory)")
    add("--device", help="cpu, cuda, cuda:1, mps, ..., or auto: all devices (default: a GPU if there is one)")
    add("--dtype", choices=sources.MODEL_DTYPES, default="float32", help="(default: float32)")
    add("--json", action="store_true", help="print the findings as JSON")


class Opened(NamedTuple):
    """What a command is about, and the folder for its result."""

    source: sources.Source
    of: Asking
    out: Path


def opened(arguments: argparse.Namespace, source: sources.Source, of: Asking) -> Opened:
    """Return the folder for a result, which can be written. Raises InvalidAblation and InvalidOutput."""
    if arguments.max_rows is not None and arguments.max_rows < 2:
        raise InvalidAblation(
            f"--max-rows is {arguments.max_rows}: a pass needs 2 rows, a clean one and an ablated one"
        )
    folder = default_folder(source, of.asked) if arguments.out is None else arguments.out
    out = output.check_output(folder, of.asked, source.full, overwrite=arguments.overwrite)
    if of.is_single and not arguments.overwrite and (out / output.UNFINISHED).exists():
        raise InvalidOutput(f"{out} holds an unfinished study of several prompts: choose another folder")
    return Opened(source, of, out)


def load_model(arguments: argparse.Namespace) -> LoadedModel:
    """Load the model of a command."""
    status_line(f"loading {arguments.model} ...")
    import torch

    from ablation import models

    silence_transformers()
    return models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))


def reference_of(of: Asking) -> Any:
    """Return the reference of the arguments: prompts, a `Reference` that is read from its file, or None."""
    from ablation.reference import Reference

    if of.reference_file is not None:
        return Reference.load(of.reference_file)
    return None if of.reference is None else [*of.reference, *of.bad_reference]


def study_options(of: Asking, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a study that say what replaces z, and where."""
    return {
        "reference": reference_of(of),
        "positions": of.positions,
        "seed": arguments.seed or 0,
        "draws": arguments.draws or 1,
        "skip_bad": arguments.skip_bad,
    }


def study_of(
    loaded: LoadedModel, of: Asking, arguments: argparse.Namespace, sets: Sequence[HeadSet] | None = None
) -> Study | TextStudy:
    """Return the study of the arguments. sets: see `Study`."""
    from ablation.errors import InvalidPrompt
    from ablation.studies.experiment import Study
    from ablation.studies.texts import TextStudy

    shared = study_options(of, arguments)
    if of.text is None:
        return Study(loaded, [*of.rows, *of.bad], of.asked["imputations"], sets=sets, **shared)
    try:
        return TextStudy(loaded, of.text, arguments.stride, of.asked["imputations"], **shared)
    except InvalidPrompt as error:
        raise InvalidPrompt(f"--text {one_line(arguments.text)}: {error}") from None


@contextmanager
def progress_bar(arguments: argparse.Namespace, opened: Opened) -> Iterator[Progress]:
    """A progress bar if standard error is a terminal. Several prompts are kept as they are finished."""
    from tqdm import tqdm

    count = len(opened.of.rows)
    shape: dict[str, Any] = {"total": 100, "bar_format": "running {percentage:3.0f}% |{bar:40}| {remaining} left"}
    if count > 1:
        bar_format = "{n:.1f} of {total} prompts |{bar:40}| {rate_fmt}, {remaining} left"
        shape = {"total": count, "bar_format": bar_format, "unit": "prompt"}
    status_line("")
    with tqdm(**shape, leave=False, disable=None) as bar:  # None: only on a terminal

        def progress(share: float) -> None:
            arguments.interruptions.check()
            if not opened.of.is_single and (opened.out / output.UNFINISHED).exists():
                arguments.kept = f"what is finished is kept in {opened.out}, and the same command goes on from there"
            bar.update(bar.total * share - bar.n)

        yield progress


def run_study(
    study: Study | TextStudy, opened: Opened, progress: Progress, arguments: argparse.Namespace, start: float = 0.0
) -> Result:
    """Run a study, with a checkpoint in the folder of the result if there are several prompts.

    start: the share of the work that is done already.
    """
    from ablation.studies.study import subrange

    return study.run(
        max_rows=arguments.max_rows,
        progress=subrange(progress, start, 1.0),
        checkpoint=None if opened.of.is_single else opened.out,
        overwrite=arguments.overwrite,
    )


def _question_line(of: Asking, result: Result) -> str:
    """Return what was asked as text for a line: a text, a prompt or a number of prompts."""
    if of.text is not None:
        return "a text"
    if len(result.prompts) > 1:
        return f"{len(result.prompts)} prompts"
    return repr(shortened(result.prompts[0].prompt or "", LONGEST_PROMPT))


def figure_title(loaded: LoadedModel, result: Result) -> str:
    """Return the title of figures: the model, and the prompt if there is one."""
    (prompt, *others) = result.prompts
    return loaded.name if others else f"{loaded.name}: {prompt.prompt}"


def finish(
    result: Result,
    study: Study | TextStudy,
    opened: Opened,
    arguments: argparse.Namespace,
    *,
    found: dict[str, Any],
    render: Callable[[dict[str, Any]], str],
    write: Callable[[Path], None],
    draw: Callable[[Path], None],
) -> int:
    """Print the findings of a result, save it, and say where it is. Returns the exit status.

    found, render: the findings, and what makes a text of them. They are printed as text, below the model and the
    question, or as JSON, with the provenance; if the output is closed, as by `| head`, the result is saved even so.
    write, draw: write tables, and draw figures, into a folder. Raises InvalidOutput if something could not be printed,
    written or drawn.
    """
    result = dataclasses.replace(result, provenance={**result.provenance, "asked": opened.of.asked})
    unprinted = None
    try:
        if arguments.json:
            print_json(found | {"provenance": result.provenance})
        else:
            print(f"{study.loaded.name}: {_question_line(opened.of, result)}\n\n{render(found)}", flush=True)
    except OSError as error:
        unprinted = error
    out = _save(result, study, opened.out, arguments, write, draw)
    if isinstance(unprinted, BrokenPipeError):
        raise unprinted
    if unprinted is not None:
        raise InvalidOutput(f"the result is in {out}, but it could not be printed: {unprinted}") from unprinted
    if not arguments.json:
        print(f"\nArrays, table, provenance and figures are in {out}")
    return 0


def _save(
    result: Result,
    study: Study | TextStudy,
    out: Path,
    arguments: argparse.Namespace,
    write: Callable[[Path], None],
    draw: Callable[[Path], None],
) -> Path:
    """Save a result with its tables and figures, and without figures if they cannot be drawn. Returns its folder.

    A reference that was computed for the result is saved, too.
    """
    undrawn = None
    try:
        with output.staging(out) as draft:
            result.write_arrays(draft)
            if study.plan.computed is not None:
                study.plan.computed.save(draft / output.REFERENCE)
            write(draft)
            status_line("drawing ...")
            try:
                draw(draft)
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
