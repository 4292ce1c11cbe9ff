"""Models whose rotary frequencies depend on the length of the text: no KV cache may mix two sets of frequencies.

See `diagnostics.models.rope`. The cases refused here would silently give wrong numbers.
"""

from __future__ import annotations

from diagnostics.models.rope import RopeLengths
from diagnostics.policies.cache import PolicyCache
from diagnostics.support.errors import UserError


def admit_length(cache: PolicyCache, n_new: int, rope: RopeLengths) -> int | None:
    """Record in the cache the rotary frequencies of its keys; return the text length that the call must use.

    None where lengths do not matter.

    Raises
    ------
    UserError
        If the keys in the cache, or other rows of the batch, have other frequencies.
    """
    if not rope:
        return None
    columns = max(cache.n_columns + n_new, cache.length)
    padding = [0] if cache.padding is None else cache.padding.tolist()
    shortest, longest = columns - max(padding), columns - min(padding)
    factors = rope.factors(longest)
    if rope.mixes(shortest, longest):
        raise UserError(f"{rope.reason}: rows of {shortest} and of {longest} tokens do not fit into one batch")
    if cache.n_columns and cache.factors is not None and cache.factors != factors:
        text = "shorter" if cache.factors < factors else "longer"
        raise UserError(
            f"{rope.reason}, and this KV cache was filled for a {text} text than one of {longest} tokens: "
            "prefill all of its tokens anew"
        )
    cache.factors = factors
    return longest


def begin_anew(cache: PolicyCache, dropped: PolicyCache, n_new: int, n_logits: int, rope: RopeLengths) -> int:
    """Return how many of the last of ``n_new`` tokens are decode phase when stock ``generate()`` runs them all anew.

    ``dropped`` is the cache that ``generate()`` dropped where the frequencies change, ``cache`` the empty new one.
    Raises UserError if the policy cannot begin anew, or if a draft of assisted generation crosses the change.
    """
    decoded, policy = dropped.decoded, cache.policy
    if not policy.chunked or len(decoded) != 1 or decoded[0].stop != dropped.n_columns:
        raise UserError(
            f"{rope.reason}, where generate() runs all tokens anew, which {policy} cannot after this "
            "prompt: generate fewer tokens"
        )
    padding = 0 if cache.padding is None else int(cache.padding.min())
    if rope.mixes(n_new - max(n_logits, 1) + 1 - padding, n_new - padding):
        raise UserError(f"{rope.reason}, and drafts of assisted generation cross that: leave out the assistant")
    for layer, old_layer in zip(cache.layers, dropped.layers, strict=True):
        layer.record_past, layer.room = old_layer.record_past, old_layer.room
    return n_new - decoded[0].start
