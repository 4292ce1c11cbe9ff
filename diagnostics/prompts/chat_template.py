"""Renders messages with a chat template, and checks that the template wrote each of them, and where.

A chat template is a program by the tokenizer's author. It may drop a turn, cut it, or ignore a content that is a string
and not a list of parts; the incomplete text would then be measured silently. So the template is rendered a second time
with a short word in place of every content, which shows where contents go, and the text is compared with the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diagnostics.prompts.prompt import Message
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Replaces content number n; no text or template contains such words.
_PROBE = "cOnTeNt{}hErE"
_PROBES = re.compile(r"cOnTeNt(\d+)hErE")


@dataclass(frozen=True)
class Rendered:
    """Messages as one text, and the character spans of their contents in it, in order."""

    text: str
    contents: tuple[Span, ...]


def render(subject: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Rendered:
    """Render messages and the generation prompt with the tokenizer's chat template.

    The template may strip white space at the ends of a content, as many do, but must keep everything else. A template
    that takes only lists of parts gets these. Error messages begin with ``subject``.

    Raises
    ------
    UserError
        If the template refuses the messages, or does not write every content completely in the order of the turns; or
        if a content holds a control token, which would end its turn.
    """
    _refuse_control_tokens(subject, tokenizer, messages)
    probes = [{**message, "content": _PROBE.format(n)} for n, message in enumerate(messages)]
    lost: list[int] = []
    for as_parts in (False, True):
        text = _apply(subject, tokenizer, messages, as_parts)
        try:
            skeleton = _apply(subject, tokenizer, probes, as_parts)
        except UserError:  # a template may inspect contents
            skeleton = ""
        if as_parts and "'type'" in skeleton:  # the template printed the list itself
            break
        spans = _matched(skeleton, messages, text)
        # A short content may occur elsewhere in the text by chance: if its probe is lost, so is the content.
        if spans is None and (not skeleton or all(probe["content"] in skeleton for probe in probes)):
            spans = content_spans(messages, text)
        if spans is not None:
            order = [int(number) for number in _PROBES.findall(skeleton)]
            turns = [n for n in order if messages[n]["role"] != "system"]
            if turns != sorted(turns):
                raise UserError(f"{subject}: the chat template writes the turns in another order")
            return Rendered(text, tuple(spans))
        lost = lost or [n for n, probe in enumerate(probes) if skeleton and probe["content"] not in skeleton]
        lost = lost or [n for n, message in enumerate(messages) if message["content"].strip() not in text]
        lost = lost or [len(messages) - 1]
    number = lost[0]
    raise UserError(
        f"{subject}: the chat template does not write all of message {number + 1} "
        f"({messages[number]['role']}): what would be measured is another prompt"
    )


def refuse_control_tokens(subject: str, tokenizer: PreTrainedTokenizerBase, part: str, content: str) -> None:
    """Raise UserError if ``content``, which is data, holds a control token of the model; ``part`` names it."""
    for token in _control_tokens(tokenizer):
        if token in content:
            raise UserError(
                f"{subject}: {part} holds {token!r}, a control token of the model: write it otherwise, or the model "
                "takes what is quoted for the conversation itself"
            )


def _refuse_control_tokens(subject: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        refuse_control_tokens(subject, tokenizer, f"message {number}", message["content"])


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that no text may contain: special ones, and other added ones that the chat template itself writes.

    The unknown token is not among them: it represents text.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    for added in getattr(tokenizer, "added_tokens_decoder", {}).values():
        if added.special or (added.content in template and not added.content.isspace()):
            special.add(added.content)
    return sorted(special - {getattr(tokenizer, "unk_token", None)}, key=len, reverse=True)


def apply(
    subject: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, opening: bool = True
) -> str:
    """Render messages with the tokenizer's chat template, with its generation prompt unless ``opening`` is False.

    Raises UserError if the template refuses them. Only `render` checks that the template wrote all of them.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening))
    except Exception as error:  # templates are programs by the tokenizer's author and may raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"{subject}: the chat template refuses its messages ({reason})") from error


def _apply(subject: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], as_parts: bool) -> str:
    turns: list[Mapping[str, Any]] = list(messages)
    if as_parts:
        turns = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    return apply(subject, tokenizer, turns)


def _matched(skeleton: str, messages: Sequence[Message], text: str) -> list[Span] | None:
    """Return the spans of the contents at the positions of the probes; None if a probe is lost or the text differs."""
    pieces = _PROBES.split(skeleton)  # text, number, text, number, ..., text
    if {int(number) for number in pieces[1::2]} != set(range(len(messages))) or not text.startswith(pieces[0]):
        return None
    spans, end = [], len(pieces[0])
    for number, following in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        content = messages[number]["content"]
        for written in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(written + following, end):
                spans.append((end, end + len(written)))
                end += len(written) + len(following)
                break
        else:
            return None
    return spans if end == len(text) else None


def content_spans(messages: Sequence[Message], text: str) -> list[Span] | None:
    """Return the spans of the contents, each after the previous one; None if one is missing."""
    spans, end = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, end)
        if start < 0:
            return None
        end = start + len(content)
        spans.append((start, end))
    return spans
