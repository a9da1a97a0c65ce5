"""Questions to a model, and their tokens. This module imports neither torch nor transformers."""

from __future__ import annotations

import numbers
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablation.errors import InvalidPrompt, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 60
"""Texts in messages are cut to this length."""
MARK = "\ue000"
"""A character that no chat template contains: of the private use area of Unicode."""


@dataclass(frozen=True)
class Question:
    """A prompt, the target (the text that should follow it), and the control (a similar text that should not react).

    None as target or control stands for the most probable token of the clean run that is not the other one. chat: the
    prompt is a message of the user, to be rendered by the model's chat template; the target begins the answer. group:
    any name, by which the results of several questions are summarised. resample: a prompt of as many tokens, whose z
    replaces that of this prompt; None for one that is drawn. spans: (start, end) pairs of characters of the prompt, at
    whose tokens an ablation acts if it acts at the tokens of a column.
    """

    prompt: str
    target: str | None = None
    control: str | None = None
    chat: bool = False
    group: str | None = None
    resample: str | None = None
    spans: tuple[tuple[int, int], ...] | None = None


def check_prompt(prompt: str) -> None:
    """Raise InvalidPrompt for a prompt that is not text, or that is empty."""
    check_text(prompt, "prompt")
    if not prompt:
        raise InvalidPrompt("the prompt is empty")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> list[int]:
    """Return the token ids of the prompt.

    Special tokens that the tokenizer adds at the start (BOS, CLS) stay. Those that it adds at the end (EOS, SEP) are
    left off, since the question is what follows the prompt. chat: render the prompt with the model's chat template.

    Raises InvalidPrompt if the prompt is empty or not text, contains unknown words, or loses letters in the tokenizer,
    and with `chat` if the model has no chat template.
    """
    check_prompt(prompt)
    text = _rendered(tokenizer, prompt) if chat else prompt
    # A chat template writes all special tokens itself.
    encoded: Any = tokenizer(text, add_special_tokens=not chat, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    if len(added) != len(ids):  # ByT5 counts an EOS that it does not add to a text that ends with one
        added = [0] * len(ids)
    own = [token for token, is_added in zip(ids, added, strict=True) if not is_added]
    while added and added.pop():
        ids.pop()
    if not own:
        raise InvalidPrompt(f"the prompt {_shown(prompt)} has no tokens in this model")
    if _has_unknown(tokenizer, own, text):
        raise InvalidPrompt(f"this model has no token for {_unknown_parts(tokenizer, text)} in the prompt")
    if not _round_trips(tokenizer, own, text):
        raise InvalidPrompt(f"this tokenizer loses the prompt: {_shown(text)} becomes {_shown(tokenizer.decode(own))}")
    return ids


def span_positions(
    tokenizer: PreTrainedTokenizerBase, prompt: str, spans: Iterable[tuple[int, int]], *, chat: bool = False
) -> tuple[int, ...]:
    """Return the positions of the tokens that overlap with spans of characters of the prompt, in `prompt_ids`.

    spans: (start, end) pairs. tokenizer: a fast one. Raises InvalidPrompt for a span that the prompt does not have, or
    that has no token.
    """
    check_spans(prompt, spans)
    text = _rendered(tokenizer, prompt) if chat else prompt
    begin, shown = _place_in_rendered(tokenizer, prompt, text) if chat else (0, range(len(prompt)))
    encoded: Any = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    found: list[int] = []
    for start, end in spans:
        low, high = max(begin + start, shown.start), min(begin + end, shown.stop)
        at = [number for number, (first, last) in enumerate(offsets) if max(first, low) < min(last, high)]
        if not at:
            raise InvalidPrompt(f"no token is at the characters {start} to {end} of the prompt")
        found += at
    return tuple(sorted(set(found)))


def is_integer(value: object) -> bool:
    """Whether a value is an integer, of Python or numpy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_spans(prompt: str, spans: object) -> None:
    """Raise InvalidPrompt unless these are spans of the prompt: (start, end) pairs of integers, at least one."""
    pairs = list(spans) if isinstance(spans, list | tuple) else []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(is_integer, pair)):
            raise InvalidPrompt(f"a span is a pair [start, end] of characters of the prompt, not {_shown(pair)}")
        if not 0 <= pair[0] < pair[1] <= len(prompt):
            raise InvalidPrompt(f"the prompt has {len(prompt)} characters, and so no span {list(pair)}")
    if not pairs:
        raise InvalidPrompt(f"spans are pairs [start, end] of characters of the prompt, not {_shown(spans)}")


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the token ids of a target or a control, without special tokens.

    Raises InvalidPrompt for a text that is empty, or that the model's tokens cannot spell.
    """
    check_text(text, "target or control")
    ids = _encode(tokenizer, text)
    if not ids:
        raise InvalidPrompt(f"{_shown(text)} has no tokens in this model")
    if not _is_spelled(tokenizer, ids, text):
        stripped = text.strip()
        spelled = [
            v for v in (f" {stripped}", stripped) if v != text and _is_spelled(tokenizer, _encode(tokenizer, v), v)
        ]
        raise InvalidPrompt(
            f"{_shown(text)} has no tokens in this model" + (f"; {spelled[0]!r} has" if spelled else "")
        )
    return tuple(ids)


def other_spacing(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """Return a text with a leading space for one without it, and the reverse; None if it has the same first token."""
    other = text[1:] if text.startswith(" ") else f" {text}"
    ids = _encode(tokenizer, other)
    if not other or not _is_spelled(tokenizer, ids, other) or ids[0] == _encode(tokenizer, text)[0]:
        return None
    return other


def check_text(text: object, what: str) -> None:
    """Raise InvalidPrompt unless this is a str that UTF-8 can hold; lone surrogates stand for undecodable bytes."""
    if not isinstance(text, str):
        raise InvalidPrompt(f"a {what} is a str, not {type(text).__name__}: {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidPrompt(f"the {what} is not valid UTF-8: {_shown(text)}") from None


def _shown(text: object) -> str:
    """The repr of a text, shortened in its middle."""
    return shortened(repr(text), SHOWN_CHARACTERS)


def _rendered(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """Render a user's message, and the start of the answer, with the model's chat template. Raises InvalidPrompt."""
    if tokenizer.chat_template is None:
        raise InvalidPrompt("this model has no chat template: ask without chat")
    try:
        messages = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's authors, which may raise anything
        raise InvalidPrompt(f"the model's chat template fails: {type(error).__name__}: {_shown(str(error))}") from error


def _place_in_rendered(tokenizer: PreTrainedTokenizerBase, message: str, text: str) -> tuple[int, range]:
    """Return where the first character of a message is in its rendered text, and the characters that are shown.

    They are where a mark is that is rendered in place of the message. Spaces around the message may be left out. Raises
    InvalidPrompt if the template changes the message in another way.
    """
    start, stripped = _rendered(tokenizer, MARK).find(MARK), message.strip()
    for shown, skipped in ((message, 0), (stripped, message.find(stripped))):
        if start >= 0 and text.startswith(shown, start):
            return start - skipped, range(start, start + len(shown))
    raise InvalidPrompt("the chat template changes the prompt, so the tokens of its characters are unknown")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def _has_unknown(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether some of the text became the unknown token; not where the text itself contains that token by name."""
    unknown = tokenizer.unk_token_id
    return unknown is not None and ids.count(unknown) > text.count(str(tokenizer.unk_token))


def _unknown_parts(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The parts of the text that became the unknown token; the whole text, if the tokenizer does not tell them."""
    if not tokenizer.is_fast:
        return _shown(text)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    parts = [text[start:end] for token, (start, end) in places if token == tokenizer.unk_token_id]
    unknown = dict.fromkeys(_shown(part.strip() or part) for part in parts if part != tokenizer.unk_token)
    return ", ".join(list(unknown)[:4]) or _shown(text)


def _is_spelled(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether these token ids of a text, at least one, give the text again."""
    return bool(ids) and not _has_unknown(tokenizer, ids, text) and _round_trips(tokenizer, ids, text)


def _round_trips(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether decoding gives the text again. Case, spaces and Unicode form may differ, since tokenizers change them."""
    back = str(tokenizer.decode(ids))
    one, other = ("".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in (back, text))
    return one == other
