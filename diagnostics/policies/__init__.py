"""Ways to run a model on a prompt, one policy per file; `registry` finds each by its name."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.policies.base import Policy, Workload
    from diagnostics.policies.cache import PolicyCache
    from diagnostics.policies.registry import all_policies, parse_policy

_HOMES = {
    "base": ("Policy", "Workload"),
    "cache": ("PolicyCache",),
    "registry": ("all_policies", "parse_policy"),
}

__all__ = ["Policy", "PolicyCache", "Workload", "all_policies", "parse_policy"]

find_on_demand(__name__, _HOMES)
