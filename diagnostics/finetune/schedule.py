"""Which cutoff a training step runs at."""

from dataclasses import dataclass

from diagnostics.errors import UserError


@dataclass(frozen=True)
class CutoffSchedule:
    """From ``start`` down to ``end`` in even steps over the first ``share`` of training, and ``end`` from then on.

    Cutoffs are 1..L, ``share`` 0..1. With ``start`` equal to ``end`` the cutoff is fixed.
    """

    start: int
    end: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.end <= self.start:
            raise UserError(f"a schedule lowers the cutoff: it cannot go from {self.start} to {self.end}")
        if not 0 <= self.share <= 1:
            raise UserError(f"the share of training that lowers the cutoff is {self.share}: give 0 to 1")

    def at(self, step: int, n_steps: int) -> int:
        """Return the cutoff of a step, 0..``n_steps`` - 1, ``end`` for the last; until then each gets as many steps."""
        lowering = min(round(self.share * n_steps), n_steps - 1)
        if step >= lowering:
            return self.end
        return self.start - step * (self.start - self.end + 1) // lowering
