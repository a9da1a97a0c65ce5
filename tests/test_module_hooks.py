"""Compiled code, threads, copies and pickles; and ablations that never fire."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run
from ablation.errors import AblationNotApplied, InvalidAblation
from ablation.hook import HeadAblation
from tests.implementations.surgery import Surgery
from tests.test_hook import hooks_of, logits

LLAMA = Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
IDS = torch.tensor([[3, 1, 4, 1, 5]])
HEAD = (1, 1)


def ablated(model: PreTrainedModel, *heads: tuple[int, int]) -> Tensor:
    """The logits of a copy whose W_O has zeros where it reads these heads."""
    surgery = Surgery(model)
    surgery.ablate(heads, "zero")
    return surgery.run(IDS)


# ---- compiled code


class Outer(nn.Module):
    """A user's module around the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits * 1.0


def compiled_function(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager")


def compiled_module(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return torch.compile(Outer(model), backend="eager")


def module_compiled_in_place(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    outer = Outer(model)
    outer.compile(backend="eager")
    return outer


def compiled_forward(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    model.forward = torch.compile(model.forward, backend="eager")
    return lambda ids: model(ids, use_cache=False).logits


STANCE = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.5 cannot switch it off")


@STANCE
@pytest.mark.slow
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("compiled", [compiled_function, compiled_module, module_compiled_in_place, compiled_forward])
def test_compiled_code_around_the_model_is_ablated(compiled: Any, warm: bool) -> None:
    model = LLAMA.fresh()
    clean, want, other = logits(model, IDS), ablated(model, HEAD), ablated(model, (0, 2))
    step = compiled(model)
    with torch.no_grad():
        if warm:
            step(IDS)
        with HeadAblation(model) as ablation:
            torch.testing.assert_close(step(IDS), clean)
            ablation.ablate([HEAD])
            torch.testing.assert_close(step(IDS), want)
            ablation.ablate([(0, 2)])
            torch.testing.assert_close(step(IDS), other)
        torch.testing.assert_close(step(IDS), clean)


@STANCE
@pytest.mark.slow
def test_nested_ablations_leave_the_compiler_as_it_was() -> None:
    from torch._dynamo import eval_frame

    models = [LLAMA.fresh(), LLAMA.fresh()]
    before = eval_frame._stance.stance
    first, second = (HeadAblation(model).__enter__() for model in models)
    assert eval_frame._stance.stance == "force_eager"
    first.__exit__()
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__()
    assert eval_frame._stance.stance == before


# ---- an ablation that never fires


def test_ablation_without_a_forward_is_an_error_on_leaving() -> None:
    model = LLAMA.fresh()
    before = hooks_of(model)
    with (
        pytest.raises(AblationNotApplied, match="layer 1, head 1 was set .* no forward pass"),
        HeadAblation(model) as a,
    ):
        a.ablate([HEAD])
    assert hooks_of(model) == before


def test_ablation_of_another_object_is_an_error_on_leaving() -> None:
    model, twin = LLAMA.fresh(), LLAMA.fresh()
    with pytest.raises(AblationNotApplied, match="another object"), HeadAblation(model) as ablation:
        ablation.ablate([HEAD])
        logits(twin, IDS)


def test_replaced_ablation_without_a_forward_is_an_error() -> None:
    model = LLAMA.fresh()
    with HeadAblation(model) as ablation:
        ablation.ablate([HEAD])
        with pytest.raises(AblationNotApplied, match="layer 1, head 1 was set"):
            ablation.ablate([(0, 2)])
        torch.testing.assert_close(logits(model, IDS), ablated(model, (0, 2)))  # the call has taken effect


def test_receipt_without_a_forward_is_an_error() -> None:
    model = LLAMA.fresh()
    with HeadAblation(model) as ablation:
        logits(model, IDS)
        ablation.ablate([HEAD])
        with pytest.raises(AblationNotApplied, match="layer 1, head 1 was set"):
            print(ablation.receipt)
        torch.testing.assert_close(logits(model, IDS), ablated(model, HEAD))
        assert ablation.receipt.calls == [1, 1, 1]


def test_clear_discards_an_ablation_of_a_model_that_ran() -> None:
    model = LLAMA.fresh()
    clean = logits(model, IDS)
    with HeadAblation(model) as ablation:
        ablation.ablate([HEAD])
        ablation.clear()
        assert torch.equal(logits(model, IDS), clean)
        ablation.ablate([HEAD])
        ablation.clear()


def test_cleared_ablation_of_a_model_that_never_ran_is_an_error() -> None:
    with pytest.raises(AblationNotApplied, match="a head was set"), HeadAblation(LLAMA.fresh()) as ablation:
        ablation.ablate([HEAD])
        ablation.clear()


def test_error_inside_is_not_replaced_by_ours() -> None:
    with pytest.raises(ZeroDivisionError), HeadAblation(LLAMA.fresh()) as ablation:
        ablation.ablate([HEAD])
        raise ZeroDivisionError


def test_failed_forward_is_reported_once() -> None:
    model = LLAMA.fresh()
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with HeadAblation(model) as ablation:
        ablation.ablate([(2, 0)])
        with pytest.raises(ZeroDivisionError):
            logits(model, IDS)
        handle.remove()


# ---- threads


def in_thread(work: Callable[[], Any]) -> Any:
    """The result of a function, run in another thread."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(work()))
    thread.start()
    thread.join()
    return done[0]


@pytest.mark.parametrize("imputation", ["zero", "mean"])
def test_other_threads_get_the_models_own_logits(imputation: str) -> None:
    model = LLAMA.fresh()
    clean = logits(model, IDS)
    with HeadAblation(model) as ablation:
        ablation.ablate([HEAD], imputation)
        mine = logits(model, IDS)
        receipt = ablation.receipt
        assert torch.equal(in_thread(lambda: logits(model, IDS)), clean)
        assert ablation.receipt is receipt and receipt.calls == [1, 1, 1]
        assert torch.equal(logits(model, IDS), mine) and not torch.equal(mine, clean)


def test_other_thread_inside_our_forward_is_not_ablated() -> None:
    """The other thread runs while a growing batch is in the middle of a layer."""
    model = LLAMA.fresh()
    clean, seen = logits(model, IDS), []
    busy = threading.local()

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not getattr(busy, "now", False):
            busy.now = True
            seen.append(in_thread(lambda: logits(model, IDS)))
            busy.now = False

    want = run(model, IDS[0].tolist(), [Ablation([HEAD]), Ablation([(2, 0)], "mean")])
    handle = model.model.layers[1].mlp.register_forward_pre_hook(meanwhile)
    try:
        got = run(model, IDS[0].tolist(), [Ablation([HEAD]), Ablation([(2, 0)], "mean")])
    finally:
        handle.remove()
    assert len(seen) >= 2 and all(torch.equal(answer, clean) for answer in seen)
    for name in ("target_probability", "control_probability"):
        assert (got.change(name) == want.change(name)).all()


def test_worker_thread_may_enter_an_ablation() -> None:
    model = LLAMA.fresh()
    want = ablated(model, HEAD)

    def work() -> Tensor:
        with HeadAblation(model) as ablation:
            ablation.ablate([HEAD])
            return logits(model, IDS)

    torch.testing.assert_close(in_thread(work), want)


def test_ablation_belongs_to_the_thread_that_set_it_last() -> None:
    model = LLAMA.fresh()
    clean, want = logits(model, IDS), ablated(model, HEAD)

    def work() -> Tensor:
        ablation.ablate([HEAD])
        return logits(model, IDS)

    with HeadAblation(model) as ablation:
        ablation.ablate([(0, 2)])
        logits(model, IDS)
        torch.testing.assert_close(in_thread(work), want)
        assert torch.equal(logits(model, IDS), clean)
        ablation.ablate([HEAD])
        torch.testing.assert_close(logits(model, IDS), want)


def test_streaming_thread_is_an_error_on_leaving() -> None:
    model = LLAMA.fresh()
    with pytest.raises(AblationNotApplied, match="thread ran in its place"), HeadAblation(model) as ablation:
        ablation.ablate([HEAD])
        in_thread(lambda: model.generate(IDS, max_new_tokens=2, pad_token_id=0))


# ---- copies and pickles


def pickled(model: PreTrainedModel) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 -- our own


def saved(model: PreTrainedModel) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copy_made_inside_carries_no_ablation(duplicate: Any) -> None:
    model = LLAMA.fresh()
    model.config.marker = "kept"
    clean, before = logits(model, IDS), hooks_of(model)
    with HeadAblation(model) as ablation:
        ablation.ablate([HEAD])
        mine = logits(model, IDS)
        twin = duplicate(model)
        assert torch.equal(logits(twin, IDS), clean) and torch.equal(logits(model, IDS), mine)
    assert hooks_of(model) == hooks_of(twin) == before and twin.config.marker == "kept"
    assert not any("__reduce_ex__" in vars(module) for of in (model, twin) for module in of.modules())
    with HeadAblation(twin) as ablation:
        ablation.ablate([HEAD])
        assert torch.equal(logits(twin, IDS), mine)


def test_copy_keeps_the_users_hooks() -> None:
    model = LLAMA.fresh()
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    want = logits(model, IDS)
    with HeadAblation(model):
        twin = copy.deepcopy(model)
        part = copy.deepcopy(model.model.layers[1].self_attn.o_proj)
    assert torch.equal(logits(twin, IDS), want) and len(part._forward_pre_hooks) == 1


def test_copy_of_an_ablation_belongs_to_the_copied_model() -> None:
    model = LLAMA.fresh()
    clean = logits(model, IDS)
    with HeadAblation(model) as ablation:
        ablation.ablate([HEAD])
        mine = logits(model, IDS)
        twin, other = copy.deepcopy((model, ablation))
    with other:
        other.ablate([HEAD])
        assert torch.equal(logits(twin, IDS), mine)
    assert torch.equal(logits(model, IDS), clean)


# ---- an ablation that nobody holds any more


def test_remove_from_takes_every_ablation_off() -> None:
    model = LLAMA.fresh()
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    clean, before = logits(model, IDS), hooks_of(model)
    lost = HeadAblation(model).__enter__()
    lost.ablate([HEAD])
    with pytest.raises(InvalidAblation, match=r"HeadAblation.remove_from\(model\)$"):
        HeadAblation(model).__enter__()
    HeadAblation.remove_from(model)
    assert torch.equal(logits(model, IDS), clean) and hooks_of(model) == before
    with pytest.raises(InvalidAblation, match="not installed"):
        lost.ablate([HEAD])
    lost.__exit__()
    with HeadAblation(model):
        HeadAblation.remove_from(model)
        HeadAblation.remove_from(model)
    handle.remove()
    assert not torch.equal(logits(model, IDS), clean)


def test_entering_twice_is_refused() -> None:
    model = LLAMA.fresh()
    before = hooks_of(model)
    ablation = HeadAblation(model)
    with ablation, pytest.raises(InvalidAblation, match="already carries an ablation"):
        ablation.__enter__()
    assert hooks_of(model) == before
