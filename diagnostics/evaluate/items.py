"""The items of a task, each with its right answer, and how an answer is scored.

An item's prompt may come in two parts: a *document*, which can be prefilled once for many questions, and the *query*
about it. Without a document the query is the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.evaluate.answer_metrics import last_number
from diagnostics.support.errors import UserError
from diagnostics.support.fields import check_name, check_text, kind, wrong
from diagnostics.support.jsonl import read_records

# In a summary, the task name of the mean over tasks.
AVERAGE = "average"
CHOICE_METRICS = ("acc", "acc_per_char", "acc_per_token")
GENERATION_METRICS = ("exact_match", "f1", "contains", "number", "share", "passes")
CHOICE_FIELDS = ("id", "document", "query", "queries", "continuations", "gold", "category")
GENERATION_FIELDS = ("id", "document", "query", "answers", "category")
MAX_NEW_TOKENS = 2**20


@dataclass(frozen=True)
class Context:
    """A prompt in two parts, joined without a separator."""

    query: str
    document: str = ""

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.document + self.query


@dataclass(frozen=True)
class ChoiceItem:
    """A question with several ``continuations``, one of them right; the model chooses the most likely one.

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
        if self.name == AVERAGE:
            raise UserError(f"a task cannot be called {AVERAGE!r}: that is a row of the summary")
        metrics = CHOICE_METRICS if self.is_choice else GENERATION_METRICS
        if self.metric not in metrics:
            raise UserError(f"metric {self.metric!r} of task {self.name!r} is not one of: {', '.join(metrics)}")
        ids = [item.id for item in self.items]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise UserError(f"task {self.name!r} has two items {twice!r}")
        for item in self.items:
            if not isinstance(item, GenerationItem):
                break
            if self.metric == "passes" and len(item.answers) != 1:
                raise UserError(f"item {item.id!r} of task {self.name!r} needs one answer: the source of its tests")
            if self.metric == "number" and all(last_number(answer) is None for answer in item.answers):
                raise UserError(f"item {item.id!r} of task {self.name!r} needs a number as answer")

    @property
    def is_choice(self) -> bool:
        """Whether answers are chosen among continuations, rather than generated."""
        return isinstance(self.items[0], ChoiceItem)


def read_jsonl(path: Path, *, metric: str | None = None, **settings: Any) -> Task:
    """Read a task from a file with one JSON object per line, plain or as ``.gz``, named by the file.

    Choice items have ``query`` (or ``queries``, one per choice), ``continuations`` and ``gold``; generation items
    ``query`` and ``answers``; both may have ``id``, ``document`` and ``category``. The first line may be
    ``{"task": {...}}`` with the fields of `Task` but ``name`` and ``items``; the arguments ``metric`` and ``settings``
    override it. The default metric is ``acc`` for choice items, else ``exact_match``. Raises UserError that names the
    wrong line.
    """
    items: list[Any] = []
    header: dict[str, Any] = {}
    header_line = 0

    def take(record: dict[str, Any], number: int) -> None:
        nonlocal header, header_line
        if "task" not in record:
            items.append(_item(record, f"line-{number}"))
        elif items or header_line:
            raise UserError('only the first line may have "task"')
        else:
            header, header_line = _settings(record), number

    read_records(path, "tasks", take)
    if not items:
        raise UserError(f"{path} has no items: write one JSON object per line")
    if len({type(item) for item in items}) > 1:
        raise UserError(f"{path} mixes items with continuations and items with answers: make two files of it")
    is_choice = isinstance(items[0], ChoiceItem)
    try:
        _check_fit(header, is_choice)
    except UserError as error:
        raise UserError(f"{path}:{header_line}: {error}") from None
    fields = {"source": str(path), "metric": "acc" if is_choice else "exact_match"} | header | settings
    if metric is not None:
        fields["metric"] = metric
    return Task(path.name.removesuffix(".gz").removesuffix(".jsonl"), tuple(items), **fields)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file's first line; a null counts as absent."""
    fields = record["task"]
    if len(record) > 1:
        raise UserError('a line with "task" has no other fields')
    if not isinstance(fields, dict):
        raise wrong("task", f"must be an object, not {kind(fields)}")
    checks: dict[str, Callable[[str, Any], None]] = {
        "metric": _check_metric,
        "max_new_tokens": _check_tokens,
        "stop": _check_stop,
        "chat": _check_flag,
        "source": check_text,
        "licence": check_name,
    }
    for name, value in fields.items():
        if name not in checks:
            raise UserError(f"unknown field {name!r:.60} of the task; the fields are {', '.join(checks)}")
        if value is not None:
            checks[name](name, value)
    settings = {name: value for name, value in fields.items() if value is not None}
    return settings | ({"stop": tuple(settings["stop"])} if "stop" in settings else {})


def _check_metric(field: str, value: Any) -> None:
    metrics = CHOICE_METRICS + GENERATION_METRICS
    if value not in metrics:
        raise wrong(field, f"must be one of: {', '.join(metrics)}")


def _check_tokens(field: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_NEW_TOKENS:
        raise wrong(field, f"must be a number of tokens from 1 to {MAX_NEW_TOKENS}")


def _check_stop(field: str, value: Any) -> None:
    if not isinstance(value, list):
        raise wrong(field, f"must be a list of texts, not {kind(value)}")
    for text in value:
        check_text(field, text)


def _check_flag(field: str, value: Any) -> None:
    if type(value) is not bool:
        raise wrong(field, f"must be true or false, not {kind(value)}")


def _check_fit(header: dict[str, Any], is_choice: bool) -> None:
    """Raise UserError for settings that do not apply to items of this kind."""
    metrics, what = (CHOICE_METRICS, "continuations") if is_choice else (GENERATION_METRICS, "answers")
    if "metric" in header and header["metric"] not in metrics:
        raise wrong("metric", f"must be one of {', '.join(metrics)} for items with {what}")
    for name in ("max_new_tokens", "stop", "chat"):
        if is_choice and name in header:
            raise wrong(name, "is for items with answers; these have continuations")


def _item(record: dict[str, Any], default_id: str) -> ChoiceItem | GenerationItem:
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
