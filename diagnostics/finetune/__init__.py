"""Fine-tuning under SPEED: what a token sees in training is what it sees in inference."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.finetune.chat_tokens import encode_conversation
    from diagnostics.finetune.conversations import Conversation, read_conversations
    from diagnostics.finetune.cutoff_comparison import compare_cutoffs
    from diagnostics.finetune.example_encoding import collate, encode_examples
    from diagnostics.finetune.examples import Counts, Example
    from diagnostics.finetune.finetuning_folder import FineTuning, load_finetuning
    from diagnostics.finetune.objectives import distillation_loss, mixed_loss, predicting, supervised_loss
    from diagnostics.finetune.own_answers import with_answers
    from diagnostics.finetune.plan import decode_phase
    from diagnostics.finetune.schedule import CutoffSchedule
    from diagnostics.finetune.settings import Settings
    from diagnostics.finetune.sources import Source, load_data, load_held_out
    from diagnostics.finetune.trainer import SpeedTrainer
    from diagnostics.finetune.training import finetune
    from diagnostics.finetune.visibility import Visibility, full_depth, train_under

_HOMES = {
    "own_answers": ("with_answers",),
    "chat_tokens": ("encode_conversation",),
    "conversations": ("Conversation", "read_conversations"),
    "example_encoding": ("collate", "encode_examples"),
    "examples": ("Counts", "Example"),
    "finetuning_folder": ("FineTuning", "load_finetuning"),
    "objectives": ("distillation_loss", "mixed_loss", "predicting", "supervised_loss"),
    "plan": ("decode_phase",),
    "schedule": ("CutoffSchedule",),
    "settings": ("Settings",),
    "sources": ("Source", "load_data", "load_held_out"),
    "cutoff_comparison": ("compare_cutoffs",),
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
