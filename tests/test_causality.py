"""Only a causal language model says what follows a prompt: all others are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForTokenClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MllamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from ablation.checks.decoders import Decoder, randomised
from ablation.engine import run, run_sequential
from ablation.errors import InvalidPrompt, NonFiniteLogits, UnsupportedModel
from ablation.hook import Ablation, HeadAblation
from ablation.sweeps import sweep, sweep_sequential

IDS = [3, 1, 4, 1, 5]
SHAPE: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=41, pad_token_id=0
)
DECODER: dict[str, Any] = SHAPE | dict(bos_token_id=None, eos_token_id=None)
SEQ2SEQ: dict[str, Any] = dict(
    **dict(encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    **dict(vocab_size=41, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64),
)
GPT2 = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=41, pad_token_id=0)
BIDIRECTIONAL = "is bidirectional, not a causal language model: later tokens .* move the logits of earlier ones, by"
NO_TOKENS = r"is not a language model: for \[\d, 5\] tokens, its logits are \[\d, .*not one for each of 41 tokens$"


def from_config(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


def llama(**given: Any) -> LlamaConfig:
    return LlamaConfig(**DECODER | given)


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return from_config(llama())


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "BERT as published": (lambda: from_config(BertConfig(**SHAPE)), BIDIRECTIONAL),
    "BERT, masked": (lambda: BertForMaskedLM(BertConfig(**SHAPE)), BIDIRECTIONAL),
    "BERT, large weights": (lambda: randomised(BertConfig(**SHAPE), 1), BIDIRECTIONAL),
    "BERT, eager": (
        lambda: BertLMHeadModel._from_config(BertConfig(**SHAPE), attn_implementation="eager"),
        BIDIRECTIONAL,
    ),
    "RoBERTa": (lambda: RobertaForMaskedLM(RobertaConfig(**SHAPE)), BIDIRECTIONAL),
    "XLM": (lambda: from_config(XLMConfig(emb_dim=32, n_layers=2, n_heads=4, vocab_size=41)), BIDIRECTIONAL),
    "Llama": (lambda: bidirectional_llama(), BIDIRECTIONAL),
    "Gemma 3": (
        lambda: from_config(Gemma3TextConfig(**DECODER, head_dim=8, use_bidirectional_attention=True)),
        BIDIRECTIONAL,
    ),
    "BART": (lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)), "is an encoder-decoder, .*by"),
    "Blenderbot": (
        lambda: BlenderbotForConditionalGeneration(BlenderbotConfig(**SEQ2SEQ)),
        "is an encoder-decoder, .*it fails on a prompt alone",
    ),
    "T5": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=41, d_model=32, d_kv=8, num_heads=4, num_layers=2)),
        "has 2 attention output projections",
    ),
    "classifier": (lambda: LlamaForSequenceClassification(llama()), NO_TOKENS),
    "classifier without padding": (lambda: LlamaForSequenceClassification(llama(pad_token_id=None)), NO_TOKENS),
    "token classifier": (lambda: LlamaForTokenClassification(llama()), NO_TOKENS),
    "GPT-2, token classifier": (lambda: GPT2ForTokenClassification(GPT2), NO_TOKENS),
    "question answering": (
        lambda: LlamaForQuestionAnswering(llama()),
        "without logits: pass the model with its language-model head",
    ),
    "pretraining": (
        lambda: BertForPreTraining(BertConfig(**SHAPE)),
        "without logits: pass the model with its language-model head",
    ),
    "bare Llama": (
        lambda: LlamaModel(llama()),
        "^LlamaModel returns .* without logits: pass the model with its language-model head",
    ),
    "bare GPT-2": (
        lambda: GPT2Model(GPT2),
        "^GPT2Model returns .* without logits: pass the model with its language-model head",
    ),
    "tuple": (lambda: from_config(llama(return_dict=False)), "returns tuples, .* set config.return_dict = True"),
    "meta": (on_meta, "is on the meta device, where it has no weights"),
}


@pytest.mark.filterwarnings("ignore")  # transformers warns of a classifier without padding
@pytest.mark.parametrize("name", REFUSED)
def test_model_that_does_not_continue_a_prompt_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    model: Any = make()
    model.eval()
    for act in (sweep, sweep_sequential):
        with pytest.raises(UnsupportedModel, match=reason) as caught:
            act(model, IDS)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [[7], [7, 7, 7], [0, 0], IDS, list(range(30))])
def test_bidirectional_model_is_refused_for_every_prompt(dtype: str, tokens: list[int]) -> None:
    model = bidirectional_llama(dtype)
    with pytest.raises(UnsupportedModel, match=BIDIRECTIONAL):
        run(model, tokens, [Ablation([])])


def test_leak_of_one_layer_of_many_is_found() -> None:
    """As in a model whose layers are converted one by one to bidirectional attention."""
    model = Decoder("llama", 6, 4, 8).fresh()
    attention = model.model.layers[4].self_attn
    attention.forward = unmasked(attention.forward)
    with pytest.raises(UnsupportedModel, match=BIDIRECTIONAL):
        run(model, IDS, [Ablation([])])


def unmasked(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        rows, tokens = kwargs["hidden_states"].shape[:2]
        mask = kwargs["hidden_states"].new_zeros(rows, 1, tokens, tokens)
        return forward(*args, **kwargs | {"attention_mask": mask})

    return call


def bidirectional_llama(dtype: str = "float32") -> PreTrainedModel:
    """Unmask every layer, since transformers 4 does not read `is_causal` of a configuration."""
    model = randomised(llama(), 1, dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.forward = unmasked(layer.self_attn.forward)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("tokens", [[7], [7, 7, 7], IDS, list(range(30))])
def test_causal_model_is_accepted(family: str, dtype: str, tokens: list[int]) -> None:
    model = Decoder(family, 3, 4, 8, dtype=dtype).shared()
    assert run(model, tokens, [Ablation([])]).clean["argmax"] >= 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_family_as_a_decoder_is_accepted(attention: str) -> None:
    model = randomised(BertConfig(**SHAPE, is_decoder=True), 1, attention)
    result = sweep(model, IDS)
    assert result.grid(result.ablated["margin"]).shape == (1, 2, 2, 4)


def test_second_head_beside_the_language_model_is_accepted() -> None:
    assert run_sequential(GPT2DoubleHeadsModel(GPT2).eval(), IDS, [Ablation([])]).clean["margin"] > 0


def test_noise_between_equal_rows_is_no_leak() -> None:
    """As in a mixture of experts that drops tokens of a full expert: which ones, depends on the whole batch."""
    model = Decoder("llama", 3, 4, 8).fresh()

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[len(output) // 2 :] = 0  # another half of the rows than the one that comes first
        return output

    model.model.layers[1].mlp.register_forward_hook(drop)
    assert run_sequential(model, IDS, [Ablation([])]).clean["margin"] > 0


def test_tokens_that_are_never_predicted_are_accepted() -> None:
    """Some models mask logits by minus infinity; the embedding of Mllama holds more tokens than it predicts."""
    model = Decoder("llama", 2, 4, 8).fresh()
    model.lm_head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([0, 2]), -torch.inf))
    with pytest.raises(NonFiniteLogits):  # by the run, and not taken for a leak
        run(model, IDS, [Ablation([])])
    config = MllamaTextConfig(**SHAPE, num_key_value_heads=2, cross_attention_layers=[])
    mllama = MllamaForCausalLM(config).eval()
    assert len(mllama.get_input_embeddings().weight) > 41
    assert run(mllama, IDS, [Ablation([])], 40).prompts[0].target == (40,)
    with pytest.raises(InvalidPrompt, match="^no token 41: the model predicts 41 tokens$"):
        run(mllama, IDS, [Ablation([])], 41)
    with pytest.raises(InvalidPrompt, match="^no token 41: the model predicts 41 tokens$"):
        run(mllama, IDS, [Ablation([])], None, [3, 41])


@pytest.mark.parametrize("is_causal", [True, False])
def test_model_that_takes_single_rows_is_verified_by_them(is_causal: bool) -> None:
    model = randomised(llama(), 1) if is_causal else bidirectional_llama()

    def single(module: nn.Module, args: Any) -> None:
        if len(args[0]) > 1:
            raise ValueError("cannot handle batch sizes > 1")

    model.register_forward_pre_hook(single)
    if is_causal:
        assert run_sequential(model, IDS, [Ablation([])]).clean["margin"] > 0
    else:
        with pytest.raises(UnsupportedModel, match=BIDIRECTIONAL):
            run_sequential(model, IDS, [Ablation([])])


def test_non_finite_model_is_left_to_the_run() -> None:
    model = Decoder("gpt2", 2, 4, 8).fresh()
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.bias[0] = torch.nan
    with pytest.raises(NonFiniteLogits):
        run(model, IDS, [Ablation([])])


def test_special_tokens_are_not_tried() -> None:
    """A token that stands for an image fails without one."""
    model = Decoder("llama", 2, 4, 8).fresh()
    model.config.image_token_id = IDS[-1] + 20

    seen: list[Tensor] = []
    model.forward = recording(model.forward, seen)
    run(model, IDS, [Ablation([])])
    assert len(seen[0].unique(dim=0)) == 2 and not (seen[0] == IDS[-1] + 20).any()


def recording(forward: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    def call(ids: Tensor, **kwargs: Any) -> Any:
        seen.append(ids)
        return forward(ids, **kwargs)

    return call


def test_encoder_may_be_ablated_outside_of_a_run() -> None:
    """`HeadAblation` replaces heads of any attention; only what a run says of a next token would be wrong."""
    model = randomised(BertConfig(**SHAPE), 1)
    ids = torch.tensor([IDS])
    with torch.no_grad(), HeadAblation(model) as ablation:
        clean = model(ids).logits
        ablation.ablate([(1, 1)])
        assert not torch.equal(model(ids).logits, clean)
