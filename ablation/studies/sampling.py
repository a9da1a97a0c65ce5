"""Choices for generated text: how tokens are sampled, and what is refused.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ablation.choices import RESAMPLE
from ablation.errors import InvalidAblation
from ablation.prompts import is_integer


@dataclass(frozen=True)
class Sampling:
    """Sample each token from the softmax of logits / temperature, restricted to the most probable tokens.

    temperature: a number above 0. top_k: only the k most probable tokens; None for all. top_p: only the fewest tokens
    whose probabilities add up to at least p, after the temperature and top_k; 1 for all. Raises InvalidAblation for
    other values.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise InvalidAblation(f"the temperature is {self.temperature!r}: it is a number above 0")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InvalidAblation(f"top_p is {self.top_p!r}: it is a probability, above 0 and at most 1")
        if self.top_k is not None and not (is_integer(self.top_k) and self.top_k >= 1):
            raise InvalidAblation(f"top_k is {self.top_k!r}: it is a number of tokens, at least 1")


def verify_imputation(imputation: object) -> None:
    """Raise InvalidAblation for `resample`."""
    if imputation == RESAMPLE:
        raise InvalidAblation(
            "resample takes z from a prompt of equal length, and a text that is being generated has none: use a "
            "reference mean, or values of your own"
        )


def verify_seed(seed: object) -> None:
    """Raise InvalidAblation unless a seed is a whole number of at least 0."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InvalidAblation(f"the seed is {seed!r}: it is a whole number, at least 0")


def verify_new_tokens(max_new_tokens: object) -> None:
    """Raise InvalidAblation unless this is a number of new tokens."""
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise InvalidAblation(f"max_new_tokens is {max_new_tokens!r}: it is a number of tokens, at least 1")


def seed_of_prompt(seed: int, token_ids: Sequence[int]) -> int:
    """Return the seed of the random numbers for one prompt, below 2**63.

    It depends on nothing but the arguments, so neither the order of prompts nor another run changes the text.
    """
    digest = hashlib.sha256(json.dumps([seed, list(token_ids)]).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
