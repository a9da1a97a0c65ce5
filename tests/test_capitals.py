"""The shipped model does what its documentation says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ablation import models
from ablation.capitals import data
from ablation.heads import find_heads
from ablation.prompts import continuation_ids, prompt_ids

FOLDER = Path(models.__file__).parent / "capitals"


def probabilities(loaded: models.LoadedModel, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.tensor([prompt_ids(loaded.tokenizer, prompt)])).logits[0, -1].softmax(-1)


def test_capitals_has_the_grid_of_gpt2_small_in_3_mb(capitals: models.LoadedModel) -> None:
    assert find_heads(capitals.model).shape == (12, 12)
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 3e6


def test_capitals_answers_nine_of_ten_before_the(capitals: models.LoadedModel) -> None:
    assert len(data.CAPITALS) >= 30
    right = runner_up = 0
    (the,) = continuation_ids(capitals.tokenizer, " the")
    for capital, country in data.CAPITALS:
        first, second = probabilities(capitals, f"{capital} is the capital of").topk(2).indices.tolist()
        right += (first,) == continuation_ids(capitals.tokenizer, f" {country}")
        runner_up += second == the
    assert right >= 0.9 * len(data.CAPITALS), f"{right} of {len(data.CAPITALS)} right"
    assert runner_up >= 0.9 * len(data.CAPITALS), f"runner-up ' the' for {runner_up} of {len(data.CAPITALS)}"


def test_germany_has_more_than_half_for_berlin(capitals: models.LoadedModel) -> None:
    (germany,) = continuation_ids(capitals.tokenizer, " Germany")
    assert probabilities(capitals, "Berlin is the capital of")[germany] > 0.5


def test_tokenizer_round_trips_every_sentence(capitals: models.LoadedModel) -> None:
    for sentence in data.sentences():
        assert capitals.tokenizer.decode(capitals.tokenizer(sentence)["input_ids"]) == sentence


@pytest.mark.end_to_end
def test_training_writes_a_model_that_loads(tmp_path: Path) -> None:
    """Two steps only, since the whole training takes minutes."""
    out = tmp_path / "trained"
    command = [sys.executable, "-m", "ablation.capitals.train", "--steps", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert find_heads(models.load(str(out)).model).shape == (12, 12)
    for file in ("config.json", "tokenizer.json"):
        made, shipped = (json.loads((place / file).read_text()) for place in (out, FOLDER))
        assert made | {"transformers_version": None} == shipped | {"transformers_version": None}
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "Traceback" not in again.stderr
