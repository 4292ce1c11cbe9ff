"""A text with its tokens, the characters of each token, and the characters by the prompt's author."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diagnostics.prompts.chat_template import Rendered, Span
from diagnostics.prompts.prompt import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """A text and its tokens.

    ``offsets`` are the characters of each token, None if unknown; ``stripped`` is the number of closing special tokens
    that were left out; ``contents`` are the characters by the prompt's author: the rest is the chat template's.
    """

    text: str
    ids: tuple[int, ...]
    offsets: Sequence[Span] | None
    stripped: int
    contents: tuple[Span, ...]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool, contents: tuple[Span, ...] | None = None
) -> Tokenized:
    """Tokenize a text; ``special`` adds the tokens that the tokenizer puts before a text, but none after it."""
    output = tokenizer(
        text,
        add_special_tokens=special,
        truncation=False,
        padding=False,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # whether a long text fits the model is checked by the callers
    )
    ids: list[int] = output["input_ids"]
    added = output["special_tokens_mask"]
    stop = len(ids)
    # The mask marks tokens that the tokenizer added; if there are no others, the text has no tokens.
    while special and stop and added[stop - 1]:
        stop -= 1
    contents = ((0, len(text)),) if contents is None else contents
    return Tokenized(text, tuple(ids[:stop]), output.get("offset_mapping"), len(ids) - stop, contents)


def joined(messages: Sequence[Message]) -> Rendered:
    """Join messages as plain paragraphs, for a model without a chat template."""
    text, contents = "", []
    for message in messages:
        text += f"{message['role']}: "
        contents.append((len(text), len(text) + len(message["content"])))
        text += f"{message['content']}\n\n"
    return Rendered(f"{text}assistant:", tuple(contents))
