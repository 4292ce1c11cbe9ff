"""Loads a task by its name: from OLMES or HumanEval, generated at a length, or from a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.evaluate.humaneval import load_humaneval
from diagnostics.evaluate.items import Task, read_jsonl
from diagnostics.evaluate.olmes import load_olmes, olmes_names
from diagnostics.evaluate.retrieval import retrieval_names, retrieval_task
from diagnostics.support.defaults import RETRIEVAL_ITEMS
from diagnostics.support.errors import UserError
from diagnostics.support.sizes import parse_length
from diagnostics.support.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMANEVAL = "humaneval"
MAX_LENGTH = 2**20  # tokens of a retrieval task


def as_tasks(tasks: Any, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, seed: int = 0) -> list[Task]:
    """Return what was given as tasks: one or several, as objects or by names for `load_task`; else a UserError."""
    if isinstance(tasks, str | Task):
        tasks = [tasks]
    how = "give load_task(...), the name of a task, or a list of such"
    if not isinstance(tasks, Iterable):
        raise UserError(f"tasks are {tasks!r}: {how}")
    made = [load_task(one, tokenizer, limit=limit, seed=seed) if isinstance(one, str) else one for one in tasks]
    for one in made:
        if not isinstance(one, Task):
            raise UserError(f"a task is {one!r}: {how}")
    return made


def load_task(name: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, seed: int = 0) -> Task:
    """Load a task by its name.

    ``NAME.jsonl`` or ``NAME.jsonl.gz`` is a file, ``needle@4096`` a retrieval task of 4096 tokens (or ``needle@4K``)
    with ``limit`` items, 100 by default, ``humaneval`` HumanEval; anything else is a task of OLMES. Raises UserError
    that lists the known names for any other name.
    """
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(Path(name))
    if name == HUMANEVAL:
        return load_humaneval()
    kind, at, length = name.partition("@")
    if at:
        return retrieval_task(
            kind, parse_length(length, most=MAX_LENGTH), tokenizer, n_items=limit or RETRIEVAL_ITEMS, seed=seed
        )
    if name in retrieval_names():
        raise UserError(f"task {name!r} needs a length, such as {name}@4096")
    if name.partition(":")[0] not in olmes_names():
        known = [*olmes_names(), HUMANEVAL, *(f"{kind}@LENGTH" for kind in retrieval_names()), "FILE.jsonl"]
        raise UserError(f"task {name!r} is not one of: {', '.join(known)}{did_you_mean(name, known)}")
    return load_olmes(name)
