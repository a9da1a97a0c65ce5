"""The command `ablation generate`. It checks its arguments before torch is imported, so errors are reported fast."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation import choices, sources
from ablation.commands.arguments import LONGEST_PROMPT, Asking, asking
from ablation.commands.study import NEGATIVE, load_model, reference_of
from ablation.commands.terminal import print_json, status_line, warnings_as_notes
from ablation.errors import InvalidAblation, InvalidOutput, InvalidPrompt, one_line, shortened
from ablation.processes import Processes
from ablation.prompt_files import TO_CONTINUE
from ablation.studies.sampling import Sampling, verify_imputation
from ablation.units import parse_set

if TYPE_CHECKING:
    from ablation.models import LoadedModel
    from ablation.studies.generation import Generation, Generations

SHOWN = 5
"""So many prompts are printed with their texts."""
MARK = "‖"
"""Stands in a printed text where the two texts part."""
EPILOG = """\
examples:
  ablation generate --heads "L0H8 L0H9"
  ablation generate --heads L0H8 --prompt "Paris is the capital of" --imputation scale:2 --max-new-tokens 8
  ablation generate --heads L23H4 --model smollm2 --chat --prompt "Where is Rome?" --sample --temperature 0.8 --seed 3
  ablation generate --heads "L0H8 L0H9" --prompts capitals --max-new-tokens 8 --out answers.jsonl
"""


def add_command(commands: Any) -> None:
    """Add the parser of `ablation generate`. commands: what `ArgumentParser.add_subparsers` returns."""
    parser = commands.add_parser(
        "generate",
        help="generate text with heads ablated, beside the text of the unchanged model",
        description="Generate text, first with the unchanged model, then with a set of heads ablated. Prompts run one "
        "by one, without padding. Of the model's generation configuration, only the tokens that end a text are used.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--heads", required=True, metavar="SET", help='the heads that are ablated together, such as "L9H6 L9H9"')
    add("--model", default="capitals", help=sources.MODEL_HELP)
    add("--prompt", help="the text to continue (default: the prompt of the named model)")
    add(
        "--prompts",
        metavar="FILE",
        help="continue many prompts: a .jsonl or .csv file with the column prompt, and optionally target, the right "
        "answer, and group; or capitals or smollm2, files that are part of the package",
    )
    add("--skip-bad", action="store_true", help="leave out the prompts of FILE that cannot be used")
    add("--chat", action="store_true", help="a prompt is a user's message, rendered by the model's chat template")
    add("--max-new-tokens", type=choices.whole_number(1), default=20, metavar="N", help="(default: 20)")
    add(
        "--imputation",
        type=choices.imputation,
        default="zero",
        metavar="NAME",
        help=f"what replaces the output of a head (z) (default: zero): {', '.join(choices.IMPUTATIONS)}, except "
        "resample; `ablation sweep --help` explains them. mean and channel-mean average over the text so far, which "
        "each step computes again, without a key/value cache",
    )
    add(
        "--reference",
        metavar="FILE",
        help="the prompts of the reference means: a .jsonl or .csv file with the column prompt, capitals or smollm2; "
        "or reference.npz of an earlier sweep (default: the prompts of --prompts)",
    )
    add(
        "--positions",
        default="all",
        metavar="WHERE",
        help="the tokens at which z is replaced: all, those of the prompt and new ones; prompt, no new ones; last, the "
        "last one of the prompt; integers such as 0,3,-1, of the prompt; or a column of --prompts, as in a sweep "
        "(default: all)",
    )
    add("--sample", action="store_true", help="sample tokens (default: take the most probable one)")
    add("--temperature", type=float, metavar="T", help="sample from the softmax of logits / T (default: 1)")
    add("--top-p", type=float, metavar="P", help="sample among the fewest tokens with a probability of P in total")
    add("--top-k", type=int, metavar="K", help="sample among the K most probable tokens")
    add(
        "--seed",
        dest="sampling_seed",
        type=choices.whole_number(0),
        metavar="N",
        help="of the random numbers, which are the same in both runs (default: 0)",
    )
    add(
        "--out",
        metavar="FILE.jsonl",
        help="write a line of JSON for each prompt as soon as it is finished; FILE.json gets summary and provenance",
    )
    add("--overwrite", action="store_true", help="replace the files of --out")
    add("--device", help="cpu, cuda, cuda:1, mps, ..., or auto: all devices (default: a GPU if there is one)")
    add("--dtype", choices=sources.MODEL_DTYPES, default="float32", help="(default: float32)")
    add("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_generate)
    parser._negative_number_matcher = NEGATIVE  # otherwise, argparse takes -2,-1 for an option


def _generate(arguments: argparse.Namespace) -> int:
    units = parse_set(arguments.heads)
    source = sources.resolve(arguments.model)
    verify_imputation(arguments.imputation)
    sampling = _sampling(arguments)
    of = _asking(arguments, source)
    out = None if arguments.out is None else _Lines.checked(arguments.out, overwrite=arguments.overwrite)
    if not Processes.current().is_first:  # of torchrun: texts are generated by one process
        return 0
    with warnings_as_notes():
        loaded = load_model(arguments)
        from ablation.heads import find_heads
        from ablation.studies.generation import Generations

        study = Generations(
            loaded,
            [*of.rows, *of.bad],
            units.heads(find_heads(loaded.model)),
            arguments.imputation,
            positions=arguments.positions if arguments.positions == choices.PROMPT else of.positions,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.sampling_seed or 0,
            reference=reference_of(of),
            skip_bad=arguments.skip_bad,
        )
        found = _run_with_progress(study, out, arguments)
    summary = _summary(found)
    made_with = {**study.provenance, "asked": of.asked}
    if out is not None:
        out.write_summary({"summary": summary, "provenance": made_with})
    if arguments.json:
        records = [record(loaded, of_prompt) for of_prompt in found]
        print_json({"generations": records, "summary": summary, "provenance": made_with})
    else:
        print(render(loaded, found, arguments.heads, made_with))
        if out is not None:
            print(f"\nThe texts are in {out.path}, summary and provenance in {out.of_summary}")
    return 0


def _sampling(arguments: argparse.Namespace) -> Sampling | None:
    """Return how to sample, or None. Raises InvalidAblation."""
    given = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k", "sampling_seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not arguments.sample:
        option = next(iter(given)).replace("sampling_", "").replace("_", "-")
        raise InvalidAblation(f"--{option} is for sampled text: pass --sample, too")
    given.pop("sampling_seed", None)
    return Sampling(**given) if arguments.sample else None


def _asking(arguments: argparse.Namespace, source: sources.Source) -> Asking:
    """Return the prompts, the reference and the positions. Raises InvalidPrompt and InvalidAblation."""
    of_sweep = {"imputation": [arguments.imputation]} | dict.fromkeys(
        ("target", "control", "text", "stride", "top", "draws", "seed")
    )
    if arguments.positions == choices.PROMPT:
        of_sweep["positions"] = "all"
    found = asking(argparse.Namespace(**vars(arguments) | of_sweep), source, TO_CONTINUE)
    if arguments.overwrite and arguments.out is None:
        raise InvalidPrompt("--overwrite replaces files: pass --out FILE.jsonl")
    return found


def _run_with_progress(study: Generations, out: _Lines | None, arguments: argparse.Namespace) -> list[Generation]:
    """Generate all texts, with a progress bar if standard error is a terminal. Each is written when it is finished."""
    from tqdm import tqdm

    found = list["Generation"]()
    status_line("")
    bar_format = "generating {percentage:3.0f}% |{bar:40}| {remaining} left"
    with tqdm(total=100, bar_format=bar_format, leave=False, disable=None) as bar:  # None: only on a terminal

        def progress(share: float) -> None:
            arguments.interruptions.check()
            bar.update(bar.total * share - bar.n)

        for of_prompt in study.run(progress):
            if out is not None:
                with arguments.interruptions.deferred():  # no line is cut
                    out.write(record(study.loaded, of_prompt))
                    found.append(of_prompt)
                    arguments.kept = f"{len(found)} of {len(study.asked)} prompts are in {out.path}"
                arguments.interruptions.check()
            else:
                found.append(of_prompt)
    return found


class _Lines:
    """A file of JSON lines, and a file with summary and provenance, which is written when the lines are complete."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path, self.of_summary, self.overwrite = path, path.with_suffix(".json"), overwrite
        self._mode, self._begun = "w" if overwrite else "x", False

    @classmethod
    def checked(cls, name: str, *, overwrite: bool) -> _Lines:
        """Return the file of that name, which can be written to. Raises InvalidOutput."""
        path = Path(name).expanduser()
        if path.suffix != ".jsonl":
            raise InvalidOutput(
                f"--out {one_line(name)!r} does not end with .jsonl: a line of JSON is written per prompt"
            )
        lines = cls(path, overwrite)
        try:
            if not path.absolute().parent.is_dir():
                raise InvalidOutput(f"cannot write to {one_line(name)}: there is no folder {path.absolute().parent}")
            for each in (path, lines.of_summary):
                if each.is_dir() or (each.exists() and not overwrite):
                    hint = (
                        "is a folder" if each.is_dir() else "exists already: choose another name, or pass --overwrite"
                    )
                    raise InvalidOutput(f"cannot write to {each}: it {hint}")
        except InvalidOutput:
            raise
        except OSError as error:
            raise InvalidOutput(f"cannot write to {one_line(name)}: {error.strerror or error}") from error
        return lines

    def write(self, of_prompt: dict[str, Any]) -> None:
        """Append a line. The first one replaces an earlier file, so that an error before it loses nothing."""
        try:
            if not self._begun and self.overwrite:
                self.of_summary.unlink(missing_ok=True)
            with self.path.open("a" if self._begun else self._mode, encoding="utf-8") as file:
                file.write(json.dumps(of_prompt, ensure_ascii=False) + "\n")
            self._begun = True
        except OSError as error:
            raise InvalidOutput(f"cannot write to {self.path}: {error.strerror or error}") from error

    def write_summary(self, content: dict[str, Any]) -> None:
        """Write the other file. Raises InvalidOutput."""
        try:
            with self.of_summary.open(self._mode, encoding="utf-8") as file:
                json.dump({**content, "lines": self.path.name}, file, indent=2, ensure_ascii=False)
                file.write("\n")
        except OSError as error:
            raise InvalidOutput(f"cannot write to {self.of_summary}: {error.strerror or error}") from error


def record(loaded: LoadedModel, of: Generation) -> dict[str, Any]:
    """Return a generation as values that JSON can hold, with the texts of its new tokens and of where they part."""
    from ablation.studies.answers import flags

    parts = None
    if of.parts_at is not None:
        parts = {
            "new_token": of.parts_at,
            "position": len(of.token_ids) + of.parts_at,
            "clean": loaded.decode(of.clean[of.parts_at]),
            "clean_margin": of.clean_margin,
            "ablated": loaded.decode(of.ablated[of.parts_at]),
            "ablated_margin": of.ablated_margin,
        }
    values = dataclasses.asdict(of)
    for name in ("parts_at", "clean_margin", "ablated_margin"):
        del values[name]
    return {**values, "parts_at": parts, **flags(of.target, of.clean_text, of.ablated_text)}


def _summary(found: Sequence[Generation]) -> dict[str, Any]:
    """Return the numbers of all prompts as values that JSON can hold."""
    from ablation.studies.answers import as_json, changes, flags

    of_answers = changes([flags(of.target, of.clean_text, of.ablated_text) for of in found])
    return {
        "prompts": len(found),
        "changed_texts": sum(of.parts_at is not None for of in found),
        "answers": {name: as_json(change) for name, change in of_answers.items()},
        "forwards": sum(of.forwards for of in found),
        "replaced": sum(of.replaced for of in found),
        "changed": sum(of.changed for of in found),
    }


def render(loaded: LoadedModel, found: Sequence[Generation], heads: str, made_with: dict[str, Any]) -> str:
    """Return the findings as text."""
    summary = _summary(found)
    sampling = made_with["sampling"]
    how = "greedy"
    if sampling is not None:
        given = {"temperature": sampling["temperature"], "top_p": sampling["top_p"], "top_k": sampling["top_k"]}
        named = [
            f"{name} {value:g}" for name, value in given.items() if value not in (None, 1.0) or name == "temperature"
        ]
        how = f"sampled ({', '.join(named)}, seed {sampling['seed']})"
    where = "" if made_with["positions"] == "all" else f" at {made_with['positions']}"
    single = len(found) == 1
    prompts = repr(shortened(found[0].prompt, LONGEST_PROMPT)) if single else f"{len(found)} prompts"
    lines = [f"{loaded.name}: {prompts}", "", f"{heads} ablated ({made_with['imputation']}{where}), {how}", ""]
    if single:
        lines += _render_texts(loaded, found[0])
    else:
        lines += [f"texts      {summary['changed_texts']} of {len(found)} change"]
        lines += [line for name, change in summary["answers"].items() for line in _render_change(name, change)]
        parted = [of for of in found if of.parts_at is not None]
        for of in parted[:SHOWN]:
            lines += ["", repr(shortened(of.prompt, LONGEST_PROMPT)), *_render_texts(loaded, of)]
        if len(parted) > SHOWN:
            lines += ["", f"and {len(parted) - SHOWN} more; --out FILE.jsonl writes all"]
        lines.append("")
    receipt = f"{summary['forwards']} forward passes of the ablated model, {summary['replaced']} elements of z replaced"
    lines.append(f"receipt    {receipt}, {summary['changed']} changed")
    return "\n".join(lines)


def _render_texts(loaded: LoadedModel, of: Generation) -> list[str]:
    """Return the two texts of a prompt, with a mark where they part."""
    if of.parts_at is None:
        return [f"both       {of.clean_text!r}"]
    from ablation.studies.generation import continuation_text

    at, lines = of.parts_at, []
    for name, tokens, text in (("clean", of.clean, of.clean_text), ("ablated", of.ablated, of.ablated_text)):
        start = continuation_text(loaded, of.token_ids, tokens[:at])
        shown = start + MARK + text.removeprefix(start) if text.startswith(start) else text
        lines.append(f"{name:<11}{shown!r}")
    margins = [  # a sampled token may be less probable than the other one
        f"{'behind' if margin < 0 else 'ahead'} by {abs(margin):.2f} logits"
        for margin in (of.clean_margin or 0.0, of.ablated_margin or 0.0)
    ]
    one, other = (loaded.decode(tokens[at]) for tokens in (of.clean, of.ablated))
    where = f"new token {at} (position {len(of.token_ids) + at})"
    lines.append(f"  {where}: clean {one!r}, {margins[0]}; ablated {other!r}, {margins[1]}")
    return lines


def _render_change(name: str, change: dict[str, Any]) -> list[str]:
    """Return how often the answer is there before and after, in lines."""
    label = {"exact": "equals the target", "contains": "contains the target"}[name]
    shares = [
        f"{of['count']} of {of['of']} [{of['low']:.1%}, {of['high']:.1%}]"
        for of in (change["clean"], change["ablated"])
    ]
    flips = f"{change['lost']} lose it, {change['gained']} gain it"
    return [
        f"{name:<11}the text {label}: clean {shares[0]}, ablated {shares[1]}",
        f"           {flips} (McNemar's exact test: p = {change['p']:.2g})",
    ]
