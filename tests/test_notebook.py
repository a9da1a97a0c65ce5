"""The notebook for students runs from its first to its last cell, and shows what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "published_experiment.ipynb"


def printed(cells: list[Any]) -> list[str]:
    """What each code cell prints, and `image` for a figure."""
    texts = []
    for cell in cells:
        for out in cell.get("outputs", []):
            if out["output_type"] == "stream" and out["name"] == "stdout":
                texts.append("".join(out["text"]).strip())
            elif "image/png" in out.get("data", {}):
                texts.append("image")
    return texts


@pytest.mark.end_to_end
def test_notebook_runs_and_prints_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = printed(notebook.cells)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()  # raises CellExecutionError
    assert printed(notebook.cells) == stored
    assert "zero: 144 of 144 ablations keep ' Germany'" in "\n".join(stored) and "image" in stored


def test_notebook_holds_no_errors_or_local_paths() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    assert not any(out["output_type"] == "error" for cell in cells for out in cell.get("outputs", []))
    assert all(cell.get("outputs") for cell in cells[3:] if cell["cell_type"] == "code" and "print(" in cell["source"])
    assert str(Path.home()) not in text and str(NOTEBOOK.parent) not in text
