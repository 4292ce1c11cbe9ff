"""Log-likelihoods under a policy, phase by phase: the context is prompt, the continuation is decode phase.

The last token of the context is the first decode-phase token, as in generation: its final state gives the first
logits. One prefill serves all continuations of a context, and where a policy's cache follows from that of full depth,
one prefill serves all those policies (`SharedPrefill`).

Where a context has a document, its query may be placed in three ways (``QUERIES``):

- ``prompt``: document and query are one prompt, prefilled together.
- ``later``: the document is prefilled alone, before the query is known; the query follows as prompt. SPEED gives
  the same numbers, since its choice does not depend on the prompt; FastKV does not.
- ``decode``: the document is prefilled alone; the query is decode phase and runs at full depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.evaluate.items import Context
from diagnostics.generation.generation import decode, prefill
from diagnostics.models.loading import LoadedModel
from diagnostics.models.rope import rope_lengths
from diagnostics.policies import Policy
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.full import FullPolicy
from diagnostics.support.divergence import log_likelihoods
from diagnostics.support.errors import UserError

QUERIES = ("prompt", "later", "decode")
# Continuations run as batches, each with a copy of the context's cache; copies and logits take no more bytes than this.
BATCH_BYTES = 2**30
# Positions whose log-probabilities are held at once.
SCORED_AT_ONCE = 128


@dataclass(frozen=True)
class Scored:
    """A continuation's log-likelihood in nats, its number of tokens, and whether greedy decoding would write it."""

    log_likelihood: float
    n_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class Encoded:
    """The tokens of a context: those of its document, which may be empty, and those of its query."""

    document: tuple[int, ...]
    query: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the context."""
        return self.document + self.query


def encode_context(tokenizer: Any, context: Context, *, special: bool) -> Encoded:
    """Tokenize a context as it is, to generate from.

    ``special`` adds what the tokenizer puts before a text, such as BoS. A token that spans the document's end and
    the query's beginning belongs to the query.
    """
    ids, document_ids = (
        tuple(tokenizer(text, add_special_tokens=special)["input_ids"]) if text else ()
        for text in (context.text, context.document)
    )
    shared = next((i for i, (a, b) in enumerate(zip(document_ids, ids, strict=False)) if a != b), len(document_ids))
    return Encoded(ids[:shared], ids[shared:])


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


class SharedPrefill:
    """Full-depth caches of prompts, from which policies derive their own where that is possible.

    SPEED can: below the cutoff it holds what full depth holds, above it the anchors, which saw only each other. So all
    its cutoffs cost one prefill. Caches live as long as the object.
    """

    def __init__(self, lm: LoadedModel, chunk_size: int | None = None) -> None:
        self.lm, self.chunk_size = lm, chunk_size
        self._caches: dict[tuple[int, tuple[int, ...]], PolicyCache] = {}

    def cache(self, policy: Policy, ids: Sequence[int], length: int) -> PolicyCache | None:
        """Return the policy's cache of prompt tokens, none of them decode phase; None if it must be prefilled.

        ``length`` is the number of tokens that the text will have in all.
        """
        if type(policy).from_full is Policy.from_full or not ids:
            return None
        key = rope_lengths(self.lm.anatomy.stack).factors(length), tuple(ids)
        if key not in self._caches:
            _, self._caches[key] = prefill(
                self.lm,
                _tensor(self.lm, ids),
                policy=FullPolicy(),
                chunk_size=self.chunk_size,
                more=True,
                length=length,
            )
        return policy.from_full(self._caches[key])


@torch.no_grad()
def score(
    lm: LoadedModel,
    policy: Policy,
    context: Encoded,
    continuations: Sequence[Sequence[int]],
    *,
    query: str = "prompt",
    chunk_size: int | None = None,
    shared: SharedPrefill | None = None,
) -> list[Scored]:
    """Score every continuation after one context: one prefill, then all of them as decode phase.

    ``query`` places the query about a document; ``chunk_size`` bounds the prompt tokens of a forward pass; ``shared``
    holds the context's full-depth cache, and its own chunk size.

    Raises UserError for a continuation without tokens, and for what does not fit the model's positions.
    """
    longest = max((len(continuation) for continuation in continuations), default=0)
    room = lm.anatomy.room(longest)
    if room is not None and len(context.ids) > room:
        raise UserError(
            f"a context of {len(context.ids)} tokens and {longest} more exceed the {lm.anatomy.max_positions} "
            f"positions of {lm.name!r}"
        )
    if not all(continuations):
        raise UserError("a continuation has no tokens")
    # Texts on both sides of a length at which rotary frequencies change share no keys.
    rope, groups = rope_lengths(lm.anatomy.stack), dict[int, list[int]]()
    lengths = [len(context.ids) + len(continuation) - 1 for continuation in continuations]
    for index, length in enumerate(lengths):
        groups.setdefault(rope.factors(length), []).append(index)
    scored: dict[int, Scored] = {}
    for indices in groups.values():
        length, rows = max(lengths[index] for index in indices), [continuations[index][:-1] for index in indices]
        first, cache = prefill_context(
            lm, policy, context, query=query, chunk_size=chunk_size, shared=shared, length=length
        )
        for index, more in zip(indices, _later_logits(lm, cache, rows, first.shape[-1]), strict=True):
            ids = torch.tensor(list(continuations[index]))
            scored[index] = _scored(first if more is None else torch.cat([first, more]), ids)
    return [scored[index] for index in range(len(continuations))]


def _later_logits(
    lm: LoadedModel, cache: PolicyCache, rows: Sequence[Sequence[int]], n_vocabulary: int
) -> Iterator[Tensor | None]:
    """Logits [tokens, vocabulary] after every token of each of these rows; None for a row without tokens."""
    width = max(map(len, rows), default=0)
    if width == 0:
        yield from [None] * len(rows)
        return
    at_once = max(1, BATCH_BYTES // (cache.kv_bytes + width * n_vocabulary * lm.dtype.itemsize))
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        # Shorter rows are padded with any token: it comes after all that is read.
        filled = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=lm.device)
        for ids, logits in zip(batch, decode(lm, filled, cache.repeated(len(batch))), strict=True):
            yield logits[: len(ids)] if ids else None


def prefill_context(
    lm: LoadedModel,
    policy: Policy,
    context: Encoded,
    *,
    query: str = "prompt",
    chunk_size: int | None = None,
    shared: SharedPrefill | None = None,
    length: int = 0,
) -> tuple[Tensor, PolicyCache]:
    """Prefill a context; return the logits [1, vocabulary] for the token after it, and the cache.

    With ``shared``, the cache is derived from that of full depth where the policy can. ``length`` is the number of
    tokens of the text in all, where what follows the context is known.
    """
    if query not in QUERIES:
        raise UserError(f"query is {query!r}: give one of {', '.join(QUERIES)}")
    if not context.ids:
        raise UserError("a context has no tokens")
    length = max(length, len(context.ids))
    chunk_size = shared.chunk_size if shared else chunk_size
    chunk = chunk_size if policy.chunked else None
    apart = bool(context.document) and bool(context.query) and query != "prompt"
    in_decode = apart and query == "decode"
    # Tokens before the decode phase.
    n_prompt = len(context.document) if in_decode else len(context.ids) - policy.boundary
    cache = shared.cache(policy, context.ids[: max(n_prompt, 0)], length) if shared else None
    if cache is not None:
        return decode(lm, _tensor(lm, context.ids[n_prompt:]), cache)[:, -1], cache
    if not apart:
        logits, cache = prefill(lm, _tensor(lm, context.ids), policy=policy, chunk_size=chunk, length=length)
    else:
        document = _tensor(lm, context.document)
        _, cache = prefill(lm, document, policy=policy, chunk_size=chunk, more=policy.chunked, length=length)
        if in_decode:
            return decode(lm, _tensor(lm, context.query), cache)[:, -1], cache
        logits, cache = prefill(lm, _tensor(lm, context.query), cache=cache, chunk_size=chunk)
    assert logits is not None
    return logits, cache


def _tensor(lm: LoadedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=lm.device)


def _scored(logits: Tensor, ids: Tensor) -> Scored:
    """Score tokens [n] by the logits [n, vocabulary] that predict them."""
    # Never in the logits' own type: in half precision likelihoods of long continuations are worth nothing. In blocks,
    # since float64 copies of all logits would be the largest tensors of an evaluation.
    blocks = zip(logits.split(SCORED_AT_ONCE), ids.split(SCORED_AT_ONCE), strict=True)
    chosen = [log_likelihoods(rows, targets).sum() for rows, targets in blocks]
    greedy = bool((logits.argmax(-1) == ids.to(logits.device)).all())
    return Scored(float(torch.stack(chosen).sum()), len(ids), greedy)
