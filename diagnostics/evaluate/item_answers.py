"""One item under one policy -> its row: what was chosen or written, how it scores, and how it fails."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from diagnostics.evaluate.answer_metrics import cut_at_stop, failures, score_answer
from diagnostics.evaluate.humaneval import METRIC as PASSES
from diagnostics.evaluate.humaneval import passes
from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task
from diagnostics.evaluate.scoring import Encoded, SharedPrefill, encode_context, encode_pair, prefill_context, score
from diagnostics.generation.generation import decode, end_tokens, outgrown
from diagnostics.models.loading import LoadedModel
from diagnostics.models.rope import rope_lengths
from diagnostics.policies import Policy
from diagnostics.prompts.encoding import encode_messages
from diagnostics.prompts.token_text import Continuation
from diagnostics.support.errors import UserError

Row = dict[str, Any]


def answer(
    lm: LoadedModel,
    task: Task,
    item: ChoiceItem | GenerationItem,
    policy: Policy,
    *,
    query: str = "prompt",
    shared: SharedPrefill,
) -> Row:
    """Answer an item, and return its row of `Evaluation.items`.

    Raises UserError for an item that does not fit the model's positions.
    """
    row = {"task": task.name, "policy": policy.spec, "item_id": item.id, "category": item.category}
    if isinstance(item, ChoiceItem):
        return row | _choose(lm, task, item, policy, query, shared)
    return row | _write(lm, task, item, policy, query, shared)


def token_ids(lm: LoadedModel, task: Task, item: ChoiceItem | GenerationItem) -> list[Sequence[int]]:
    """Return the tokens that the model reads for an item: its contexts and continuations, in order."""
    if isinstance(item, GenerationItem):
        return [_encode(lm, item.context, task.chat).ids]
    pairs = zip(item.contexts, item.continuations, strict=True)
    encoded = (encode_pair(lm.tokenizer, context, text, special=True) for context, text in pairs)
    return [ids for context, continuation in encoded for ids in (context.ids, continuation)]


def _choose(lm: LoadedModel, task: Task, item: ChoiceItem, policy: Policy, query: str, shared: SharedPrefill) -> Row:
    """Choose the most likely continuation, with one prefill per distinct context."""
    values = np.full(len(item.continuations), np.nan)
    gold, n_prompt = np.nan, 0
    for context in dict.fromkeys(item.contexts):
        indices = [i for i, c in enumerate(item.contexts) if c == context]
        pairs = [encode_pair(lm.tokenizer, context, item.continuations[i], special=True) for i in indices]
        encoded = pairs[0][0]
        scored = score(lm, policy, encoded, [ids for _, ids in pairs], query=query, shared=shared)
        n_prompt = max(n_prompt, len(encoded.ids))
        for index, one in zip(indices, scored, strict=True):
            length = {"acc": 1, "acc_per_char": len(item.continuations[index]), "acc_per_token": one.n_tokens}
            values[index] = one.log_likelihood / length[task.metric]
            gold = one.log_likelihood if index == item.gold else gold
    chosen = int(values.argmax())
    row = {"n_prompt": n_prompt, "score": float(chosen == item.gold), "chosen": chosen, "gold": item.gold}
    return row | {"gold_log_likelihood": gold}


@torch.no_grad()
def _write(lm: LoadedModel, task: Task, item: GenerationItem, policy: Policy, query: str, shared: SharedPrefill) -> Row:
    """Generate greedily until a stop string, the end of text, or the limit."""
    encoded = _encode(lm, item.context, task.chat)
    room = lm.anatomy.room(task.max_new_tokens)
    if room is not None and len(encoded.ids) > room:
        positions = lm.anatomy.max_positions
        raise UserError(f"item {item.id!r} has {len(encoded.ids)} tokens: too many for the {positions} positions")
    logits, cache = prefill_context(lm, policy, encoded, query=query, shared=shared)
    continuation, rope = Continuation(lm.tokenizer, encoded.ids), rope_lengths(lm.anatomy.stack)
    ends = set(end_tokens(lm.model).tolist())
    ids: list[int] = []
    text, finished = "", False
    while len(ids) < task.max_new_tokens and not finished:
        token = int(logits.argmax())
        if token in ends:
            finished = True
            break
        ids.append(token)
        text, finished = cut_at_stop(continuation.text(ids), task.stop)
        if not finished and len(ids) < task.max_new_tokens:
            new = [token]
            if outgrown(cache, rope):  # recomputed with the rotary frequencies of longer texts
                length, new = len(encoded.ids) + len(ids), ids
                _, cache = prefill_context(lm, policy, encoded, query=query, shared=shared, length=length)
            logits = decode(lm, torch.tensor([new], device=lm.device), cache)[:, -1]
    row = {"n_prompt": len(encoded.ids), "score": _score(task, item, text), "answer": text}
    if task.metric != PASSES:
        row["accepted"] = " | ".join(item.answers)
    # Without stop strings, reaching the length limit is no failure.
    ended = finished or not task.stop
    # As floats: choice items have NaN here.
    failed = {name: float(failing) for name, failing in failures(task.metric, text, ids, ended).items()}
    return row | {"n_tokens": len(ids)} | failed


def _score(task: Task, item: GenerationItem, text: str) -> float:
    if task.metric == PASSES:
        return passes(item.context.text, text, item.answers[0])
    return score_answer(task.metric, text, item.answers)


def _encode(lm: LoadedModel, context: Context, chat: bool) -> Encoded:
    if not chat:
        return encode_context(lm.tokenizer, context, special=True)
    return Encoded((), encode_messages([{"role": "user", "content": context.text}], lm.tokenizer))
