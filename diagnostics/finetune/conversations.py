"""Conversations to train on, and the JSONL files they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.prompts.prompt import ROLES, Message, text_of
from diagnostics.support.errors import UserError
from diagnostics.support.fields import check_name, kind, wrong
from diagnostics.support.jsonl import read_records

FIELDS = ("id", "messages", "category")


@dataclass(frozen=True)
class Conversation:
    """Messages ``{"role": ..., "content": ...}`` in order; one without a last answer is only a prompt.

    Raises UserError if a field is wrong; the message begins with its name, as in ``field "messages": ...``.
    """

    id: str
    messages: tuple[Message, ...]
    category: str = "default"

    def __post_init__(self) -> None:
        check_name("id", self.id)
        check_name("category", self.category)
        object.__setattr__(self, "messages", _checked(self.messages))


def read_conversations(path: Path) -> list[Conversation]:
    """Read conversations from a file with one JSON object per line, plain or as ``.gz``.

    A line has ``messages``, as in `Conversation`, and may have ``id`` and ``category``. Raises UserError that
    names the wrong line.
    """
    conversations: dict[str, Conversation] = {}

    def take(record: dict[str, Any], number: int) -> None:
        conversation = _parse(record, f"line-{number}")
        if conversation.id in conversations:
            raise wrong("id", f"{conversation.id!r} is already the id of an earlier conversation")
        conversations[conversation.id] = conversation

    read_records(path, "conversations", take)
    if not conversations:
        raise UserError(f"{path} has no conversations: write one JSON object per line")
    return list(conversations.values())


def _parse(record: dict[str, Any], default_id: str) -> Conversation:
    for name in record:
        if name not in FIELDS:
            raise UserError(f"unknown field {name!r:.60}; the fields are {', '.join(FIELDS)}")
    fields = {name: value for name, value in record.items() if value is not None}
    return Conversation(**{"id": default_id, "messages": (), **fields})


def _checked(messages: Any) -> tuple[Message, ...]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise wrong("messages", "must be a list of at least one message")
    previous = ""
    checked = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise wrong("messages", f"a message must be an object, not {kind(message)}")
        for name in message:
            if name not in ("role", "content"):
                raise wrong("messages", f"unknown field {name!r:.60} of a message; the fields are role, content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise wrong("messages", f"role {role!r:.60} is none of {', '.join(ROLES)}")
        content = text_of(content)
        checked.append({"role": role, "content": content})
        if role == "assistant" and previous != "user":
            raise wrong("messages", "what the assistant says must follow a message from the user")
        if role == "assistant" and not content.strip():
            raise wrong("messages", "an answer is blank")
        previous = str(role)
    if previous == "system":
        raise wrong("messages", "the last must be from the user or the assistant")
    return tuple(checked)
