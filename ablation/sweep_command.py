"""The command `ablation sweep`. It checks its arguments before torch is imported, so errors are reported fast."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation import choices, output, sources
from ablation.errors import InvalidAblation, InvalidOutput, InvalidPrompt, one_line, shortened
from ablation.processes import Processes
from ablation.sweep_arguments import DEFAULT_IMPUTATIONS, LONGEST_PROMPT, Asking, asking, default_folder
from ablation.terminal import print_json, say, silence_transformers, status_line, warnings_as_notes

if TYPE_CHECKING:
    from ablation.experiment import Study
    from ablation.models import LoadedModel
    from ablation.moved import Moved
    from ablation.results import Result
    from ablation.texts import TextStudy

EPILOG = """\
examples:
  ablation sweep
  ablation sweep --model smollm2 --out smollm2-berlin
  ablation sweep --model gpt2 --prompt "Paris is the capital of" --target " France" --control " Germany"
  ablation sweep --model path/to/a/folder --prompt "Two and two are" --imputation zero --json
  ablation sweep --prompts capitals
  ablation sweep --model smollm2 --prompts my-prompts.jsonl --out my-study
  ablation sweep --imputation reference-mean resample --reference capitals --positions last
"""
NEGATIVE = re.compile(r"-\d[\d,-]*")
"""An argument that is a list of positions, not an option."""


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
        "group, and others that --positions and resample name; or capitals or smollm2, files that are part of the "
        "package",
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
        type=choices.imputation,
        default=DEFAULT_IMPUTATIONS,
        metavar="NAME",
        help="what replaces the output of a head (z), one or several (default: zero mean): "
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
    add("--seed", type=choices.whole_number(0), metavar="N", help="of the draws of resample (default: 0)")
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
    parser._negative_number_matcher = NEGATIVE  # otherwise, argparse takes -2,-1 for an option


def _sweep(arguments: argparse.Namespace) -> int:
    source = sources.resolve(arguments.model)
    of = asking(arguments, source)
    if arguments.max_rows is not None and arguments.max_rows < 2:
        raise InvalidAblation(
            f"--max-rows is {arguments.max_rows}: a pass needs 2 rows, a clean one and an ablated one"
        )
    folder = default_folder(source, of.asked) if arguments.out is None else arguments.out
    out = output.check_output(folder, of.asked, source.full, overwrite=arguments.overwrite)
    if of.is_single and not arguments.overwrite and (out / output.UNFINISHED).exists():
        raise InvalidOutput(f"{out} holds an unfinished study of several prompts: choose another folder")
    status_line(f"loading {arguments.model} ...")
    import torch

    from ablation import models

    silence_transformers()
    with warnings_as_notes():
        loaded = models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        study, result = _sweep_with_progress(loaded, of, out, arguments)
    if not Processes.current().is_first:
        return 0
    moved = None if arguments.top is None else _moved(study, result, arguments)
    result = dataclasses.replace(result, provenance={**result.provenance, "asked": of.asked})
    unprinted = None
    try:
        _print_report(result, loaded, of, moved, arguments)
    except OSError as error:  # the output is closed, as by `| head`: the result is saved all the same
        unprinted = error
    out = _save(result, study, moved, out, arguments)
    if isinstance(unprinted, BrokenPipeError):
        raise unprinted
    if unprinted is not None:
        raise InvalidOutput(f"the result is in {out}, but it could not be printed: {unprinted}") from unprinted
    if not arguments.json:
        print(f"\nArrays, table, provenance and figures are in {out}")
    return 0


def _moved(study: Study | TextStudy, result: Result, arguments: argparse.Namespace) -> list[Moved]:
    from ablation import moved
    from ablation.experiment import Study

    assert isinstance(study, Study)  # --top is refused with a text
    return moved.of_strongest(
        study.loaded, result, arguments.top, ablations=study.ablations, max_rows=arguments.max_rows
    )


def _print_report(
    result: Result,
    loaded: LoadedModel,
    of: Asking,
    moved: list[Moved] | None,
    arguments: argparse.Namespace,
) -> None:
    """Print the findings. Raises OSError."""
    from ablation import report, summary

    if of.text is not None:
        heading, found, render = "a text", summary.findings_of_text(result), summary.render_text
    elif len(result.prompts) == 1:
        heading = repr(shortened(of.rows[0].question.prompt, LONGEST_PROMPT))
        found, render = report.findings(result, loaded.decode), report.render
    else:
        heading, found, render = f"{len(result.prompts)} prompts", summary.findings(result), summary.render
    if arguments.json:
        print_json(found | {"provenance": result.provenance})
    else:
        print(f"{loaded.name}: {heading}\n\n{render(found)}", flush=True)
        if moved is not None and of.is_single:
            from ablation.moved import render as render_moved

            print("\n" + "\n".join(render_moved(loaded, moved)), flush=True)


def _save(
    result: Result, study: Study | TextStudy, moved: list[Moved] | None, out: Path, arguments: argparse.Namespace
) -> Path:
    """Save a result with its table and figures, and without figures if they cannot be drawn. Returns its folder.

    A reference that was computed for it is saved, too.

    Raises InvalidOutput if the figures or the result could not be written.
    """
    from ablation import html_report, results, tables

    undrawn, loaded = None, study.loaded
    try:
        with output.staging(out) as draft:
            result.write_arrays(draft)
            if study.plan.computed is not None:
                study.plan.computed.save(draft / output.REFERENCE)
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


def _sweep_with_progress(
    loaded: LoadedModel, of: Asking, out: Path, arguments: argparse.Namespace
) -> tuple[Study | TextStudy, Result]:
    """Sweep with a progress bar if standard error is a terminal. Several prompts are kept as they are finished."""
    from tqdm import tqdm

    count = len(of.rows)
    shape: dict[str, Any] = {"total": 100, "bar_format": "sweeping {percentage:3.0f}% |{bar:40}| {remaining} left"}
    if count > 1:
        bar_format = "{n:.1f} of {total} prompts |{bar:40}| {rate_fmt}, {remaining} left"
        shape = {"total": count, "bar_format": bar_format, "unit": "prompt"}
    status_line("")
    with tqdm(**shape, leave=False, disable=None) as bar:  # None: only on a terminal

        def progress(share: float) -> None:
            arguments.interruptions.check()
            if not of.is_single and (out / output.UNFINISHED).exists():
                arguments.kept = f"what is finished is kept in {out}, and the same command goes on from there"
            bar.update(bar.total * share - bar.n)

        study = _study(loaded, of, arguments)
        checkpoint = None if of.is_single else out
        return study, study.run(
            max_rows=arguments.max_rows, progress=progress, checkpoint=checkpoint, overwrite=arguments.overwrite
        )


def _study(loaded: LoadedModel, of: Asking, arguments: argparse.Namespace) -> Study | TextStudy:
    """Return the study of the arguments."""
    from ablation.experiment import Study
    from ablation.reference import Reference
    from ablation.texts import TextStudy

    reference: Any = None if of.reference is None else [*of.reference, *of.bad_reference]
    if of.reference_file is not None:
        reference = Reference.load(of.reference_file)
    shared: dict[str, Any] = {
        "reference": reference,
        "positions": of.positions,
        "seed": arguments.seed or 0,
        "draws": arguments.draws or 1,
        "skip_bad": arguments.skip_bad,
    }
    if of.text is None:
        return Study(loaded, [*of.rows, *of.bad], of.asked["imputations"], **shared)
    try:
        return TextStudy(loaded, of.text, arguments.stride, of.asked["imputations"], **shared)
    except InvalidPrompt as error:
        raise InvalidPrompt(f"--text {one_line(arguments.text)}: {error}") from None
