"""Fine-tuning under SPEED: what a token sees in training is what it sees in inference."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.finetune.answers import with_answers
    from diagnostics.finetune.chat_tokens import encode_conversation
    from diagnostics.finetune.conversations import Conversation, read_conversations
    from diagnostics.finetune.data import collate, encode_examples
    from diagnostics.finetune.examples import Counts, Example
    from diagnostics.finetune.folder import FineTuning, load_finetuning
    from diagnostics.finetune.objectives import distillation_loss, mixed_loss, predicting, supervised_loss
    from diagnostics.finetune.plan import decode_phase
    from diagnostics.finetune.schedule import CutoffSchedule
    from diagnostics.finetune.settings import Settings
    from diagnostics.finetune.sources import Source, load_data, load_held_out
    from diagnostics.finetune.summary import compare_cutoffs
    from diagnostics.finetune.trainer import SpeedTrainer
    from diagnostics.finetune.training import finetune
    from diagnostics.finetune.visibility import Visibility, full_depth, train_under

_HOMES = {
    "answers": ("with_answers",),
    "chat_tokens": ("encode_conversation",),
    "conversations": ("Conversation", "read_conversations"),
    "data": ("collate", "encode_examples"),
    "examples": ("Counts", "Example"),
    "folder": ("FineTuning", "load_finetuning"),
    "objectives": ("distillation_loss", "mixed_loss", "predicting", "supervised_loss"),
    "plan": ("decode_phase",),
    "schedule": ("CutoffSchedule",),
    "settings": ("Settings",),
    "sources": ("Source", "load_data", "load_held_out"),
    "summary": ("compare_cutoffs",),
    "trainer": ("SpeedTrainer",),
    "training": ("finetune",),
    "visibility": ("Visibility", "full_depth", "train_under"),
}

__all__ = [
    "Conversation",
    "Counts",
    "CutoffSchedule",
    "Example",
    "FineTuning",
    "Settings",
    "Source",
    "SpeedTrainer",
    "Visibility",
    "collate",
    "compare_cutoffs",
    "decode_phase",
    "distillation_loss",
    "encode_conversation",
    "encode_examples",
    "finetune",
    "full_depth",
    "load_data",
    "load_finetuning",
    "load_held_out",
    "mixed_loss",
    "predicting",
    "read_conversations",
    "supervised_loss",
    "train_under",
    "with_answers",
]

find_on_demand(__name__, _HOMES)
