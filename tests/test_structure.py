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
LEAVES = {"errors", "prompts", "sources", "provenance"}


def listed() -> list[str]:
    """The modules of the tables in CONTRIBUTING.md, from the top to the bottom, such as `heads` and `figures/maps`."""
    found = []
    for row in re.findall(r"^\| (`.*) \|$", CONTRIBUTING, re.M):
        folder = re.match(r"`(\w+/)`", row)
        if not row.startswith("`checks/"):
            found += [(folder[1] if folder else "") + name for name in re.findall(r"`(\w+)\.py`", row)]
    return found


LAYERS = listed()


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


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports when it is imported itself; all of `checks` is one."""
    tree = ast.parse((ROOT / "ablation" / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ablation":
            _, *parts = (node.module or "").split(".")
            for name in node.names:
                path = "/".join((*parts, name.name))
                found.add("checks" if "checks" in parts else path if path in LAYERS else "/".join(parts))
    return found


def test_contributing_lists_every_module() -> None:
    paths = [path.relative_to(ROOT / "ablation").with_suffix("") for path in SOURCES if "tests" not in path.parts]
    modules = {path.as_posix() for path in paths if not path.name.startswith("__")}
    modules = {module for module in modules if not module.startswith(("checks/", "capitals/"))}
    assert len(LAYERS) > 60 and modules - {"errors", "provenance"} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_modules_import_only_those_above_them(module: str) -> None:
    commands = {name for name in LAYERS if name.startswith("commands/")} | {"checks"}
    allowed = LEAVES | (commands if module == "cli" else set())
    below = {"checks", *LAYERS[LAYERS.index(module) :]}
    assert not imports(module) & (below - allowed), f"{module} imports a module below it"
