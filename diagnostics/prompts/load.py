"""Loads sets of prompts: the built-in one by name, others from JSONL files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diagnostics.prompts.builtin import builtin_prompts
from diagnostics.prompts.prompt import Prompt, PromptSet, shown
from diagnostics.support.defaults import CONTEXT_LENGTH
from diagnostics.support.errors import UserError
from diagnostics.support.fields import wrong
from diagnostics.support.jsonl import read_records
from diagnostics.support.suggest import did_you_mean, whats_there

FILE_FIELDS = ("id", "messages", "text", "document", "reference", "evidence", "category")
MIN_CONTEXT_LENGTH = 16


def load_prompts(
    source: str | os.PathLike[str] = "builtin",
    *,
    max_prompts: int | None = None,
    context_length: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Return the built-in prompts, or those of a JSONL file.

    Parameters
    ----------
    source
        ``"builtin"``, or the path of a file with one JSON object per line (fields: ``FILE_FIELDS``).
    max_prompts
        Maximum number of prompts, from the start. The built-in set cycles through its categories, so any number of
        first prompts is balanced.
    context_length
        Maximum number of tokens of every prompt, at least 16. The built-in set fills it; its default is 1024.
    seed
        For the built-in set: the same seed and length give the same prompts.

    Raises
    ------
    UserError
        If the set or file does not exist, or if a line of it is wrong (the message names file, line and field).
    """
    if max_prompts is not None and max_prompts < 1:
        raise UserError(f"max_prompts is {max_prompts}: ask for at least 1 prompt")
    if context_length is not None and context_length < MIN_CONTEXT_LENGTH:
        raise UserError(f"context_length is {context_length}: ask for at least {MIN_CONTEXT_LENGTH} tokens")
    if source == "builtin":
        length = CONTEXT_LENGTH if context_length is None else context_length
        return PromptSet(builtin_prompts(length, seed=seed, max_prompts=max_prompts), "builtin", length, seed)
    path = Path(source)
    return PromptSet(tuple(_read_jsonl(path, max_prompts)), path.name, context_length)


def _read_jsonl(path: Path, max_prompts: int | None) -> list[Prompt]:
    if not os.path.lexists(path):
        if path.suffix or len(path.parts) > 1:
            raise UserError(f"no such prompt file: {path}{whats_there(str(path), _is_prompt_file, 'prompt files')}")
        hint = did_you_mean(str(path), ["builtin"])
        raise UserError(f"no prompt set {str(path)!r}: use 'builtin' or the path of a .jsonl file{hint}")
    prompts: dict[str, Prompt] = {}

    def add(record: dict[str, Any], number: int) -> None:
        prompt = _parse(record, default_id=f"line-{number}")
        if prompt.id in prompts:
            raise wrong("id", f"{shown(prompt.id)} is already the id of an earlier prompt")
        prompts[prompt.id] = prompt

    read_records(path, "prompts", add, most=max_prompts)
    if not prompts:
        raise UserError(f"{path} has no prompts: write one JSON object per line")
    return list(prompts.values())


def _is_prompt_file(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _parse(record: dict[str, Any], default_id: str) -> Prompt:
    for field in record:
        if field not in FILE_FIELDS:
            raise UserError(f"unknown field {shown(field)}; the fields are {', '.join(FILE_FIELDS)}")
    # null means a missing field: JSON written from tables has such fields.
    values = {field: value for field, value in record.items() if value is not None}
    return Prompt(**{"id": default_id, **values})
