"""Questions put to a model, and their tokens. Importing this module is cheap."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablation.errors import InvalidPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A prompt, the token that should follow it, and a token of the same kind that should not react.

    A target or control of None stands for the most probable token of the clean run that is not watched yet.
    """

    prompt: str
    target: str | None = None
    control: str | None = None


def check_prompt(prompt: str) -> None:
    """Raise InvalidPrompt for a prompt without text."""
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids that the model's own tokenizer gives the prompt.

    Raises InvalidPrompt if the prompt is empty, has unknown words, or is changed by the tokenizer.
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
    """Return the id of a text that is one token. Raises InvalidPrompt otherwise, with its tokens and an alternative."""
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
    """Whether the tokens still hold the text. A tokenizer may change case, form and spaces, but not lose letters."""
    back = str(tokenizer.decode(ids, skip_special_tokens=True))
    one, other = ("".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in (back, text))
    return one == other
