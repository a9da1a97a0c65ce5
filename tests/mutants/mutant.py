"""What a mutant is."""

from __future__ import annotations

from typing import ClassVar

from tests.mutants.right import Reference


class Mutant(Reference):
    """Differs from `Right` in one way; the first line of its docstring says in which.

    source: the thread where code was wrong in this way, where there is one. killer: the check to try first.
    crashes: what the model or the adapter raises, where the bug is just that; any other mutant has to break a
    requirement.
    """

    source: ClassVar[str] = ""
    killer: ClassVar[str] = "locality"
    crashes: ClassVar[type[Exception] | None] = None
