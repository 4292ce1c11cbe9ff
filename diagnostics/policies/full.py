"""Full depth: every token through every layer, by the same code path as the other policies. The baseline."""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.policies.base import Policy, Workload


@dataclass(frozen=True)
class FullPolicy(Policy):
    """The stock model with the policies' cache: nothing is skipped or dropped."""

    name: ClassVar[str] = "full"

    def depth(self, n_layers: int) -> int:
        """All layers."""
        return n_layers

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """Everything, everywhere."""
        return Workload([n_prompt] * n_layers, [n_prompt] * n_layers, [0] * n_layers)
