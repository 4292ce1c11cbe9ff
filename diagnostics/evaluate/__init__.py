"""Quality: how well a model solves tasks under a policy, compared with full depth."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.evaluate.evaluation import evaluate
    from diagnostics.evaluate.evaluation_folder import Evaluation, load_evaluation
    from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task
    from diagnostics.evaluate.policy_fidelity import fidelity
    from diagnostics.evaluate.score_table import summarize
    from diagnostics.evaluate.tasks import load_task

_HOMES = {
    "evaluation": ("evaluate",),
    "policy_fidelity": ("fidelity",),
    "evaluation_folder": ("Evaluation", "load_evaluation"),
    "items": ("ChoiceItem", "Context", "GenerationItem", "Task"),
    "score_table": ("summarize",),
    "tasks": ("load_task",),
}

__all__ = [
    "ChoiceItem",
    "Context",
    "Evaluation",
    "GenerationItem",
    "Task",
    "evaluate",
    "fidelity",
    "load_evaluation",
    "load_task",
    "summarize",
]

find_on_demand(__name__, _HOMES)
