"""Results are saved and loaded without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.checks.decoders import Decoder
from ablation.errors import InvalidOutput, InvalidResult
from ablation.results import SweepResult
from ablation.sweeps import sweep
from tests.comparing import IDS, arrays

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)


def test_loaded_result_equals_the_saved_one(tmp_path: Path) -> None:
    result = sweep(GPT2.shared(), IDS)
    result.save(str(tmp_path))
    loaded = SweepResult.load(str(tmp_path))
    assert loaded.provenance == json.loads(json.dumps(result.provenance))
    for name, value in arrays(result).items():
        again = getattr(loaded, name)
        assert type(again) is type(value) and np.array_equal(again, value), name
        assert not isinstance(value, np.ndarray) or again.dtype == value.dtype, name


def test_saved_text_is_readable_utf8(tmp_path: Path) -> None:
    replace(sweep(GPT2.shared(), IDS, imputations=["zero"]), provenance={"prompt": "Zürich"}).save(tmp_path)
    text = (tmp_path / "sweep.json").read_text(encoding="utf-8")
    head = '{\n  "imputations": [\n    "zero"\n  ],\n  "provenance": {\n    "prompt": "Zürich"\n  },\n  "files": {'
    assert text.startswith(head) and json.loads(text)["files"].keys() == {"sweep.npz"}


def rewrite(folder: Path, **arrays: Any) -> None:
    """Replace arrays of a saved result, as an older version would have saved them: without digests."""
    with np.load(folder / "sweep.npz") as saved:
        kept = dict(saved)
    np.savez(folder / "sweep.npz", **{k: v for k, v in (kept | arrays).items() if v is not None})
    rest = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({k: v for k, v in rest.items() if k != "files"}))


def truncated_arrays(folder: Path) -> None:
    content = (folder / "sweep.npz").read_bytes()
    rewrite(folder)
    (folder / "sweep.npz").write_bytes(content[: len(content) // 2])


def flipped_bit(folder: Path) -> None:
    content = bytearray((folder / "sweep.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "sweep.npz").write_bytes(content)


def of_another_sweep(folder: Path) -> None:
    sweep(GPT2.shared(), [1, 2]).save(folder / "other")
    (folder / "other" / "sweep.npz").replace(folder / "sweep.npz")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "sweep.json").unlink(), "No such file or directory: .*sweep.json"),
        (lambda folder: (folder / "sweep.npz").unlink(), "No such file or directory: .*sweep.npz"),
        (lambda folder: (folder / "sweep.json").write_text('{"imputations": ["ze'), "JSONDecodeError"),
        (lambda folder: (folder / "sweep.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
        (lambda folder: (folder / "sweep.json").write_text("[1, 2]"), "AttributeError"),
        (lambda folder: (folder / "sweep.json").write_text("{}"), "KeyError: 'imputations'"),
        (lambda folder: (folder / "sweep.json").write_text("[" * 100_000), "RecursionError"),
        (truncated_arrays, "BadZipFile"),
        (flipped_bit, "sweep.npz is not the file that was saved"),
        (of_another_sweep, "sweep.npz is not the file that was saved"),
        (lambda folder: rewrite(folder, margin=np.array([{}])), "allow_pickle=False"),
        (lambda folder: rewrite(folder, margin=None), "'margin'"),
        (lambda folder: rewrite(folder, surprise=np.ones(3)), "'surprise'"),
        (lambda folder: rewrite(folder, margin=np.ones((2, 2, 4))), "margin has the dimensions"),
        (lambda folder: rewrite(folder, argmax=np.ones((2, 2, 3))), "argmax has .* the dtype float64"),
        (lambda folder: rewrite(folder, clean_argmax=np.ones(3)), "the clean argmax"),
        (lambda folder: rewrite(folder, head_mean=np.float64(1)), "'float' object has no attribute"),
    ],
)
def test_damaged_result_is_a_named_error(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    sweep(GPT2.shared(), IDS).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InvalidResult, match=f"(?s)no result can be read from .*{reason}") as error:
        SweepResult.load(tmp_path)
    assert "\n" not in str(error.value)


def test_result_without_digests_is_loaded(tmp_path: Path) -> None:
    result = sweep(GPT2.shared(), IDS)
    result.save(tmp_path)
    rewrite(tmp_path)
    assert np.array_equal(SweepResult.load(tmp_path).margin, result.margin)


def test_save_keeps_another_result_unless_told(tmp_path: Path) -> None:
    first, second = sweep(GPT2.shared(), IDS), sweep(GPT2.shared(), [1, 2])
    first.save(tmp_path / "new" / "folder")
    with pytest.raises(InvalidOutput, match="holds the result of another question"):
        second.save(tmp_path / "new" / "folder")
    assert SweepResult.load(tmp_path / "new" / "folder").provenance["token_ids"] == IDS
    second.save(tmp_path / "new" / "folder", overwrite=True)
    assert SweepResult.load(tmp_path / "new" / "folder").provenance["token_ids"] == [1, 2]


def test_provenance_can_be_added_by_replace() -> None:
    """`dataclasses.replace` keeps the arrays, as the same objects."""
    result = sweep(GPT2.shared(), IDS)
    named = replace(result, provenance={"model": "x", **result.provenance})
    assert named.margin is result.margin and named.provenance["model"] == "x"
