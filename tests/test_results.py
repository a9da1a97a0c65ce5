"""Results are saved and loaded without loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.checks.decoders import Decoder
from ablation.errors import InvalidOutput, InvalidResult
from ablation.results import RECEIPTS, Result
from ablation.sweeps import sweep
from tests.comparing import IDS

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)


def arrays(result: Result) -> dict[str, Any]:
    """Every array of a result."""
    return {
        **{f"clean.{name}": values for name, values in result.clean.items()},
        **{f"ablated.{name}": values for name, values in result.ablated.items()},
        **{name: getattr(result, name) for name in ("head_mean", *RECEIPTS)},
    }


def test_loaded_result_equals_the_saved_one(tmp_path: Path) -> None:
    result = sweep(GPT2.shared(), IDS)
    result.save(str(tmp_path))
    loaded = Result.load(str(tmp_path))
    assert loaded.provenance == json.loads(json.dumps(result.provenance))
    assert loaded.ablations == result.ablations and type(loaded.ablations) is tuple
    assert loaded.prompts == result.prompts and type(loaded.prompts) is tuple
    assert list(loaded.clean) == list(result.clean) and list(loaded.ablated) == list(result.ablated)
    for name, value in arrays(result).items():
        again = arrays(loaded)[name]
        assert type(again) is type(value) and np.array_equal(again, value), name
        assert again.dtype == value.dtype and again.shape == value.shape, name


def test_saved_text_is_readable_utf8(tmp_path: Path) -> None:
    replace(sweep(GPT2.shared(), IDS, imputations=["zero"]), provenance={"prompt": "Zürich"}).save(tmp_path)
    text = (tmp_path / "sweep.json").read_text(encoding="utf-8")
    head = '{\n  "ablations": [\n    {\n      "heads": "L0H0",\n      "imputation": "zero"\n    },'
    assert text.startswith(head) and '\n  "provenance": {\n    "prompt": "Zürich"\n  },\n  "files": {' in text
    content = json.loads(text)
    assert list(content) == ["ablations", "prompts", "provenance", "files"]
    assert content["files"].keys() == {"sweep.npz"}


def rewrite(folder: Path, **arrays: Any) -> None:
    """Replace arrays of a saved result, with the digest of the new file."""
    with np.load(folder / "sweep.npz") as saved:
        kept = dict(saved)
    np.savez(folder / "sweep.npz", **{k: v for k, v in (kept | arrays).items() if v is not None})
    as_saved(folder)


def as_saved(folder: Path) -> None:
    """Record the digest of sweep.npz as it is now."""
    digest = hashlib.sha256((folder / "sweep.npz").read_bytes()).hexdigest()
    rewrite_json(folder, files={"sweep.npz": digest})


def rewrite_json(folder: Path, **values: Any) -> None:
    """Replace values of sweep.json; None removes one."""
    content = json.loads((folder / "sweep.json").read_text()) | values
    (folder / "sweep.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def truncated_arrays(folder: Path) -> None:
    content = (folder / "sweep.npz").read_bytes()
    (folder / "sweep.npz").write_bytes(content[: len(content) // 2])
    as_saved(folder)


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
        (lambda folder: (folder / "sweep.json").write_text("[1, 2]"), "TypeError: list"),
        (lambda folder: (folder / "sweep.json").write_text("{}"), "KeyError: 'files'"),
        (lambda folder: rewrite_json(folder, files={}), "sweep.npz is not the file that was saved"),
        (lambda folder: rewrite_json(folder, ablations=None), "KeyError: 'ablations'"),
        (lambda folder: rewrite_json(folder, ablations=[{"heads": 1}]), "TypeError: 'int'"),
        (lambda folder: rewrite_json(folder, ablations=[]), "calls has the dimensions"),
        (lambda folder: rewrite_json(folder, prompts=[]), "head_mean has the dimensions"),
        (lambda folder: rewrite_json(folder, prompts=[{"token_ids": []}]), "KeyError: 'target'"),
        (lambda folder: rewrite_json(folder, provenance=[]), "the provenance has the wrong type"),
        (lambda folder: (folder / "sweep.json").write_text("[" * 100_000), "RecursionError"),
        (truncated_arrays, "BadZipFile"),
        (flipped_bit, "sweep.npz is not the file that was saved"),
        (of_another_sweep, "sweep.npz is not the file that was saved"),
        (lambda folder: rewrite(folder, **{"ablated.margin": np.array([{}])}), "allow_pickle=False"),
        (lambda folder: rewrite(folder, **{"ablated.margin": None}), "clean and ablated runs have different metrics"),
        (lambda folder: rewrite(folder, **{"clean.kl": None, "ablated.kl": None}), "the metric kl is missing"),
        (lambda folder: rewrite(folder, calls=None), "'calls'"),
        (lambda folder: rewrite(folder, surprise=np.ones(3)), "'surprise'"),
        (lambda folder: rewrite(folder, **{"ablated.margin": np.ones((1, 11))}), "ablated margin has the dimensions"),
        (
            lambda folder: rewrite(folder, **{"ablated.argmax": np.ones((1, 12))}),
            "ablated argmax has .* the dtype float64",
        ),
        (lambda folder: rewrite(folder, **{"clean.argmax": np.ones(3, dtype=int)}), "clean argmax has"),
        (lambda folder: rewrite(folder, head_mean=np.float64(1)), r"head_mean has the dimensions \(\)"),
    ],
)
def test_damaged_result_is_a_named_error(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    sweep(GPT2.shared(), IDS).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InvalidResult, match=f"(?s)no result can be read from .*{reason}") as error:
        Result.load(tmp_path)
    assert "\n" not in str(error.value)


def test_damage_of_the_tests_keeps_what_it_does_not_change(tmp_path: Path) -> None:
    """Otherwise, the errors above could have another cause."""
    result = sweep(GPT2.shared(), IDS)
    result.save(tmp_path)
    rewrite(tmp_path)
    rewrite_json(tmp_path)
    assert np.array_equal(Result.load(tmp_path).ablated["margin"], result.ablated["margin"])


def test_save_keeps_another_result_unless_told(tmp_path: Path) -> None:
    first, second = sweep(GPT2.shared(), IDS), sweep(GPT2.shared(), [1, 2])
    first.save(tmp_path / "new" / "folder")
    with pytest.raises(InvalidOutput, match="holds the result of another question"):
        second.save(tmp_path / "new" / "folder")
    assert Result.load(tmp_path / "new" / "folder").prompts[0].token_ids == tuple(IDS)
    second.save(tmp_path / "new" / "folder", overwrite=True)
    assert Result.load(tmp_path / "new" / "folder").prompts[0].token_ids == (1, 2)


def test_provenance_can_be_added_by_replace() -> None:
    """`dataclasses.replace` keeps the arrays, as the same objects."""
    result = sweep(GPT2.shared(), IDS)
    named = replace(result, provenance={"model": "x", **result.provenance})
    assert named.ablated is result.ablated and named.head_mean is result.head_mean and named.provenance["model"] == "x"
