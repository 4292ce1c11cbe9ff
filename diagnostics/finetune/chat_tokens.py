"""A conversation through the chat template -> tokens, and which of them are answers.

Labels are the token ids of the answers, each with its end of turn, and -100 elsewhere: from them
`diagnostics.finetune.plan.decode_phase` reads the phases. The answer to a prompt is all that the chat template writes
after its generation prompt, so that training feeds what inference feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from diagnostics.finetune.conversations import Conversation
from diagnostics.finetune.examples import IGNORED
from diagnostics.prompts import chat_template
from diagnostics.prompts.chat_template import Span, content_spans, refuse_control_tokens
from diagnostics.prompts.prompt import Message
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands in for an answer, to see what a chat template writes after one; no chat template has such a word.
_PROBE = "aNsWeR0here"


def encode_conversation(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of a conversation through the chat template, and its labels; see the module.

    It ends with the last answer's end of turn, or with the generation prompt if the last turn is the user's. The tokens
    before the last answer are those of the messages before it with the generation prompt. Where the first character
    of an answer would merge with the generation prompt, the two are tokenized separately, as in generation.

    Raises
    ------
    UserError
        If there is no chat template, if it refuses the messages, or if it does not write each of them in the same way
        whatever follows, so that no single row of tokens is what inference feeds at every turn.
    """
    for number, message in enumerate(conversation.messages, start=1):
        subject = f"conversation {conversation.id!r}"
        refuse_control_tokens(subject, tokenizer, f"message {number}", message["content"])
    text, answers = _write(conversation, tokenizer)
    for role in ("system", "user"):  # answers are checked by now
        if content_spans([message for message in conversation.messages if message["role"] == role], text) is None:
            raise _refusal(conversation, tokenizer, f"does not write all that the {role} says")
    ids: list[int] = []
    labels: list[int] = []
    for number, piece in enumerate(_tokenize(conversation, tokenizer, text, answers)):
        ids += piece
        labels += piece if number % 2 else [IGNORED] * len(piece)
    return ids, labels


def _write(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the characters of each answer with its end of turn."""
    messages = conversation.messages
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    open_ended = messages[-1]["role"] == "user"
    text = _render(conversation, tokenizer, messages, opening=open_ended)
    if not turns:
        return text, []
    openings = [_render(conversation, tokenizer, messages[:turn], opening=True) for turn in turns]
    if not all(text.startswith(opening) for opening in openings):
        raise _refusal(conversation, tokenizer, "writes a turn differently when others follow it")
    probed = ({"role": "assistant", "content": _PROBE},)
    shown, _, tail = _render(conversation, tokenizer, messages[: turns[-1]] + probed, opening=False).rpartition(_PROBE)
    if not shown:
        raise _refusal(conversation, tokenizer, "does not show answers as they are")
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    end = max((token for token in known if tail.lstrip().startswith(token)), key=len, default="")
    limits = [*(len(opening) for opening in openings[1:]), len(text)]
    answers = []
    for turn, opening, limit in zip(turns, openings, limits, strict=True):
        stop = _find(text[:limit], messages[turn]["content"].strip(), end, len(opening))
        if stop is None:
            after = f", with {end!r} after it" if end else ""
            raise _refusal(conversation, tokenizer, f"does not show message {turn + 1} as it is{after}")
        answers.append((len(opening), stop))
    return text if open_ended else text[: answers[-1][1]], answers


def _find(text: str, content: str, end: str, start: int) -> int | None:
    """Return where the first occurrence of a content with its end of turn ends; None if there is none."""
    while (start := text.find(content, start)) >= 0:
        stop = start + len(content)
        if not end:
            return stop
        rest = text[stop:].lstrip()
        if rest.startswith(end):
            return len(text) - len(rest) + len(end)
        start += 1
    return None


def _tokenize(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, answers: list[Span]
) -> list[list[int]]:
    """Cut a text at its answers into tokens: prompt, answer, prompt, and so on."""

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"]

    ids = encode(text)
    bounds = [0, *(end for span in answers for end in span), len(text)]
    prefixes = [encode(text[:bound]) for bound in bounds]
    if all(ids[: len(prefix)] == prefix for prefix in prefixes):
        return [ids[len(shorter) : len(longer)] for shorter, longer in pairwise(prefixes)]
    pieces = [encode(text[start:stop]) for start, stop in pairwise(bounds)]
    # Some tokenizers put a space before every text.
    if tokenizer.decode([token for piece in pieces for token in piece]) != tokenizer.decode(ids):
        raise _refusal(conversation, tokenizer, "joins an answer to its generation prompt in one token")
    return pieces


def _render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, opening: bool
) -> str:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: conversations need one")
    return chat_template.apply(f"conversation {conversation.id!r}", tokenizer, messages, opening=opening)


def _refusal(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, what: str) -> UserError:
    name = f" of {tokenizer.name_or_path!r}" if tokenizer.name_or_path else ""
    return UserError(f"conversation {conversation.id!r}: the chat template{name} {what}")
