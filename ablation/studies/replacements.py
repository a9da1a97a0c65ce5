"""What replaces z in a study: imputations that are the same for every prompt, and the z of other prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from ablation.choices import RESAMPLE
from ablation.errors import InvalidAblation, InvalidPrompt, UnknownImputation
from ablation.forward import as_token_ids
from ablation.imputation import Imputation, Values, as_imputation
from ablation.reference import MEAN, MEAN_BY_POSITION, Reference, record_z
from ablation.sweeps import listed, verify_names

TokenIds = tuple[int, ...]


def needs_reference(imputations: Sequence[str | Imputation]) -> bool:
    """Whether one of the imputations is a mean over reference prompts, by name."""
    return any(name in (MEAN, MEAN_BY_POSITION) for name in imputations if isinstance(name, str))


@dataclass(frozen=True)
class Replacements:
    """The imputations of a study.

    imputations: with `RESAMPLE` in the place of the imputations that differ from prompt to prompt. pool: prompts from
    which `resample` draws. draws: how many prompts it draws for each prompt. seed: of the draws.
    """

    imputations: tuple[Imputation | str, ...]
    pool: tuple[TokenIds, ...] = ()
    draws: int = 1
    seed: int = 0

    @classmethod
    def of(
        cls,
        imputations: Sequence[str | Imputation],
        reference: Reference | None = None,
        pool: Sequence[Sequence[int]] = (),
        draws: int = 1,
        seed: int = 0,
    ) -> Replacements:
        """Return the imputations of a study. imputations: names or objects; see docs/imputations.md.

        reference: for `reference-mean` and `reference-mean-by-position`. Raises UnknownImputation, and InvalidAblation
        for an empty list, equal names, or draws and seeds that are none.
        """
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise InvalidAblation(f"draws is {draws!r}: it is a number of prompts, at least 1")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InvalidAblation(f"the seed is {seed!r}: it is a whole number, at least 0")
        found: list[Imputation | str] = []
        for imputation in listed(imputations):
            if imputation == RESAMPLE:
                found.append(RESAMPLE)
            elif imputation in (MEAN, MEAN_BY_POSITION):
                if reference is None:
                    raise UnknownImputation(f"{imputation!r} needs reference prompts")
                found.append(reference.imputation(str(imputation)))
            else:
                found.append(as_imputation(imputation))
        replacements = cls(tuple(found), tuple(sorted(set(map(as_token_ids, pool)))), draws, seed)
        verify_names(replacements.names)
        return replacements

    @property
    def names(self) -> list[str]:
        """The names of the imputations."""
        return [of if isinstance(of, str) else of.name for of in self.imputations]

    def sources(self, token_ids: Sequence[int], given: Sequence[int] | None = None) -> tuple[TokenIds, ...]:
        """Return the prompts from which `resample` takes z for a prompt; none without `resample`.

        given: the one that the data set names. Otherwise, prompts of equal length, other than the prompt itself, are
        drawn from the pool without replacement; all, if there are no more than `draws`. The draw depends on the seed,
        the prompt and the pool, not on the order of the prompts. Raises InvalidPrompt if there are none, or if the
        given one has another length.
        """
        if not any(isinstance(of, str) for of in self.imputations):
            return ()
        own = as_token_ids(token_ids)
        if given is not None:
            source = as_token_ids(given)
            if len(source) != len(own):
                raise InvalidPrompt(
                    f"the prompt to resample from has {len(source)} tokens, the prompt {len(own)}: z is replaced at "
                    "the same positions"
                )
            return (source,)
        others = [ids for ids in self.pool if len(ids) == len(own) and ids != own]
        if not others:
            raise InvalidPrompt(f"no other prompt has {len(own)} tokens, so there is none to resample from")
        digest = hashlib.sha256(json.dumps([self.seed, own]).encode()).digest()
        drawn = np.random.default_rng(int.from_bytes(digest)).permutation(len(others))[: self.draws]
        return tuple(others[index] for index in drawn)

    def of_prompt(self, model: PreTrainedModel, sources: Sequence[TokenIds]) -> list[Imputation]:
        """Return the imputations of one prompt, with one named `resample` for each of its sources.

        Raises the errors of `ablation.reference.record_z`.
        """
        return [
            each
            for of in self.imputations
            for each in (
                [Values(record_z(model, source), RESAMPLE) for source in sources] if isinstance(of, str) else [of]
            )
        ]
