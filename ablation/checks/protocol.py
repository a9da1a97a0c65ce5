"""What an implementation of head ablation has to offer to be checked.

An adapter for a hook that is a context manager:

    class Mine:
        unsupported = {"mean": "not implemented", "cache": "not tested"}

        def __init__(self, model):
            self.model, self.heads = model, []

        def ablate(self, heads, imputation):
            self.heads = list(heads)

        def run(self, input_ids, attention_mask=None, **inputs):
            with my_hook(self.model, self.heads):
                return self.model(input_ids, attention_mask=attention_mask, **inputs).logits

        def clear(self):
            self.heads = []

        def close(self):
            pass
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

FEATURES = {
    "zero": "zero imputation",
    "mean": "imputation by the mean of the head's z over the row's real tokens and all channels in that forward pass",
    "multiple_heads": "several heads at once",
    "batch": "several rows at once",
    "padding": "batches with padding, given an attention mask",
    "cache": "decoding with a key/value cache, with no head ablated and under zero imputation",
    "exact": "computing the logits by the model's own kernels, on the shapes that they are given; without it, they are "
    "compared with the model's up to rounding",
    "observable": "running the modules of the given model itself, and changing z before their `forward`, so that their "
    "inputs can be recorded; a `forward` that is replaced on the class is too late for that",
    "restores": "leaving the model as it was found, once closed",
    "single_forward": "running the model once for each ablated run",
    "gradients": "logits that can be differentiated with respect to the weights of the given model; not tried if the "
    "logits that `run` returns do not require gradients",
    "checkpointing": "gradients under gradient checkpointing",
    "non_finite": "replacing z where it is NaN or infinite, too; arithmetic such as `z * 0` does not",
    "later_patches": "keeping a `forward` that the user puts in the place of a projection's while heads are ablated",
    "copies": "a model whose copy, made while heads are ablated, has no ablation",
    "validation": "refusing heads and imputations that do not exist",
}


CACHE = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
"""The argument for a key/value cache in this version of transformers: `past_key_values` until 5.23, then `cache`."""


class Implementation(Protocol):
    """Head ablation on one model. It is made from a model in evaluation mode, which belongs to it until `close`.

    A second implementation on the same model may be refused. If it is not, either may be closed first. Other models and
    global state must not change.

    A class attribute `unsupported` may hold {name: reason} for features of FEATURES, families (`gpt2`, ...) and dtypes
    (`float64`, ...) that the implementation does not claim. Checks that need one are skipped, with that reason.
    """

    def __init__(self, model: PreTrainedModel) -> None: ...

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        """Ablate these (layer, head) pairs and no others in following runs, by "zero" or "mean".

        The caller may change the sequence later. After a rejected call, the previous heads stay in force.
        """

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the logits, [rows, tokens, vocabulary], in a tensor that later runs do not write to.

        Gradients are checked if the logits require them; an adapter may as well run under torch.no_grad().

        inputs: for the model: position_ids and use_cache, and a key/value cache under the name CACHE unless "cache" is
        unsupported.
        """

    def clear(self) -> None:
        """Ablate nothing in following runs."""

    def close(self) -> None:
        """Leave the model as it was found."""


Factory = Callable[[PreTrainedModel], Implementation]
"""Makes an implementation from a model: the adapter class."""
