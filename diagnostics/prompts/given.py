"""Prompts as people give them: a set, a file, one text, or a list of texts, conversations and prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from diagnostics.prompts.load import load_prompts
from diagnostics.prompts.prompt import Prompt, PromptSet, escaped
from diagnostics.support.errors import UserError
from diagnostics.support.fields import kind

GIVEN = "given"  # name of a set that was made of texts
HOW = "give load_prompts(...), a text, or a list of texts, conversations or Prompts"


def as_prompts(prompts: Any) -> PromptSet:
    """Return what was given as a set of prompts.

    A text is a prompt without a chat template; ``"builtin"`` and names that end in ``.jsonl`` or ``.jsonl.gz``, and
    paths, are for `load_prompts`. A list may hold texts, conversations (lists of ``{"role": ..., "content": ...}``) and
    `Prompt` objects; a list of messages is one conversation. Raises UserError for anything else.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, os.PathLike) or (isinstance(prompts, str) and _names_a_set(prompts)):
        return load_prompts(prompts)
    if isinstance(prompts, str | Prompt) or _is_conversation(prompts):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts are {kind(prompts)}: {HOW}")
    made = tuple(_prompt(one, f"prompt-{number}") for number, one in enumerate(prompts, start=1))
    if not made:
        raise UserError(f"there are no prompts: {HOW}")
    ids = [prompt.id for prompt in made]
    if twice := next((one for one in ids if ids.count(one) > 1), None):
        raise UserError(f"two prompts are called {twice!r}: give each an `id` of its own")
    return PromptSet(made, GIVEN)


def _prompt(given: Any, name: str) -> Prompt:
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        return Prompt(name, text=escaped(given))
    if _is_conversation(given):
        messages = [{**message, "content": _escaped(message.get("content"))} for message in given]
        return Prompt(name, messages=tuple(messages))
    raise UserError(f"{name} is {kind(given)}: {HOW}")


def _escaped(content: Any) -> Any:
    return escaped(content) if isinstance(content, str) else content


def _names_a_set(text: str) -> bool:
    return text == "builtin" or ("\n" not in text and text.endswith((".jsonl", ".jsonl.gz")))


def _is_conversation(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) > 0 and all(isinstance(one, Mapping) for one in given)
