"""The command `ablation curve`: heads are ablated cumulatively. It checks its arguments before torch is imported."""

from __future__ import annotations

import argparse
import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ablation import choices, output, sources, units
from ablation.commands.arguments import Asking, asking
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
    study_options,
)
from ablation.commands.terminal import warnings_as_notes
from ablation.errors import InvalidAblation, InvalidHead, InvalidPrompt, InvalidResult, one_line
from ablation.processes import Processes
from ablation.prompt_files import Row
from ablation.prompts import Question

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.passes import Progress
    from ablation.results import Result
    from ablation.studies.curves import Heads
    from ablation.sweeps import HeadSet

DESCRIPTION = """\
Ablate the first k heads of an order together, for growing k, and as many heads of random orders. The order is that of
the effects in an earlier result of `ablation sweep`, that of a file, or --greedy."""
EPILOG = """\
examples:
  ablation sweep --prompts capitals --out capitals-study
  ablation curve capitals-study --split 0.5
  ablation curve capitals-study --by kl --k 1,2,3,4 --random 100
  ablation curve --greedy --prompts capitals --k 1,2,4,8
  ablation curve order.txt --model smollm2
"""
GREEDY_KS = (1, 2, 4, 8)
"""The sizes by default with --greedy, whose work grows with each head."""


def add_command(commands: Any) -> None:
    """Add the parser of `ablation curve`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "curve",
        help="ablate the strongest heads together, more and more of them, against random heads",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "order",
        nargs="?",
        metavar="RESULT",
        help="the folder of a sweep, whose model, prompts, positions and first imputation are taken unless others are "
        "given; or a text file of heads in their order, such as L9H6 L9H9",
    )
    add("--greedy", action="store_true", help="rank the remaining heads again after each head that is removed")
    add("--by", choices=list(choices.BY), help="what ranks heads, the most harmful first (default: target)")
    add(
        "--k", metavar="LIST", help="sizes of the sets, such as 1,2,3 or 1,2,4,... (default: 1,2,4,... up to all heads)"
    )
    add(
        "--random",
        type=choices.whole_number(0),
        default=20,
        metavar="N",
        help="random orders of each kind: of all heads alike, and with as many heads of each layer (default: 20)",
    )
    add(
        "--split",
        type=_share,
        metavar="SHARE",
        help="rank heads on this share of the prompts, drawn with --seed, and ablate them on the others",
    )
    add_question_options(parser)
    add_imputation_options(parser, ["zero"], "of the random orders, of --split, and of the draws of resample")
    add_output_options(parser)
    parser.set_defaults(
        run=_curve, text=None, stride=None, top=None, model=None, imputation=None, positions=None, dtype=None
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"it is a share between 0 and 1, such as 0.5, not {text!r}")
    return share


class _Order(NamedTuple):
    """Where the order of the heads comes from: a result, a file, or neither if it is greedy. digest: of the result."""

    result: Result | None = None
    heads: units.Units | None = None
    digest: str | None = None


def _curve(arguments: argparse.Namespace) -> int:
    order = _read_order(arguments)
    rows = () if order.result is None else _take_over(arguments, order.result)
    _set_defaults(arguments)
    source = sources.resolve(arguments.model)
    of = asking(arguments, source, rows=rows)
    ranking, of = _split(arguments, of, order.result)
    ranked = () if order.result is None else _ranked(order.result, ranking, arguments)
    study: dict[str, Any] = {
        "kind": "curve",
        **{name: getattr(arguments, name) for name in ("by", "greedy", "k", "random", "split")},
        **({"seed": arguments.seed or 0} if arguments.random or arguments.split else {}),
        "heads": None if order.heads is None else order.heads.text,
        "ranked_by_result": order.digest,
    }
    this = opened(arguments, source, of._replace(asked={**of.asked, "study": study}))
    with warnings_as_notes():
        loaded = load_model(arguments)
        with progress_bar(arguments, this) as progress:
            heads, said, start = _heads(loaded, order, ranked, ranking, this, progress, arguments)
            sets = _sets(loaded, heads, arguments)
            running = study_of(loaded, this.of, arguments, sets)
            result = run_study(running, this, progress, arguments, start)
    if not Processes.current().is_first:
        return 0
    told = {"order": said, "evaluated_on": _evaluated_on(order, ranking, this)}
    result = dataclasses.replace(result, provenance={**result.provenance, "study": told})
    from ablation.reports import of_sets

    title = figure_title(loaded, result)
    return finish(
        result,
        running,
        this,
        arguments,
        found=of_sets.findings_of_curve(result, loaded.decode),
        render=of_sets.render_curve,
        write=lambda folder: _write_table(result, folder),
        draw=lambda folder: _draw(result, folder, title),
    )


def _read_order(arguments: argparse.Namespace) -> _Order:
    """Return where the order comes from. Raises InvalidAblation, InvalidResult and InvalidHead."""
    if arguments.greedy == (arguments.order is not None):
        raise InvalidAblation("pass the folder of a sweep, a file of heads, or --greedy, and only one of them")
    if arguments.k is not None:
        choices.parse_ks(arguments.k, None)  # the model is not known yet
    if arguments.greedy:
        return _Order()
    path = Path(arguments.order).expanduser()
    if not path.exists():
        raise InvalidResult(f"there is no {one_line(arguments.order)}: pass the folder of a sweep, or a file of heads")
    if not path.is_file():
        from ablation.results import ARRAYS, Result

        return _Order(Result.load(path), digest=output.sha256(path / ARRAYS))
    if arguments.by is not None or arguments.split is not None:
        raise InvalidAblation(
            f"{'--by' if arguments.by else '--split'} is for a ranking: {path.name} has an order already"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidHead(f"cannot read heads from {one_line(path)}: {reason}") from None
    try:
        heads = units.parse_set(re.sub("#.*", "", text))
    except InvalidHead as error:
        raise InvalidHead(f"{one_line(path.name)}: {error}") from None
    if any(unit.kind == "MLP" for unit in heads.units):
        raise InvalidHead(f"{one_line(path.name)}: an order names heads, and no MLPs")
    return _Order(heads=heads)


def _take_over(arguments: argparse.Namespace, result: Result) -> Sequence[Row]:
    """Take the model, and how z is replaced, from a result where the arguments do not name them. Returns its prompts.

    Raises InvalidResult if the result does not know them.
    """
    made = result.provenance
    if arguments.model is None:
        arguments.model = made.get("source")
        arguments.dtype = arguments.dtype or made.get("dtype")
    if arguments.model is None:
        raise InvalidResult(f"the result in {one_line(arguments.order)} does not name its model: pass --model")
    places = {key.positions for key in result.ablations}
    if arguments.positions is None and len(places) == 1:
        (arguments.positions,) = places
    if arguments.imputation is None:
        name = result.imputations[0]
        if choices.meaning(name) is None or name.startswith(f"{choices.VALUES}:"):
            raise InvalidResult(f"the result is of the imputation {name!r}: name one with --imputation")
        arguments.imputation = [name]
    if arguments.prompts is not None or arguments.prompt is not None:
        return ()
    own = {name: getattr(arguments, name) for name in ("target", "control", "chat")}
    if given := [name for name, value in own.items() if value not in (None, False)]:
        raise InvalidPrompt(f"--{given[0]} is not for the prompts of RESULT: leave it out, or name others")
    if any(prompt.prompt is None for prompt in result.prompts):
        raise InvalidResult(f"the result in {one_line(arguments.order)} has no texts of its prompts: pass --prompts")
    chats = made.get("chat", False)
    chat = chats if isinstance(chats, list) else [chats] * len(result.prompts)
    return [
        Row(
            f"prompt {number} of RESULT",
            Question(str(of.prompt), of.target_text, of.control_text, bool(is_chat), of.group),
        )
        for number, (of, is_chat) in enumerate(zip(result.prompts, chat, strict=True), start=1)
    ]


def _set_defaults(arguments: argparse.Namespace) -> None:
    """Set what neither the arguments nor a result have named."""
    arguments.model = arguments.model or "capitals"
    arguments.positions = arguments.positions or "all"
    arguments.imputation = arguments.imputation or ["zero"]
    arguments.dtype = arguments.dtype or "float32"
    arguments.by = arguments.by or "target"


class _Parts(NamedTuple):
    """The prompts that heads are ranked on. ranked: their indices, or None for all. rows: the prompts."""

    ranked: list[int] | None
    rows: Sequence[Row]


def _split(arguments: argparse.Namespace, of: Asking, result: Result | None) -> tuple[_Parts, Asking]:
    """Return the prompts of the ranking, and what is asked with those of the evaluation.

    result: ranks the heads. Raises InvalidAblation, and InvalidPrompt if its prompts are not those that are asked.
    """
    if arguments.split is None:
        return _Parts(None, of.rows), of
    asked = [row.question.prompt for row in of.rows]
    if result is not None and [prompt.prompt for prompt in result.prompts] != asked:
        raise InvalidPrompt("--split divides the prompts of RESULT, and --prompts or --prompt name others")
    from ablation.studies import curves

    ranked, evaluated = curves.split(len(of.rows), arguments.split, arguments.seed or 0)
    return _Parts(ranked, [of.rows[index] for index in ranked]), of._replace(
        rows=[of.rows[index] for index in evaluated]
    )


def _ranked(result: Result, parts: _Parts, arguments: argparse.Namespace) -> Heads:
    """Return the heads of a result in their order. Raises InvalidResult, and InvalidAblation for too large sets."""
    from ablation.studies import curves

    heads = curves.rank_heads(result, arguments.by, _ranking_imputation(result, arguments), parts.ranked)
    if arguments.k is not None:
        choices.parse_ks(arguments.k, len(heads))
    return heads


def _ranking_imputation(result: Result, arguments: argparse.Namespace) -> str:
    """Return the imputation whose effects rank the heads: the first one of the curve, if the result has it."""
    (first, *_), names = arguments.imputation, result.imputations
    return first if first in names else next(iter(names), "")


def _heads(
    loaded: LoadedModel,
    order: _Order,
    ranked: Heads,
    parts: _Parts,
    this: Opened,
    progress: Progress,
    arguments: argparse.Namespace,
) -> tuple[Heads, str, float]:
    """Return the order of heads, where it is from in words, and the share of the work that it took.

    ranked: the heads of a result in their order.
    """
    from ablation import provenance
    from ablation.heads import find_heads
    from ablation.studies.sets import greedy_order
    from ablation.studies.study import subrange

    heads, by = find_heads(loaded.model), choices.BY[arguments.by][2]
    if order.heads is not None:
        found = dict.fromkeys(pair for unit in order.heads.units for pair in unit.pairs(heads))
        return tuple(found), f"{len(found)} head{'' if len(found) == 1 else 's'} of {Path(arguments.order).name}", 0.0
    if order.result is not None:
        imputation = _ranking_imputation(order.result, arguments)
        if provenance.weights_digest(loaded.model)["weights_sha256"] != order.result.provenance.get("weights_sha256"):
            warnings.warn(f"the heads are ranked by a result of other weights than {loaded.name}", stacklevel=2)
        on = _prompts(len(order.result.prompts if parts.ranked is None else parts.ranked))
        return ranked, f"{by} by {imputation} imputation in {one_line(arguments.order)}, on {on}", 0.0
    start = 0.8  # of the work: one sweep for each head of the order
    how = study_options(this.of, arguments)
    count = max(_sizes(len(list(heads)), arguments) or ())
    found_order = greedy_order(
        loaded,
        [*parts.rows],
        count,
        arguments.imputation[0],
        arguments.by,
        max_rows=arguments.max_rows,
        progress=subrange(progress, 0.0, start),
        **how,
    )
    return (
        found_order,
        f"{by} by {arguments.imputation[0]} imputation, ranked again at each head, on {_prompts(len(parts.rows))}",
        start,
    )


def _prompts(count: int, which: str = "") -> str:
    return f"{count} {which}prompt{'' if count == 1 else 's'}"


def _sizes(heads: int, arguments: argparse.Namespace) -> list[int] | None:
    """Return the sizes of the sets; None for those of `curve_sets`."""
    if arguments.k is not None:
        return choices.parse_ks(arguments.k, heads)
    return [k for k in GREEDY_KS if k <= heads] if arguments.greedy else None


def _sets(loaded: LoadedModel, heads: Heads, arguments: argparse.Namespace) -> list[HeadSet]:
    from ablation.heads import find_heads
    from ablation.studies.sets import curve_sets

    ks = _sizes(len(heads), arguments)
    return curve_sets(find_heads(loaded.model), heads, ks, arguments.random, arguments.seed or 0)


def _evaluated_on(order: _Order, parts: _Parts, this: Opened) -> str | None:
    """Return in words whether heads are ranked and ablated on the same prompts; None if they are not ranked here."""
    if order.heads is not None:
        return None
    rows = this.of.rows
    other = f"ablated on {_prompts(len(rows), 'other ')}"
    if parts.ranked is not None:
        return other
    if order.result is not None:
        ranked = {of.prompt for of in order.result.prompts}
        if None in ranked:
            return f"ablated on {_prompts(len(rows))}; the result has no texts that tell whether they are others"
        shared = sum(row.question.prompt in ranked for row in rows)
        if not shared:
            return other
        if shared < len(rows):
            return f"ablated on {len(rows)} prompts, of which {shared} {'is' if shared == 1 else 'are'} the same"
    of = "the same prompt" if len(rows) == 1 else f"the same {len(rows)} prompts"
    remedy = "pass others with --prompts" if len(rows) == 1 else "--split ranks and ablates on different prompts"
    return f"ablated on {of}, which flatters the order: {remedy}"


def _write_table(result: Result, folder: Path) -> None:
    from ablation import tables
    from ablation.studies import curves

    tables.write_rows(curves.curve_rows(curves.Curve.of(result)), folder / "curve.csv")


def _draw(result: Result, folder: Path, title: str) -> None:
    from ablation.figures import of_curves

    of_curves.draw_curve(result, folder, title)
