"""A likely cause is named only if the failing check can show it, and finding it has no side effects."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from ablation.checks import CHECKS
from ablation.checks.causes.diagnosis import diagnosis
from ablation.checks.decoders import Decoder
from ablation.checks.observe import changes, state
from ablation.checks.on_model.own_model import OwnModel
from tests.implementations.ours import Ours

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=8)
PROMPT = (3, 14, 15, 9, 26, 5)
CHECK = {check.id: check for check in CHECKS}


class LeavesAHook(Ours):
    """Ablates as it should, so that all experiments of a check are tried, and leaves a hook."""

    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")

    def close(self) -> None:
        super().close()
        self.model.register_forward_hook(lambda *_: None)


# ---- side effects


ALTERED = ("hygiene.restored", "hygiene.user_hooks", "gradients.zero", "independence.other_models")


@pytest.mark.parametrize("id", [pytest.param(id, marks=() if id in ALTERED else pytest.mark.slow) for id in CHECK])
def test_diagnosis_leaves_the_users_model_as_found(id: str) -> None:
    model = GPT2.fresh()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 3 else None
    mine = OwnModel(model, "mine", [PROMPT])
    before = state(model)
    rows = (PROMPT, PROMPT[:4]) if "padded" in id else (PROMPT,)
    diagnosis(LeavesAHook, CHECK[id], mine.case(rows, heads=((1, 0),)), AssertionError("a finding"))
    assert not changes(model, before)
