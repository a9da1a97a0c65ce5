"""The one type of result: what each ablation of a list does to each prompt of a list. Does not import torch.

Dimensions: P prompts, A ablations, I imputations, L decoder layers, H the largest number of heads in a layer. A metric
is one number for each run, clean or ablated; `METRICS` lists them with their units.

Logits that differ by no more than rounding are a tie (see `ablation.measure.tie_tolerance`). In a tie, the argmax is
the lowest token id, the margin is 0, and tied tokens have the same rank.

A receipt proves that an ablation took place: how often a projection was called, and how many elements of z were
replaced and changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ablation import output
from ablation.errors import InvalidResult, one_line
from ablation.units import MLP, Pair, pair_label, pair_of_label

if TYPE_CHECKING:
    import pandas

ARRAYS = "sweep.npz"

METRICS: dict[str, str] = {
    "target_probability": "P(target), in [0, 1]",
    "target_log_probability": "log P(target), in nats; the sum over the tokens of the target",
    "control_probability": "P(control), in [0, 1]",
    "control_log_probability": "log P(control), in nats; the sum over the tokens of the control",
    "logit_difference": "log P(target) - log P(control): the difference of their logits if both are one token",
    "kl": "KL(clean || ablated) of the next token, in nats",
    "target_rank": "rank of the target's first token among the logits; 1 is the largest",
    "margin": "top-1 logit - top-2 logit",
    "correct": "1 if the greedy continuation equals the target, or else 0",
    "argmax": "token id of the prediction",
}
"""{metric of every result: what it is}. All are measured at the last token of the prompt, those of a target or control
of several tokens also at the tokens before their last one. In arrays, ranks and token ids are int64, the others
float64."""
LOSS = "loss"
"""The only metric of a sweep of a text: the mean next-token loss over the scored tokens, in nats per token."""
INTEGERS = ("target_rank", "argmax")
LISTED = "for_each_prompt"
"""The key of a provenance under which the keys are listed whose value is a list with an entry for each prompt."""
RECEIPTS = ("calls", "replaced", "changed")


class AblationKey(NamedTuple):
    """Which ablation a number belongs to.

    heads: (layer, head) pairs, and (layer, "mlp") for MLPs. imputation: its name. positions: at which tokens of the
    prompt it applies: "all", or as text, such as "0,-1". name: of the set of heads, if it has one.
    """

    heads: tuple[Pair, ...]
    imputation: str
    positions: str = "all"
    name: str = ""

    @property
    def label(self) -> str:
        """The heads and MLPs as text, such as L0H8+L0H9 or MLP3."""
        return "+".join(map(pair_label, self.heads))

    @property
    def title(self) -> str:
        """The name of the set of heads, or the heads as text."""
        return self.name or self.label

    def __str__(self) -> str:
        at = "" if self.positions == "all" else f" at {self.positions}"
        return f"{self.title or 'no head'}, {self.imputation}{at}"

    def as_json(self) -> dict[str, str]:
        """Return the key as values that JSON can hold."""
        values = {**self._asdict(), "heads": self.label}
        return {name: value for name, value in values.items() if value != self._field_defaults.get(name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the key that `as_json` has written."""
        heads = values["heads"]
        pairs: tuple[Pair, ...]
        if isinstance(heads, str):
            pairs = tuple(pair_of_label(part) for part in heads.split("+") if part)
        else:  # version 0.4 wrote pairs
            pairs = tuple((int(layer), int(head)) for layer, head in heads)
        return cls(pairs, **{name: str(value) for name, value in values.items() if name != "heads"})


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a result: token ids, and texts where they are known.

    target, control: the token ids of the two continuations. group: any name, by which results can be summarised.
    """

    token_ids: tuple[int, ...]
    target: tuple[int, ...]
    control: tuple[int, ...]
    prompt: str | None = None
    target_text: str | None = None
    control_text: str | None = None
    group: str | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """What each ablation of a list does to the predictions of a model for each prompt of a list."""

    ablations: tuple[AblationKey, ...]
    """[A]"""
    prompts: tuple[PromptRecord, ...]
    """[P]"""
    clean: Mapping[str, NDArray[Any]]
    """{metric: [P]} without ablation: those of `METRICS`, and metrics of one's own; of a text, only `LOSS`."""
    ablated: Mapping[str, NDArray[Any]]
    """{metric: [P, A]} with each ablation."""
    head_mean: NDArray[np.float64]
    """[P, L, H] the mean of z over all tokens and channels in the clean run; NaN where there is no head."""
    calls: NDArray[np.int64]
    """[P, A] receipt: how often each projection that the ablation edits was called; always 1."""
    replaced: NDArray[np.int64]
    """[P, A] receipt: elements of z that hold the imputed value; always tokens x head_dim, summed over the heads."""
    changed: NDArray[np.int64]
    """[P, A] receipt: elements of z that the imputation changed; 0 if z already had the imputed values."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions and settings that the result was made with, as values that JSON can hold. rounding: the difference up to
    which two logits are a tie. A value that differs between the prompts is a list, with an entry for each prompt;
    `for_each_prompt` names these."""

    # ---- what the arrays say

    def change(self, metric: str) -> NDArray[np.float64]:
        """Return the ablated value - the clean value of a metric, [P, A]. Raises KeyError for an unknown metric."""
        clean: NDArray[np.float64] = self.clean[metric][:, None].astype(np.float64)
        return self.ablated[metric] - clean

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[P, A] whether the argmax is that of the clean run. Raises InvalidResult for a result of a text."""
        if "argmax" not in self.clean:
            raise InvalidResult("a result of a text has a loss, and no predictions")
        kept: NDArray[np.bool_] = np.equal(self.ablated["argmax"], self.clean["argmax"][:, None])
        return kept

    @cached_property
    def imputations(self) -> tuple[str, ...]:
        """[I] the names of the imputations, in the order of the ablations."""
        return tuple(dict.fromkeys(key.imputation for key in self.ablations))

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], ...]:
        """The imputation, layer and head of each ablation, three times [A].

        Raises InvalidResult for sets of heads, for MLPs, and if two ablations have one place.
        """
        if any(len(key.heads) != 1 for key in self.ablations):
            raise InvalidResult("ablations of several heads, or of none, cannot be arranged as a map of heads")
        if any(key.heads[0][1] == MLP for key in self.ablations):
            raise InvalidResult("an MLP is no head, and has no place on a map of heads")
        index = {name: number for number, name in enumerate(self.imputations)}
        places = [(index[key.imputation], *key.heads[0]) for key in self.ablations]
        if len(set(places)) < len(places):
            raise InvalidResult("a head has several ablations of one imputation, but one place on a map of heads")
        return tuple(np.array(places, dtype=np.int64).T)

    def grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """Arrange the values of one-head ablations as maps of all heads, [..., A] -> [..., I, L, H].

        Where there is no head, a map holds NaN if it is of floats, -1 if of integers, and False if of booleans. Raises
        InvalidResult if an ablation has several heads, or none, or an MLP, and if a head has several ablations of one
        imputation, such as at different positions.
        """
        missing: Any = {"f": np.nan, "b": False}.get(values.dtype.kind, -1)
        maps = np.full((*values.shape[:-1], len(self.imputations), *self.head_mean.shape[1:]), missing, values.dtype)
        places: Any = (..., *self._places)
        maps[places] = values
        return maps

    @property
    def has_head(self) -> NDArray[np.bool_]:
        """[L, H] whether an ablation of this head is in the result. Raises InvalidResult as `grid` does."""
        exists: NDArray[np.bool_] = np.any(self.grid(np.ones(len(self.ablations), dtype=bool)), axis=0)
        return exists

    def to_frame(self) -> pandas.DataFrame:
        """Return a long table as a pandas frame; see `ablation.tables`. Raises AblationError if pandas is missing."""
        from ablation import tables

        return tables.to_frame(self)

    # ---- parts and wholes

    def of_prompt(self, index: int) -> Self:
        """Return the result of one prompt. index: from 0, or from the end if negative."""
        at = [index]
        alone = {key: value for key, value in self.provenance.items() if key not in (*self._listed, LISTED)}
        own = {key: self.provenance[key][index] for key in self._listed}  # None for a key that the prompt lacks
        return replace(
            self,
            prompts=(self.prompts[index],),
            clean={name: values[at] for name, values in self.clean.items()},
            ablated={name: values[at] for name, values in self.ablated.items()},
            head_mean=self.head_mean[at],
            **{name: getattr(self, name)[at] for name in RECEIPTS},
            provenance=alone | {key: value for key, value in own.items() if value is not None},
        )

    @property
    def _listed(self) -> tuple[str, ...]:
        """The keys of the provenance whose value is a list with an entry for each prompt."""
        return tuple(self.provenance.get(LISTED, ()))

    @classmethod
    def joined(cls, results: Sequence[Result]) -> Self:
        """Return the results of several lists of prompts as one.

        Raises InvalidResult if there are none, or if their ablations, metrics or models differ.
        """
        if not results:
            raise InvalidResult("there are no results to join")
        first = results[0]
        for other in results[1:]:
            same = (other.ablations, other.clean.keys(), other.head_mean.shape[1:])
            if same != (first.ablations, first.clean.keys(), first.head_mean.shape[1:]):
                raise InvalidResult("results of other ablations, metrics or models cannot be joined")
        return cls(
            ablations=first.ablations,
            prompts=tuple(prompt for result in results for prompt in result.prompts),
            clean={name: np.concatenate([result.clean[name] for result in results]) for name in first.clean},
            ablated={name: np.concatenate([result.ablated[name] for result in results]) for name in first.ablated},
            head_mean=np.concatenate([result.head_mean for result in results]),
            **{name: np.concatenate([getattr(result, name) for result in results]) for name in RECEIPTS},
            provenance=_common_provenance(results),
        )

    def averaged_over_draws(self) -> Self:
        """Return the result with one column for ablations of one key, such as several draws of `resample`.

        Metrics are averaged, but the argmax is the most frequent one, the lowest of these in a tie, and the rank is the
        lower median. Receipts are the smallest ones.
        """
        columns: dict[AblationKey, list[int]] = {}
        for number, key in enumerate(self.ablations):
            columns.setdefault(key, []).append(number)
        if len(columns) == len(self.ablations):
            return self
        merging: dict[str, _Merge] = {"argmax": _most_frequent, "target_rank": _lower_median}

        def merged(values: NDArray[Any], merge: _Merge) -> NDArray[Any]:
            parts = [values[:, at[0]] if len(at) == 1 else merge(values[:, at]) for at in columns.values()]
            return np.stack(parts, axis=1)

        receipts: dict[str, Any] = {name: merged(getattr(self, name), _smallest) for name in RECEIPTS}
        ablated = {name: merged(values, merging.get(name, _mean)) for name, values in self.ablated.items()}
        return replace(self, ablations=tuple(columns), ablated=ablated, **receipts)

    # ---- files

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write sweep.npz (the arrays) and sweep.json (the rest) into a folder, both or neither.

        With `overwrite`, an earlier result in the folder is replaced. Without it, an earlier result is replaced only if
        model, weights, prompts and ablations are recorded in both and the same, as after a repeated command; for any
        other result, InvalidOutput is raised. Files that are not part of a result are never replaced: InvalidOutput is
        raised, with and without `overwrite`. Raises OSError if the folder cannot be written.
        """
        with output.staging(Path(folder)) as draft:
            self.write_arrays(draft)
            self.publish(draft, Path(folder), overwrite=overwrite)

    def write_arrays(self, folder: Path) -> None:
        """Write sweep.npz into an existing folder. Raises OSError."""
        arrays: dict[str, Any] = {f"clean.{name}": values for name, values in self.clean.items()}
        arrays |= {f"ablated.{name}": values for name, values in self.ablated.items()}
        arrays |= {name: getattr(self, name) for name in ("head_mean", *RECEIPTS)}
        np.savez(folder / ARRAYS, **arrays)

    def manifest(self) -> dict[str, Any]:
        """Return what sweep.json holds besides the list of files."""
        return {
            "ablations": [key.as_json() for key in self.ablations],
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "provenance": self.provenance,
        }

    def publish(self, draft: Path, folder: Path, *, overwrite: bool) -> None:
        """Move the files of `draft` into a folder, with sweep.json; see `ablation.output.publish`."""
        output.publish(draft, folder, self.manifest(), overwrite=overwrite)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a result that `save` wrote, without any loss. Raises InvalidResult if it is missing or damaged."""
        folder = Path(folder)
        try:
            rest = json.loads((folder / output.MANIFEST).read_text(encoding="utf-8"))
            digest = rest["files"].get(ARRAYS)
            if output.sha256(folder / ARRAYS) != digest:
                raise ValueError(f"{ARRAYS} is not the file that was saved")
            with (folder / ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                values = dict(arrays)
            result = cls(
                ablations=tuple(map(AblationKey.from_json, rest["ablations"])),
                prompts=tuple(map(_prompt_from_json, rest["prompts"])),
                clean=_part(values, "clean."),
                ablated=_part(values, "ablated."),
                provenance=rest["provenance"],
                **{name: array for name, array in values.items() if not name.startswith(("clean.", "ablated."))},
            )
            result._check_shapes()
        except Exception as error:  # a damaged file makes json, zipfile, zlib and numpy raise many kinds of errors
            raise InvalidResult(f"no result can be read from {folder}: {one_line(error)}") from error
        return result

    def _check_shapes(self) -> None:
        """Raise ValueError or TypeError unless all fields have the types and dimensions documented above."""
        if not isinstance(self.provenance, dict):
            raise TypeError("the provenance has the wrong type")
        if missing := [name for name in METRICS if name not in self.clean and LOSS not in self.clean]:
            raise ValueError(f"the metric {missing[0]} is missing")
        if self.clean.keys() != self.ablated.keys():
            raise ValueError("clean and ablated runs have different metrics")
        prompts, ablations, rest = len(self.prompts), len(self.ablations), self.head_mean.ndim - 1
        expected: dict[str, tuple[NDArray[Any], tuple[int, ...], type]] = {
            "head_mean": (self.head_mean, (prompts, *self.head_mean.shape[1:3], *[-1] * (2 - rest)), np.float64),
            **{name: (getattr(self, name), (prompts, ablations), np.int64) for name in RECEIPTS},
        }
        for name in self.clean:
            kind = np.int64 if name in INTEGERS else np.float64
            expected[f"clean {name}"] = (self.clean[name], (prompts,), kind)
            expected[f"ablated {name}"] = (self.ablated[name], (prompts, ablations), kind)
        for name, (array, shape, dtype) in expected.items():
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} has the dimensions {array.shape} and the dtype {array.dtype}")


def _common_provenance(results: Sequence[Result]) -> dict[str, Any]:
    """Return the provenance of joined results: a value that differs between prompts becomes a list, [P]."""
    keys = dict.fromkeys(key for result in results for key in result.provenance if key != LISTED)
    common: dict[str, Any] = {}
    listed = []
    for key in keys:
        values = [value for result in results for value in _for_each_prompt(result, key)]
        common[key] = values[0]
        if any(value != values[0] for value in values):
            common[key] = values
            listed.append(key)
    return common | ({LISTED: listed} if listed else {})


def _for_each_prompt(result: Result, key: str) -> Iterable[Any]:
    value = result.provenance.get(key)
    return value if value is not None and key in result._listed else [value] * len(result.prompts)


def _part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


_Merge = Callable[[NDArray[Any]], NDArray[Any]]
"""[P, draws] -> [P]"""


def _mean(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(values.mean(axis=1))


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(values.min(axis=1))


def _lower_median(values: NDArray[Any]) -> NDArray[Any]:
    return np.sort(values, axis=1)[:, (values.shape[1] - 1) // 2]


def _most_frequent(values: NDArray[Any]) -> NDArray[Any]:
    def of_row(row: NDArray[Any]) -> Any:
        found, counts = np.unique(row, return_counts=True)  # sorted
        return found[counts.argmax()]

    return np.array([of_row(row) for row in values], dtype=values.dtype)


def _prompt_from_json(value: Mapping[str, Any]) -> PromptRecord:
    ids = {name: tuple(map(int, value[name])) for name in ("token_ids", "target", "control")}
    return PromptRecord(**{**value, **ids})
