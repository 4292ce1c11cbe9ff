"""The folder of an evaluation: its files, and how it resumes after a kill.

- ``evaluation.json``: what was asked, on what, with which versions; what failed
- ``items.parquet``: one row per task, policy and item
- ``summary.parquet``, ``summary.md``: the table of scores, at the margin asked for
- ``parts/TASK.parquet``: the rows of a task so far, until all tasks are finished
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd

from diagnostics.evaluate.item_texts import COLUMNS, item_texts
from diagnostics.evaluate.items import ChoiceItem, GenerationItem, Task
from diagnostics.runs.parts import PARTS
from diagnostics.support.errors import UserError
from diagnostics.support.files import read_table, write_sealed, write_table, write_text
from diagnostics.support.folders import FolderKind, Head
from diagnostics.support.overview import Overview, Readable

if TYPE_CHECKING:
    from diagnostics.policies import Policy

ITEMS, EVALUATION, SUMMARY, SUMMARY_TEXT = "items.parquet", "evaluation.json", "summary.parquet", "summary.md"
# A kill loses at most the answers of this many seconds.
WRITE_EVERY_S = 20.0


class EvaluationManifest(Head, total=False):
    """The content of ``evaluation.json``."""

    n_layers: int
    tasks: dict[str, Any]
    policies: list[str]
    margin: float
    notes: list[str]
    identity: dict[str, Any]
    sandbox: dict[str, bool]
    errors: list[str]  # a line for every task and policy that could not be finished


EVALUATION_FOLDER: FolderKind[EvaluationManifest] = FolderKind("evaluation", EVALUATION, EvaluationManifest)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Readable):
    """Scores of one model: ``items`` has one row per task, policy and item.

    Columns: task, policy, item_id, category, question (what was asked, at most about 2,000 characters), choices (texts,
    None where the answer is generated), n_prompt (tokens of the prompt), score (0..1); for choice items
    ``chosen``, ``gold`` and ``gold_log_likelihood`` (nats, of the whole right continuation); for generated answers
    ``answer``, ``accepted``, ``n_tokens`` and the ways to fail. NaN where a column does not apply. Earlier versions
    kept no question and no choices.
    """

    manifest: EvaluationManifest
    items: pd.DataFrame
    path: Path | None = None

    def overview(self) -> Overview:
        """What was asked, and every policy's mean score; `diagnostics.evaluate.summarize` has intervals and tests."""
        counts = self.items.groupby("task", sort=False)["item_id"].nunique()
        means = self.items.groupby(["policy", "task"], sort=False)["score"].mean().groupby("policy", sort=False).mean()
        facts = {
            "tasks": ", ".join(f"{task} ({count} items)" for task, count in counts.items()),
            "score, mean over tasks": ", ".join(f"{policy} {100 * score:.1f}%" for policy, score in means.items()),
            "not finished": "; ".join(self.manifest.get("errors", [])) or None,
            "folder": self.path,
        }
        return Overview(f"Evaluation of {self.manifest['model']}", facts=facts)


def load_evaluation(path: str | Path) -> Evaluation:
    """Read an evaluation; raise UserError if there is none, or if policies did not answer the same items once each."""
    manifest = EVALUATION_FOLDER.read(path)
    if not (Path(path) / ITEMS).exists():
        raise UserError(f"evaluation {str(path)!r} is not finished: continue it with `resume=True`")
    items = EVALUATION_FOLDER.read_table(path, ITEMS)
    if problem := _problem(items):
        raise EVALUATION_FOLDER.damaged(path, problem)
    if "choices" in items:
        items["choices"] = items["choices"].map(list, na_action="ignore")
    return Evaluation(manifest, items, Path(path))


def _problem(items: pd.DataFrame) -> str | None:
    """Say what is wrong with the table of items; None if every policy answered the same items once each."""
    if missing := {"task", "policy", "item_id", "score"} - set(items):
        return f"{ITEMS} has no column {min(missing)}"
    try:
        scores = items["score"].astype(float)
        counted = items.groupby(["task", "item_id"])["policy"].agg(["size", "nunique"])
        policies = items.groupby("task")["policy"].nunique()
    except (ValueError, TypeError) as error:
        return str(error)
    once = (counted["size"] == counted["nunique"]) & (counted["size"] == policies.reindex(counted.index, level="task"))
    if items.empty or not scores.between(0, 1).all() or not once.all():
        return "items are missing, doubled or without a score"
    if not all(isinstance(text, str) for text in items.get("question", ())):
        return "a question is not text"
    choices = [choice for texts in items.get("choices", ()) if texts is not None for choice in texts]
    return None if all(isinstance(choice, str) for choice in choices) else "a choice is not text"


class EvaluationWriter:
    """Writes the folder of an evaluation: one file for each task, until all are finished."""

    def __init__(self, path: Path, manifest: EvaluationManifest, *, resume: bool) -> None:
        self.path = path
        if EVALUATION_FOLDER.claim(path, manifest, resume=resume) is None:
            EVALUATION_FOLDER.start(path, manifest)

    def read(self, task: Task) -> pd.DataFrame:
        """Return the rows of a task that were written before."""
        part, items = self._part(task), self.path / ITEMS
        file = part if part.exists() else items
        try:
            rows = read_table(file)
            if {"policy", "item_id"} <= set(rows) and file == part:
                return rows
            rows = rows[rows["task"] == task.name].dropna(axis="columns", how="all")
            return rows.drop(columns=list(COLUMNS), errors="ignore")
        except FileNotFoundError:
            return pd.DataFrame()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the evaluation's file {str(file)!r} is damaged: {error}") from None

    def write(self, task: Task, rows: pd.DataFrame) -> None:
        """Keep the rows of a task."""
        with EVALUATION_FOLDER.writing(self.path):
            (self.path / PARTS).mkdir(exist_ok=True)
            write_table(self._part(task), rows)

    def finish(self, evaluation: Evaluation, summary: pd.DataFrame, text: str) -> Evaluation:
        """Write the table of all items and its summary, then remove the parts."""
        with EVALUATION_FOLDER.writing(self.path):
            write_table(self.path / ITEMS, evaluation.items)
            write_table(self.path / SUMMARY, summary)
            write_text(self.path / SUMMARY_TEXT, text)
            write_sealed(self.path / EVALUATION, evaluation.manifest)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        return replace(evaluation, path=self.path)

    def _part(self, task: Task) -> Path:
        return self.path / PARTS / f"{quote(task.name, safe='@: ')}.parquet"


class AnsweredItems:
    """Collects the rows of one task; as a context manager it writes them when the block is left."""

    def __init__(self, task: Task, store: EvaluationWriter | None) -> None:
        self.task, self.store = task, store
        kept = store.read(task).to_dict("records") if store else []
        self.rows: dict[tuple[str, str], Any] = {(row["policy"], row["item_id"]): row for row in kept}
        self.written, self.at = len(self.rows), time.monotonic()

    def has(self, policy: Policy, item: ChoiceItem | GenerationItem) -> bool:
        """Whether an item was answered under a policy."""
        return (policy.spec, item.id) in self.rows

    def add(self, policy: Policy, item: ChoiceItem | GenerationItem, row: Mapping[str, Any]) -> None:
        """Add a row; write all rows from time to time."""
        self.rows[policy.spec, item.id] = row
        if time.monotonic() - self.at > WRITE_EVERY_S:
            self._write()

    def of(self, policy: Policy) -> pd.DataFrame:
        """Return the rows of a policy and what was asked, in the order of the task; every item must have one."""
        rows = [self.rows[policy.spec, item.id] for item in self.task.items]
        asked = [item_texts(item) for item in self.task.items]
        return pd.DataFrame(rows).assign(**{name: [texts[name] for texts in asked] for name in COLUMNS})

    def __enter__(self) -> AnsweredItems:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._write()

    def _write(self) -> None:
        if self.store and len(self.rows) > self.written:
            self.store.write(self.task, pd.DataFrame(list(self.rows.values())))
            self.written = len(self.rows)
        self.at = time.monotonic()
