"""The command `ablation set`: named sets of heads, each ablated as a whole. It checks its arguments before torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation import sources, units
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
from ablation.errors import InvalidHead
from ablation.processes import Processes

if TYPE_CHECKING:
    from ablation.heads import HeadMap
    from ablation.results import Result
    from ablation.sweeps import HeadSet

EPILOG = """\
a set is a text of heads, layers, key/value heads and MLPs:
  L9H6            layer 9, head 6
  L9, L9H*        all heads of layer 9;  L*: all heads;  L*H0: head 0 of every layer
  KV9.2           the query heads that share key/value head 2 of layer 9
  MLP9            the output of the MLP of layer 9

examples:
  ablation set L0H8 "L0H8 L0H9" L0
  ablation set --each "L*" --each "MLP*"
  ablation set --heads-file circuits.txt --prompts capitals
"""


def add_command(commands: Any) -> None:
    """Add the parser of `ablation set`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "set",
        help="ablate named sets of heads, layers or MLPs, and show what each set does",
        description="Ablate named sets of attention heads, each as a whole, and show what each does to the next token.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sets", nargs="*", metavar="SET", help="the heads of one set, such as L9 or 'L9H6 L9H9 L10H0'")
    add("--heads-file", metavar="FILE", help="a text file with a set on each line: NAME: L9H6 L9H9, or L9H6 L9H9")
    add(
        "--each",
        action="append",
        default=[],
        metavar="PATTERN",
        help="one set for each unit that a pattern stands for: 'L*' the layers, 'L*H*' the heads, 'KV*.*', 'MLP*'",
    )
    add_question_options(parser)
    add_imputation_options(parser, DEFAULT_IMPUTATIONS)
    add_output_options(parser)
    parser.set_defaults(run=_set, text=None, stride=None, top=None)


def _set(arguments: argparse.Namespace) -> int:
    named = [(_name(of), of) for of in map(units.parse_set, arguments.sets)]
    if arguments.heads_file is not None:
        named += [(_name(of) if name == of.text else name, of) for name, of in units.read_sets(arguments.heads_file)]
    patterns = list(map(units.parse_set, arguments.each))
    if not named and not patterns:
        raise InvalidHead("name at least one set of heads: ablation set L9, ablation set 'L9H6 L9H9', --each 'L*'")
    source = sources.resolve(arguments.model)
    of = asking(arguments, source)
    study = {"kind": "set", "sets": [[name, units.text] for name, units in named], "each": [of.text for of in patterns]}
    this = opened(arguments, source, of._replace(asked={**of.asked, "study": study}))
    with warnings_as_notes():
        loaded = load_model(arguments)
        from ablation.heads import find_heads

        with progress_bar(arguments, this) as progress:
            sets = _head_sets(named, patterns, find_heads(loaded.model))
            running = study_of(loaded, this.of, arguments, sets)
            result = run_study(running, this, progress, arguments)
    if not Processes.current().is_first:
        return 0
    from ablation.reports import of_sets

    title = figure_title(loaded, result)
    return finish(
        result,
        running,
        this,
        arguments,
        found=of_sets.findings_of_sets(result, loaded.decode),
        render=of_sets.render_sets,
        write=lambda folder: _write_tables(result, folder),
        draw=lambda folder: _draw(result, folder, title, loaded.decode),
    )


def _name(of: units.Units) -> str:
    """Return the name of a set in a result: none if it is a list of heads, whose names say as much."""
    return "" if all(unit.kind == "LH" and None not in unit for unit in of.units) else of.text


def _head_sets(named: list[tuple[str, units.Units]], patterns: list[units.Units], heads: HeadMap) -> list[HeadSet]:
    from ablation.sweeps import HeadSet

    split = [(_name(of), of) for pattern in patterns for of in units.each(pattern.text, heads)]
    return list(dict.fromkeys(HeadSet(name, of.heads(heads)) for name, of in [*named, *split]))


def _write_tables(result: Result, folder: Path) -> None:
    from ablation import tables

    tables.write_csv(result, folder / "results.csv")
    if tables.can_write_parquet():
        tables.write_parquet(result, folder / "results.parquet")


def _draw(result: Result, folder: Path, title: str, decode: Any) -> None:
    from ablation.figures import of_sets

    of_sets.draw_sets(result, folder, title, decode)
