"""Which cutoff a training step runs at."""

from dataclasses import dataclass
from math import floor

from diagnostics.support.errors import UserError


@dataclass(frozen=True)
class CutoffSchedule:
    """Lowers the cutoff evenly from ``start`` to ``end`` over the first ``share`` of training, then keeps it there.

    Attributes
    ----------
    start, end
        Cutoffs, 1..L; where they are equal the cutoff is fixed.
    share
        Share of training over which the cutoff falls, 0..1.
    hold
        Share of the steps, spread evenly, that run at full depth instead, 0..0.5: there self-distillation keeps the
        model as it was.
    full_depth
        L; needed with ``hold``.
    """

    start: int
    end: int
    share: float = 0.5
    hold: float = 0.0
    full_depth: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.end <= self.start:
            raise UserError(f"a schedule lowers the cutoff: it cannot go from {self.start} to {self.end}")
        if not 0 <= self.share <= 1:
            raise UserError(f"the share of training that lowers the cutoff is {self.share}: give 0 to 1")
        if not 0 <= self.hold <= 0.5:
            raise UserError(f"the share of steps at full depth is {self.hold}: give 0 to 0.5")
        if self.hold and (self.full_depth is None or self.full_depth < self.start):
            raise UserError("to hold full depth a schedule needs the number of layers as full_depth")

    def at(self, step: int, n_steps: int) -> int:
        """Return the cutoff of a step, 0..``n_steps`` - 1.

        The cutoffs before ``end`` get equally many steps, apart from steps at full depth; the last step is at ``end``.
        """
        # Never the first step; rounded, as ten times 0.1 is not 1.
        if self.full_depth and step < n_steps - 1 and self._held(step) > self._held(step - 1):
            return self.full_depth
        lowering = min(round(self.share * n_steps), n_steps - 1)
        if step >= lowering:
            return self.end
        return self.start - step * (self.start - self.end + 1) // lowering

    def _held(self, step: int) -> int:
        return max(0, floor(step * self.hold + 1e-9))
