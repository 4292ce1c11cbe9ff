"""Encodes a text that a user typed as the token ids to generate from."""

import torch
from torch import Tensor

from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.encoding import encode_messages, encode_prompt
from diagnostics.prompts.prompt import Prompt, escaped
from diagnostics.support.errors import UserError


def encode_input(
    lm: LoadedModel, text: str, *, system: str | None = None, chat: bool | None = None, max_new_tokens: int = 0
) -> Tensor:
    """Return the token ids of a text to generate from, int64 [1, tokens], on the model's device.

    ``chat`` makes it a user message of the chat template, by default if there is one. Raises UserError if a needed chat
    template is missing, or if the tokens and the new ones exceed the model's positions.
    """
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    if chat and not templated:
        raise UserError(f"model {lm.name!r} has no chat template: use `chat=False`")
    if chat is False or not templated:
        if system is not None:
            raise UserError("`system` needs a chat template")
        tokens = encode_prompt(Prompt(id="prompt", text=escaped(text)), lm.tokenizer).token_ids
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        tokens = encode_messages([*messages, {"role": "user", "content": text}], lm.tokenizer)
    room = lm.anatomy.room(max_new_tokens)
    if room is not None and len(tokens) > room:
        raise UserError(
            f"the prompt has {len(tokens)} tokens; with {max_new_tokens} new ones they exceed the "
            f"{lm.anatomy.max_positions} positions of {lm.name!r}"
        )
    return torch.tensor([tokens], device=lm.device)
