"""Fine-tuning under SPEED: what a token sees in training is what it sees in inference."""

from typing import TYPE_CHECKING

from diagnostics.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.finetune.objectives import distillation_loss, mixed_loss, predicting, supervised_loss
    from diagnostics.finetune.plan import decode_phase
    from diagnostics.finetune.visibility import Visibility, full_depth, train_under

_HOMES = {
    "objectives": ("distillation_loss", "mixed_loss", "predicting", "supervised_loss"),
    "plan": ("decode_phase",),
    "visibility": ("Visibility", "full_depth", "train_under"),
}

__all__ = [
    "Visibility",
    "decode_phase",
    "distillation_loss",
    "full_depth",
    "mixed_loss",
    "predicting",
    "supervised_loss",
    "train_under",
]

find_on_demand(__name__, _HOMES)
