"""The specification on unusual models of a user: a right hook passes, and what proves nothing is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import MptConfig, MptForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedModel

from ablation.checks.check import unsupported_features
from ablation.checks.decoders import Decoder
from ablation.checks.driving import run
from ablation.checks.observe import recorded_inputs, state
from ablation.checks.on_model.every_head import EveryHead, try_every_head
from ablation.checks.on_model.own_model import OwnModel, shorter
from ablation.checks.on_model.report import findings
from ablation.checks.on_model.run import OF_THE_MODEL, Bare
from ablation.checks.runner import CHECKS, Record, run_check
from ablation.errors import UnsupportedModel
from ablation.heads import find_heads
from tests.implementations.ours import Ours
from tests.test_own_model import GPT2, PROMPT, ZeroAndMean, own, records_of


def mpt() -> PreTrainedModel:
    """Return a model with ALiBi, which counts hidden tokens."""
    torch.manual_seed(0)
    config = MptConfig(d_model=24, n_heads=3, n_layers=2, max_seq_len=64, vocab_size=41, initializer_range=0.3)
    return MptForCausalLM(config).eval()


def openai_gpt() -> PreTrainedModel:
    """Return a model that has no key/value cache."""
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=41, n_positions=64, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3)
    return OpenAIGPTLMHeadModel(config).eval()


@pytest.mark.families
@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        (Decoder("lfm2", 4, 3, 8).fresh, {"masks.single_row"}),
        (Decoder("gemma3", 2, 3, 8).fresh, {"masks.single_row", "independence.cache_kept"}),
        (mpt, {"masks.single_row"}),
        (openai_gpt, {"independence.cache", "independence.cache_padded", "independence.cache_kept", "positions.cache"}),
    ],
    ids=["convolutions", "sliding window", "ALiBi", "no cache"],
)
def test_right_hook_fails_nothing_that_the_model_breaks(model: Any, left_out: set[str]) -> None:
    prompt = [(3 * number + 1) % 41 for number in range(12)]  # longer than a window
    records = records_of(Ours, OwnModel(model(), "mine", [prompt]), "smoke", "oracle.zero", *OF_THE_MODEL)
    skipped = {record.id: record.reason for record in records if record.outcome == "skipped"}
    assert not [record.reason for record in records if record.outcome == "failed"]
    assert skipped.keys() == left_out
    assert all(reason.startswith("the model itself fails, with no head ablated: ") for reason in skipped.values())


def test_model_passes_with_no_head_ablated() -> None:
    checks = [check for check in CHECKS if check.id in OF_THE_MODEL]
    assert len(checks) == len(OF_THE_MODEL)
    for check in checks:
        offered: Any = type("Offers", (Bare,), {"imputations": ("zero",), "unsupported": {}})
        assert run_check(check, offered, quick=True).outcome in ("passed", "skipped"), check.id


# ---- what belongs to the model


class Freezes(ZeroAndMean):
    """Leaves the weights frozen, and a gradient."""

    def close(self) -> None:
        super().close()
        self.model.requires_grad_(False)
        find_heads(self.model).layers[0].projection.weight.grad = torch.ones(24, 24)


def test_frozen_weights_are_found_after_other_checks() -> None:
    mine = own()
    before = state(mine.fresh())
    outcomes = {record.id: record for record in records_of(Freezes, mine, "smoke", "identity", "hygiene.restored")}
    assert outcomes["identity"].outcome == "passed" and outcomes["hygiene.restored"].outcome == "failed"
    assert "the model is not as it was found: " in outcomes["hygiene.restored"].reason
    assert state(mine.fresh()) == before


def test_recorder_keeps_a_forward_of_the_users() -> None:
    """Accelerate sets one on each module that it moves between devices."""
    model = GPT2.fresh()
    first, second = (layer.projection for layer in find_heads(model).layers)
    kept = first.forward = first.forward
    with recorded_inputs(model) as calls:
        run(model, {"input_ids": torch.tensor([[1, 2]])})
    assert [len(of_layer) for of_layer in calls.values()] == [1, 1]
    assert vars(first)["forward"] is kept and "forward" not in vars(second)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda model: model.transformer.h[0].attn.c_proj.weight.data.fill_(float("nan")), "in float32 are not finite"),
        (lambda model: setattr(model.transformer, "wte", nn.Identity()), "mine cannot be run: "),
        (lambda model: model.transformer.h[1].attn.c_proj.to("meta"), "h.1.attn.c_proj is not in memory: "),
    ],
    ids=["NaN", "it raises", "offloaded"],
)
def test_unusable_model_is_refused_in_one_line(spoil: Any, problem: str) -> None:
    model = GPT2.fresh()
    spoil(model)
    with pytest.raises(UnsupportedModel, match=problem):
        OwnModel(model, "mine", [PROMPT])


@pytest.mark.parametrize("length", [3, 4, 5])
def test_shorter_row_has_both_positions_of_the_cases(length: int) -> None:
    row = PROMPT[:length]
    assert 2 <= len(shorter(row)) < len(row)
    (record,) = records_of(Ours, own(GPT2, row), "positions")
    assert record == Record("positions", "passed")


# ---- every head


class RaisesForOneHead(ZeroAndMean):
    imputations: ClassVar[tuple[str, ...]] = ("mine",)

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        if (0, 1) in heads:
            raise IndexError("out of range")
        super().ablate(heads, "scale:-2" if heads else "zero")


def test_error_under_an_own_imputation_fails_locality() -> None:
    (record,) = records_of(RaisesForOneHead, own(), "locality")
    assert record.outcome == "failed"
    assert "found: 1 of 6 heads are wrong: ablating L0H1 raised IndexError: out of range" in record.reason


class IgnoresPositionsOfValues(Ours):
    imputations: ClassVar[tuple[str, ...]] = ("values",)

    def ablate(self, heads: Any, imputation: str, *, values: Any = None, positions: Any = None) -> None:  # type: ignore[override]
        first = {pair: value[0] if value.ndim == 2 else value for pair, value in (values or {}).items()}
        super().ablate(heads, imputation, values=first, positions=positions)


def test_values_are_given_by_position_in_every_second_layer() -> None:
    mine = own(Decoder("gpt2", num_layers=4, num_heads=3, head_dim=8))
    found = try_every_head(IgnoresPositionsOfValues, mine)
    assert {each.pair[0] for each in found.wrong("values", mine.tolerance)} == {1, 3}
    (record,) = records_of(IgnoresPositionsOfValues, mine, "oracle.values")
    assert record.outcome == "failed" and "values imputation by position" in record.reason


class OneRow(ZeroAndMean):
    unsupported: ClassVar[dict[str, str]] = {"batch": "one prompt at a time"}


def test_prompts_of_other_lengths_count_as_left_out() -> None:
    mine = own(GPT2, PROMPT, (1, 2, 3, 4), (6, 5, 4, 3, 2, 1))
    found: EveryHead = try_every_head(OneRow, mine, ["zero"])
    first, *_ = findings(mine, found)
    assert "on one row of 6 tokens; " in first and first.endswith("; 2 prompts were left out")


# ---- declarations


def declaring(**unsupported: str) -> Any:
    return type("Declares", (ZeroAndMean,), {"unsupported": unsupported})


def in_float16() -> OwnModel:
    return OwnModel(GPT2.fresh().half(), "mine", [PROMPT])


def text_of_gemma() -> OwnModel:
    return own(Decoder("gemma3", 2, 3, 8))


def vision_of_gemma() -> OwnModel:
    return own(Decoder("gemma3_vision", 2, 3, 8))


@pytest.mark.parametrize(
    ("make", "name"), [(in_float16, "float16"), (text_of_gemma, "gemma3"), (vision_of_gemma, "gemma3_vision")]
)
def test_declared_model_is_not_tried(make: Any, name: str) -> None:
    factory = declaring(**{name: "never tried"})
    assert unsupported_features(factory)[name] == "never tried"
    (record,) = records_of(factory, make(), "smoke")
    assert record == Record("smoke", "skipped", f"does not support {name!r}: never tried")
