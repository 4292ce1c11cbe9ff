"""Layer diagnostics of decoder-only language models, and the SPEED cutoff that follows from them.

The public names come from their modules when they are first used: reading a run does not load torch.
"""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand
from diagnostics.support.moved import find_moved

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diagnostics.cutoffs import Recommendation, RegionRules, find_regions, recommend
    from diagnostics.diagnosis import diagnose
    from diagnostics.generation import Generation, decode, generate, prefill
    from diagnostics.models import LoadedModel, load_model
    from diagnostics.policies import Policy, PolicyCache, parse_policy
    from diagnostics.policies.fastkv import FastKVPolicy
    from diagnostics.policies.full import FullPolicy
    from diagnostics.policies.projected import ProjectedPolicy
    from diagnostics.policies.speed import SpeedPolicy
    from diagnostics.policies.store import load_cache, save_cache
    from diagnostics.prompts import Prompt, PromptSet, load_prompts
    from diagnostics.runs import Run, load_run
    from diagnostics.support.errors import UserError

_HOMES = {
    "diagnosis": ("diagnose",),
    "support.errors": ("UserError",),
    "generation": ("Generation", "decode", "generate", "prefill"),
    "models": ("LoadedModel", "load_model"),
    "policies": ("Policy", "PolicyCache", "parse_policy"),
    "policies.fastkv": ("FastKVPolicy",),
    "policies.full": ("FullPolicy",),
    "policies.projected": ("ProjectedPolicy",),
    "policies.speed": ("SpeedPolicy",),
    "policies.store": ("load_cache", "save_cache"),
    "prompts": ("Prompt", "PromptSet", "load_prompts"),
    "cutoffs": ("Recommendation", "RegionRules", "find_regions", "recommend"),
    "runs": ("Run", "load_run"),
}

__all__ = [
    "FastKVPolicy",
    "FullPolicy",
    "Generation",
    "LoadedModel",
    "Policy",
    "PolicyCache",
    "ProjectedPolicy",
    "Prompt",
    "PromptSet",
    "Recommendation",
    "RegionRules",
    "Run",
    "SpeedPolicy",
    "UserError",
    "decode",
    "diagnose",
    "find_regions",
    "generate",
    "load_cache",
    "load_model",
    "load_prompts",
    "load_run",
    "parse_policy",
    "prefill",
    "recommend",
    "save_cache",
]

find_on_demand(__name__, _HOMES)
find_moved()
