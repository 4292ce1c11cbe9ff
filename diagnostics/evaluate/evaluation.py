"""Tasks x policies -> scores of every item: resumable, and a task that fails leaves the others alone.

Every policy answers the same items, drawn once from the task with the seed; an item is answered under all policies
before the next, so that they can share what full depth computed of its context.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd

from diagnostics.evaluate.evaluation_folder import AnsweredItems, Evaluation, EvaluationFolder
from diagnostics.evaluate.humaneval import require_allowed
from diagnostics.evaluate.item_answers import answer, token_ids
from diagnostics.evaluate.items import Task
from diagnostics.evaluate.sandbox import isolation
from diagnostics.evaluate.scoring import QUERIES, SharedPrefill
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.base import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.prompts.digests import tokens_digest
from diagnostics.support.errors import UserError
from diagnostics.support.locks import one_writer
from diagnostics.support.versions import hardware, versions

Progress = Callable[[int, int, str], None]


@one_writer
def evaluate(
    lm: LoadedModel,
    tasks: Sequence[Task],
    policies: Sequence[Policy],
    *,
    limit: int | None = None,
    query: str = "prompt",
    chunk_size: int | None = None,
    run_code: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    arguments: dict[str, Any] | None = None,
) -> Evaluation:
    """Answer the items of every task under every policy; full depth is added in front.

    Parameters
    ----------
    lm
        The model.
    tasks, policies
        What to answer, and how the model runs.
    limit
        Items of each task, drawn at random; all if None.
    query
        How the query about a document is placed; see `diagnostics.evaluate.scoring`.
    chunk_size
        Prompt tokens per forward pass; bounds memory at long prompts.
    run_code
        Whether tasks may run code that the model wrote; see `diagnostics.evaluate.sandbox`.
    seed
        Of the drawing of items.
    out, resume
        Folder to write, and whether to go on with an evaluation there that asked for the same.
    progress
        Called as ``progress(done, total, what)`` before each item and at the end.
    arguments
        What the user asked for, kept in the manifest as it is.

    Returns
    -------
    Evaluation
        Its manifest's ``errors`` has a line for every task and policy that could not be finished.

    Raises
    ------
    UserError
        For names given twice, code to run without leave, a policy that does not fit the model, a folder that holds
        something else, or if nothing could be evaluated.
    """
    if query not in QUERIES:
        raise UserError(f"query is {query!r}: give one of {', '.join(QUERIES)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give 1 or more")
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise UserError("name one task or more, each once")
    require_allowed(tasks, run_code)
    every = list(dict.fromkeys([FullPolicy(), *policies]))
    for policy in every:
        policy.check(lm.anatomy)
    drawn = [draw(task, limit, seed) for task in tasks]
    manifest = _manifest(lm, drawn, every, query, seed) | {"arguments": arguments or {}}
    if run_code:
        manifest["sandbox"] = isolation()
    store = EvaluationFolder(Path(out), manifest, resume=resume) if out is not None else None
    total, done = sum(len(task.items) for task in drawn) * len(every), 0
    parts: list[pd.DataFrame] = []
    errors: list[str] = []
    for task in drawn:
        failed: set[Policy] = set()
        with AnsweredItems(task, store) as rows:
            for item in task.items:
                shared = SharedPrefill(lm, chunk_size)
                for policy in every:
                    said = f"{task.name}, {policy.spec}"
                    if progress:
                        progress(done, total, said)
                    done += 1
                    if policy in failed or rows.has(policy, item):
                        continue
                    try:
                        row = answer(lm, task, item, policy, query=query, shared=shared)
                    except Exception as error:  # one task's trouble is not the others'
                        failed.add(policy)
                        errors.append(f"{said}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    else:
                        rows.add(policy, item, row)
        parts += [rows.of(policy) for policy in every if policy not in failed]
    if progress:
        progress(total, total, "")
    if not parts:
        raise UserError(f"nothing could be evaluated: {'; '.join(errors)}")
    made = Evaluation(manifest | {"errors": errors}, pd.concat(parts, ignore_index=True))
    return store.finish(made) if store else made


def draw(task: Task, limit: int | None, seed: int) -> Task:
    """Return a task with at most ``limit`` of its items, drawn without replacement, in their own order."""
    if limit is None or limit >= len(task.items):
        return task
    chosen = sorted(Random(f"{seed}/{task.name}").sample(range(len(task.items)), limit))
    items: Any = tuple(task.items[index] for index in chosen)
    return replace(task, items=items)


def _manifest(
    lm: LoadedModel, tasks: Sequence[Task], policies: Sequence[Policy], query: str, seed: int
) -> dict[str, Any]:
    identity = lm.identity()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": lm.name,
        "n_layers": lm.anatomy.n_layers,
        "hardware": hardware(lm.device),
        "versions": versions(),
        "tasks": {task.name: _about(task) for task in tasks},
        "policies": [policy.spec for policy in policies],
        "notes": identity.notes,
        "configuration": identity.configuration,
        "identity": identity.entries()
        | {
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": lm.device.type,
            "tasks": {task.name: _asked(lm, task) for task in tasks},
            "policies": [policy.spec for policy in policies],
            "query": query,
            "seed": seed,
        },
    }


def _asked(lm: LoadedModel, task: Task) -> dict[str, Any]:
    """Return all of a task that decides answers and scores."""

    def rows() -> Iterator[Any]:
        for item in task.items:
            try:
                yield token_ids(lm, task, item)
            except Exception as error:  # said where the item is answered, and other tasks go on
                yield str(error)

    return {
        "items": tokens_digest(asdict(item) for item in task.items),
        "token_ids": tokens_digest(rows()),
        "n_items": len(task.items),
        "metric": task.metric,
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
        "chat": task.chat,
    }


def _about(task: Task) -> dict[str, Any]:
    return {"metric": task.metric, "n_items": len(task.items), "source": task.source, "licence": task.licence}
