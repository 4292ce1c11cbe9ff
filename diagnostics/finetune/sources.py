"""Data to train on: conversations with their answers, or conversations and prompts that the model answers itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.finetune.conversations import FIELDS as CONVERSATION_FIELDS
from diagnostics.finetune.conversations import Conversation, read_conversations
from diagnostics.finetune.example_encoding import encode_examples
from diagnostics.finetune.examples import Counts, Example
from diagnostics.finetune.own_answers import with_answers
from diagnostics.finetune.training_prompts import training_prompts
from diagnostics.prompts.builtin import builtin_prompts
from diagnostics.prompts.load import FILE_FIELDS as PROMPT_FIELDS
from diagnostics.prompts.load import load_prompts
from diagnostics.prompts.prompt import Prompt, PromptSet
from diagnostics.support import defaults
from diagnostics.support.errors import UserError
from diagnostics.support.jsonl import read_records

if TYPE_CHECKING:
    from diagnostics.models.loading import LoadedModel

BUILTIN = "builtin"
# Categories of built-in prompts that are held out by default.
HELD_OUT = ("question", "variables", "code")
MANY = 10_000  # sets of built-in prompts that one seed may need
PART = 16  # rows made at a time; a kill loses at most these


@dataclass(frozen=True, eq=False)
class Source:
    """Conversations or prompts, and how rows to train on come from them.

    Attributes
    ----------
    data
        Conversations, or prompts.
    name
        Where they come from.
    own_answers
        Whether the model answers at full depth, replacing given last answers. Prompts have no others.
    answer_tokens
        Tokens of an own answer at most.
    max_length
        Tokens of a row at most; the model's positions unless given.
    """

    data: Sequence[Conversation] | PromptSet
    name: str
    own_answers: bool = True
    answer_tokens: int = defaults.ANSWER_TOKENS
    max_length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, PromptSet) and not self.own_answers:
            raise UserError(f"{self.name} has prompts, not answers to learn: give conversations, one per line")
        if self.answer_tokens < 1 or (self.max_length is not None and self.max_length < 1):
            raise UserError("answers and rows need at least one token")

    @property
    def n_parts(self) -> int:
        """Number of parts in which the rows are made."""
        return -(-len(self.data) // PART)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides the rows."""
        how = [self.own_answers, self.answer_tokens if self.own_answers else None, self.max_length]
        if isinstance(self.data, PromptSet):
            what: list[object] = [self.data.fingerprint]
        else:
            what = [[one.id, one.messages] for one in self.data]
        return hashlib.sha256(json.dumps([how, what], ensure_ascii=True).encode()).hexdigest()

    @property
    def advice(self) -> str:
        """What to do if nothing is left."""
        return "allow longer rows" if self.own_answers else "give conversations with answers, or allow longer rows"

    def make(self, lm: LoadedModel, part: int) -> tuple[list[Example], Counts]:
        """Make the rows of one part, reproducibly, and count what became of its data."""
        data = self.data[part * PART : (part + 1) * PART]
        if self.own_answers:
            return with_answers(
                lm, data, max_new_tokens=self.answer_tokens, max_length=self.max_length, batch_size=PART
            )
        assert not isinstance(data, PromptSet)
        limit = self.max_length or lm.anatomy.max_positions or 2**31
        return encode_examples(data, lm.tokenizer, limit)


def load_data(
    source: str | Path,
    *,
    examples: int | None = None,
    context_length: int | None = None,
    without: Collection[str] = (),
    seed: int = 0,
) -> Sequence[Conversation] | PromptSet:
    """Read conversations or prompts to train on: those of a file, or the built-in ones.

    Parameters
    ----------
    source
        ``builtin``, a file of conversations (``messages``, one JSON object per line), or one of prompts as a diagnosis
        takes them.
    examples
        At most this many, from the start; exactly this many built-in prompts, 384 by default.
    context_length
        Tokens of a prompt at most; documents are cut to fit.
    without
        Categories to leave out.
    seed
        Seed of the built-in prompts, 0 or more. They differ from those of other seeds and of `load_held_out`, except
        for a few short ones (1 in 100 at 128 tokens); prompts of categories that are left out always differ.
    """
    if examples is not None and examples < 1:
        raise UserError(f"examples is {examples}: give 1 or more")
    if str(source) == BUILTIN:
        seeds = count(1 + MANY * seed)
        return _builtin(
            training_prompts, examples or defaults.EXAMPLES, context_length, seeds, lambda kind: kind not in without
        )
    path = Path(source)
    if _holds_prompts(path):
        prompts = load_prompts(path, context_length=context_length)
        prompts = replace(prompts, prompts=tuple(p for p in prompts if p.category not in without)[:examples])
        _require_some(prompts, path)
        return prompts
    conversations = [one for one in read_conversations(path) if one.category not in without][:examples]
    _require_some(conversations, path)
    return conversations


def load_held_out(
    source: str | Path = BUILTIN,
    *,
    n_prompts: int | None = None,
    context_length: int | None = None,
    only: Collection[str] = (),
) -> PromptSet:
    """Read the prompts to measure on, ``only`` those of some categories if given; by default 24 built-in ones."""
    if n_prompts is not None and n_prompts < 1:
        raise UserError(f"the number of held-out prompts is {n_prompts}: give 1 or more")
    if str(source) == BUILTIN:
        n = n_prompts or defaults.HELD_OUT_PROMPTS
        _require_kinds(only, _diagnosed(defaults.TRAINING_CONTEXT_LENGTH, 0), BUILTIN)
        return _builtin(_diagnosed, n, context_length, count(0, -1), lambda kind: not only or kind in only)
    prompts = load_prompts(source, context_length=context_length)
    _require_kinds(only, prompts, prompts.name)
    return replace(prompts, prompts=tuple(p for p in prompts if not only or p.category in only)[:n_prompts])


def _require_some(data: Sequence[Conversation] | PromptSet, path: Path) -> None:
    if not data:
        raise UserError(f"nothing to train on is left of {path.name}: all of its categories are held out")


def _require_kinds(only: Collection[str], prompts: Sequence[Prompt], name: str) -> None:
    kinds = {prompt.category for prompt in prompts}
    if unknown := set(only) - kinds:
        known = ", ".join(sorted(kinds))
        raise UserError(f"no prompt of {name} is of category {min(unknown)!r}: there are {known}")


def _diagnosed(context_length: int, seed: int) -> tuple[Prompt, ...]:
    return builtin_prompts(context_length, seed=seed)


def _builtin(
    make: Callable[[int, int], tuple[Prompt, ...]],
    n: int,
    context_length: int | None,
    seeds: Iterator[int],
    wanted: Callable[[str], bool],
) -> PromptSet:
    """Collect ``n`` prompts of the wanted categories from as many sets as that needs."""
    length = defaults.TRAINING_CONTEXT_LENGTH if context_length is None else context_length
    collected: list[Prompt] = []
    while len(collected) < n:
        seed = next(seeds)
        prompts = make(length, seed)
        kept = [replace(prompt, id=f"{prompt.id}/{seed}") for prompt in prompts if wanted(prompt.category)]
        if not kept:
            kinds = sorted({prompt.category for prompt in prompts})
            raise UserError(f"no kind of built-in prompts is left: there are {', '.join(kinds)}")
        collected += kept
    return PromptSet(tuple(collected[:n]), BUILTIN, length, seed)


def _holds_prompts(path: Path) -> bool:
    """Whether any line has a field that conversations do not have."""
    fields: set[str] = set()
    read_records(path, "conversations or prompts", lambda record, _: fields.update(record))
    return bool(fields & set(PROMPT_FIELDS) - set(CONVERSATION_FIELDS))
