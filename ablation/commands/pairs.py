"""The command `ablation pairs`: all sets of two heads. It checks its arguments before torch is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation import choices, sources, units
from ablation.commands.arguments import asking
from ablation.commands.study import (
    Opened,
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
from ablation.errors import InvalidPrompt
from ablation.processes import Processes

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.passes import Progress
    from ablation.results import Result
    from ablation.sweeps import HeadSet

DESCRIPTION = """\
Ablate every head alone and every set of two heads, and show what two heads do together beyond their single effects:
interaction = effect of both - effect of one - effect of the other."""
EPILOG = """\
examples:
  ablation pairs
  ablation pairs --prompts capitals --top 20
  ablation pairs --model smollm2 --pairs-of L23H4
"""


def add_command(commands: Any) -> None:
    """Add the parser of `ablation pairs`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "pairs",
        help="ablate all sets of two heads, and show which heads stand in for each other",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pairs-of", metavar="SET", help="only pairs with one of these heads, such as L9H6, 'L9H6 L9H9' or L9")
    add(
        "--top",
        dest="strongest",
        type=choices.whole_number(1),
        metavar="N",
        help="only pairs of the N heads with the largest effect on their own, of either sign (and those of --pairs-of)",
    )
    add(
        "--by",
        choices=list(choices.BY),
        default="target",
        help="the effect that ranks the heads of --top (default: target)",
    )
    add_question_options(parser)
    add_imputation_options(parser, ["zero"])
    add_output_options(parser)
    parser.set_defaults(run=_pairs, text=None, stride=None, top=None)


def _pairs(arguments: argparse.Namespace) -> int:
    needed = None if arguments.pairs_of is None else units.parse_set(arguments.pairs_of)
    if arguments.by != "target" and arguments.strongest is None:
        raise InvalidPrompt("--by ranks the heads of --top: pass --top N")
    source = sources.resolve(arguments.model)
    of = asking(arguments, source)
    study = {"kind": "pairs", "of": None if needed is None else needed.text, "top": arguments.strongest}
    study |= {} if arguments.strongest is None else {"by": arguments.by}
    this = opened(arguments, source, of._replace(asked={**of.asked, "study": study}))
    with warnings_as_notes():
        loaded = load_model(arguments)
        with progress_bar(arguments, this) as progress:
            sets, start = _sets(loaded, this, needed, progress, arguments)
            running = study_of(loaded, this.of, arguments, sets)
            result = run_study(running, this, progress, arguments, start)
    if not Processes.current().is_first:
        return 0
    from ablation.reports import of_sets

    title = figure_title(loaded, result)
    return finish(
        result,
        running,
        this,
        arguments,
        found=of_sets.findings_of_pairs(result, loaded.decode),
        render=of_sets.render_pairs,
        write=lambda folder: _write_table(result, folder),
        draw=lambda folder: _draw(result, folder, title, loaded.decode),
    )


def _sets(
    loaded: LoadedModel,
    this: Opened,
    needed: units.Units | None,
    progress: Progress,
    arguments: argparse.Namespace,
) -> tuple[list[HeadSet], float]:
    """Return the sets that are ablated, and the share of the work that their choice took: of --top, a sweep."""
    from ablation.heads import find_heads
    from ablation.studies.pairs import strongest_heads
    from ablation.studies.sets import pair_sets
    from ablation.studies.study import subrange

    heads = find_heads(loaded.model)
    with_heads = None if needed is None else needed.heads(heads)
    if arguments.strongest is None:
        return pair_sets(heads, None, with_heads), 0.0
    count = min(arguments.strongest, len(list(heads)))
    start = len(list(heads)) / (len(list(heads)) + count * (count + 1) / 2)
    alone = study_of(loaded, this.of, arguments).run(
        max_rows=arguments.max_rows, progress=subrange(progress, 0.0, start)
    )
    return pair_sets(heads, strongest_heads(alone, count, arguments.by), with_heads), start


def _write_table(result: Result, folder: Path) -> None:
    from ablation import tables
    from ablation.studies.pairs import pair_rows

    tables.write_rows(pair_rows(result), folder / "pairs.csv")


def _draw(result: Result, folder: Path, title: str, decode: Any) -> None:
    from ablation.figures import of_pairs

    of_pairs.draw_pairs(result, folder, title, decode)
