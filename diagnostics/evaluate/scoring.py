"""Log-likelihoods under a policy, phase by phase: the context is prompt, the continuation is decode phase.

The last token of the context is the first decode-phase token, as in generation: its final state gives the first
logits. One prefill serves all continuations of a context; after each the cache is cropped back to the context.

Where a context has a document, its query may be placed in three ways (``QUERIES``):

- ``prompt``: document and query are one prompt, prefilled together.
- ``later``: the document is prefilled alone, before the query is known; the query follows as prompt. For SPEED the same
  numbers, since its choice does not depend on the prompt; for FastKV not.
- ``decode``: the document is prefilled alone; the query is decode phase and runs at full depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import UserError
from diagnostics.evaluate.items import Context
from diagnostics.generate import decode, prefill
from diagnostics.models import LoadedModel
from diagnostics.policies.base import Policy
from diagnostics.policies.cache import PolicyCache

QUERIES = ("prompt", "later", "decode")


@dataclass(frozen=True)
class Scored:
    """A continuation's log-likelihood in nats, its number of tokens, and whether greedy decoding would write it."""

    log_likelihood: float
    n_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class Encoded:
    """A context as tokens: those of its document, which may be none, and those of its query."""

    document: tuple[int, ...]
    query: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the context."""
        return self.document + self.query


def encode_context(tokenizer: Any, context: Context, *, special: bool) -> Encoded:
    """Tokenize a context as it is, to generate from.

    ``special`` adds what the tokenizer puts before a text, such as BoS. A token that holds the document's end and the
    query's beginning is the query's.
    """
    whole, document = (
        tuple(tokenizer(text, add_special_tokens=special)["input_ids"]) if text else ()
        for text in (context.text, context.document)
    )
    shared = next((i for i, (a, b) in enumerate(zip(document, whole, strict=False)) if a != b), len(document))
    return Encoded(whole[:shared], whole[shared:])


def encode_pair(
    tokenizer: Any, context: Context, continuation: str, *, special: bool
) -> tuple[Encoded, tuple[int, ...]]:
    """Tokenize a context and its continuation as lm-eval does: together, then split where the context alone ends.

    Spaces at the end of the context go to the continuation, since tokenizers put a space before a word. Otherwise as
    `encode_context`.
    """
    text = context.text
    stripped = text.rstrip()
    size = len(context.document)
    alone = encode_context(tokenizer, Context(stripped[size:], stripped[:size]), special=special)
    both = tokenizer(stripped + text[len(stripped) :] + continuation, add_special_tokens=special)["input_ids"]
    return alone, tuple(both[len(alone.ids) :])


@torch.no_grad()
def score(
    lm: LoadedModel,
    policy: Policy,
    context: Encoded,
    continuations: Sequence[Sequence[int]],
    *,
    query: str = "prompt",
    chunk_size: int | None = None,
) -> list[Scored]:
    """Score every continuation after one context: one prefill, then each of them as decode phase.

    Raises UserError for a continuation without tokens, and for what does not fit the model's positions.
    """
    longest = max((len(continuation) for continuation in continuations), default=0)
    positions = lm.anatomy.max_positions
    if positions is not None and len(context.ids) + longest > positions:
        raise UserError(
            f"a context of {len(context.ids)} tokens and {longest} more exceed the {positions} positions of {lm.name!r}"
        )
    if not all(continuations):
        raise UserError("a continuation has no tokens")
    first, cache = prefill_context(lm, policy, context, query=query, chunk_size=chunk_size)
    scored = []
    for continuation in continuations:
        ids = torch.tensor([list(continuation)], device=lm.device)
        logits = first[:, None]
        if len(continuation) > 1:
            logits = torch.cat([logits, decode(lm, ids[:, :-1], cache).to(first.dtype)], dim=1)
            cache.crop(1 - len(continuation))
        scored.append(_scored(logits[0], ids[0]))
    return scored


def prefill_context(
    lm: LoadedModel, policy: Policy, context: Encoded, *, query: str = "prompt", chunk_size: int | None = None
) -> tuple[Tensor, PolicyCache]:
    """Take a context into a cache, and return the logits [1, vocabulary] of the token after it, and the cache."""
    if query not in QUERIES:
        raise UserError(f"query is {query!r}: give one of {', '.join(QUERIES)}")
    if not context.ids:
        raise UserError("a context has no tokens")
    chunk = chunk_size if policy.chunked else None

    def tensor(ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=lm.device)

    apart = bool(context.document) and bool(context.query) and query != "prompt"
    if not apart:
        logits, cache = prefill(lm, tensor(context.ids), policy=policy, chunk_size=chunk)
    else:
        _, cache = prefill(lm, tensor(context.document), policy=policy, chunk_size=chunk, more=policy.chunked)
        if query == "decode":
            return decode(lm, tensor(context.query), cache)[:, -1], cache
        logits, cache = prefill(lm, tensor(context.query), cache=cache, chunk_size=chunk)
    assert logits is not None
    return logits, cache


def _scored(logits: Tensor, ids: Tensor) -> Scored:
    """Score tokens [n] by the logits [n, vocabulary] that predict them."""
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, ids[:, None].to(log_p.device))[:, 0]
    greedy = bool((log_p.argmax(-1) == ids.to(log_p.device)).all())
    return Scored(float(chosen.double().sum()), len(ids), greedy)
