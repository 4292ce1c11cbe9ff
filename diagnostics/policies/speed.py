"""SPEED, Shallow Prefill, dEEp Decode (arXiv 2605.06105): prompt tokens stop at the cutoff; decoding is full depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diagnostics.policies.base import Policy, Workload
from diagnostics.policies.recommendation import integer_of, read_recommendation
from diagnostics.support.errors import require_integer

if TYPE_CHECKING:
    from diagnostics.policies.cache import PolicyCache


@dataclass(frozen=True)
class SpeedPolicy(Policy):
    """Prompt tokens run through layers 0..cutoff-1 and leave keys and values only there.

    Attributes
    ----------
    cutoff
        Layers that prompt tokens run through, 1 to L; L is the stock model.
    anchors
        Leading tokens that run through all layers, 0 or more; 1 is BoS.
    boundary
        Trailing prompt tokens that also run through all layers, the first of the decode phase; 1 or more.
    """

    cutoff: int
    anchors: int = 1
    boundary: int = 1
    name: ClassVar[str] = "speed"
    title: ClassVar[str] = "SPEED"
    rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_integer("cutoff", self.cutoff, 1)
        require_integer("anchors", self.anchors, 0)
        require_integer("boundary", self.boundary, 1)

    @classmethod
    def from_recommendation(cls, path: str | Path) -> SpeedPolicy:
        """Read cutoff and anchors from a ``recommendation.json``, or from the run folder that holds one.

        Raises
        ------
        UserError
            If there is no such file, or if it is not a recommendation.
        """
        data = read_recommendation(path)
        cutoff, anchors = (integer_of(data.get(name), name, path) for name in ("cutoff", "anchors"))
        return cls(cutoff=cutoff, anchors=anchors)

    def depth(self, n_layers: int) -> int:
        """The cutoff."""
        return self.cutoff

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """All tokens below the cutoff; anchors and boundary above it."""
        deep = min(n_prompt, self.anchors + self.boundary)
        tokens = [n_prompt] * self.cutoff + [deep] * (n_layers - self.cutoff)
        return Workload(tokens, tokens, [0] * n_layers)

    def from_full(self, cache: PolicyCache) -> PolicyCache | None:
        """Return all columns below the cutoff, and above it the anchors, which see only anchors at full depth too.

        None if rows are padded, since their anchors are then different columns, and if sliding layers have dropped
        columns.
        """
        upper = cache.layers[self.cutoff :]
        if cache.padding is not None or cache.n_columns < self.anchors or any(layer.forgotten for layer in upper):
            return None
        stops = [cache.n_columns] * self.cutoff + [self.anchors] * len(upper)
        return cache.first_columns(self, stops)
