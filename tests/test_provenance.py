"""What a result was made with: the whole source of the model, its weights and its quantisation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ablation import models
from ablation.checks.decoders import Decoder
from ablation.provenance import of_model, weights_digest
from ablation.results import Result
from tests.test_cli import Run, run  # noqa: F401 (fixture)
from tests.test_models import folder  # noqa: F401 (fixture)
from tests.test_output import quick  # noqa: F401 (fixture)

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
ZERO = ["--imputation", "zero"]
pytestmark = pytest.mark.usefixtures("quick")


class Sharded:
    """Stands in for a tensor whose bytes are elsewhere, such as a DTensor: it has no view and no numpy."""

    is_meta, dtype, shape = False, "float32", (2,)

    def detach(self) -> None:
        raise RuntimeError("aten.view.dtype: got mixed torch.Tensor and DTensor\nconvert them first")


def test_weights_without_bytes_do_not_lose_the_result(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = GPT2.fresh()
    monkeypatch.setattr(model, "state_dict", lambda: {"a.weight": Sharded()})
    digest = weights_digest(model)
    assert digest["weights_sha256"] is None and "mixed torch.Tensor" in str(digest["weights_sha256_missing"])
    monkeypatch.setattr("ablation.provenance.weights_digest", lambda _: digest)
    assert run(*ZERO, "--out", "out")[0] == 0
    assert Result.load("out").provenance["weights_sha256"] is None


def test_provenance_has_the_full_source(run: Run, folder: Path) -> None:  # noqa: F811
    run("--model", os.path.relpath(folder), "--prompt", "Berlin is", *ZERO, "--out", "out")
    made = Result.load("out").provenance
    assert (made["model"], made["source"], made["revision"], made["quantisation"]) == (
        folder.name,
        str(folder.resolve()),
        None,
        None,
    )
    run(*ZERO, "--out", "named", "--model", f"capitals={Path(models.__file__).parent / 'capitals'}")
    assert Result.load("named").provenance["source"].startswith("capitals=/")


def test_provenance_has_the_quantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BitsAndBytesConfig

    model = GPT2.fresh()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    found = of_model(model)["quantisation"]
    assert found["load_in_8bit"] is True and json.loads(json.dumps(found)) == found
