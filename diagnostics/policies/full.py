"""Full depth, the baseline: every token runs through every layer, by the same code path as the other policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diagnostics.policies.base import Policy, Workload

if TYPE_CHECKING:
    from diagnostics.policies.cache import PolicyCache


@dataclass(frozen=True)
class FullPolicy(Policy):
    """The stock model with the policies' cache: nothing is skipped or dropped."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full depth"
    rank: ClassVar[int] = 0

    def depth(self, n_layers: int) -> int:
        """All layers."""
        return n_layers

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """Everything, everywhere."""
        return Workload([n_prompt] * n_layers, [n_prompt] * n_layers, [0] * n_layers)

    def from_full(self, cache: PolicyCache) -> PolicyCache:
        """Return the same keys and values, in a cache that continues independently of the first."""
        return cache.first_columns(self, [cache.n_columns] * len(cache.layers))
