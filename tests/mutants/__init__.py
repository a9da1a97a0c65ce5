"""Wrong implementations with one bug each: proof that the specification rejects bugs of real code."""

from __future__ import annotations

from types import ModuleType

from tests.mutants import (
    arguments,
    dtype,
    families,
    gradients,
    hooks,
    imputations,
    index,
    layouts,
    masks,
    mean,
    model,
    process,
    shape,
    site,
    state,
)
from tests.mutants.mutant import Mutant
from tests.mutants.outside_protocol import OUTSIDE_PROTOCOL

GROUPS: tuple[ModuleType, ...] = (
    site,
    index,
    shape,
    mean,
    masks,
    state,
    hooks,
    model,
    process,
    dtype,
    gradients,
    families,
    layouts,
    arguments,
    imputations,
)

MUTANTS: tuple[type[Mutant], ...] = tuple(
    found
    for group in GROUPS
    for found in vars(group).values()
    if isinstance(found, type) and issubclass(found, Mutant) and found.__module__ == group.__name__
)
"""All mutants, group by group."""

__all__ = ["GROUPS", "MUTANTS", "OUTSIDE_PROTOCOL", "Mutant"]
