"""Process: global state changes: gradients, the default dtype, random number generators, global hooks."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.mutants.correct_variants import FunctionMode, Linears
from tests.mutants.mutant import Mutant
from tests.mutants.reference import Reference


class GradientsOff(Mutant):
    """Disables gradients for the whole process, and leaves them disabled."""

    expected_check = "hygiene.global_state"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        torch.set_grad_enabled(False)
        return super().run(input_ids, attention_mask, **inputs)


class Reseeds(Mutant):
    """Seeds torch's generator in each run, so that the user's random numbers repeat."""

    expected_check = "hygiene.global_state"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        torch.manual_seed(0)
        return super().run(input_ids, attention_mask, **inputs)


class DefaultDtypeLeft(Mutant):
    """Makes the model's dtype torch's default dtype, and leaves it so."""

    expected_check = "hygiene.global_state"

    def __init__(self, model: PreTrainedModel) -> None:
        torch.set_default_dtype(model.dtype)
        super().__init__(model)


class GradientsOn(Mutant):
    """Disables gradients for a forward pass, and then enables them, whatever they were before."""

    expected_check = "hygiene.global_state"

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().run(*args, **kwargs)
        finally:
            torch.set_grad_enabled(True)


class GradientsOffAfterException(Mutant):
    """Enables gradients again after the forward pass, without a `finally`."""

    expected_check = "hygiene.exception"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.failed = True
        logits = super().forward(input_ids, **inputs)
        self.failed = False
        return logits

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().run(*args, **kwargs)
        finally:
            if self.failed:
                torch.set_grad_enabled(False)


class DrawsNumbers(Mutant):
    """Tries the model on random tokens when it is made, and so advances the global generator."""

    expected_check = "hygiene.global_state"

    def install(self) -> None:
        torch.randint(0, 41, (1, 4))
        super().install()


class SeedsOthers(Mutant):
    """Seeds the generators of Python and numpy."""

    expected_check = "hygiene.global_state"

    def install(self) -> None:
        random.seed(0)
        np.random.seed(0)
        super().install()


class HooksOnAllModules(Mutant):
    """Leaves an idle hook on all modules of the process."""

    expected_check = "hygiene.global_state"

    def install(self) -> None:
        super().install()
        nn.modules.module.register_module_forward_pre_hook(lambda *_: None)


class ModeOfOneThread(Mutant, FunctionMode):
    """Edits torch's linear functions in a mode that it enters when it is made, in the thread that makes it only."""

    expected_check = "independence.threads"

    def install(self) -> None:
        self.mode = ExitStack()
        self.mode.enter_context(Linears(self.edit))

    def remove(self) -> None:
        self.mode.close()

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.shape = input_ids.shape
        return Reference.forward(self, input_ids, **inputs)


class MainThreadOnly(Mutant):
    """Does nothing outside of the main thread."""

    expected_check = "independence.threads"

    def targets(self, layer: int) -> list[int]:
        here = threading.current_thread() is threading.main_thread()
        return super().targets(layer) if here else []
