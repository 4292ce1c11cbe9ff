"""The token ids to generate from: of a text that a user typed, or as libraries return them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.encoding import encode_messages, encode_prompt
from diagnostics.prompts.prompt import Prompt, escaped
from diagnostics.support.errors import UserError


def encode_input(
    lm: LoadedModel,
    text: str | Sequence[Mapping[str, str]],
    *,
    system: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 0,
) -> Tensor:
    """Return the token ids of a text or a conversation to generate from, int64 [1, tokens], on the model's device.

    ``chat`` makes a text a user message of the chat template, by default if there is one; a conversation is a list of
    ``{"role": ..., "content": ...}``. Raises UserError if a needed chat template is missing, or if the tokens and the
    new ones exceed the model's positions.
    """
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    if not isinstance(text, str):
        chat, text = True, [dict(message) for message in text]
    if chat and not templated:
        raise UserError(f"model {lm.name!r} has no chat template: use `chat=False`")
    if isinstance(text, str) and (chat is False or not templated):
        if system is not None:
            raise UserError("`system` needs a chat template")
        tokens = encode_prompt(Prompt(id="prompt", text=escaped(text)), lm.tokenizer).token_ids
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        asked = [{"role": "user", "content": text}] if isinstance(text, str) else text
        tokens = encode_messages([*messages, *asked], lm.tokenizer)
    room = lm.anatomy.room(max_new_tokens)
    if room is not None and len(tokens) > room:
        raise UserError(
            f"the prompt has {len(tokens)} tokens; with {max_new_tokens} new ones they exceed the "
            f"{lm.anatomy.max_positions} positions of {lm.name!r}"
        )
    return torch.tensor([tokens], device=lm.device)


def token_input(
    model: Any, given: Any, attention_mask: Tensor | None, *, chat: bool | None, max_new_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Return token ids [batch, tokens] and the attention mask of what was given to generate from.

    That is a text or a conversation, as for `encode_input`; token ids; or what a tokenizer returns, with its mask.
    Raises UserError for anything else.
    """
    is_conversation = isinstance(given, list | tuple) and all(isinstance(one, Mapping) for one in given)
    if isinstance(given, str) or (is_conversation and given):
        if not isinstance(model, LoadedModel):
            raise UserError("a text needs the model's tokenizer: give load_model(...) or LoadedModel.wrap(...)")
        return encode_input(model, given, chat=chat, max_new_tokens=max_new_tokens), None
    if isinstance(given, Mapping):
        given, attention_mask = given.get("input_ids"), given.get("attention_mask", attention_mask)
    return token_ids(given), attention_mask


def token_ids(given: Any) -> Tensor:
    """Return token ids if they are a tensor of integers [batch, tokens]; raise UserError for anything else."""
    if isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point():
        return given
    kind = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    raise UserError(
        f"token ids are {kind}: give a tensor of integers [batch, tokens], as from encode_input(lm, text) or "
        "tokenizer(text, return_tensors='pt')['input_ids']"
    )
