"""Fine-tuning under SPEED: what a token sees in training is what it sees in inference."""

from typing import TYPE_CHECKING

from diagnostics.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.finetune.answers import with_answers
    from diagnostics.finetune.chat_tokens import encode_conversation
    from diagnostics.finetune.conversations import Conversation, read_conversations
    from diagnostics.finetune.data import Counts, Example, collate, encode_examples
    from diagnostics.finetune.objectives import distillation_loss, mixed_loss, predicting, supervised_loss
    from diagnostics.finetune.plan import decode_phase
    from diagnostics.finetune.visibility import Visibility, full_depth, train_under

_HOMES = {
    "answers": ("with_answers",),
    "chat_tokens": ("encode_conversation",),
    "conversations": ("Conversation", "read_conversations"),
    "data": ("Counts", "Example", "collate", "encode_examples"),
    "objectives": ("distillation_loss", "mixed_loss", "predicting", "supervised_loss"),
    "plan": ("decode_phase",),
    "visibility": ("Visibility", "full_depth", "train_under"),
}

__all__ = [
    "Conversation",
    "Counts",
    "Example",
    "Visibility",
    "collate",
    "decode_phase",
    "distillation_loss",
    "encode_conversation",
    "encode_examples",
    "full_depth",
    "mixed_loss",
    "predicting",
    "read_conversations",
    "supervised_loss",
    "train_under",
    "with_answers",
]

find_on_demand(__name__, _HOMES)
