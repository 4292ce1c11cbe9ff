"""Encodes conversations as rows to train on, counts what is kept, cut and dropped, and makes batches of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diagnostics.finetune.chat_tokens import encode_conversation
from diagnostics.finetune.conversations import Conversation
from diagnostics.finetune.examples import IGNORED, Counts, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_examples(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], Counts]:
    """Encode conversations to at most ``max_length`` tokens each, and count what became of them.

    A conversation that is too long is cut after its last answer that fits: half an answer would teach the model to stop
    anywhere, and the start holds the anchor. Turns after the last answer are left out. Raises UserError for what
    `encode_conversation` refuses.
    """
    examples = []
    counts = Counts()
    for conversation in conversations:
        ids, labels = encode_conversation(conversation, tokenizer)
        ends = [n for n, (one, after) in enumerate(pairwise([*labels, IGNORED]), 1) if after == IGNORED != one]
        stop = max((end for end in ends if end <= max_length), default=0)
        if stop:
            example = Example(id=conversation.id, input_ids=ids[:stop], labels=labels[:stop])
            examples.append(example)
            counts += Counts.of_kept(example, cut=stop < len(ids))
        else:
            counts += Counts(loaded=1, dropped_too_long=int(bool(ends)), dropped_without_target=int(not ends))
    return examples, counts


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch, padded on the right: ``input_ids``, ``attention_mask`` and ``labels``, int64 [batch, tokens].

    ``functools.partial(collate, pad_token_id=...)`` is a ``data_collator`` of the transformers Trainer.
    """
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
