"""The recommendation as one plain sentence, the same in the terminal, the dashboard, the report and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diagnostics.cutoffs.recommendation import Recommendation

ANSWER_LENGTH = 8192  # prompt tokens


def answer(recommendation: Recommendation, n_prompt: int = ANSWER_LENGTH) -> str:
    """Say how deep prompts must go, what that saves at ``n_prompt`` tokens, and what it changes.

    Savings are predicted at the length closest to ``n_prompt`` among those of the recommendation.
    """
    data, cutoff = recommendation.data, recommendation.cutoff
    n_layers = data["n_layers"]
    if cutoff == n_layers:
        return f"Prompts must run through all {n_layers} layers: no smaller cutoff meets the goal."
    at = min(data["predicted"], key=lambda savings: abs(savings["n_prompt"] - n_prompt))
    agreement = recommendation.evidence[cutoff - 1]["top1_agreement"]
    return (
        f"Prompts can stop at layer {cutoff} of {n_layers}: at {at['n_prompt']:,} tokens that saves a predicted "
        f"{_saved(at['ttft_ratio'], at['kv_ratio'])}, and {_changed(1 - agreement)}."
    )


def _saved(ttft_ratio: float, kv_ratio: float) -> str:
    prefill, cache = f"{1 - ttft_ratio:.0%}", f"{1 - kv_ratio:.0%}"
    if prefill == cache:
        return f"{prefill} of the prefill and of the KV cache"
    return f"{prefill} of the prefill and {cache} of the KV cache"


def _changed(share: float) -> str:
    """Say how many next tokens are different ones."""
    if share <= 0:
        return "changed no next token that was measured"
    if share < 0.0005:
        return "changes fewer than 1 of 1,000 next tokens"
    return (
        f"changes {100 * share:.0f} of 100 next tokens"
        if share >= 0.01
        else f"changes {1000 * share:.0f} of 1,000 next tokens"
    )
