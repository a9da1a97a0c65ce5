"""The protocol through which the checks call an implementation of head ablation.

An adapter is a class with the methods of `Implementation`. This one is for a hook that is a context manager:

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

IMPUTATIONS = {
    "zero": "replacing z by 0",
    "mean": "replacing z by one number: its mean over the row's real tokens and all channels in that forward pass",
    "channel-mean": "replacing each channel of z by its mean over the row's real tokens in that forward pass",
    "scale": "multiplying z by a factor, which follows in the name: scale:0.5",
    "values": "replacing z by given values, for all tokens or for each position",
    "reference-mean": "replacing each channel of z by its mean over all real tokens of reference prompts",
    "reference-mean-by-position": "replacing each channel of z by its mean over the real tokens of reference prompts "
    "that are at the same position",
    "resample": "replacing z by that of the same head at the same positions in another prompt",
}
"""The imputations that the checks know. An adapter may have others, of its own."""
DEFAULT_IMPUTATIONS = ("zero", "mean")
"""Those of an adapter that does not name any."""
READ_ROW = ("mean", "channel-mean")
"""Imputations that read the whole row of the run."""
WITHOUT_ROW = ("zero", "scale", "values", "reference-mean", "reference-mean-by-position")
"""Imputations that read at most the token that they replace, so that they work with a key/value cache."""
KEYWORDS = {
    "values": "values",
    "reference-mean": "reference",
    "reference-mean-by-position": "reference",
    "resample": "reference",
}
"""Imputation -> the keyword argument of `ablate` that holds what it needs."""
FROM_REFERENCE = tuple(name for name, keyword in KEYWORDS.items() if keyword == "reference")
"""Imputations for which the implementation runs the model on reference prompts."""

FEATURES = {
    **IMPUTATIONS,
    "positions": "ablations at some positions of a row only, if `ablate` has a parameter `positions`",
    "multiple_heads": "several heads at once",
    "batch": "several rows at once",
    "padding": "batches with padding, given an attention mask",
    "position_ids": "rows whose padding is not all on their right, for which the model has to be given `position_ids`",
    "cache": "decoding with a key/value cache, with no head ablated and under imputations that do not read the whole "
    "row",
    "observable": "running the given model's own modules, and changing z before a projection's `forward` is called, so "
    "that the inputs of the projections can be recorded; replacing `forward` on the class is too late for that",
    "restores": "leaving the model as it was found, once closed",
    "single_forward": "running the model once for each ablated run",
    "bit_identity": "giving the bare model's logits bit for bit with no head ablated; an implementation that computes "
    "attention itself, or other rows beside, may round differently, and is then compared up to rounding",
    "gradients": "logits that can be differentiated with respect to the weights of the given model; not tried if the "
    "logits that `run` returns do not require gradients",
    "checkpointing": "gradients under gradient checkpointing",
    "non_finite": "replacing z where it is NaN or infinite, too; arithmetic such as `z * 0` does not",
    "later_patches": "keeping a `forward` that the user puts in the place of a projection's while heads are ablated",
    "adapters": "projections that a module wraps, as LoRA does",
    "copies": "a model whose copy, made while heads are ablated, has no ablation",
    "validation": "refusing heads and imputations that do not exist",
}


CACHES = ("cache", "past_key_values")
CACHE = next(name for name in CACHES if name in inspect.signature(GPT2LMHeadModel.forward).parameters)
"""The argument for a key/value cache in this version of transformers: `past_key_values` until 5.23, then `cache`."""


class Implementation(Protocol):
    """Head ablation on one model, which is in evaluation mode and belongs to the implementation until `close`.

    The constructor may refuse a model that already has an implementation. If it accepts the model, the two
    implementations may be closed in either order. Other models and global state must not change.

    A class attribute `imputations` may hold the names of the imputations that the implementation offers; without it,
    they are DEFAULT_IMPUTATIONS. Names that IMPUTATIONS does not have are imputations of the implementation's own: they
    are run on the checks that hold for any imputation, so they must depend only on the row's own real tokens.

    A class attribute `families` may hold the names of the families that the implementation supports, such as
    ("gpt2",); without it, they are all.

    A class attribute `unsupported` may hold {name: reason} for features (the keys of FEATURES), families (`gpt2`, ...)
    and dtypes (`float64`, ...) that the implementation does not support. Cases that need one of these are left out; a
    check without any other case is skipped, with that reason.
    """

    def __init__(self, model: PreTrainedModel) -> None: ...

    # *args: Any with **given: Any stands for any further parameters, so that an adapter needs none.
    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, *args: Any, **given: Any) -> None:
        """Ablate these (layer, head) pairs and no others in the following runs.

        Besides, the keywords `values`, `reference` and `positions` are passed, each only if the case needs it, so an
        adapter needs only those of the imputations that it offers.
        The caller may change the sequence `heads` later. If the call is rejected, the previous heads stay in force. If
        no run has used the previous heads, `ablate` and `close` may take effect and then raise
        `ablation.errors.AblationNotApplied`.

        imputation: a name; for scale with its factor, such as "scale:0.5".

        values: for values. {(layer, head): what replaces z}, for every head of the model: [head_dim] for all tokens, or
        [positions, head_dim] for each position, with at least as many positions as the longest row has; in the dtype of
        the model.

        reference: for reference-mean, reference-mean-by-position and resample. A list of batches, each a dict of
        input_ids and attention_mask, [rows, tokens]. The means are over the real tokens of all rows of all batches; no
        row of a run is longer than the longest of the reference. For resample, there is one batch, of the shape and
        with the mask of the runs that follow, and row i of it replaces z in row i. The implementation runs the model on
        the reference in this call, with no head ablated.

        positions: at which tokens z is replaced; without it, at all. The position of a token is the number of real
        tokens before it in its row, so padding does not count; negative positions count from the end of the row: -1 is
        its last real token. All rows have all these positions. With a key/value cache, positions are not negative, and
        count from the first token of the sequence. Imputations that read the row read all of it.
        """

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the logits, [rows, tokens, vocabulary], in a tensor that later runs do not write to.

        Gradients are checked if the logits require them; an adapter may as well run under torch.no_grad().

        inputs: keyword arguments to pass on to the model: position_ids, use_cache and, unless "cache" is unsupported, a
        key/value cache under the name CACHE.
        """

    def clear(self) -> None:
        """Ablate nothing in the following runs."""

    def close(self) -> None:
        """Restore the model to the state in which the implementation found it."""


Factory = Callable[[PreTrainedModel], Implementation]
"""The type of an adapter class: called with a model, it returns an implementation."""
