"""What a recommended cutoff must meet: limits on its measured loss, or a budget."""

from dataclasses import dataclass

from diagnostics.support.defaults import CONFIDENCE
from diagnostics.support.errors import UserError

MAX_LOSS = 1000.0  # nats per token; the largest goal that is accepted


@dataclass(frozen=True)
class Criterion:
    """The limits that a cutoff must meet; None means no limit.

    ``max_kl`` and ``max_nll_increase`` are in nats per token, ``min_agreement`` and ``kv_budget`` are shares 0..1.
    ``kv_budget`` excludes the others: it requests the largest cutoff that fits, whatever its loss. With
    ``every_category`` the mean of every category of prompts must also be within the limits.
    """

    max_kl: float | None = None
    max_nll_increase: float | None = None
    min_agreement: float | None = None
    kv_budget: float | None = None
    confidence: float = CONFIDENCE
    every_category: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_kl", 0, MAX_LOSS),
            ("max_nll_increase", 0, MAX_LOSS),
            ("min_agreement", 0, 1),
            ("kv_budget", 0, 1),
        ):
            value = getattr(self, name)
            # "not ... <=" so that NaN is refused too
            if value is not None and not (low <= value <= high):
                raise UserError(f"{name} is {value}: give a number from {low} to {high}")
        if not 0.5 <= self.confidence < 1:
            raise UserError(f"confidence is {self.confidence}: give a number from 0.5 to below 1")
        losses = [self.max_kl, self.max_nll_increase, self.min_agreement]
        if self.kv_budget is not None and (self.every_category or any(loss is not None for loss in losses)):
            raise UserError("kv_budget asks for the largest cutoff that fits: give it without a loss goal")

    def limits(self) -> dict[str, float]:
        """Return the limit of each requested loss, by its name in the evidence; for every loss lower is better."""
        limits = {"kl": self.max_kl, "nll_increase": self.max_nll_increase}
        limits["disagreement"] = None if self.min_agreement is None else 1 - self.min_agreement
        return {name: limit for name, limit in limits.items() if limit is not None}

    def require_no_sweep(self) -> None:
        """Raise UserError unless a cutoff can be named without a measured loss."""
        given = {"max_nll_increase": self.max_nll_increase, "min_agreement": self.min_agreement}
        goals = [name for name, value in given.items() if value is not None]
        for name in [*goals, *(["every_category"] if self.every_category else [])]:
            raise UserError(
                f"`{name}` needs the measured loss, which a run with `sweep=False` does not have: "
                "give `max_kl` or `kv_budget` alone"
            )
