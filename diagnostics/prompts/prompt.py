"""A prompt, and a set of prompts.

A prompt may hold a long *document* at the mark ``{document}``. If the prompt is too long, the document is cut at its
end; the text around it and the texts inserted into it stay complete. ``{{document}}`` is not a mark, but stands for the
text ``{document}``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, overload

from diagnostics.prompts.inserts import Insert, place_inserts
from diagnostics.support.fields import check_name, check_text, kind, wrong

Message = dict[str, str]

PLACEHOLDER = "{document}"
# The mark, or its escaped form with a second pair of braces.
_MARKS = re.compile(r"\{\{document\}\}|\{document\}")
ROLES = ("system", "user", "assistant")


def escaped(text: str) -> str:
    """Escape the marks in a text, so that it can be a prompt's ``text`` or content."""
    return text.replace(PLACEHOLDER, f"{{{PLACEHOLDER}}}")


@dataclass(frozen=True)
class Prompt:
    """One prompt: a conversation (``messages``) or a plain ``text``, never both.

    Parameters
    ----------
    id
        The prompt's name, unique in its set, 1 to 200 characters.
    messages
        ``{"role": ..., "content": ...}`` in order, the last one from the user; a content is text, or a list of
        ``{"type": "text", "text": ...}``.
    text
        The prompt as plain text, without a chat template.
    document
        Long text for the one ``{document}`` mark in ``text`` or in a message.
    inserts
        Texts inserted into the document after the cut, so that they are never lost.
    reference
        The text expected to follow the prompt. Without one, the model's own continuation is used.
    evidence
        The parts that the answer depends on: strings in the prompt, or half-open character ranges of ``text``.
    category
        The kind of task, by which results are grouped.
    cut
        The unit in which the document is cut: words, lines or paragraphs.

    Raises
    ------
    UserError
        If a field is wrong; the message begins with its name, as in ``field "messages": ...``.
    """

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    document: str = ""
    inserts: tuple[Insert, ...] = ()
    reference: str | None = None
    evidence: tuple[str | tuple[int, int], ...] = ()
    category: str = "default"
    cut: Literal["word", "line", "paragraph"] = "word"

    def __post_init__(self) -> None:
        check_name("id", self.id)
        check_name("category", self.category)
        if self.messages is None and self.text is None:
            raise wrong("text", 'is missing, and so is "messages": give one of the two')
        if self.messages is not None and self.text is not None:
            raise wrong("text", 'is given beside "messages": give one of the two')
        if self.messages is not None:
            object.__setattr__(self, "messages", _checked_messages(self.messages))
        else:
            check_text("text", self.text)
        if self.reference is not None:
            check_text("reference", self.reference)
        self._check_document()
        object.__setattr__(self, "evidence", self._checked_evidence())

    def fill(self, document: str) -> str | tuple[Message, ...]:
        """Return the prompt with ``document`` and the inserts at its mark: a text, or messages."""
        document = place_inserts(document, self.inserts)

        def filled(content: str) -> str:
            return _MARKS.sub(lambda mark: document if mark[0] == PLACEHOLDER else PLACEHOLDER, content)

        if self.messages is None:
            return filled(str(self.text))
        return tuple({**message, "content": filled(message["content"])} for message in self.messages)

    def _contents(self) -> list[str]:
        if self.messages is None:
            return [str(self.text)]
        return [message["content"] for message in self.messages]

    def _check_document(self) -> None:
        if self.document != "":
            check_text("document", self.document)
        marks = sum(_MARKS.findall(content).count(PLACEHOLDER) for content in self._contents())
        if marks and not self.document:
            raise wrong("document", f"is missing, but the prompt has a {PLACEHOLDER} mark")
        if self.document and marks != 1:
            raise wrong("document", f"goes to one {PLACEHOLDER} mark, but the prompt has {marks or 'none'}")
        if self.inserts and not self.document:
            raise wrong("inserts", "there is no document to place them in")

    def _checked_evidence(self) -> tuple[str | tuple[int, int], ...]:
        if isinstance(self.evidence, str) or not isinstance(self.evidence, Sequence):
            raise wrong("evidence", "must be a list of strings or [start, end] pairs")
        if not self.evidence:
            return ()
        filled = self.fill(self.document)
        contents = [filled] if isinstance(filled, str) else [message["content"] for message in filled]
        return tuple(self._checked_span(span, contents) for span in self.evidence)

    def _checked_span(self, span: Any, contents: list[str]) -> str | tuple[int, int]:
        if isinstance(span, str):
            if not span or not any(span in content for content in contents):
                raise wrong("evidence", f"{shown(span)} does not occur in the prompt")
            return span
        if not (isinstance(span, Sequence) and len(span) == 2 and all(type(end) is int for end in span)):
            raise wrong("evidence", f"{shown(span)} is neither a string nor a [start, end] pair")
        if self.text is None or self.document:
            raise wrong("evidence", '[start, end] is only for "text" without a document: quote it instead')
        if _MARKS.search(self.text):
            raise wrong("evidence", "[start, end] is not for a text with {{document}}: quote it instead")
        start, end = span
        if not 0 <= start < end <= len(self.text):
            raise wrong("evidence", f"[{start}, {end}] is no part of the text's {len(self.text)} characters")
        return start, end


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in a fixed order, with the name of their source.

    ``context_length`` is the maximum number of tokens of every prompt (None: no limit); ``seed`` is that of a generated
    set (None: read from a file).
    """

    prompts: tuple[Prompt, ...]
    name: str
    context_length: int | None = None
    seed: int | None = None

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return replace(self, prompts=self.prompts[index])
        return self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the model's input: all fields of all prompts, and the length."""
        digest = hashlib.sha256(json.dumps(self.context_length).encode())
        for prompt in self.prompts:
            # One prompt at a time, so that a long set is not copied in memory.
            digest.update(json.dumps(asdict(prompt), sort_keys=True, ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()


# --- Checks ---


def _checked_messages(messages: Any) -> tuple[Message, ...]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise wrong("messages", "must be a list of at least one message")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise wrong("messages", 'every message has exactly "role" and "content"')
        if message["role"] not in ROLES:
            raise wrong("messages", f"role {shown(message['role'])} is none of {', '.join(ROLES)}")
        checked.append({"role": message["role"], "content": text_of(message["content"])})
    if messages[-1]["role"] != "user":
        raise wrong("messages", 'the last must be from the user; an expected answer belongs in "reference"')
    return tuple(checked)


def text_of(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts ``{"type": "text", "text": ...}``, joined.

    Raises UserError for anything else, such as a part that is an image.
    """
    if isinstance(content, Sequence) and not isinstance(content, str) and all(isinstance(p, Mapping) for p in content):
        for part in content:
            if part.get("type") != "text":
                raise wrong("messages", f"a content has a part of type {shown(part.get('type'))}: only text is served")
            if set(part) != {"type", "text"}:
                raise wrong("messages", 'a part of type "text" has exactly "type" and "text"')
            if not isinstance(part["text"], str):
                raise wrong("messages", f"a part's text must be text, not {kind(part['text'])}")
        content = "".join(part["text"] for part in content)
    check_text("messages", content)
    return str(content)


def shown(value: Any) -> str:
    """Return a value as JSON for an error message, in at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr).encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
