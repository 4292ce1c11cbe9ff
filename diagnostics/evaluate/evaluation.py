"""Tasks x policies -> scores of every item: resumable, and a task that fails leaves the others alone.

Every policy answers the same items, drawn once from the task with the seed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.errors import UserError
from diagnostics.evaluate.answers import cut_at_stop, failures, score_answer
from diagnostics.evaluate.folder import Evaluation, EvaluationFolder
from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task
from diagnostics.evaluate.scoring import QUERIES, Encoded, encode_context, encode_pair, prefill_context, score
from diagnostics.generate import decode, end_tokens
from diagnostics.models import LoadedModel
from diagnostics.policies.base import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.versions import hardware, versions

FAILURES = ("empty", "unfinished", "repeating", "unparseable")

Progress = Callable[[int, int, str], None]
Row = dict[str, Any]


def evaluate(
    lm: LoadedModel,
    tasks: Sequence[Task],
    policies: Sequence[Policy],
    *,
    limit: int | None = None,
    query: str = "prompt",
    chunk_size: int | None = None,
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
        For names given twice, a policy that does not fit the model, a folder that holds something else, or if nothing
        could be evaluated.
    """
    if query not in QUERIES:
        raise UserError(f"query is {query!r}: give one of {', '.join(QUERIES)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give 1 or more")
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise UserError("name one task or more, each once")
    every = list(dict.fromkeys([FullPolicy(), *policies]))
    for policy in every:
        policy.check(lm.anatomy)
    drawn = [draw(task, limit, seed) for task in tasks]
    manifest = _manifest(lm, drawn, every, query, seed) | {"arguments": arguments or {}}
    store = EvaluationFolder(Path(out), manifest, resume=resume) if out is not None else None
    total, done = sum(len(task.items) for task in drawn) * len(every), 0
    parts: list[pd.DataFrame] = []
    errors: list[str] = []
    for task in drawn:
        for policy in every:
            rows = store.read(task, policy) if store else None
            if rows is None:
                said = f"{task.name}, {policy.spec}"
                try:
                    answered: list[Row] = []
                    for row in _answer_all(lm, task, policy, query, chunk_size):
                        if progress:
                            progress(done + len(answered), total, said)
                        answered.append(row)
                    rows = pd.DataFrame(answered)
                    if store:
                        store.write(task, policy, rows)
                except Exception as error:  # one task's trouble is not the others'
                    errors.append(f"{said}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            done += len(task.items)
            if rows is not None:
                parts.append(rows)
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


# --- Items ---


def _answer_all(lm: LoadedModel, task: Task, policy: Policy, query: str, chunk_size: int | None) -> Iterator[Row]:
    for item in task.items:
        made = (
            _choose(lm, task, item, policy, query, chunk_size)
            if isinstance(item, ChoiceItem)
            else _write(lm, task, item, policy, query, chunk_size)
        )
        yield {"task": task.name, "policy": policy.spec, "item_id": item.id, "category": item.category} | made


def _choose(lm: LoadedModel, task: Task, item: ChoiceItem, policy: Policy, query: str, chunk_size: int | None) -> Row:
    """Take the most likely continuation: one prefill for all that share a context."""
    values = np.full(len(item.continuations), np.nan)
    n_prompt = 0
    for context in dict.fromkeys(item.contexts):
        places = [i for i, c in enumerate(item.contexts) if c == context]
        pairs = [encode_pair(lm.tokenizer, context, item.continuations[i], special=True) for i in places]
        encoded = pairs[0][0]
        scored = score(lm, policy, encoded, [ids for _, ids in pairs], query=query, chunk_size=chunk_size)
        n_prompt = max(n_prompt, len(encoded.ids))
        for place, one in zip(places, scored, strict=True):
            length = {"acc": 1, "acc_per_char": len(item.continuations[place]), "acc_per_token": one.n_tokens}
            values[place] = one.log_likelihood / length[task.metric]
    chosen = int(values.argmax())
    return {"n_prompt": n_prompt, "score": float(chosen == item.gold), "chosen": chosen, "gold": item.gold}


@torch.no_grad()
def _write(
    lm: LoadedModel, task: Task, item: GenerationItem, policy: Policy, query: str, chunk_size: int | None
) -> Row:
    """Generate greedily until a stop string, the end of text, or the limit."""
    encoded = _encode(lm, item.context, task.chat)
    positions = lm.anatomy.max_positions
    if positions is not None and len(encoded.ids) + task.max_new_tokens > positions:
        raise UserError(f"item {item.id!r} has {len(encoded.ids)} tokens: too many for the {positions} positions")
    logits, cache = prefill_context(lm, policy, encoded, query=query, chunk_size=chunk_size)
    ends = set(end_tokens(lm.model).tolist())
    ids: list[int] = []
    text, finished = "", False
    while len(ids) < task.max_new_tokens and not finished:
        token = int(logits.argmax())
        if token in ends:
            finished = True
            break
        ids.append(token)
        text, finished = cut_at_stop(lm.tokenizer.decode(ids, skip_special_tokens=True), task.stop)
        if not finished and len(ids) < task.max_new_tokens:
            logits = decode(lm, torch.tensor([[token]], device=lm.device), cache)[:, -1]
    made = {"n_prompt": len(encoded.ids), "score": score_answer(task.metric, text, item.answers), "answer": text}
    # Where nothing stops an answer but its length, reaching that is no failure.
    ended = finished or not task.stop
    # As numbers, since choice items have none of them: NaN there.
    failed = {name: float(failing) for name, failing in failures(task.metric, text, ids, ended).items()}
    return made | {"n_tokens": len(ids)} | failed


def _encode(lm: LoadedModel, context: Context, chat: bool) -> Encoded:
    if not chat:
        return encode_context(lm.tokenizer, context, special=True)
    from diagnostics.encoding import encode_messages

    return Encoded((), encode_messages([{"role": "user", "content": context.text}], lm.tokenizer))


def _manifest(
    lm: LoadedModel, tasks: Sequence[Task], policies: Sequence[Policy], query: str, seed: int
) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": lm.name,
        "n_layers": lm.anatomy.n_layers,
        "hardware": hardware(lm.device),
        "versions": versions(),
        "tasks": {task.name: _about(task) for task in tasks},
        "policies": [policy.spec for policy in policies],
        "identity": {
            "weight_hash": lm.weight_hash,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": lm.device.type,
            "items": {task.name: [item.id for item in task.items] for task in tasks},
            "policies": [policy.spec for policy in policies],
            "query": query,
            "seed": seed,
        },
    }


def _about(task: Task) -> dict[str, Any]:
    return {"metric": task.metric, "n_items": len(task.items), "source": task.source, "licence": task.licence}
