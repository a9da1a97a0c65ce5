"""The command `ablation sweep`. It checks its arguments before torch is imported, so errors are reported fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation import sources
from ablation.commands.arguments import DEFAULT_IMPUTATIONS, asking
from ablation.commands.study import (
    add_imputation_options,
    add_output_options,
    add_question_options,
    figure_title,
    finish,
    load_model,
    opened,
    progress_bar,
    run_study,
    study_of,
)
from ablation.commands.terminal import warnings_as_notes
from ablation.processes import Processes

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.results import Result
    from ablation.studies.experiment import Study
    from ablation.studies.moved import Moved
    from ablation.studies.texts import TextStudy

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


def add_command(commands: Any) -> None:
    """Add the parser of `ablation sweep`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "sweep",
        help="ablate every head in turn, and show what each does to one prediction",
        description="Ablate every attention head in turn and show what each does to the model's next token.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_question_options(parser)
    add = parser.add_argument
    add("--text", metavar="FILE", help="measure the mean next-token loss on a text file instead of an answer")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens of FILE that each window scores, after a context of up to N (default: 128, or half of "
        "the model's longest input)",
    )
    add_imputation_options(parser, DEFAULT_IMPUTATIONS)
    add(
        "--top",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="show the five tokens that rise and the five that fall most in probability, for the N ablations of each "
        "prompt with the largest effect (default: 5), and write them to top_tokens.csv",
    )
    add_output_options(parser)
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    source = sources.resolve(arguments.model)
    this = opened(arguments, source, asking(arguments, source))
    with warnings_as_notes():
        loaded = load_model(arguments)
        with progress_bar(arguments, this) as progress:
            study = study_of(loaded, this.of, arguments)
            result = run_study(study, this, progress, arguments)
    if not Processes.current().is_first:
        return 0
    moved = None if arguments.top is None else _moved(study, result, arguments)
    found, render = _findings(result, loaded, moved if this.of.is_single else None)
    return finish(
        result,
        study,
        this,
        arguments,
        found=found,
        render=render,
        write=lambda folder: _write_tables(result, loaded, moved, folder),
        draw=lambda folder: _draw(result, loaded, folder),
    )


def _moved(study: Study | TextStudy, result: Result, arguments: argparse.Namespace) -> list[Moved]:
    from ablation.studies import moved
    from ablation.studies.experiment import Study

    assert isinstance(study, Study)  # --top is refused with a text
    return moved.of_strongest(
        study.loaded, result, arguments.top, ablations=study.ablations, max_rows=arguments.max_rows
    )


def _findings(
    result: Result, loaded: LoadedModel, moved: list[Moved] | None
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """Return the findings, and what makes a text of them. moved: tokens that are listed in the text."""
    from ablation import results
    from ablation.reports import report, summary
    from ablation.studies.moved import render as render_moved

    if results.LOSS in result.clean:
        return summary.findings_of_text(result), summary.render_text
    if len(result.prompts) > 1:
        return summary.findings(result), summary.render
    tokens = [] if moved is None else ["", *render_moved(loaded, moved)]
    return report.findings(result, loaded.decode), lambda found: "\n".join([report.render(found), *tokens])


def _write_tables(result: Result, loaded: LoadedModel, moved: list[Moved] | None, folder: Path) -> None:
    from ablation import results, tables
    from ablation.reports import html_report

    tables.write_csv(result, folder / "results.csv")
    if html_report.available() and results.LOSS not in result.clean:
        html_report.write_html(result, folder / "report.html", title=loaded.name, decode=loaded.decode)
    if moved is not None:
        from ablation.studies.moved import write_csv

        write_csv(loaded, result, moved, folder / "top_tokens.csv")
    if tables.can_write_parquet():
        tables.write_parquet(result, folder / "results.parquet")


def _draw(result: Result, loaded: LoadedModel, folder: Path) -> None:
    from ablation import results  # now, since matplotlib takes a while to import
    from ablation.figures import of_sweeps, of_texts

    if results.LOSS in result.clean:
        of_texts.draw(result, folder, title=loaded.name)
        return
    of_sweeps.draw(result, folder, title=figure_title(loaded, result), decode=loaded.decode)
