"""The specification on the user's own model: one copy, restored for each case, and every head against surgery."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ablation.checks import adapter_from_context
from ablation.checks.check import CheckFailure
from ablation.checks.decoders import Decoder
from ablation.checks.driving import run
from ablation.checks.observe import changes, state
from ablation.checks.on_model.every_head import EveryHead, _spread, padded_case, try_every_head
from ablation.checks.on_model.own_model import NOISE_FACTOR, OwnModel
from ablation.checks.on_model.report import findings, listed
from ablation.checks.on_model.run import DAMAGED, EVERY_HEAD, FAILED_AT_ALL, ModelRun
from ablation.checks.oracles import surgery_logits
from ablation.checks.protocol import IMPUTATIONS
from ablation.checks.runner import CHECKS, Record
from ablation.errors import UnsupportedModel
from ablation.heads import find_heads
from tests.implementations.ours import Ours
from tests.implementations.surgery import Surgery
from tests.mutants.index import NextHead
from tests.mutants.mean import MeanOfPadding
from tests.mutants.shape import WidthFromHidden
from tests.mutants.site import PseudoHeads

PROMPT = (3, 14, 15, 9, 26, 5)
QWEN3 = Decoder("qwen3", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=8)


def own(decoder: Decoder = GPT2, *rows: Sequence[int]) -> OwnModel:
    return OwnModel(decoder.fresh(), f"my-{decoder.family}", rows or (PROMPT,))


class ZeroAndMean(Ours):
    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")


@cache
def every_head(factory: Any, decoder: Decoder = QWEN3) -> tuple[OwnModel, EveryHead]:
    model = own(decoder)
    return model, try_every_head(factory, model)


# ---- one model


def test_fresh_model_has_nothing_of_an_implementation() -> None:
    mine = own()
    model = mine.fresh()
    kept = model.register_forward_pre_hook(lambda *_: None)
    mine = OwnModel(model, "mine", [PROMPT])
    before = state(model)
    layer = find_heads(model).layers[0]
    layer.projection.register_forward_pre_hook(lambda *_: None)
    layer.projection.forward = lambda z: z
    layer.block.attn = nn.Identity()
    model.train()
    model.config.use_cache = not model.config.use_cache
    assert len(changes(model, before)) >= 5
    assert not changes(mine.fresh(), before)
    kept.remove()  # the table of hooks is the same object, so the user's handle still works
    assert not model._forward_pre_hooks


def test_changed_weights_are_noticed() -> None:
    mine = own()
    assert mine.is_intact
    with torch.no_grad():
        find_heads(mine.fresh()).layers[1].projection.weight[0, 0] += 1
    assert not mine.is_intact


def test_surgery_leaves_the_weights_as_they_were() -> None:
    mine = own(QWEN3)
    before = state(mine.fresh())
    for name in IMPUTATIONS:
        case = mine.case(mine.rows, heads=((0, 1), (2, 3)), imputation="scale:0.5" if name == "scale" else name)
        surgery_logits(case)
        assert not changes(mine.fresh(), before), name


def test_noise_is_of_the_model_and_padding_is_judged_by_it() -> None:
    mine = own()
    eps, largest = torch.finfo(torch.float32).eps, mine.clean.abs().max().item()
    assert eps / 2 <= mine.noise < 64 * eps
    assert mine.can_be_padded
    assert mine.tolerance == NOISE_FACTOR * max(mine.noise, mine.padding_noise) * largest


def test_model_that_padding_disturbs_is_not_padded() -> None:
    class SeesPadding(nn.Module):
        def __init__(self, embedding: Any) -> None:
            super().__init__()
            self.embedding = embedding

        @property
        def weight(self) -> Tensor:
            return self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids) * ids.shape[-1]

    model = GPT2.fresh()
    model.transformer.wte = SeesPadding(model.transformer.wte)
    mine = OwnModel(model, "mine", [PROMPT])
    assert not mine.can_be_padded
    case, prompts = padded_case(ZeroAndMean, mine)
    assert not case.is_padded and prompts == 1
    records = records_of(ZeroAndMean, mine, "identity.padded", "locality")
    assert [record.outcome for record in records] == ["skipped", "passed"]


@pytest.mark.parametrize("kind", ["quantised", "adapter"])
def test_model_without_editable_weights_is_refused(kind: str) -> None:
    model = GPT2.fresh()
    layer = find_heads(model).layers[1]
    if kind == "quantised":
        projection: Any = layer.projection
        projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    else:

        class Wrapper(nn.Module):
            def __init__(self, base_layer: nn.Module) -> None:
                super().__init__()
                self.base_layer = base_layer

        layer.block.attn.c_proj = Wrapper(layer.projection)
    with pytest.raises(UnsupportedModel, match=r"transformer.h.1.attn.c_proj .*cannot be edited"):
        OwnModel(model, "mine", [PROMPT])


# ---- every head


@pytest.mark.parametrize(
    "decoder", [GPT2, QWEN3, Decoder("lfm2", 4, 3, 8), Decoder("gemma3", 2, 3, 8)], ids=lambda d: d[0]
)
def test_right_hook_is_right_on_every_head(decoder: Decoder) -> None:
    mine, found = every_head(Ours, decoder)
    assert list(found.outcomes) == list(IMPUTATIONS)
    for name, outcomes in found.outcomes.items():
        assert [each.pair for each in outcomes] == mine.heads()
        assert not found.wrong(name, mine.tolerance), name
        assert not any(each.z_problem for each in outcomes), name
        assert all(each.kept == each.right_kept for each in outcomes)
        assert not found.too_small(name, mine.tolerance), name
    assert found.case.is_padded and found.prompts == 1


@pytest.mark.parametrize(
    ("factory", "imputation", "wrong"),
    [
        (PseudoHeads, "zero", "L* (all)"),
        (NextHead, "zero", "L* (all)"),
        (MeanOfPadding, "mean", "L* (all)"),
        (WidthFromHidden, "zero", "L* (all)"),
    ],
)
def test_wrong_hook_is_named_with_its_heads(factory: Any, imputation: str, wrong: str) -> None:
    mine, found = every_head(factory)
    bad = found.wrong(imputation, mine.tolerance)
    assert listed(bad, mine) == wrong
    worst = bad[0]
    case = found.case.decoder.case(found.case.rows, heads=(worst.pair,), imputation=imputation, side="left")
    right, real = surgery_logits(case), case.replaced()
    assert worst.effect == (right[real] - run(mine.fresh(), case.inputs())[real]).abs().max().item() > 0
    assert any(each.z_problem for each in found.outcomes[imputation])


class WrongInLayerOne(ZeroAndMean):
    """Halves the ablated heads of one layer, in place of the imputation."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        wrong = [layer for layer, _ in heads if layer == 1]
        super().ablate(heads, "scale:0.5" if wrong else imputation, **keywords)


def test_only_wrong_heads_are_listed() -> None:
    mine, found = every_head(WrongInLayerOne)
    assert listed(found.wrong("zero", mine.tolerance), mine) == "L1"
    text = "\n".join(findings(mine, found))
    assert "zero: 8 of 12 heads have the right logits; wrong: L1\n" in text
    assert "the answer is kept in" in text and "strongest heads" in text


class Raises(ZeroAndMean):
    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        if (2, 1) in heads:
            raise RuntimeError("no such head\nhere")
        super().ablate(heads, imputation, **keywords)


def test_errors_of_the_implementation_are_outcomes() -> None:
    mine, found = every_head(Raises)
    (bad,) = found.wrong("mean", mine.tolerance)
    assert bad.pair == (2, 1) and bad.raised == "RuntimeError: no such head here"
    assert "L2H1 raised RuntimeError: no such head here" in "\n".join(findings(mine, found))


@contextmanager
def skips_one(model: Any, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Register a hook for each head but one."""
    handles = []
    for index, head in heads:
        layer = find_heads(model).layer(index)
        channels = layer.channels(head)

        def zeroed(module: Any, args: Any, channels: slice = channels) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., channels] = 0
            return (z,)

        if (index, head) != (2, 1):
            handles.append(layer.projection.register_forward_pre_hook(zeroed))
    yield
    for handle in handles:
        handle.remove()


def test_head_that_is_left_out_is_the_likely_cause() -> None:
    (record,) = records_of(adapter_from_context(skips_one, imputations=["zero"]), own(QWEN3), "oracle.zero")
    assert "found: 1 of 12 heads are wrong: L2H1" in record.reason
    assert "likely cause: nothing is ablated for head 1 of layer 2, but other heads are" in record.reason


class CannotBeMade(ZeroAndMean):
    def __init__(self, model: Any) -> None:
        raise OSError("the hub cannot be reached")


def test_implementation_that_cannot_be_made_fails_on_all_heads() -> None:
    _, found = every_head(CannotBeMade)
    assert {each.raised for each in found.outcomes["zero"]} == {"OSError: the hub cannot be reached"}


class OwnImputation(Ours):
    imputations: ClassVar[tuple[str, ...]] = ("mine",)

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        super().ablate(heads, "scale:-2" if heads else "zero")


def test_imputation_of_its_own_is_judged_by_z_alone() -> None:
    mine, found = every_head(OwnImputation)
    assert list(findings(mine, found))[1:] == ["mine: the z of 12 of 12 heads is as required; logits are not compared"]


def test_implementation_on_a_copy_is_judged_by_its_logits() -> None:
    mine, found = every_head(Surgery)
    assert list(found.outcomes) == ["zero", "scale", "reference-mean"]
    assert not any(found.wrong(name, mine.tolerance) for name in found.outcomes)


class OneRow(ZeroAndMean):
    unsupported: ClassVar[dict[str, str]] = {"batch": "one prompt at a time"}


class NoPadding(ZeroAndMean):
    unsupported: ClassVar[dict[str, str]] = {"padding": "equal lengths only"}


def test_batch_is_what_the_implementation_supports() -> None:
    mine = own(GPT2, PROMPT, (1, 2, 3, 4), (6, 5, 4, 3, 2, 1))
    assert padded_case(OneRow, mine)[0].rows == (PROMPT,)
    assert padded_case(NoPadding, mine)[0].rows == (PROMPT, (6, 5, 4, 3, 2, 1))
    case, prompts = padded_case(ZeroAndMean, mine)
    assert case.rows == mine.rows and prompts == 3 and case.is_padded


def test_check_without_time_is_not_tried() -> None:
    identity, locality, zero = records_of(ZeroAndMean, own(QWEN3), "identity", "locality", "oracle.zero", minutes=1e-9)
    assert identity.outcome == "passed"
    for record in (locality, zero):
        assert record.outcome == "skipped"
        assert record.reason.startswith("no time was left for 3 of 3 layers: give more --minutes")


def test_layers_left_out_for_lack_of_time_are_named() -> None:
    mine = own(QWEN3)
    found = try_every_head(ZeroAndMean, mine, deadline=time.monotonic() - 1)
    assert found.left_out == {"zero": [0, 1, 2], "mean": [0, 1, 2]} and not any(found.outcomes.values())
    assert list(findings(mine, found))[1:] == [
        f"{name}: no time was left for 3 layers: L0, L1, L2 (--minutes)" for name in ("zero", "mean")
    ]


def test_first_layers_tried_are_spread_over_the_model() -> None:
    assert _spread(range(8)) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(_spread([1, 3, 5, 9, 11])) == [1, 3, 5, 9, 11]


# ---- the run


def records_of(factory: Any, mine: OwnModel, *ids: str, **options: Any) -> list[Record]:
    checks = [check for check in ModelRun.checks if not ids or check.id in ids]
    model_run = ModelRun(factory, mine, **options)
    return [model_run(check) for check in checks]


@pytest.mark.slow
def test_right_hook_passes_all_checks_on_a_model() -> None:
    records = records_of(Ours, own(GPT2))
    assert {record.outcome for record in records} == {"passed"}, [r.reason for r in records if r.outcome != "passed"]


def test_checks_on_a_model_are_those_of_the_specification() -> None:
    assert set(ModelRun.checks) <= set(CHECKS) and set(EVERY_HEAD) <= {check.id for check in ModelRun.checks}
    assert set(EVERY_HEAD.values()) == set(IMPUTATIONS)


class ChangesAWeight(ZeroAndMean):
    def close(self) -> None:
        super().close()
        with torch.no_grad():
            find_heads(self.model).layers[0].projection.weight[0] *= 2


def test_damaged_weights_end_the_run() -> None:
    first, *rest = records_of(ChangesAWeight, own(), "smoke", "identity", "oracle.zero")
    assert first.outcome == "failed" and first.reason.endswith("damages the model in smoke: its logits are others")
    assert {record.reason for record in rest} == {DAMAGED}


class NoEffect(ZeroAndMean):
    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        pass


def test_hook_without_effect_ends_the_run() -> None:
    first, *rest = records_of(NoEffect, own(), "smoke", "identity", "oracle.zero")
    assert first.outcome == "failed" and "changed no logit" in first.reason
    assert {record.reason for record in rest} == {FAILED_AT_ALL}


class LeavesAHook(ZeroAndMean):
    def close(self) -> None:
        super().close()
        self.model.register_forward_hook(lambda *_: None)


def test_hooks_left_on_a_model_are_found_once() -> None:
    records = records_of(LeavesAHook, own(), "hygiene.restored", "oracle.zero")
    assert [record.outcome for record in records] == ["passed", "failed"]
    assert "not as it was found: the model._forward_hooks" in records[1].reason
    assert "repeat: the same command with -k hygiene.restored" in records[1].reason


def test_expected_failures_hold_on_a_model() -> None:
    expected = {"oracle.zero": "known", "identity": "gone"}
    records = records_of(WrongInLayerOne, own(), "identity", "oracle.zero", expected_failures=expected)
    assert [record.outcome for record in records] == ["unexpected pass", "expected failure"]


class NotForQwen3(ZeroAndMean):
    unsupported: ClassVar[dict[str, str]] = {"qwen3": "never tried"}


def test_model_of_an_unsupported_family_is_not_tried() -> None:
    (record,) = records_of(NotForQwen3, own(QWEN3), "smoke")
    assert record == Record("smoke", "skipped", "does not support 'qwen3': never tried")


def test_failure_of_every_head_names_the_worst() -> None:
    (record,) = records_of(WrongInLayerOne, own(QWEN3), "oracle.zero")
    assert "found: 4 of 12 heads are wrong: L1H" in record.reason and "and 1 more (tolerance " in record.reason
    with pytest.raises(CheckFailure, match="layer 1 head 0"):
        mine = own(QWEN3)
        check = next(check for check in CHECKS if check.id == "locality")
        check.run_case(WrongInLayerOne, mine.case([PROMPT], heads=((1, 0),)))
