"""The recommendation as one plain sentence, the same in the terminal, the dashboard, the report and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diagnostics.cutoffs.rules.uptake import UPTAKE_HELD

if TYPE_CHECKING:
    from diagnostics.cutoffs.recommendation import Recommendation

ANSWER_LENGTH = 8192  # prompt tokens


def answer(recommendation: Recommendation, n_prompt: int = ANSWER_LENGTH) -> str:
    """Say how deep prompts must go, what that saves at ``n_prompt`` tokens, and what it changes.

    Savings are predicted at the length closest to ``n_prompt`` among those of the recommendation.
    """
    data, cutoff = recommendation.data, recommendation.cutoff
    n_layers = data["n_layers"]
    if not recommendation.measured:
        return _unmeasured(recommendation, n_prompt)
    if cutoff == n_layers:
        return f"Prompts must run through all {n_layers} layers: no smaller cutoff meets the goal."
    agreement = recommendation.evidence[cutoff - 1]["top1_agreement"]
    return (
        f"Prompts can stop at layer {cutoff} of {n_layers}: {_saved(recommendation, n_prompt)}, and "
        f"{_changed(1 - agreement)}."
    )


def _unmeasured(recommendation: Recommendation, n_prompt: int) -> str:
    """Say a cutoff whose loss was not measured, and how far it can be trusted."""
    data, cutoff = recommendation.data, recommendation.cutoff
    where = f"layer {cutoff} of {data['n_layers']}"
    saved = _saved(recommendation, n_prompt)
    if "kv_budget" in data["criterion"]:
        return f"Prompts that stop at {where} fit the budget: {saved}. What that changes was not measured."
    trust = f"That is by the uptake of the layers, not measured; this rule was {UPTAKE_HELD}."
    if cutoff == data["n_layers"]:
        return f"Prompts must run through all {cutoff} layers. {trust}"
    return f"Prompts can stop at {where}: {saved}. {trust}"


def _saved(recommendation: Recommendation, n_prompt: int) -> str:
    predicted = recommendation.data["predicted"]
    at = min(predicted, key=lambda savings: abs(savings["n_prompt"] - n_prompt))
    prefill, cache = f"{1 - at['ttft_ratio']:.0%}", f"{1 - at['kv_ratio']:.0%}"
    share = f"{prefill} of the prefill and of the KV cache"
    if prefill != cache:
        share = f"{prefill} of the prefill and {cache} of the KV cache"
    return f"at {at['n_prompt']:,} tokens that saves a predicted {share}"


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
