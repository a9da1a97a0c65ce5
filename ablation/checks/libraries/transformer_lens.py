"""TransformerLens: a TransformerBridge around a copy of the model, with functions on `hook_z`.

A copy, since the bridge "modifies it in place: bridge components replace its submodules"
(transformer_lens/model_bridge/sources/_bridge_builder.py:296), and nothing puts them back.

It does not give the bits of the model, as it documents: it computes attention itself, whatever implementation the model
uses (model_bridge/generalized_components/position_embeddings_attention.py:550), and for GPT-2 from W_Q, W_K and W_V
split apart (joint_qkv_attention.py:376). In float64 that is 1e-7, for the softmax: always in float32 for Llama, Qwen3
and Mixtral (position_embeddings_attention.py:591), never for GPT-NeoX
(joint_qkv_position_embeddings_attention.py:208).

It fails identity.padded: without position_ids, it counts positions by the attention mask (model_bridge/
transformer_bridge.py:2253), which the model itself does not.

Its attention looks for the key/value cache as `past_key_values` (model_bridge/generalized_components/attention.py:433).
Since transformers 5.24, which calls it `cache`, it finds none, and each decoded piece attends to itself only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel

from ablation.checks.libraries.shared import Library, Recorded, replace_slice
from ablation.checks.protocol import CACHE


class TransformerLens(Library):
    unsupported: ClassVar[dict[str, str]] = {
        "observable": "a bridge replaces the modules of the model that it is given, for good, so it is given a copy",
        "bit_identity": "it computes attention itself, and for GPT-2 from W_Q, W_K and W_V split apart",
        "float64": "it takes the softmax in float32 for some families whose model does not, and the other way round",
        "validation": "hook_z gives all heads to a function that picks one: the adapter decides what an index means",
    }
    if CACHE != "past_key_values":
        unsupported["cache"] = "its attention takes a cache by the name that it had before transformers 5.24 only"

    def __init__(self, model: PreTrainedModel) -> None:
        copied = copy.deepcopy(model)
        self.bridge = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config)
        self.clear()

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        inputs = dict(batch)
        with torch.no_grad():
            _, cache = self.bridge.run_with_cache(inputs.pop("input_ids"), **inputs)
        names = {layer: f"blocks.{layer}.attn.hook_z" for layer in range(self.bridge.cfg.n_layers)}
        return {layer: cache[name] for layer, name in names.items() if name in cache}  # a hybrid lacks some

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        hooks = [
            (f"blocks.{layer}.attn.hook_z", partial(replace_slice, layer, head, self.imputed, attention_mask))
            for layer, head in dict.fromkeys(self.heads)
        ]
        inputs = {"use_cache": False} | inputs
        with torch.no_grad():
            return self.bridge.run_with_hooks(input_ids, fwd_hooks=hooks, attention_mask=attention_mask, **inputs)
