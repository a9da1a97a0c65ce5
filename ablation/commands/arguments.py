"""What the arguments of `ablation sweep` ask, found before torch is imported, so that errors are reported fast."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ablation import choices, output, sources
from ablation.errors import InvalidPrompt, one_line, shortened
from ablation.prompt_files import OF_QUESTIONS, PROMPTS_ONLY, Columns, Row, read_rows, valid_rows
from ablation.prompts import Question, check_prompt

LONGEST_PROMPT = 400
"""Characters of a prompt that are printed."""
DEFAULT_IMPUTATIONS = ["zero", "mean"]


class Asking(NamedTuple):
    """What a sweep is about. asked: identifies it, as values that JSON can hold. rows: questions, or none with a text.

    bad: rows that are left out. reference, bad_reference: reference prompts, and those that are left out.
    reference_file: the path of a saved reference.
    """

    asked: dict[str, Any]
    positions: choices.Positions
    rows: Sequence[Row] = ()
    bad: Sequence[InvalidPrompt] = ()
    text: str | None = None
    reference: Sequence[Row] | None = None
    bad_reference: Sequence[InvalidPrompt] = ()
    reference_file: Path | None = None

    @property
    def is_single(self) -> bool:
        """Whether it is one question."""
        return self.text is None and len(self.rows) == 1


def asking(
    arguments: argparse.Namespace, source: sources.Source, columns: Columns = OF_QUESTIONS, rows: Sequence[Row] = ()
) -> Asking:
    """Return what the arguments ask. columns: those of --prompts, besides the one that --positions may name.

    rows: questions that are asked if the arguments name none. Raises InvalidPrompt, and InvalidAblation for positions
    that are none.
    """
    _verify_combination(arguments)
    positions = choices.parse_positions(arguments.positions)
    column = positions if isinstance(positions, str) and positions not in ("all", "last") else None
    if column is not None and arguments.prompts is None:
        if rows:
            raise InvalidPrompt(
                f"the result is of the column {one_line(column)!r} of its prompts: pass their file with --prompts, or "
                "other --positions"
            )
        raise InvalidPrompt(
            f"--positions is all, last, integers such as 0,3,-1, or a column of a file that --prompts names, not "
            f"{one_line(column)!r}"
        )
    if arguments.text is not None:
        text = _read_text(arguments.text)
        of = {"text_sha256": _digest(text), "stride": arguments.stride}
        found = Asking(of, positions, text=text)
    elif arguments.prompts is None and arguments.prompt is None and rows:
        found = Asking(_asked_of(rows, arguments), positions, rows)
    elif arguments.prompts is None:
        question = _question(arguments, source)
        found = Asking(_texts_of(question), positions, [Row("", question)])
    else:
        columns = columns._replace(spans=column)
        rows, bad = valid_rows(
            read_rows(arguments.prompts, chat=arguments.chat, columns=columns), skip_bad=arguments.skip_bad
        )
        found = Asking(_asked_of(rows, arguments), positions, rows, bad)
    found = _with_reference(found, arguments)
    _verify_has_others(found, arguments)
    return found._replace(asked={**found.asked, **_how(arguments, positions)})


def _asked_of(rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the questions of a file as values that JSON can hold."""
    digest = _digest_of(row.question for row in rows)
    return {"prompts": len(rows), "prompts_sha256": digest, "chat": arguments.chat}


def _verify_combination(arguments: argparse.Namespace) -> None:
    """Raise InvalidPrompt for arguments that exclude or need each other."""
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
    if arguments.text is not None and (arguments.chat or arguments.top):
        raise InvalidPrompt(f"{'--chat' if arguments.chat else '--top'} is for questions, not for a --text")
    resamples = choices.RESAMPLE in arguments.imputation
    has_seed = resamples or hasattr(arguments, "random")  # random orders have a seed, too
    for option, value, used in (("--draws", arguments.draws, resamples), ("--seed", arguments.seed, has_seed)):
        if value is not None and not used:
            raise InvalidPrompt(f"{option} is for the imputation resample: pass --imputation resample")
    of_others = [*choices.OF_REFERENCE, choices.RESAMPLE]
    if arguments.reference is not None and not set(of_others) & set(arguments.imputation):
        raise InvalidPrompt(f"--reference is for an --imputation of other prompts: {', '.join(of_others)}")


def _with_reference(found: Asking, arguments: argparse.Namespace) -> Asking:
    """Return what is asked, with the reference. Raises InvalidPrompt if it cannot be read."""
    if arguments.reference is None:
        return found
    name = arguments.reference
    if name.endswith(".npz"):
        path = Path(name).expanduser()
        try:
            digest = output.sha256(path)
        except OSError as error:
            raise InvalidPrompt(f"cannot read the reference {one_line(name)}: {error.strerror or error}") from None
        asked = {**found.asked, "reference": {"file_sha256": digest}}
        return found._replace(asked=asked, reference_file=path)
    try:
        rows, bad = valid_rows(read_rows(name, chat=arguments.chat, columns=PROMPTS_ONLY), skip_bad=arguments.skip_bad)
    except InvalidPrompt as error:
        saved = " (or a reference.npz that a sweep has saved)" if "pass a .jsonl" in str(error) else ""
        raise InvalidPrompt(f"--reference: {error}{saved}") from None
    reference = {"prompts": len(rows), "prompts_sha256": _digest_of(row.question for row in rows)}
    return found._replace(asked={**found.asked, "reference": reference}, reference=rows, bad_reference=bad)


def _verify_has_others(found: Asking, arguments: argparse.Namespace) -> None:
    """Raise InvalidPrompt if one question needs other prompts, and there are none."""
    if not found.is_single or found.reference is not None:
        return
    needed = [] if found.reference_file else [name for name in choices.OF_REFERENCE if name in arguments.imputation]
    needed += [choices.RESAMPLE] * (choices.RESAMPLE in arguments.imputation and not found.rows[0].question.resample)
    if needed:
        raise InvalidPrompt(
            f"the imputation {needed[0]} takes z from other prompts: pass them with --reference FILE (.jsonl, .csv, "
            "capitals or smollm2)"
        )


def _how(arguments: argparse.Namespace, positions: choices.Positions) -> dict[str, Any]:
    """Return the choices of a sweep, besides the questions; those that are not of every sweep only if they are made."""
    files = {
        name: output.sha256(Path(name.partition(":")[2]).expanduser())
        for name in arguments.imputation
        if name.startswith(f"{choices.VALUES}:")
    }
    resampling = {"draws": arguments.draws or 1, "seed": arguments.seed or 0}
    return {
        "imputations": list(dict.fromkeys(arguments.imputation)),
        "dtype": arguments.dtype,
        **({"values_sha256": files} if files else {}),
        **({} if positions == "all" else {"positions": choices.label(positions)}),
        **(resampling if choices.RESAMPLE in arguments.imputation else {}),
    }


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


def default_folder(source: sources.Source, asked: dict[str, Any]) -> str:
    """Return the name of the folder of a result: ablation-MODEL, and for another question its words and a digest.

    For a study of sets, the name begins with the kind of study: ablation-pairs-MODEL.
    """
    kind = asked.get("study", {}).get("kind")
    name = "-".join(filter(None, ("ablation", kind, _file_name(source.name.removesuffix(".gguf")) or "model")))
    usual = {"imputations": DEFAULT_IMPUTATIONS, "dtype": "float32"}
    named = sources.NAMED_MODELS.get(source.full)
    if named is not None and asked == {**_texts_of(named.question), **usual}:
        return name
    count = asked.get("prompts")
    words = asked.get("prompt") or ("text" if count is None else f"{count} prompt{'' if count == 1 else 's'}")
    return "-".join(filter(None, (name, _file_name(words), _digest([source.full, asked])[:8])))


def _file_name(text: str) -> str:
    """Return the letters and digits of a text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII)[:40].strip("-.").lower()


def _texts_of(question: Question) -> dict[str, Any]:
    """Return a question of the command line as values that JSON can hold."""
    return {name: value for name, value in dataclasses.asdict(question).items() if name not in ("resample", "spans")}


def _digest_of(questions: Iterable[Question]) -> str:
    return _digest([dataclasses.asdict(question) for question in questions])


def _digest(value: Any) -> str:
    """Return a SHA-256 of a text, or of a value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()
