"""Correct implementations in unusual circumstances are not blamed, and a failure says what it depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from ablation.checks import CHECKS, Case, Check, Decoder, reproduce
from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import with_factor
from ablation.heads import find_heads
from tests.implementations.ours import Ours

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
CASE = Case(GPT2, rows=((3, 1, 4, 1),), heads=((1, 0),))
PADDED = replace(CASE, rows=((3, 1, 4, 1), (5, 9)), side="left")


def check_of(id: str) -> Check:
    return next(check for check in CHECKS if check.id == id)


@pytest.fixture
def few_examples() -> Iterator[None]:
    profile = settings.get_current_profile_name()
    settings.register_profile("fairness", settings.get_profile("mutants"), max_examples=5)
    settings.load_profile("fairness")
    yield
    settings.load_profile(profile)


# ---- transformers' own hooks


class AsksForOutputs(Ours):
    """Asks the model for more than logits, for which transformers installs hooks that it keeps."""

    asks: ClassVar[dict[str, Any]] = {}

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        return super().run(input_ids, attention_mask, **self.asks, **inputs)


OUTPUTS = ["output_hidden_states", "output_attentions"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", [OUTPUTS[:1], OUTPUTS[1:], OUTPUTS], ids=" and ".join)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_capturing_hooks_of_transformers_are_no_finding(asked: list[str], family: str) -> None:
    factory = type("Asks", (AsksForOutputs,), {"asks": dict.fromkeys(asked, True)})
    decoder = Decoder(family, num_layers=2, num_heads=3, head_dim=8, attention="eager")
    for check in ("hygiene.restored", "hygiene.user_hooks", "refusal.head"):
        reproduce(check, factory, replace(CASE, decoder=decoder))
    steps = (("open",), ("ablate", ((0, 1),), "zero"), ("close",))
    reproduce("hygiene.lifecycle", factory, replace(CASE, decoder=decoder, heads=(), steps=steps))


class LeavesAHook(AsksForOutputs):
    """Asks for hidden states, and leaves a hook of its own."""

    asks: ClassVar[dict[str, Any]] = {"output_hidden_states": True}

    def close(self) -> None:
        super().close()
        find_heads(self.model).layers[0].block.register_forward_hook(lambda *_: None)


def test_other_hooks_are_found_beside_the_capturing_ones() -> None:
    with pytest.raises(AssertionError, match=r"not as it was found: transformer.h.0._forward_hooks changed"):
        reproduce("hygiene.restored", LeavesAHook, CASE)


# ---- a single imputation


class IgnoresTheImputation(Ours):
    """Offers zero only, and does not look at the imputation."""

    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")
    unsupported: ClassVar[dict[str, str]] = {"mean": "not implemented"}

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        super().ablate(heads, "zero")


def test_adapter_of_one_imputation_may_ignore_its_name(few_examples: None) -> None:
    assert (
        check_of("refusal.imputation").skip_reason(IgnoresTheImputation) == "does not support 'mean': not implemented"
    )
    for check in ("refusal.head", "refusal.type", "refusal.no_side_effect"):
        check_of(check)(IgnoresTheImputation)


def test_adapter_of_two_imputations_must_not_ignore_its_name() -> None:
    factory = type("Ignores", (IgnoresTheImputation,), {"unsupported": {}})
    with pytest.raises(AssertionError, match="imputation 'median': .* accepted; imputation '': .*; imputation None: "):
        reproduce("refusal.imputation", factory, CASE)


class ValidatesNothing(Ours):
    """Takes every index modulo the size."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        layers, count = self.ablation.heads.shape
        super().ablate([(int(layer) % layers, int(head) % count) for layer, head in heads], imputation, **keywords)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("refusal.head", ["head too large: ", "head negative: ", "layer too large: ", "layer negative: "]),
        ("refusal.type", ["head True: ", "layer False: ", "head 0.0: ", "layer '0': "]),
    ],
)
def test_refusals_report_all_findings_of_a_case(check: str, expected: list[str]) -> None:
    with pytest.raises(AssertionError) as error:
        reproduce(check, ValidatesNothing, replace(CASE, rows=((0, 1, 4, 1),)))
    assert all(f"{what}[(" in str(error.value) for what in expected)
    assert str(error.value).count(" was accepted") == 4


# ---- wrong numbers are the oracles' to report


class NextHead(Ours):
    """Ablates the next head, and handles exceptions well."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        count = self.ablation.heads.shape[1]
        super().ablate([(layer, (head + 1) % count) for layer, head in heads], imputation, **keywords)


class SwapsImputations(Ours):
    """Takes the mean for zero, and zero for the mean."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        super().ablate(heads, {"zero": "mean", "mean": "zero"}.get(imputation, imputation), **keywords)


@pytest.mark.parametrize("factory", [NextHead, SwapsImputations])
@pytest.mark.parametrize("check", ["hygiene.exception", "hygiene.lifecycle"])
def test_lifecycle_does_not_repeat_wrong_numbers(factory: Any, check: str, few_examples: None) -> None:
    check_of(check)(factory)
    with pytest.raises(AssertionError, match="those of the ablation written into W_O"):
        reproduce("oracle.zero", factory, CASE)


class KeepsTheFirstHeads(Ours):
    """Ignores all but the first call of `ablate`."""

    first = True

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        if self.first:
            super().ablate(heads, imputation, **keywords)
        self.first = False


def test_lifecycle_compares_with_a_fresh_implementation() -> None:
    steps = (("open",), ("ablate", ((0, 1),), "zero"), ("ablate", ((1, 1),), "zero"), ("close",))
    with pytest.raises(AssertionError, match=r"layer 1 head 1 ablated by zero, against a fresh implementation"):
        reproduce("hygiene.lifecycle", KeepsTheFirstHeads, replace(CASE, heads=(), steps=steps))


# ---- rounding


class Rounds(Ours):
    """Differs from the bare model by rounding, as if it computed attention itself."""

    unsupported: ClassVar[dict[str, str]] = {"bit_identity": "it computes attention itself"}
    factor = 1 + 1e-6

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        return super().run(*args, **inputs) * self.factor


class RoundsEachRunOtherwise(Rounds):
    """Gives other bits in each run."""

    runs = 0

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        self.runs += 1
        return super().run(*args, **inputs) * (1 + self.runs * 1e-6)


def test_undeclared_rounding_is_told_how_to_declare_it() -> None:
    factory = type("Undeclared", (Rounds,), {"unsupported": {}})
    with pytest.raises(AssertionError, match="the logits before anything is ablated .*declare 'bit_identity'"):
        reproduce("identity", factory, CASE)


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1 + 1e-6), ("float64", 1 + 1e-14), ("bfloat16", 1 + 1e-2)])
def test_declared_rounding_is_compared_up_to_rounding(dtype: str, factor: float) -> None:
    factory = type("Declared", (Rounds,), {"factor": factor})
    case = replace(CASE, decoder=GPT2._replace(dtype=dtype))
    reproduce("identity", factory, case)
    if dtype != "bfloat16":
        reproduce("identity.padded", factory, replace(case, rows=PADDED.rows))
    worse = type("Worse", (Rounds,), {"factor": 1.5 if dtype == "bfloat16" else 1.001})
    with pytest.raises(AssertionError, match="the logits before anything is ablated: "):
        reproduce("identity", worse, case)


def test_declared_rounding_is_the_same_in_equal_calls() -> None:
    with pytest.raises(AssertionError, match="the logits of a second run, .*, should be identical"):
        reproduce("identity", RoundsEachRunOtherwise, CASE)


class SoftmaxInFloat32(Ours):
    """Differs by the rounding of float32, whatever the dtype is."""

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        return super().run(*args, **inputs) + 3e-8


def test_rounding_of_float32_in_float64_is_recognised() -> None:
    double = replace(CASE, decoder=GPT2._replace(dtype="float64"))
    hint = "as small as rounding in float32, .*declare 'float64' unsupported"
    for check in ("oracle.zero", "identity"):
        with pytest.raises(AssertionError, match=hint):
            reproduce(check, SoftmaxInFloat32, double)
    with pytest.raises(AssertionError) as error:  # far more than that rounding
        reproduce("oracle.zero", NextHead, double)
    assert "float32" not in str(error.value).partition("reproduce:")[0]


class NaNInPadding(Ours):
    """Gives NaN where the padding is, as eager attention does for a token that sees only padding."""

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        logits = super().run(input_ids, attention_mask, **inputs)
        if attention_mask is not None and attention_mask.shape == logits.shape[:2]:
            logits = logits.masked_fill(attention_mask[..., None] == 0, float("nan"))
        return logits


class NaNInARealToken(Ours):
    """Gives NaN for the first token, with an ablation."""

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        logits = super().run(*args, **inputs).clone()
        if self.ablation.edits:
            logits[:, 0] = float("nan")
        return logits


@pytest.mark.parametrize("check", [check for check in CHECKS if check.cases.ragged], ids=lambda check: check.id)
def test_equal_nan_in_padding_is_no_failure(check: Check) -> None:
    family = PADDED.decoder.family if PADDED.decoder.family in check.cases.families else check.cases.families[0]
    imputation = with_factor((check.cases.imputations or ("zero",))[0])
    decoder = PADDED.decoder._replace(family=family)
    reproduce(check.id, NaNInPadding, replace(PADDED, decoder=decoder, imputation=imputation))


def test_nan_in_a_real_token_is_a_failure() -> None:
    for check in ("oracle.zero", "oracle.unread_head"):
        with pytest.raises(AssertionError, match="is nan, should be "):
            reproduce(check, NaNInARealToken, CASE)


def test_comparison_takes_nan_as_equal_to_nan_only() -> None:
    nan, inf = float("nan"), float("inf")
    for compare in (assert_identical, assert_close):
        compare(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0]), "numbers")
        for got, want in ((nan, 1.0), (1.0, nan), (inf, nan), (inf, 1.0), (1.0, inf), (-inf, inf)):
            with pytest.raises(AssertionError, match="numbers"):
                compare(torch.tensor([1.0, got]), torch.tensor([1.0, want]), "numbers")


# ---- what a failure depends on


class LosesTheBias(Ours):
    """Computes the projection of an ablated layer without its bias."""

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        handles = []
        for layer in self.ablation.edits:
            projection = self.ablation.heads.layers[layer].projection

            def subtract(module: Any, args: Any, output: Tensor) -> Tensor:
                return output if module.bias is None else output - module.bias

            handles.append(projection.register_forward_hook(subtract))
        try:
            return super().run(*args, **inputs)
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize(
    ("family", "released"),
    [
        ("gpt2", ""),
        ("opt", ""),
        ("llama", "; most released Llama models have none"),
        ("qwen3", "; most released Qwen3 models have none"),
    ],
)
def test_lost_bias_is_named_as_the_condition(family: str, released: str) -> None:
    decoder = Decoder(family, num_layers=2, num_heads=3, head_dim=8)
    with pytest.raises(AssertionError) as error:
        reproduce("oracle.zero", LosesTheBias, replace(CASE, decoder=decoder))
    note = "  note: only models whose projection has a bias are affected: if that bias is 0, the check passes"
    assert f"{note}{released}\n" in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_other_failures_do_not_name_a_bias(family: str) -> None:
    decoder = Decoder(family, num_layers=2, num_heads=3, head_dim=8)
    with pytest.raises(AssertionError) as error:
        reproduce("oracle.zero", NextHead, replace(CASE, decoder=decoder))
    assert "bias are affected" not in str(error.value)


class TokenInsteadOfHead(Ours):
    """Ablates a token in place of a head where there are as many tokens as heads."""

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        logits = super().run(input_ids, attention_mask, **inputs)
        return logits * 2 if input_ids.shape[1] == self.ablation.heads.shape[1] and self.ablation.edits else logits


SQUARES = [
    (CASE, {"rows": ((3, 1, 4),)}, "as many tokens as heads (3); with 4 tokens it "),
    (CASE, {"rows": ((3, 1),)}, "as many tokens as layers (2); with 3 tokens it "),
    (CASE, {"decoder": GPT2._replace(num_layers=3)}, "as many layers as heads (3); with 4 layers it "),
    (CASE, {"decoder": GPT2._replace(head_dim=6, num_heads=6)}, "as many heads as channels per head (6); with 7 heads"),
    (PADDED, {"rows": ((3, 1, 4, 1),) * 3}, "as many rows as heads (3); with 4 rows it "),
]


@pytest.mark.parametrize(("case", "changes", "note"), SQUARES, ids=range(len(SQUARES)))
@pytest.mark.parametrize("check", ["oracle.zero", "refusal.head"])
def test_square_case_is_pointed_out_by_every_check(check: str, case: Case, changes: dict[str, Any], note: str) -> None:
    factory = {"oracle.zero": NextHead, "refusal.head": ValidatesNothing}[check]
    with pytest.raises(AssertionError) as error:
        reproduce(check, factory, replace(case, **changes))
    assert f"  note: the case has {note}" in str(error.value)


def test_square_note_says_whether_the_axes_matter() -> None:
    square = replace(CASE, rows=((3, 1, 4),))
    with pytest.raises(AssertionError, match=r"with 4 tokens it passes, so they may be mixed up"):
        reproduce("oracle.zero", TokenInsteadOfHead, square)
    with pytest.raises(AssertionError, match=r"with 4 tokens it fails, too"):
        reproduce("oracle.zero", NextHead, square)
    with pytest.raises(AssertionError) as error:
        reproduce("oracle.zero", NextHead, CASE)
    assert "note:" not in str(error.value)


class TwiceInARow(Ours):
    """Takes the mean of the mean for a head that is named twice."""

    imputations = ("mean",)

    def run(self, *args: Any, **inputs: Any) -> Any:
        layer, head = self.pair
        found = find_heads(self.model).layer(layer)

        def again(_: Any, args: Any) -> Any:
            z = args[0].clone()
            for _ in range(self.count):
                z[..., found.channels(head)] = z[..., found.channels(head)].mean(dim=(1, 2), keepdim=True)
            return (z,)

        handle = found.projection.register_forward_pre_hook(again)
        try:
            return super().run(*args, **inputs)
        finally:
            handle.remove()

    def ablate(self, heads: Any, imputation: str, **keywords: Any) -> None:
        self.pair, self.count = (heads or [(0, 0)])[0], list(heads).count((heads or [(0, 0)])[0])
        super().ablate([pair for pair in heads if pair != self.pair], imputation, **keywords)


def test_mean_of_a_mean_is_a_head_named_twice() -> None:
    for seed in range(8):  # in some, the last bits differ
        row = tuple((7 * seed + 3 * token) % 41 for token in range(5))
        reproduce("independence.head_order", TwiceInARow, replace(CASE, rows=(row,), imputation="mean"))
