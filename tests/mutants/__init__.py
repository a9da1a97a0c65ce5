"""Wrong implementations, one bug each: proof that the specification rejects what has gone wrong in real code."""

from __future__ import annotations

from types import ModuleType

from tests.mutants import arguments, dtype, families, index, life, mean, shape, site, state
from tests.mutants.elsewhere import ELSEWHERE
from tests.mutants.mutant import Mutant

GROUPS: tuple[ModuleType, ...] = (site, index, shape, mean, state, life, dtype, families, arguments)

MUTANTS: tuple[type[Mutant], ...] = tuple(
    found
    for group in GROUPS
    for found in vars(group).values()
    if isinstance(found, type) and issubclass(found, Mutant) and found.__module__ == group.__name__
)
"""All of them, group by group."""

__all__ = ["ELSEWHERE", "GROUPS", "MUTANTS", "Mutant"]
