"""The structure that CONTRIBUTING.md describes: files of one idea, imports in one direction, short test names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("ablation", "tests") for path in (ROOT / folder).rglob("*.py"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# errors.py, sources.py and prompts.py are imported everywhere, and import nothing of the package but each other.
LEAVES = ("errors", "prompts", "sources", "provenance")
LAYERS = [name for row in re.findall(r"^\| (`.*?`) \|", CONTRIBUTING, re.M) for name in re.findall(r"`(\w+)\.py`", row)]
"""The modules of the table in CONTRIBUTING.md, from the top to the bottom."""


def test_files_have_at_most_400_lines() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES if "mutants" not in path.parts
    }
    assert len(lengths) > 80 and {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_test_names_have_at_most_60_characters() -> None:
    names = [
        name for path in SOURCES for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    ]
    assert len(names) > 200 and [name for name in names if len(name) > 60] == []


def imports(path: Path) -> set[str]:
    """The modules of the package that a module imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ablation":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {name.name for name in node.names}
    return found


def test_contributing_lists_every_module() -> None:
    modules = {path.stem for path in (ROOT / "ablation").glob("*.py")} - {
        "__init__",
        "__main__",
        "errors",
        "provenance",
    }
    assert modules == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_modules_import_only_those_above_them(module: str) -> None:
    below = set(LAYERS[LAYERS.index(module) :])
    allowed_upwards = {"checks"} if module == "cli" else set()
    found = imports(ROOT / "ablation" / f"{module}.py")
    assert not found & (below - set(LEAVES)), f"{module} imports a module below it"
    assert "checks" not in found - allowed_upwards, "the core does not import the specification"
