"""Whether a model answers the question of a run, which is what follows the prompt: decided by what the model does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.errors import UnsupportedModel
from ablation.forward import Request, embedding_weight, token_batch, verify_tokens
from ablation.measure import coarsest_eps, logit_spread

CHECKED_TOKENS = 8
"""Of a longer prompt, only this many tokens are checked."""

NOISE_FACTOR = 10.0
"""A leak is larger than this many times the difference between equal rows."""


def verify_causal_lm(request: Request, max_rows: int = 4) -> None:
    """Verify in a short forward pass that the model predicts each token from the tokens before it.

    The rows of the batch are two variants of the start of the prompt, each twice. The variants differ in the later
    tokens, which must not move the logits of the earlier ones. The noise is measured between equal rows. In a mixture
    of experts, it includes the effect of dropped tokens. If `max_rows` is smaller than 4, the batch is run in halves.
    Refused are:

    - encoders, encoder-decoders, and decoders with bidirectional attention over the prompt. A prefix language model is
      among them: on a prompt alone, it behaves like a masked one;
    - models that do not return one logit per token of the vocabulary, at each token of the prompt;
    - models on the meta device, which have no weights, and models set to return tuples.

    Hooks that the model carries count as part of it. A model that fails on these rows, or whose logits are not finite,
    is left to the run. Raises UnsupportedModel, InvalidPrompt for a watched token that the model does not predict, and
    InvalidAblation if the model carries an ablation.
    """
    model, name = request.model, type(request.model).__name__
    if all(p.is_meta for p in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise UnsupportedModel(f"{name} is on the meta device, where it has no weights: load it first")
    if not getattr(model.config, "return_dict", True):
        raise UnsupportedModel(f"{name} returns tuples, in which logits have no name: set config.return_dict = True")
    embedding = embedding_weight(model)
    # The two differ in models whose embedding holds more than the tokens that are predicted (Mllama).
    stated = getattr(model.config.get_text_config(), "vocab_size", None)
    vocabulary = {len(embedding), stated or len(embedding)}
    rows, kept = _variants(request.token_ids, min(vocabulary), set(_special_tokens(model.config.to_dict())))
    ids = token_batch(model, rows)
    with request.hook, torch.no_grad():
        outputs = _outputs(model, ids.split(4 if max_rows >= 4 else 2), ids.split(1))
    kind = "an encoder-decoder" if getattr(model.config, "is_encoder_decoder", False) else "bidirectional"
    if outputs is None:
        if kind == "bidirectional":
            return
        raise UnsupportedModel(f"{name} is {kind}, not a causal language model: it fails on a prompt alone")
    if not all(isinstance(getattr(output, "logits", None), Tensor) for output in outputs):
        raise UnsupportedModel(
            f"{name} returns {type(outputs[0]).__name__} without logits: pass the model with its language-model head"
        )
    logits = torch.cat([output.logits for output in outputs])
    _check_shape(model, logits, ids, vocabulary)
    verify_tokens([*(request.target or ()), *(request.control or ())], logits.shape[-1], "predicts")
    leak, noise, rounding = _leak(logits[:, :kept], model.dtype)
    if leak > NOISE_FACTOR * noise + rounding:
        raise UnsupportedModel(
            f"{name} is {kind}, not a causal language model: later tokens of a prompt move the logits of earlier ones, "
            f"by {leak:.2g}"
        )


def _check_shape(model: PreTrainedModel, logits: Tensor, ids: Tensor, vocabulary: set[int]) -> None:
    """Raise UnsupportedModel unless the logits are [rows, tokens, vocabulary], as of a classifier they are not."""
    # An output embedding may leave out tokens that are never predicted, so its size is its own.
    predicts_tokens = logits.shape[-1] in vocabulary or model.get_output_embeddings() is not None
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or not predicts_tokens:
        raise UnsupportedModel(
            f"{type(model).__name__} is not a language model: for {list(ids.shape)} tokens, its logits are "
            f"{list(logits.shape)}, not one for each of {max(vocabulary)} tokens"
        )


def _variants(token_ids: tuple[int, ...], vocabulary: int, special: set[int]) -> tuple[list[list[int]], int]:
    """Two variants of the start of a prompt, each twice. Returns the rows, and how many first tokens are common.

    special: tokens that a variant leaves out, since some stand for images or sounds.
    """
    one = list(token_ids * 2)[: max(2, min(len(token_ids), CHECKED_TOKENS))]
    kept = len(one) // 2
    other = list(one)
    for place in range(kept, len(one)):
        token = (one[place] + vocabulary // 2) % vocabulary
        while token in special and token != one[place]:
            token = (token + 1) % vocabulary
        other[place] = token
    return [one, other, other, one], kept  # a kernel that depends on the row shows as noise


def _special_tokens(config: Any) -> Iterator[int]:
    """All numbers of a configuration, and of its parts, whose names speak of tokens."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))


def _outputs(model: PreTrainedModel, *ways: Sequence[Tensor]) -> list[Any] | None:
    """Run the rows in these batches, or else in the next ones: some models take single rows only. None if all fail.

    The encoders of transformers 4 do not know `use_cache`.
    """
    for given, batches in itertools.product(({"use_cache": False}, {}), ways):
        try:
            return [model(batch, **given) for batch in batches]
        except Exception:  # noqa: S112 (of any kind; the run shows it)
            continue
    return None


def _leak(logits: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """How far variants differ at common tokens, how far equal rows do, and rounding. logits: [4, tokens, vocabulary].

    rounding: the last third of the digits of the logits' spread. In the causal families of transformers, variants were
    measured to differ by 0, and in one by 1e-6 of the spread (float32). dtype: of the model, whose logits may have more
    digits.
    """
    eps = coarsest_eps(dtype, logits.dtype)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    logits = logits.masked_fill(~logits.isfinite().all(dim=0), 0)
    one, other, other_again, one_again = logits

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    leak = min(apart(a, b) for a in (one, one_again) for b in (other, other_again))
    noise = max(apart(one, one_again), apart(other, other_again))
    return leak, noise, eps ** (2 / 3) * logit_spread(one)
