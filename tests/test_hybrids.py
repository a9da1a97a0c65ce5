"""Models in which some layers have no attention heads, or fewer: a missing head is counted nowhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForImageTextToText, Lfm2Config, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ablation.checks.assertions import assert_close
from ablation.checks.decoders import Decoder, randomised
from ablation.errors import InvalidHead, UnsupportedModel
from ablation.figures import maps, of_sweeps
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.reports import report
from ablation.results import INTEGERS, METRICS, RECEIPTS, Result
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, IDS, assert_falls_back, assert_results_equal
from tests.families.configurations import build, logits, tiny
from tests.families.evidence import check_heads, check_zero_oracle
from tests.test_figures import assert_composed, drawn, texts_of  # noqa: F401 (fixture)

# Layer 1 alone has heads: gated attention among linear ones. Layers of 6, 4 and 6 heads.
HYBRID, RAGGED = "qwen3_next", "inkling_text"
PRESENT = {HYBRID: [[0] * 4, [1] * 4, [0] * 4], RAGGED: [[1] * 6, [1, 1, 1, 1, 0, 0], [1] * 6]}


@cache
def model_of(family: str) -> PreTrainedModel:
    return build(family)


@cache
def swept(family: str) -> Result:
    return sweep(model_of(family), IDS)


def test_layers_keep_their_index_and_number_of_heads() -> None:
    hybrid, ragged = find_heads(model_of(HYBRID)), find_heads(model_of(RAGGED))
    assert (hybrid.shape, ragged.shape) == ((3, 4), (3, 6))
    assert list(hybrid) == [(1, head) for head in range(4)]
    assert [(layer.index, layer.num_heads, layer.key_value_heads, layer.head_dim) for layer in ragged.layers] == [
        (0, 6, 2, 8),
        (1, 4, 2, 16),
        (2, 6, 2, 8),
    ]
    assert hybrid.layer(1).projection_name == "model.layers.1.self_attn.o_proj"


def test_layers_are_in_the_order_of_the_model_not_of_names() -> None:
    """Sorted by name, layer 10 comes before layer 2; and the first projection does not belong to layer 0."""
    layer_types = ["conv"] * 12
    layer_types[2] = layer_types[10] = layer_types[11] = "full_attention"
    shape: dict[str, Any] = dict(num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2)
    config = Lfm2Config(vocab_size=41, hidden_size=32, intermediate_size=48, layer_types=layer_types, **shape)
    model = randomised(config, 1)
    heads = find_heads(model)
    assert [(layer.index, layer.projection_name) for layer in heads.layers] == [
        (index, f"model.layers.{index}.self_attn.out_proj") for index in (2, 10, 11)
    ]
    check_zero_oracle(model, heads)
    assert check_heads(model, heads)


@pytest.mark.filterwarnings("ignore")  # in transformers' own code
@pytest.mark.parametrize(
    ("family", "decoder"), [("llava", "language_model"), ("idefics3", "text_model"), ("mllama", "language_model")]
)
def test_heads_of_a_vision_model_are_those_of_its_text(family: str, decoder: str) -> None:
    """The vision tower has projections of the same names, before those of the text; Mllama also cross-attention."""
    config = tiny(CONFIG_MAPPING[family])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1 / min(parameter.shape, default=1) ** 0.5)
    heads = find_heads(model)
    assert [layer.projection_name for layer in heads.layers] == [
        f"model.{decoder}.layers.{index}.self_attn.o_proj" for index in range(3)
    ]
    check_zero_oracle(model, heads)
    assert check_heads(model, heads)


@pytest.mark.filterwarnings("ignore")
def test_prefix_language_model_is_refused() -> None:
    """PaliGemma sees its whole prompt at once, as a masked language model does."""
    config = tiny(CONFIG_MAPPING["paligemma"])
    model = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match="^PaliGemmaForConditionalGeneration is bidirectional, not a causal"):
        sweep(model, IDS)


@pytest.mark.parametrize(
    ("family", "pair", "reason"),
    [
        (HYBRID, (0, 0), "layer 0 has no attention heads"),
        (HYBRID, (3, 0), "no layer 3: the model has 3 layers, 0 to 2"),
        (RAGGED, (1, 4), "no head 4: layer 1 has 4 heads, 0 to 3"),
    ],
)
def test_missing_head_is_refused(family: str, pair: tuple[int, int], reason: str) -> None:
    with HeadAblation(model_of(family)) as ablation, pytest.raises(InvalidHead, match=reason):
        ablation.ablate([pair])


def test_layer_without_heads_has_no_receipt() -> None:
    model = model_of(HYBRID)
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 2)])
        logits(model)
        assert ablation.receipt.calls == [0, 1, 0]
        assert list(ablation.receipt.counts) == [1]


@pytest.mark.parametrize("family", [HYBRID, RAGGED])
def test_missing_heads_have_no_values(family: str) -> None:
    result, has_head = swept(family), np.array(PRESENT[family], dtype=bool)
    assert result.provenance["method"] == "growing batch"
    assert_results_equal(result, sweep_sequential(model_of(family), IDS), ATOL["float32"])
    assert np.array_equal(result.has_head, has_head)
    assert len(result.ablations) == 2 * has_head.sum()
    changes = {f"change of {name}": result.change(name) for name in METRICS}
    receipts = {name: getattr(result, name) for name in RECEIPTS}
    for name, values in (changes | dict(result.ablated) | receipts).items():
        array = result.grid(values)
        assert array.shape == (1, 2, *has_head.shape), name
        assert np.isfinite(array[..., has_head]).all(), name
        if values.dtype.kind == "f":
            assert np.isnan(array[..., ~has_head]).all(), name
        else:
            assert (array[..., ~has_head] == -1).all(), name
    assert {name for name in METRICS if result.ablated[name].dtype.kind == "i"} == set(INTEGERS)
    assert np.array_equal(np.isfinite(result.head_mean[0]), has_head)
    assert (result.calls == 1).all()
    kept, flipped = result.grid(result.kept)[0], result.grid(~result.kept)[0]
    assert np.array_equal(kept | flipped, np.stack([has_head] * 2)) and not (kept & flipped).any()


@pytest.mark.parametrize("family", [HYBRID, RAGGED])
def test_loaded_result_equals_the_saved_one_of_a_hybrid(family: str, tmp_path: Path) -> None:
    swept(family).save(tmp_path)
    loaded = Result.load(tmp_path)
    assert_results_equal(loaded, swept(family), atol=0)
    assert np.array_equal(loaded.has_head, swept(family).has_head)


@pytest.mark.parametrize("family", [HYBRID, RAGGED])
def test_findings_cover_existing_heads_only(family: str) -> None:
    result, heads = swept(family), list(find_heads(model_of(family)))
    found = report.findings(result, str)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["heads"] == len(heads)
    assert found["head_means"]["mean"] == pytest.approx(np.mean([result.head_mean[0][pair] for pair in heads]))
    change = result.grid(result.change("target_probability"))[0]
    for index, of in enumerate(found["imputations"].values()):
        assert of["kept"] + len(of["flips"]) == len(heads)
        changes = {pair: change[(index, *pair)] for pair in heads}
        for key, best in (("target_raised", max), ("target_lowered", min)):
            if of[key]:
                assert of[key][0]["change"] == best(changes.values())
                assert changes[of[key][0]["layer"], of[key][0]["head"]] == of[key][0]["change"]
    assert found["layers_without_heads"] == ([0, 2] if family == HYBRID else [])
    assert ("no attention heads in 2 of 3 layers: 0, 2" in report.render(found)) == (family == HYBRID)


@pytest.mark.end_to_end
def test_figures_mark_missing_heads(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    result = swept(HYBRID)
    paths = of_sweeps.draw(result, tmp_path, title="a hybrid", decode=lambda *_: "a")
    for path, figure in zip(paths, drawn, strict=True):
        assert_composed(figure)
        assert ("no heads" in {text.get_text() for text in texts_of(figure)}) == (
            path.stem not in ("histograms", "agreement")
        )
    assert [patch.get_label() for patch in maps.missing_heads_legend(swept(RAGGED).head_mean[0])] == ["no such head"]


def test_rows_mixed_up_in_one_layer_are_noticed() -> None:
    """As in HY-V4, the clean row and the first and last ablated rows are right."""
    model = Decoder("gpt2", num_layers=3, num_heads=4, head_dim=2).shared()

    def mix(_: object, args: object, out: Tensor) -> Tensor:
        return torch.cat([out[:9], out[9:10].expand(len(out) - 9, -1, -1)]) if len(out) > 9 else out

    assert_falls_back(model, 1, mix)


def test_mean_in_a_multi_part_model_leaves_out_padding() -> None:
    """Its text decoder receives a mask for each layer type instead of the model's mask."""
    model = build("gemma3")
    ids = torch.tensor([[3, 17, 4, 29, 5, 11], [3, 17, 4, 29, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.ablate([(1, 2)], "mean")
        padded = model(ids, attention_mask=mask, use_cache=False).logits[1, :4]
        alone = model(ids[1:, :4], use_cache=False).logits[0]
        ablation.clear()
        clean = model(ids[1:, :4], use_cache=False).logits[0]
    assert_close(padded, alone, "the logits of a row, padded")
    assert not torch.allclose(alone, clean, atol=1e-3)
