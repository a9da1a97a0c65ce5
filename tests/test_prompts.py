"""The tokens of a question: special tokens, chat templates, unusable prompts and targets."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from ablation.errors import InvalidPrompt
from ablation.models import LoadedModel
from ablation.prompts import continuation_ids, other_spacing, prompt_ids

END, START = "<|im_end|>", "<|im_start|>"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(tokenizer: Tokenizer, single: str, *special: str) -> Any:
    pairs = [(token, tokenizer.token_to_id(token)) for token in special]
    return processors.TemplateProcessing(single=single, special_tokens=pairs)


def byte_level(single: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as of GPT-2 or OPT. single: what it adds to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", "<|endoftext|>", START, END]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*names, *alphabet])}, []))
    raw.add_special_tokens(names)
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.post_processor = template(raw, single, *(word for word in single.split() if word in names))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer of words that adds [CLS] and [SEP], as of BERT."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "berlin", "is", "big", "##ger", "."]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.add_special_tokens(words[:5])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    raw.post_processor = template(raw, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def opt() -> PreTrainedTokenizerFast:
    """As of OPT: one token is BOS, EOS and unknown, and it is put before each prompt."""
    return byte_level("</s> $A", bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")


def gpt2() -> PreTrainedTokenizerFast:
    """As of GPT-2: one token is BOS, EOS and unknown, and nothing is added."""
    return byte_level(**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))


def appending() -> PreTrainedTokenizerFast:
    """With add_bos_token and add_eos_token, as Llama tokenizers may have."""
    return byte_level("<s> $A </s>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "first", "text"),
    [
        (appending(), ["<s>"], "Berlin is"),
        (byte_level("$A </s>", eos_token="</s>"), [], "Berlin is"),
        (byte_level("<s> $A </s> </s>", eos_token="</s>"), ["<s>"], "Berlin is"),
        (opt(), ["</s>"], "Berlin is"),
        (word_piece(), ["[CLS]"], "berlin is bigger."),
        (appending(), ["<s>"], "Berlin</s>"),
        (appending(), ["<s>"], "<s>Berlin</s>"),
    ],
    ids=["BOS and EOS", "EOS", "two EOS", "BOS", "SEP", "own EOS", "own both"],
)
def test_added_tokens_stay_at_the_start_and_not_at_the_end(
    tokenizer: PreTrainedTokenizerFast, first: list[str], text: str
) -> None:
    """The question is what follows the prompt. A special token that the user has written is part of the prompt."""
    ids = prompt_ids(tokenizer, text)
    before = [tokenizer.convert_tokens_to_ids(token) for token in first]
    assert ids == [*before, *tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_end_of_a_tokenizer_written_in_python_is_left_off() -> None:
    """They compute the mask of special tokens in another way."""
    assert prompt_ids(ByT5Tokenizer(), "Hi") == prompt_ids(ByT5Tokenizer(), "Hi</s>")[:-1] == [75, 108]
    assert prompt_ids(CanineTokenizer(), "Hi") == [57344, 72, 105]
    assert continuation_ids(ByT5Tokenizer(), "Hi") == (75, 108)


@pytest.mark.parametrize("make", [opt, gpt2, appending])
@pytest.mark.parametrize(
    "text",
    [
        "Berlin is",
        "Berlin is ",
        " Berlin\tis\t",
        "\n",
        " ",
        "\n\nBerlin\r\n",
        "</s>Berlin",
        "<|endoftext|>Berlin is",
        "<|endoftext|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_special_tokens_and_spaces_are_kept(make: Any, text: str) -> None:
    tokenizer = make()
    assert tokenizer.decode(prompt_ids(tokenizer, text)).endswith(text)


@pytest.mark.parametrize("text", [END, "<|endoftext|>", "</s>", "\n", " ", "."])
def test_special_tokens_and_spaces_may_be_targets(text: str) -> None:
    for tokenizer in (opt(), gpt2(), appending()):
        (token,) = continuation_ids(tokenizer, text)
        assert tokenizer.decode([token]) == text


def test_unknown_token_counts_only_where_it_is_not_written(capitals: LoadedModel) -> None:
    unknown = capitals.tokenizer.unk_token
    assert prompt_ids(capitals.tokenizer, f"{unknown} is")[0] == capitals.tokenizer.unk_token_id
    assert continuation_ids(capitals.tokenizer, unknown) == (capitals.tokenizer.unk_token_id,)
    with pytest.raises(InvalidPrompt, match="^this model has no token for 'Minas' in the prompt$"):
        prompt_ids(capitals.tokenizer, f"{unknown} is the capital of Minas")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Minas is the capital", "this model has no token for 'Minas' in"),
        ("Minas is the capital of Gondor", "no token for 'Minas', 'Gondor' in"),
        ("Berlin is ", "no token for ' ' in"),
        ("Berlin\tis", r"no token for '\\t' in"),
        ("\n", r"no token for '\\n' in"),
        ("", "the prompt is empty"),
        ("\ud800", r"the prompt is not valid UTF-8: '\\ud800'"),
        ("Berlin \udcff" * 20_000, "the prompt is not valid UTF-8: .{1,80}$"),
        (["Berlin", "is"], r"a prompt is a str, not list: \['Berlin', 'is'\]"),
        (None, "a prompt is a str, not NoneType: None"),
        (b"Berlin", "a prompt is a str, not bytes: b'Berlin'"),
        ("Gondor" * 20_000, "no token for .{1,80} in the prompt"),
    ],
)
def test_unusable_prompt_is_refused_in_one_short_line(capitals: LoadedModel, prompt: Any, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        prompt_ids(capitals.tokenizer, prompt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_prompt_without_tokens_of_its_own_is_refused() -> None:
    for text in (" ", "\n"):  # BERT drops spaces
        with pytest.raises(InvalidPrompt, match="the prompt .* has no tokens in this model"):
            prompt_ids(word_piece(), text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" Gondor", "^' Gondor' has no tokens in this model$"),
        (" Germany Gondor", "^' Germany Gondor' has no tokens in this model$"),
        ("pitcher", "'pitcher' has no tokens in this model"),
        ("Iran ", "'Iran ' has no tokens in this model; ' Iran' has"),
        (" Gondor" * 20_000, "^' Gondor.{1,60}' has no tokens in this model$"),
        ("", "'' has no tokens in this model"),
        ("\ud800", "the target or control is not valid UTF-8"),
        (4486, "a target or control is a str, not int: 4486"),
    ],
)
def test_target_without_tokens_is_refused_with_a_hint(capitals: LoadedModel, text: Any, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason):
        continuation_ids(capitals.tokenizer, text)


def test_continuation_may_have_several_tokens(capitals: LoadedModel) -> None:
    tokenizer = capitals.tokenizer
    one, other = (continuation_ids(tokenizer, text) for text in (" Germany", " France"))
    assert continuation_ids(tokenizer, " Germany France") == one + other and len(one) == len(other) == 1
    assert continuation_ids(tokenizer, " Iran" * 9) == 9 * continuation_ids(tokenizer, " Iran")


@pytest.mark.parametrize("make", [opt, appending, word_piece])
def test_continuation_has_no_added_tokens(make: Any) -> None:
    """What a tokenizer adds to a text does not follow a prompt."""
    tokenizer = make()
    text = "berlin is bigger"
    assert continuation_ids(tokenizer, text) == tuple(tokenizer.encode(text, add_special_tokens=False))
    assert not set(continuation_ids(tokenizer, text)) & set(tokenizer.all_special_ids)


def test_tokenizer_that_loses_text_is_refused(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers read a word-level tokenizer as one of byte pairs, and dropped unknown words."""
    first = capitals.tokenizer(" a")["input_ids"]
    encoded = {"input_ids": first * 3, "special_tokens_mask": [0] * 3}
    monkeypatch.setattr(type(capitals.tokenizer), "__call__", lambda self, text, **_: encoded)
    monkeypatch.setattr(type(capitals.tokenizer), "encode", lambda self, text, **_: first)
    with pytest.raises(InvalidPrompt, match="loses the prompt: 'Paris is the capital of' becomes ' a a a'"):
        prompt_ids(capitals.tokenizer, "Paris is the capital of")
    with pytest.raises(InvalidPrompt, match="^' France' has no tokens in this model$"):
        continuation_ids(capitals.tokenizer, " France")


def test_continuation_of_one_token_is_found(capitals: LoadedModel) -> None:
    (token,) = continuation_ids(capitals.tokenizer, " Germany")
    assert capitals.decode(token) == " Germany"


def test_other_spacing_is_the_word_with_or_without_a_space(capitals: LoadedModel) -> None:
    assert other_spacing(capitals.tokenizer, "Germany") == " Germany"
    assert other_spacing(capitals.tokenizer, " Germany") == "Germany"
    assert other_spacing(capitals.tokenizer, " Germany France") == "Germany France"
    assert other_spacing(capitals.tokenizer, "<|endoftext|>") is None
    assert other_spacing(word_piece(), "berlin") is None, "both are the same token"


def test_prompt_keeps_the_tokens_of_its_tokenizer(capitals: LoadedModel) -> None:
    ids = prompt_ids(capitals.tokenizer, "Berlin is the capital of")
    assert [capitals.decode(i) for i in ids] == ["Berlin", " is", " the", " capital", " of"]


@pytest.mark.parametrize("make", [opt, gpt2, appending])
def test_chat_renders_the_template_and_adds_nothing(make: Any) -> None:
    tokenizer = make()
    tokenizer.chat_template = CHAT
    text = tokenizer.decode(prompt_ids(tokenizer, "Hi", chat=True))
    assert text == f"{START}user\nHi{END}\n{START}assistant\n"


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (None, "^this model has no chat template: ask without chat$"),
        ("{{ raise_exception('a system prompt\nis missing') }}", "^the model's chat template fails: TemplateError: "),
        ("{% for", "^the model's chat template fails: TemplateSyntaxError"),
    ],
)
def test_chat_without_a_usable_template_is_refused(chat_template: str | None, reason: str) -> None:
    tokenizer = gpt2()
    tokenizer.chat_template = chat_template
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        prompt_ids(tokenizer, "Hi", chat=True)
    assert "\n" not in str(caught.value)
