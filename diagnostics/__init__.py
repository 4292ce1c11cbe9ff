"""Layer diagnostics of decoder-only language models, and the SPEED cutoff that follows from them."""

from diagnostics.diagnose import diagnose
from diagnostics.errors import UserError
from diagnostics.models import LoadedModel, load_model
from diagnostics.prompts import Prompt, PromptSet, load_prompts
from diagnostics.recommend import Recommendation, recommend
from diagnostics.regions import RegionRules, find_regions
from diagnostics.results import Run, load_run

__all__ = [
    "LoadedModel",
    "Prompt",
    "PromptSet",
    "Recommendation",
    "RegionRules",
    "Run",
    "UserError",
    "diagnose",
    "find_regions",
    "load_model",
    "load_prompts",
    "load_run",
    "recommend",
]
