"""The model's own answers at full depth, to distil from: no labelled data is needed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from diagnostics.finetune.chat_tokens import encode_conversation
from diagnostics.finetune.conversations import Conversation
from diagnostics.finetune.examples import IGNORED, Counts, Example
from diagnostics.generation.generation import end_tokens, generate
from diagnostics.models.positions import prompt_room
from diagnostics.policies.full import FullPolicy
from diagnostics.prompts.encoding import PromptTooLong, encode_prompt
from diagnostics.prompts.prompt import PromptSet
from diagnostics.support.errors import UserError
from diagnostics.support.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from diagnostics.models.loading import LoadedModel


def with_answers(
    lm: LoadedModel,
    source: Sequence[Conversation] | PromptSet,
    *,
    max_new_tokens: int = 256,
    max_length: int | None = None,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Example], Counts]:
    """Have the model answer at full depth, replacing given last answers, and count what became of the prompts.

    Parameters
    ----------
    lm
        The model.
    source
        Conversations, or prompts, whose documents are cut to fit as they are for a diagnosis.
    max_new_tokens
        Tokens of an answer at most; one that has not ended by then counts as cut.
    max_length
        Tokens of prompt and answer at most; the model's positions unless given. Prompts are dropped where
        ``max_new_tokens`` would not fit after them.
    batch_size
        Prompts at a time, of similar length.
    temperature, top_p
        As for `generate`: 0 takes the most likely token.
    seed
        Seed of the draws; the same prompts in the same batches give the same answers.
    progress
        Called as ``progress(done, total, what)`` before each batch and at the end.

    Returns
    -------
    examples, counts
        In the order of ``source``. The labels of the last answer are the generated tokens, with the end-of-text
        token if there is one; earlier answers of a conversation are targets too.

    Raises
    ------
    UserError
        If a number is out of range, or for what `encode_conversation`, `encode_prompt` and `generate` refuse.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    lengths = [length for length in (max_length, lm.anatomy.max_positions) if length is not None]
    # One more than in generation: training runs the last token of an answer too.
    limit = prompt_room(min(lengths, default=None), max_new_tokens + 1)
    if limit is not None and limit < 1:
        raise UserError(f"{max_new_tokens} new tokens leave no room for a prompt in {min(lengths)}")
    openings = (
        _encode_prompts(source, lm.tokenizer, limit)
        if isinstance(source, PromptSet)
        else [_encode_opening(conversation, lm.tokenizer, limit) for conversation in source]
    )
    fitting = [opening for opening in openings if opening is not None]
    ends = set(end_tokens(lm.model).tolist())
    answers: dict[int, list[int]] = {}
    # The longest first: too little memory shows at once.
    order = sorted(range(len(fitting)), key=lambda index: -len(fitting[index][0]["input_ids"]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [fitting[index][0] for index in indices]
        if progress:
            progress(start, len(order), batch[0]["id"])
        draw_seed = Random(f"{seed}/{[example['id'] for example in batch]}").getrandbits(63)
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        for index, row in zip(indices, _generate(lm, batch, draw_seed, **settings), strict=True):
            # A row is padded after its end.
            stop = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
            answers[index] = row[:stop]
    if progress:
        progress(len(order), len(order), "")
    examples = []
    too_long = len(openings) - len(fitting)
    counts = Counts(loaded=too_long, dropped_too_long=too_long)
    for index, (opening, document_cut) in enumerate(fitting):
        answer = answers[index]
        ids, labels = opening["input_ids"] + answer, opening["labels"] + answer
        examples.append(Example(id=opening["id"], input_ids=ids, labels=labels))
        counts += Counts.of_kept(examples[-1], cut=document_cut or answer[-1] not in ends)
    return examples, counts


def _generate(lm: LoadedModel, batch: Sequence[Example], seed: int, **settings: Any) -> list[list[int]]:
    rows = [torch.tensor(example["input_ids"], device=lm.device) for example in batch]
    return generate(
        lm,
        pad_sequence(rows, batch_first=True, padding_side="left"),
        pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
        policy=FullPolicy(),
        generator=torch.Generator(lm.device).manual_seed(seed),
        **settings,
    ).token_ids.tolist()


def _encode_opening(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Example, bool] | None:
    """Encode the messages to answer, and False, since no document was cut; None if they are too long."""
    messages = conversation.messages
    asked = messages if messages[-1]["role"] == "user" else messages[:-1]
    ids, labels = encode_conversation(Conversation(conversation.id, asked), tokenizer)
    if limit is not None and len(ids) > limit:
        return None
    return Example(id=conversation.id, input_ids=ids, labels=labels), False


def _encode_prompts(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[tuple[Example, bool] | None]:
    """Encode prompts, each with whether its document was cut; None for those that are too long."""
    openings: list[tuple[Example, bool] | None] = []
    for prompt in prompts:
        try:
            encoded = encode_prompt(prompt, tokenizer, limit=limit, context_length=prompts.context_length)
        except PromptTooLong:
            openings.append(None)
            continue
        ids = list(encoded.token_ids)
        # Generated documents are longer than needed, and cutting them is no loss.
        cut = prompts.seed is None and prompt.document not in encoded.text
        openings.append((Example(id=prompt.id, input_ids=ids, labels=[IGNORED] * len(ids)), cut))
    return openings
