"""What a task asks: items with a right answer, and how an answer is scored.

An item's prompt may come in two parts: a *document*, which can be prefilled once for many questions, and the *query*
about it. Where there is no document the query is the whole prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import UserError
from diagnostics.fields import check_name, check_text, parse_object, wrong

CHOICE_METRICS = ("acc", "acc_per_char", "acc_per_token")
GENERATION_METRICS = ("exact_match", "f1", "contains", "number", "share")
CHOICE_FIELDS = ("id", "document", "query", "queries", "continuations", "gold", "category")
GENERATION_FIELDS = ("id", "document", "query", "answers", "category")


@dataclass(frozen=True)
class Context:
    """A prompt in its two parts, which join without anything between them."""

    query: str
    document: str = ""

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.document + self.query


@dataclass(frozen=True)
class ChoiceItem:
    """One right answer among several: the most likely of ``continuations``, each after its context.

    ``contexts`` has one entry per continuation; in most tasks they are all the same. ``gold`` is the index of the right
    continuation.
    """

    id: str
    contexts: tuple[Context, ...]
    continuations: tuple[str, ...]
    gold: int
    category: str = ""

    def __post_init__(self) -> None:
        if len(self.contexts) != len(self.continuations) or len(self.continuations) < 2:
            raise UserError(f"item {self.id!r}: give two or more continuations, and a context for each")
        if not 0 <= self.gold < len(self.continuations):
            raise UserError(f"item {self.id!r}: gold {self.gold} is not one of {len(self.continuations)} continuations")


@dataclass(frozen=True)
class GenerationItem:
    """A question that is answered by generating; ``answers`` are all acceptable."""

    id: str
    context: Context
    answers: tuple[str, ...]
    category: str = ""


@dataclass(frozen=True)
class Task:
    """Items of one kind and how they are scored.

    ``metric`` is one of `CHOICE_METRICS` or `GENERATION_METRICS`; generation stops after ``max_new_tokens``, at one of
    the ``stop`` strings, or at the model's end of text. With ``chat`` prompts are user messages of the chat template.
    """

    name: str
    items: tuple[ChoiceItem, ...] | tuple[GenerationItem, ...]
    metric: str
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    chat: bool = False
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.items:
            raise UserError(f"task {self.name!r} has no items")
        metrics = CHOICE_METRICS if self.is_choice else GENERATION_METRICS
        if self.metric not in metrics:
            raise UserError(f"metric {self.metric!r} of task {self.name!r} is not one of: {', '.join(metrics)}")
        ids = [item.id for item in self.items]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise UserError(f"task {self.name!r} has two items {twice!r}")

    @property
    def is_choice(self) -> bool:
        """Whether answers are chosen among continuations, rather than generated."""
        return isinstance(self.items[0], ChoiceItem)


def read_jsonl(path: Path, *, metric: str | None = None, **settings: Any) -> Task:
    """Read a task from a file with one JSON object per line, named by the file.

    Choice items have ``query`` (or ``queries``, one per choice), ``continuations`` and ``gold``; generation items
    ``query`` and ``answers``; both may have ``id``, ``document`` and ``category``. The metric is ``acc`` or
    ``exact_match`` unless given; ``settings`` are fields of `Task`. Raises UserError, with the line, for what is wrong.
    """
    items: list[Any] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        items.append(_item(line, f"line-{number}"))
                    except UserError as error:
                        raise UserError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read task {str(path)!r}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file: tasks are one JSON object per line") from None
    if not items:
        raise UserError(f"{path} has no items: write one JSON object per line")
    if len({type(item) for item in items}) > 1:
        raise UserError(f"{path} mixes items with continuations and items with answers: make two files of it")
    default = "acc" if isinstance(items[0], ChoiceItem) else "exact_match"
    return Task(path.stem, tuple(items), metric or default, source=str(path), **settings)


def _item(line: str, default_id: str) -> ChoiceItem | GenerationItem:
    record = parse_object(line)
    is_choice = "continuations" in record or "gold" in record
    known = CHOICE_FIELDS if is_choice else GENERATION_FIELDS
    for name in record:
        if name not in known:
            raise UserError(f"unknown field {name!r:.60}; the fields are {', '.join(known)}")
    record = {name: value for name, value in record.items() if value is not None}
    item_id, category, document = record.get("id", default_id), record.get("category", ""), record.get("document", "")
    check_name("id", item_id)
    if category != "":
        check_name("category", category)
    if document != "":
        check_text("document", document)
    if not is_choice:
        answers = _texts(record.get("answers"), "answers")
        check_text("query", record.get("query"))
        return GenerationItem(item_id, Context(record["query"], document), answers, category)
    continuations = _texts(record.get("continuations"), "continuations")
    if "queries" in record:
        queries: Sequence[str] = _texts(record["queries"], "queries")
    else:
        check_text("query", record.get("query"))
        queries = [record["query"]] * len(continuations)
    if type(record.get("gold")) is not int:
        raise wrong("gold", "must be the number of the right continuation, counted from 0")
    return ChoiceItem(
        item_id, tuple(Context(query, document) for query in queries), continuations, record["gold"], category
    )


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not values:
        raise wrong(name, "must be a list of texts")
    for value in values:
        check_text(name, value)
    return tuple(values)
