"""The base class of all mutants."""

from __future__ import annotations

from typing import ClassVar

from tests.mutants.reference import Reference


class Mutant(Reference):
    """Differs from `Reference` in one way, which the first line of its docstring describes.

    source: the thread about real code with this bug, if there is one. expected_check: the check to try first. crashes:
    the error that the model or the adapter raises, if that is the bug; any other mutant has to break a requirement.
    """

    source: ClassVar[str] = ""
    expected_check: ClassVar[str] = "locality"
    crashes: ClassVar[type[Exception] | None] = None
