"""HookedTransformer of TransformerLens 2: converted weights of the model, with functions on `hook_z`.

It is made as `HookedTransformer.from_pretrained_no_processing` makes it, but from the configuration of the given model
instead of one that is downloaded by name. Version 4 has a bridge instead: see `transformer_lens.py` beside this file.

It takes no `position_ids`: it counts positions by the attention mask (HookedTransformer.py:417, `get_residual`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import PreTrainedModel

from ablation.checks.libraries.shared import Library, Recorded, replace_slice


class Hooked(Library):
    unsupported: ClassVar[dict[str, str]] = {
        "observable": "it is another model, with converted weights",
        "bit_identity": "it computes attention itself, from W_Q, W_K and W_V split by heads",
        "cache": "it has a cache of its own",
        "llama": "its conversion drops the biases of attention, which no released Llama has, but the models here have",
        "qwen3": "its conversion drops the biases of attention, which no released Qwen3 has, but the models here have",
        "gpt_neox": "it refuses rotary embeddings of one channel, which the models here have at 4 channels per head",
        "mixtral": "its experts multiply bfloat16 by float32, which raises",
        **dict.fromkeys(("gemma3", "gemma3_vision", "lfm2"), "it has no conversion of this family"),
        "adapters": "it converts the weights of the projection, and of no module that wraps it",
        "validation": "hook_z gives all heads to a function that picks one: the adapter decides what an index means",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        copied, dtype = copy.deepcopy(model), model.dtype  # the conversion freezes the model that it is given
        copied.config.architectures = [type(model).__name__]  # as in the files of a released model
        if model.config.model_type == "gpt2":
            copied.config.n_ctx = copied.config.n_positions
        with tempfile.TemporaryDirectory() as folder:
            copied.config.save_pretrained(folder)
            config = loading_from_pretrained.get_pretrained_model_config(folder, device="cpu", dtype=dtype)
            weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, copied, dtype=dtype)
        config.tokenizer_name = None
        self.hooked = HookedTransformer(config, move_to_device=False)
        self.hooked.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        self.clear()

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        with torch.no_grad():
            _, cache = self.hooked.run_with_cache(batch["input_ids"], attention_mask=batch["attention_mask"])
        return {layer: cache[f"blocks.{layer}.attn.hook_z"] for layer in range(self.hooked.cfg.n_layers)}

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        hooks = [
            (f"blocks.{layer}.attn.hook_z", partial(replace_slice, layer, head, self.imputed, attention_mask))
            for layer, head in dict.fromkeys(self.heads)
        ]
        with torch.no_grad():
            return self.hooked.run_with_hooks(input_ids, fwd_hooks=hooks, attention_mask=attention_mask)
