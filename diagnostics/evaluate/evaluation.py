"""Tasks x policies -> scores of every item: resumable, and a task that fails leaves the others alone.

Every policy answers the same items, drawn once from the task with the seed; an item is answered under all policies
before the next, so that they can share the full-depth prefill of its context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, cast

import pandas as pd

from diagnostics.evaluate.evaluation_folder import AnsweredItems, Evaluation, EvaluationManifest, EvaluationWriter
from diagnostics.evaluate.humaneval import require_allowed
from diagnostics.evaluate.item_answers import answer, token_ids
from diagnostics.evaluate.items import Task
from diagnostics.evaluate.sandbox import isolation
from diagnostics.evaluate.score_table import markdown, summarize
from diagnostics.evaluate.scoring import QUERIES, SharedPrefill
from diagnostics.evaluate.tasks import as_tasks
from diagnostics.models.loading import LoadedModel
from diagnostics.policies import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.registry import as_policies
from diagnostics.prompts.digests import tokens_digest
from diagnostics.self_test import looked_up_once
from diagnostics.support.defaults import MARGIN, QUERY
from diagnostics.support.errors import UserError
from diagnostics.support.folders import manifest_head
from diagnostics.support.locks import one_writer
from diagnostics.support.progress import Progress, reporter


@one_writer
@looked_up_once()
def evaluate(
    lm: LoadedModel,
    tasks: Sequence[Task | str] | Task | str,
    policies: Sequence[Policy | str] | Policy | str,
    *,
    limit: int | None = None,
    query: str = QUERY,
    chunk_size: int | None = None,
    run_code: bool = False,
    margin: float = MARGIN,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool = True,
    arguments: dict[str, Any] | None = None,
) -> Evaluation:
    """Answer the items of every task under every policy; full depth is added in front.

    Parameters
    ----------
    lm
        The model.
    tasks, policies
        The tasks to answer, and the policies to compare; one or several, as objects or by name (see
        `diagnostics.evaluate.load_task` and `diagnostics.parse_policy`).
    limit
        Items of each task, drawn at random; all if None.
    query
        How the query about a document is placed; see `diagnostics.evaluate.scoring`.
    chunk_size
        Prompt tokens per forward pass; bounds memory at long prompts.
    run_code
        Whether tasks may run code that the model wrote; see `diagnostics.evaluate.sandbox`.
    margin
        Margin of non-inferiority in the summary, as a share of the score, 0..1.
    seed
        Seed of the draw of items and of the summary's bootstrap.
    out, resume
        Folder to write, with the summary, and whether to continue the same evaluation in it.
    progress
        A bar on stderr by default, False for none, or a function that is called as ``progress(done, total, what)``
        before each item and at the end.
    arguments
        What the user asked for; the manifest keeps it unchanged.

    Returns
    -------
    Evaluation
        Its manifest's ``errors`` has a line for every task and policy that could not be finished.

    Raises
    ------
    UserError
        If a name comes twice, code would run without permission, a policy does not fit the model, the folder holds
        something else, or nothing could be evaluated.
    """
    if query not in QUERIES:
        raise UserError(f"query is {query!r}: give one of {', '.join(QUERIES)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give 1 or more")
    if not 0 <= margin <= 1:
        raise UserError(f"margin is {margin}: give a share from 0 to 1")
    lm, policies, report = LoadedModel.of(lm), as_policies(policies), reporter(progress, "evaluating")
    tasks = as_tasks(tasks, lm.tokenizer, limit=limit, seed=seed)
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise UserError("name one task or more, each once")
    require_allowed(tasks, run_code)
    compared = list(dict.fromkeys([FullPolicy(), *policies]))
    for policy in compared:
        policy.check(lm.anatomy)
    drawn = [draw(task, limit, seed) for task in tasks]
    manifest = _manifest(lm, drawn, compared, query, seed, margin, arguments)
    if run_code:
        manifest["sandbox"] = isolation()
    store = EvaluationWriter(Path(out), manifest, resume=resume) if out is not None else None
    total, done = sum(len(task.items) for task in drawn) * len(compared), 0
    parts: list[pd.DataFrame] = []
    errors: list[str] = []
    for task in drawn:
        failed: set[Policy] = set()
        with AnsweredItems(task, store) as rows:
            for item in task.items:
                shared = SharedPrefill(lm, chunk_size)
                for policy in compared:
                    step = f"{task.name}, {policy.spec}"
                    report(done, total, step)
                    done += 1
                    if policy in failed or rows.has(policy, item):
                        continue
                    try:
                        row = answer(lm, task, item, policy, query=query, shared=shared)
                    except Exception as error:  # a failure does not stop other tasks
                        failed.add(policy)
                        errors.append(f"{step}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    else:
                        rows.add(policy, item, row)
        parts += [rows.of(policy) for policy in compared if policy not in failed]
    report(total, total, "")
    if not parts:
        raise UserError(f"nothing could be evaluated: {'; '.join(errors)}")
    manifest["errors"] = errors
    evaluation = Evaluation(manifest, pd.concat(parts, ignore_index=True))
    if store is None:
        return evaluation
    summary = summarize(evaluation, margin=margin, seed=seed)
    return store.finish(evaluation, summary, markdown(summary))


def draw(task: Task, limit: int | None, seed: int) -> Task:
    """Return a task with at most ``limit`` of its items, drawn without replacement, in their own order."""
    if limit is None or limit >= len(task.items):
        return task
    chosen = sorted(Random(f"{seed}/{task.name}").sample(range(len(task.items)), limit))
    items: Any = tuple(task.items[index] for index in chosen)
    return replace(task, items=items)


def _manifest(
    lm: LoadedModel,
    tasks: Sequence[Task],
    policies: Sequence[Policy],
    query: str,
    seed: int,
    margin: float,
    arguments: dict[str, Any] | None,
) -> EvaluationManifest:
    specs = [policy.spec for policy in policies]
    head = manifest_head(
        lm,
        arguments,
        dtype=str(lm.dtype).removeprefix("torch."),
        device=lm.device.type,
        tasks={task.name: _asked(lm, task) for task in tasks},
        policies=specs,
        query=query,
        seed=seed,
    )
    about = {task.name: _about(task) for task in tasks}
    return cast(EvaluationManifest, head | {"tasks": about, "policies": specs, "margin": margin, "errors": []})


def _asked(lm: LoadedModel, task: Task) -> dict[str, Any]:
    """Return everything in a task that decides answers and scores."""

    def rows() -> Iterator[Any]:
        for item in task.items:
            try:
                yield token_ids(lm, task, item)
            except Exception as error:  # reported where the item is answered; other tasks go on
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
