"""What an implementation of head ablation has to offer to be checked.

A complete adapter, for a hook of one's own that is a context manager:

    class Mine:
        unsupported = {"mean": "not implemented", "cache": "not supported"}

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
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

FEATURES = {
    "zero": "zero imputation",
    "mean": "imputation by the mean of the head's z in that forward, over its real tokens and channels, row by row",
    "multiple_heads": "several heads at once",
    "batch": "several rows at once",
    "padding": "batches with padding, given an attention mask",
    "cache": "decoding with a key/value cache, unset and under zero imputation",
    "observable": "running the very modules of the model it was given, with z changed before their `forward`, so that "
    "what they receive can be seen; a `forward` that is put on their class comes too late for that",
    "restores": "leaving the model as it was found, once closed",
    "single_forward": "running the model once for one ablation",
    "validation": "refusing heads and imputations that are not there",
}


CACHE = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
"""What this version of transformers calls a key/value cache; `past_key_values` until 5.23."""


class Implementation(Protocol):
    """Head ablation on one model. It is made from a model, in evaluation mode, that belongs to it until `close`.

    A second one on the same model may be refused; where it is not, either may be closed first. Other models, and what
    belongs to the process, are left alone.

    unsupported: feature -> reason, for features of FEATURES, families (`gpt2`, ...) and dtypes (`float64`, ...) that it does
    not claim. Checks that need one are skipped with that reason. May be left out.
    """

    unsupported: Mapping[str, str]

    def __init__(self, model: PreTrainedModel) -> None: ...

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        """From now on ablate these (layer, head) pairs, by "zero" or "mean", and no others.

        The sequence stays the caller's, who may change it later. Where it is refused, by an error, what was ablated
        before still is.
        """

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits [rows, tokens, vocabulary], which no later run writes into.

        inputs: for the model: position_ids and use_cache; if it can "cache", a key/value cache, by the name of CACHE.
        """

    def clear(self) -> None:
        """From now on ablate nothing."""

    def close(self) -> None:
        """Leave the model as it was found."""
