"""Questions to a model, and their tokens. This module imports neither torch nor transformers."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablation.errors import InvalidPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A prompt, the target (the token that should follow it), and the control (a similar token that should not react).

    None as target or control stands for the most probable token of the clean run that is not watched yet.
    """

    prompt: str
    target: str | None = None
    control: str | None = None


def check_prompt(prompt: str) -> None:
    """Raise InvalidPrompt for a prompt that is empty or consists of spaces."""
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of the prompt, with the special tokens that the tokenizer adds.

    Raises InvalidPrompt if the prompt is empty, contains unknown words, or loses letters in the tokenizer.
    """
    check_prompt(prompt)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        unknown = [word for word in prompt.split() if tokenizer.unk_token_id in _encode(tokenizer, word)]
        raise InvalidPrompt(
            f"this model does not know all words of the prompt ({', '.join(map(repr, unknown or [prompt]))})"
        )
    if not _round_trips(tokenizer, ids, prompt):
        raise InvalidPrompt(f"this tokenizer loses the prompt: {prompt!r} becomes {tokenizer.decode(ids)!r}")
    return ids


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return the token id of a text that is one token.

    Raises InvalidPrompt for any other text. The message names the tokens of the text and, if possible, an alternative.
    """
    ids = _encode(tokenizer, text)
    if _is_token(tokenizer, text):
        return ids[0]
    variants = [v for v in (f" {text.strip()}", text.strip()) if v != text and _is_token(tokenizer, v)]
    hint = f"; {variants[0]!r} is" if variants else ""
    if len(ids) == 1:
        raise InvalidPrompt(f"{text!r} is not a token of this model{hint}")
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
    raise InvalidPrompt(f"{text!r} is not one token but {len(ids)} ({pieces}){hint}")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = _encode(tokenizer, text)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id and _round_trips(tokenizer, ids, text)


def _round_trips(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether decoding gives the text again. Case, spaces and Unicode form may differ, since tokenizers change them."""
    back = str(tokenizer.decode(ids, skip_special_tokens=True))
    one, other = ("".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in (back, text))
    return one == other
