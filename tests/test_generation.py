"""Generated text: it equals a loop of forward passes over the whole text, and nothing else has a say in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ablation.checks.decoders import FAMILIES, VOCABULARY, Decoder
from ablation.errors import (
    InvalidAblation,
    InvalidHead,
    InvalidPrompt,
    NonFiniteLogits,
    UnknownImputation,
    UnsupportedModel,
)
from ablation.hook import HeadAblation
from ablation.measure import tie_tolerance
from ablation.models import LoadedModel
from ablation.prompts import Question
from ablation.studies.generation import Generation, continuation_text, generate
from ablation.studies.sampling import Sampling
from tests.surgery import kind, reference
from tests.test_hook import hooks_of, logits

KINDS = (
    "zero",
    "scale",
    "values",
    "values-by-position",
    "reference-mean",
    "reference-mean-by-position",
    "mean",
    "channel-mean",
)
NOISE = 100.0
"""In ties: a cache, which changes the shapes of all kernels, moves logits by less than so many tolerances of a tie."""
LLAMA = Decoder("llama", num_layers=2, num_heads=3, head_dim=8)
HEADS = [(0, 1), (1, 0), (1, 2)]


@cache
def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose token N is the word tN."""
    raw = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCABULARY)}, unk_token="t0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def loaded_of(decoder: Decoder) -> LoadedModel:
    return LoadedModel("random", decoder.shared(), words())


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in ids)


@pytest.fixture
def llama() -> LoadedModel:
    return LoadedModel("random", LLAMA.fresh(), words())


def positions_of(where: Any, tokens: int) -> list[int] | None:
    """The positions of the prompt, from 0, that a name stands for; None for all tokens, new ones included."""
    match where:
        case "all":
            return None
        case "prompt":
            return list(range(tokens))
        case "last":
            return [tokens - 1]
    return [position % tokens for position in where]


def looped(
    decoder: Decoder,
    ids: Sequence[int],
    steps: int,
    ablation: tuple[Any, Any, Any] | None = None,
    choose: Callable[[Tensor], int] = lambda row: int(row.argmax()),
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Decode by one forward pass over the whole text for each token. Returns tokens, and the logits of each step."""
    text, found, model = list(ids), [], decoder.shared()
    with HeadAblation(model) as hook:
        if ablation is not None:
            hook.ablate(*ablation)
        for _ in range(steps):
            found.append(logits(model, torch.tensor([text]))[0, -1])
            text.append(choose(found[-1]))
    return tuple(text[len(ids) :]), found


def assume_clear(rows: Sequence[Tensor]) -> None:
    """Leave out an example in which rounding may choose another token."""
    for row in rows:
        second, first = row.double().sort().values[-2:].tolist()
        assume(first - second > NOISE * tie_tolerance(row.float()))


@given(data=st.data())
@pytest.mark.parametrize("name", KINDS)
def test_greedy_text_equals_a_loop_without_a_cache(name: str, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from([*FAMILIES, "gemma3", "lfm2"]))
    decoder = Decoder(family, num_layers=2, num_heads=2, head_dim=8)
    ids = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4))
    heads = data.draw(st.lists(st.sampled_from(decoder.heads()), min_size=1, unique=True))
    where = data.draw(
        st.sampled_from(["all", "prompt", "last"])
        | st.lists(st.integers(-len(ids), len(ids) - 1), min_size=1).map(tuple)
    )
    imputation, steps = kind(name, decoder).imputation, 4
    clean, of_clean = looped(decoder, ids, steps)
    ablated, of_ablated = looped(decoder, ids, steps, (heads, imputation, positions_of(where, len(ids))))
    assume_clear([*of_clean, *of_ablated])
    (found,) = generate(loaded_of(decoder), [text_of(ids)], heads, imputation, positions=where, max_new_tokens=steps)
    assert (found.token_ids, found.clean, found.ablated) == (tuple(ids), clean, ablated)
    assert found.forwards == steps
    assert found.parts_at == next((at for at in range(steps) if clean[at] != ablated[at]), None)
    if found.parts_at is not None:
        at = found.parts_at
        margins = [
            (rows[at][one] - rows[at][other]).item()
            for rows, one, other in ((of_clean, clean[at], ablated[at]), (of_ablated, ablated[at], clean[at]))
        ]
        assert [found.clean_margin, found.ablated_margin] == pytest.approx(margins, abs=1e-3)


@pytest.mark.parametrize("sampling", [None, Sampling(1.3)])
@pytest.mark.parametrize("imputation", ["zero", "mean"])
def test_without_heads_both_texts_are_equal(sampling: Sampling | None, imputation: str) -> None:
    found = generate(loaded_of(LLAMA), ["t3 t1", "t4"], [], imputation, sampling=sampling, seed=1)
    assert all(of.clean == of.ablated and of.parts_at is None and of.replaced == 0 for of in found)
    assert found[0].clean_margin is None and len(found[0].clean) == 20


def test_generation_leaves_random_numbers_and_model_alone(llama: LoadedModel) -> None:
    own = llama.model.generation_config
    own.repetition_penalty = 1.5
    before, hooks = (own.to_dict(), torch.random.get_rng_state()), hooks_of(llama.model)
    generate(llama, ["t3 t1"], HEADS, sampling=Sampling(), max_new_tokens=3)

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(llama, ["t3 t1"], HEADS, progress=interrupt)
    assert llama.model.generation_config is own and own.to_dict() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1]) and hooks_of(llama.model) == hooks


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True, "temperature": 0.3, "top_k": 2},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 7},
        {"suppress_tokens": list(range(30))},
        {"begin_suppress_tokens": list(range(30))},
        {"bad_words_ids": [[token] for token in range(30)]},
        {"sequence_bias": [[[5], 50.0]]},
        {"num_beams": 3},
        {"num_return_sequences": 3, "num_beams": 3},
        {"min_new_tokens": 2, "max_length": 3},
        {"min_p": 0.9},
        {"guidance_scale": 3.0},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_time": 1e-9},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
@pytest.mark.parametrize("sampling", [None, Sampling()], ids=["greedy", "sampled"])
def test_own_settings_of_the_model_have_no_effect(
    llama: LoadedModel, setting: dict[str, Any], sampling: Sampling | None
) -> None:
    options: dict[str, Any] = dict(positions=[0, 2], max_new_tokens=5, sampling=sampling)
    plain = generate(llama, ["t3 t1 t4"], HEADS, **options)
    llama.model.generation_config = GenerationConfig(**setting)
    assert generate(llama, ["t3 t1 t4"], HEADS, **options) == plain


@pytest.mark.parametrize("several", [False, True])
def test_text_ends_with_a_token_that_the_model_names(llama: LoadedModel, several: bool) -> None:
    (before,) = generate(llama, ["t3 t1 t4"], HEADS, max_new_tokens=6)
    assert before.parts_at is not None
    end = before.ablated[2]
    llama.model.generation_config.eos_token_id = [VOCABULARY - 1, end] if several else end
    (found,) = generate(llama, ["t3 t1 t4"], HEADS, max_new_tokens=6)
    for tokens, whole in ((found.clean, before.clean), (found.ablated, before.ablated)):
        ends = [at + 1 for at, token in enumerate(whole) if token in (end, VOCABULARY - 1)]
        assert tokens == whole[: ends[0] if ends else 6]
    assert found.forwards == len(found.ablated)


def test_receipts_are_summed_over_all_passes() -> None:
    """Three heads of eight channels, in five prompt tokens and three new ones that are read."""
    loaded, options, counts = loaded_of(LLAMA), dict[str, Any](max_new_tokens=4), dict[Any, int]()
    for where in ("all", "prompt", "last", (0, -1)):
        (found,) = generate(loaded, ["t3 t1 t4 t1 t5"], HEADS, positions=where, **options)
        assert found.replaced == found.changed
        counts[where] = found.replaced
    assert counts == {"all": 24 * 8, "prompt": 24 * 5, "last": 24, (0, -1): 24 * 2}
    (found,) = generate(loaded, ["t3 t1 t4 t1 t5"], HEADS, "mean", **options)
    assert found.replaced == 24 * (5 + 6 + 7 + 8)
    (found,) = generate(loaded, ["t3 t1 t4 t1 t5"], HEADS, "scale:1", **options)
    assert (found.replaced, found.changed, found.parts_at) == (24 * 8, 0, None)


def test_reference_means_come_from_the_prompts_by_default() -> None:
    loaded, prompts = loaded_of(LLAMA), ["t7 t2 t9", "t3 t1 t4 t1 t5 t9 t2 t6", "t8"]
    options: dict[str, Any] = dict(max_new_tokens=4, positions="prompt")
    others = [{"prompt": prompt} for prompt in prompts]
    for name in ("reference-mean", "reference-mean-by-position"):
        found = generate(loaded, prompts, HEADS, name, **options)
        assert generate(loaded, prompts, HEADS, name, reference=others, **options) == found
        assert any(of.parts_at is not None for of in found)
    given_object = generate(loaded, prompts[:1], HEADS, "reference-mean", reference=reference(LLAMA), **options)
    assert given_object == generate(loaded, prompts[:1], HEADS, reference(LLAMA).mean(), **options)


def test_values_have_to_reach_the_new_tokens() -> None:
    """The reference has eight positions: five of the prompt, and those of three new tokens that are read."""
    loaded, prompt = loaded_of(LLAMA), ["t3 t1 t4 t1 t5"]
    options: dict[str, Any] = dict(imputation="reference-mean-by-position", reference=reference(LLAMA))
    generate(loaded, prompt, HEADS, max_new_tokens=4, **options)
    with pytest.raises(
        InvalidPrompt,
        match=r"prompt 1: with its new tokens, the prompt has 9 tokens, and .* values for 8 positions: pass",
    ):
        generate(loaded, prompt, HEADS, max_new_tokens=5, **options)
    generate(loaded, prompt, HEADS, max_new_tokens=50, positions="prompt", **options)
    values = kind("values-by-position", LLAMA).imputation  # of nine positions
    with pytest.raises(
        InvalidPrompt,
        match="with its new tokens, the prompt has 10 tokens, and 'values' has values for 9 positions: pass",
    ):
        generate(loaded, prompt, HEADS, values, max_new_tokens=6)
    with pytest.raises(
        InvalidPrompt, match="^prompt 1: the prompt has 10 tokens, and 'values' has values for 9 positions$"
    ):
        generate(loaded, [" ".join(["t1"] * 10)], HEADS, values, positions="prompt")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"imputation": "resample"}, InvalidAblation, "resample takes z from a prompt of equal length"),
        ({"imputation": "nonsense"}, UnknownImputation, "unknown imputation 'nonsense'"),
        ({"imputation": "reference-mean"}, InvalidPrompt, "takes z from other prompts, and there is one prompt only"),
        ({"heads": [(0, 3)]}, InvalidHead, "head 3"),
        ({"heads": "L0H1"}, InvalidHead, "a str is not a list of heads"),
        ({"prompts": []}, InvalidPrompt, "there are no prompts"),
        ({"prompts": "t1"}, InvalidPrompt, "prompts are a list of records, not a str"),
        ({"prompts": [""]}, InvalidPrompt, "the prompt is empty"),
        ({"prompts": [3]}, InvalidPrompt, "prompt 1: a record has columns, unlike 3"),
        ({"max_new_tokens": 0}, InvalidAblation, "max_new_tokens is 0: it is a number of tokens, at least 1"),
        ({"max_new_tokens": True}, InvalidAblation, "max_new_tokens is True"),
        (
            {"max_new_tokens": 128},
            InvalidPrompt,
            "the prompt has 2 tokens, .* at most 128, so it can generate at most 127 new",
        ),
        ({"seed": -1}, InvalidAblation, "the seed is -1"),
        ({"positions": "lst"}, InvalidPrompt, "column lst: it is missing"),
        ({"positions": [2]}, InvalidPrompt, "the prompt has 2 tokens, so it has no position 2"),
        ({"loaded": LLAMA.shared()}, UnsupportedModel, "has no tokenizer"),
        ({"chat": True}, InvalidPrompt, "this model has no chat template"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(loaded=loaded_of(LLAMA), prompts=["t3 t1"], heads=HEADS) | change
    if change.get("positions") == "lst":
        arguments["prompts"] = [{"prompt": "t3 t1"}]
    with pytest.raises(error, match=message):
        generate(**arguments)


def test_longest_text_is_generated() -> None:
    (found,) = generate(loaded_of(LLAMA), ["t3 t1"], [], max_new_tokens=127)
    assert len(found.clean) == 127


@pytest.mark.parametrize("sampling", [None, Sampling()])
def test_logits_that_are_not_finite_are_refused(llama: LoadedModel, sampling: Sampling | None) -> None:
    values = {layer: torch.full((3, 8), math.inf) for layer in range(2)}
    from ablation.imputation import Values

    with pytest.raises(NonFiniteLogits, match="the logits of new token 0 are not finite"):
        generate(llama, ["t3 t1"], HEADS, Values(values), sampling=sampling)


def test_model_in_training_mode_is_refused(llama: LoadedModel) -> None:
    llama.model.train()
    with pytest.raises(InvalidAblation, match="the model is in training mode"):
        generate(llama, ["t3 t1"], HEADS)


def test_bad_prompts_are_left_out_on_demand() -> None:
    loaded = loaded_of(LLAMA)
    prompts = [
        {"prompt": "t3 t1", "target": " any text", "group": "a"},
        {"promt": "t3"},
        {"prompt": " ".join(["t1"] * 20)},
    ]
    with pytest.warns(UserWarning, match="2 prompts are left out: prompt 2, .*; prompt 3: the prompt has 20 tokens"):
        (found,) = generate(loaded, prompts, HEADS, skip_bad=True, max_new_tokens=120)
    assert (found.target, found.group) == (" any text", "a")
    (asked,) = generate(loaded, [Question("t3 t1", "t5")], HEADS, max_new_tokens=1)
    assert asked.target == "t5" and asked.clean == found.clean[:1]


def test_chat_renders_texts_and_records(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.tokenizer, "chat_template", "t7 {{ messages[0].content }} t8", raising=False)
    for prompt in ("t3", {"prompt": "t3"}):
        (found,) = generate(llama, [prompt], HEADS, chat=True, max_new_tokens=1)
        assert found.token_ids == (7, 3, 8) and found.prompt == "t3"


def test_progress_counts_every_token_up_to_one(llama: LoadedModel) -> None:
    shares: list[float] = []
    generate(llama, ["t3 t1", "t4"], HEADS, "reference-mean", max_new_tokens=3, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 2 * 2 * 3


def test_texts_keep_the_space_before_the_first_new_word() -> None:
    """A tokenizer as of Llama 2, which drops the space before the first token that it decodes."""
    raw = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "</s>": 3}, unk_token="c"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), token_decoders.Metaspace()
    loaded = LoadedModel("x", LLAMA.shared(), PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))
    assert loaded.decode(1, 2) == "bc"
    assert continuation_text(loaded, [0], [1, 2, 3]) == " bc"
    assert continuation_text(loaded, [0], [2]) == "c"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_adapter_of_peft_generates_without_own_settings() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    base = LLAMA.fresh()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    own = base.generation_config
    own.repetition_penalty = 9.0
    (found,) = generate(LoadedModel("adapted", wrapped, words()), ["t3 t1"], HEADS)
    (plain,) = generate(loaded_of(LLAMA), ["t3 t1"], HEADS)
    assert (found.clean, found.ablated) == (plain.clean, plain.ablated)  # a new adapter changes nothing
    assert base.generation_config is own and "generation_config" not in vars(wrapped)


def test_generation_is_one_frozen_value() -> None:
    (found,) = generate(loaded_of(LLAMA), ["t3 t1"], HEADS, max_new_tokens=1)
    assert isinstance(found, Generation) and {found: 1}[found] == 1
