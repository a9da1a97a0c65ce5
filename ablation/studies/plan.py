"""What replaces z in a study, and at which tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablation import choices, provenance
from ablation.choices import OF_REFERENCE, RESAMPLE, VALUES, Positions
from ablation.edits import Ablation
from ablation.errors import InvalidAblation, InvalidPrompt, InvalidResult, UnknownImputation, one_line
from ablation.heads import HeadMap, find_heads
from ablation.imputation import Imputation, Values, as_imputation
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.reference import Reference
from ablation.results import Result
from ablation.rows import as_positions
from ablation.studies.replacements import Replacements, TokenIds, needs_reference
from ablation.sweeps import HeadSet, ablations_of_sets, listed, one_head_ablations, verify_names
from ablation.units import Pair, parse_set

Sets = Mapping[str, str | Iterable[Pair]] | Iterable[HeadSet | str | Iterable[Pair]]
"""Sets of heads, with names or without; see `as_sets`."""
PASSES_OF_ABLATION = 0.5
"""The work of an ablation in a growing batch, in forward passes: on average, half of the layers."""


@dataclass
class Plan:
    """What replaces z in a study, at which tokens, and from which prompts these values come.

    imputations: names of those that need other prompts, and `Imputation` objects. positions: see `choices.Positions`.
    sets: the sets of heads that are ablated; None for each head alone. draws, seed: see `Replacements`. reference: for
    the reference means; None until `prepare` has computed it, if it is needed and was not given. reference_ids: the
    prompts that it is computed from. pool: the prompts from which `resample` draws. texts: the texts of prompts, for
    the provenance.
    """

    imputations: list[str | Imputation]
    positions: Positions
    draws: int
    seed: int
    sets: Sequence[HeadSet] | None = None
    reference: Reference | None = None
    reference_ids: Sequence[TokenIds] = ()
    pool: Sequence[TokenIds] = ()
    texts: Mapping[TokenIds, str] = field(default_factory=dict)
    computed: Reference | None = None
    """The reference, if it was not given."""

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        imputations: Sequence[str | Imputation],
        positions: str | Iterable[int],
        reference: object,
        draws: int,
        seed: int,
        sets: Sets | None = None,
    ) -> Plan:
        """Return a plan, with its arguments validated before any work.

        reference: only a `Reference` is looked at. sets: see `as_sets`. Raises UnknownImputation, InvalidAblation,
        InvalidHead and UnsupportedModel.
        """
        chosen = [_named_or_object(imputation) for imputation in listed(imputations)]
        verify_names([of if isinstance(of, str) else of.name for of in chosen])
        Replacements.of([RESAMPLE], draws=draws, seed=seed)  # raises its errors
        where: Positions = choices.parse_positions(positions) if isinstance(positions, str) else _listed(positions)
        heads = find_heads(loaded.model)
        plan = cls(chosen, where, draws, seed, None if sets is None else as_sets(sets, heads))
        if isinstance(reference, Reference):
            _verify_reference(loaded, reference)
            plan.reference = reference
        own = [of for of in chosen if isinstance(of, Imputation)]
        for layer in heads.layers:
            for imputation in [*own, *([plan.reference.mean()] if plan.reference is not None else [])]:
                imputation.validate(layer)
        return plan

    @property
    def label(self) -> str:
        """The positions, as results name them."""
        return choices.label(self.positions)

    @property
    def resamples(self) -> bool:
        """Whether `resample` is one of the imputations."""
        return RESAMPLE in self.imputations

    @property
    def needs_reference(self) -> bool:
        """Whether a reference mean is one of the imputations."""
        return needs_reference(self.imputations)

    def sources(self, token_ids: Sequence[int], given: Sequence[int] | None = None) -> tuple[TokenIds, ...]:
        """Return the prompts to resample from for a prompt; see `Replacements.sources`. Raises InvalidPrompt."""
        return self._drawing.sources(token_ids, given) if self.resamples else ()

    @cached_property
    def _drawing(self) -> Replacements:
        return Replacements.of([RESAMPLE], None, self.pool, self.draws, self.seed)

    def verify_length(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidPrompt if values for each position end before a prompt does."""
        longest = {of.name: _positions_of(of) for of in self.imputations if isinstance(of, Values) and of.by_position}
        if OF_REFERENCE[1] in self.imputations:
            given = 0 if self.reference is None else len(self.reference.counts)
            longest[OF_REFERENCE[1]] = given or max(map(len, self.reference_ids))
        for name, positions in longest.items():
            if len(token_ids) > positions:
                raise InvalidPrompt(
                    f"the prompt has {len(token_ids)} tokens, and {name!r} has values for {positions} positions"
                )

    def work_of_reference(self, loaded: LoadedModel, prompts: int) -> float:
        """Return the share of the work of a study of so many prompts that the reference takes."""
        passes = len(self.reference_ids) if self.needs_reference and self.reference is None else 0
        count = len(list(find_heads(loaded.model)) if self.sets is None else self.sets)
        return passes / (passes + prompts * (1 + PASSES_OF_ABLATION * count * len(self.imputations)))

    def prepare(self, loaded: LoadedModel, known: Mapping[str, Any], progress: Progress | None) -> PreparedPlan:
        """Compute the reference, if it is needed and was not given. known: where the model came from."""
        if self.needs_reference and self.reference is None:
            self.computed = Reference.of(loaded.model, self.reference_ids, known=known, progress=progress)
        reference = self.reference or self.computed
        made_with: dict[str, Any] = {}
        if self.needs_reference and reference is not None:
            made_with["reference"] = {**reference.provenance, "sha256": reference.sha256}
        if self.resamples:
            made_with |= {"draws": self.draws, "seed": self.seed}
        replacements = Replacements.of(self.imputations, reference, self.pool, self.draws, self.seed)
        values = {of.name: _digest(of) for of in replacements.imputations if isinstance(of, Values)}
        made_with |= {"values_sha256": values} if values else {}
        return PreparedPlan(replacements, self.label, self.sets, made_with)


@dataclass(frozen=True)
class PreparedPlan:
    """The imputations of a study, of which those of each prompt follow.

    label: the positions, as results name them. sets: see `Plan`. made_with: what the values were made with, for the
    provenance.
    """

    replacements: Replacements
    label: str
    sets: Sequence[HeadSet] | None
    made_with: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything about the plan on which the bits of a result depend."""
        values, resampling = self.made_with.get("values_sha256", {}), ("draws", "seed")
        return {
            "imputations": self.replacements.names,
            "values_sha256": values,
            "positions": self.label,
            **({} if self.sets is None else {"sets_sha256": _digest_of_sets(self.sets)}),
            **{name: self.made_with[name] for name in resampling if name in self.made_with},
        }

    def ablations(
        self, loaded: LoadedModel, sources: Sequence[TokenIds], positions: tuple[int, ...] | None
    ) -> list[Ablation]:
        """Return the ablations of one prompt; several for each head or set with `resample` and several sources.

        positions: from 0; None for all.
        """
        imputations = self.replacements.of_prompt(loaded.model, sources)
        if self.sets is None:
            return one_head_ablations(loaded.model, imputations, positions)
        return ablations_of_sets(self.sets, imputations, positions)

    def completed(self, result: Result, resampled_from: Sequence[str], positions: tuple[int, ...] | None) -> Result:
        """Return the result of one prompt, averaged over draws, with the plan in its provenance.

        resampled_from: the texts of its sources.
        """
        own: dict[str, Any] = {} if positions is None else {"positions": list(positions)}
        own |= {"resampled_from": list(resampled_from)} if resampled_from else {}
        names = itertools.cycle([of.name for of in self.sets] if self.sets is not None else [""])
        keys = tuple(key._replace(positions=self.label, name=next(names)) for key in result.ablations)
        provenance = {**result.provenance, **self.made_with, **own}
        return replace(result, ablations=keys, provenance=provenance).averaged_over_draws()


def as_sets(sets: Sets, heads: HeadMap) -> list[HeadSet]:
    """Return sets of heads, validated. sets: {name: heads}, or a list of heads of unnamed sets, or `HeadSet` objects.

    Heads are (layer, head) pairs, or a text such as "L9H6 L9H9"; see `ablation.units.parse_set`.

    Raises InvalidHead if the model lacks a head, and InvalidAblation if there are no sets, or if two are the same or
    have one name.
    """
    if isinstance(sets, str):
        raise InvalidAblation(f"`sets` is a list of sets, or a mapping of names to sets: pass [{sets!r}]")
    named = sets.items() if isinstance(sets, Mapping) else [of if isinstance(of, HeadSet) else ("", of) for of in sets]
    pairs = [(name, parse_set(of).heads(heads) if isinstance(of, str) else of) for name, of in named]
    found = [HeadSet(str(name), Ablation(members).validated(heads).heads) for name, members in pairs]
    if not found or len({(of.name, frozenset(of.heads)) for of in found}) < len(found):
        raise InvalidAblation("name at least one set of heads, and each only once")
    counts = Counter(of.name for of in found if of.name)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InvalidAblation(f"two sets of heads have the name {one_line(twice[0])!r}: rename one")
    return found


def load_values(path: Path | str) -> Values:
    """Read the imputation `values:FILE`. path: an .npz file with the arrays layer.0, layer.1, ...; see `Values`.

    Raises InvalidResult if the file is damaged, or holds anything else.
    """
    try:
        with Path(path).expanduser().open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays}
        prefix = "layer."
        if strange := [name for name in values if not (name.startswith(prefix) and name[len(prefix) :].isdecimal())]:
            raise ValueError(f"its array {strange[0]!r} is not named layer.N")
        tensors = {int(name[len(prefix) :]): torch.from_numpy(array) for name, array in values.items()}
        if infinite := [layer for layer, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"its values in layer {infinite[0]} are not finite")
        return Values(tensors, f"{VALUES}:{Path(path).name}")
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise many kinds of errors
        raise InvalidResult(f"no values can be read from {one_line(path)}: {one_line(error)}") from error


def _named_or_object(imputation: str | Imputation) -> str | Imputation:
    """Return the name of an imputation that needs other prompts, or the imputation. Raises UnknownImputation."""
    if isinstance(imputation, str):
        if imputation in (RESAMPLE, *OF_REFERENCE):
            return imputation
        if choices.meaning(imputation) is None:
            known = ", ".join(map(repr, choices.IMPUTATIONS))
            raise UnknownImputation(f"unknown imputation {imputation!r}: use one of {known}, or an `Imputation`")
        if imputation.startswith(f"{VALUES}:"):
            return load_values(imputation.partition(":")[2])
    return as_imputation(imputation)


def _listed(positions: Iterable[int]) -> Positions:
    found = as_positions(positions)
    return "all" if found is None else found


def _positions_of(values: Values) -> int:
    return len(next(iter(values.values.values())))


def _digest_of_sets(sets: Sequence[HeadSet]) -> str:
    return hashlib.sha256(json.dumps([list(of) for of in sets]).encode()).hexdigest()


def _digest(values: Values) -> str:
    """Return a SHA-256 of given values."""
    digest = hashlib.sha256()
    for layer, tensor in sorted(values.values.items()):
        digest.update(f"{layer} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _verify_reference(loaded: LoadedModel, reference: Reference) -> None:
    """Raise InvalidAblation if a reference is known to be of other weights."""
    there = reference.provenance.get("weights_sha256")
    here = provenance.weights_digest(loaded.model)["weights_sha256"] if there is not None else None
    if there is not None and here is not None and there != here:
        model = f"{reference.provenance.get('model')}, {reference.provenance.get('dtype')}"
        raise InvalidAblation(
            f"the reference is of other weights ({model}, {there[:8]}) than {loaded.name}, "
            f"{str(loaded.model.dtype).removeprefix('torch.')}, {here[:8]}: compute it again"
        )
