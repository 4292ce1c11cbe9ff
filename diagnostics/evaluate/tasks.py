"""Loads a task by its name: from OLMES or HumanEval, generated at a length, or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
