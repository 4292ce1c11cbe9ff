"""What tells one input of a model from another: digests of encoded prompts, of rows of tokens, and of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from diagnostics.prompts.encoding import EncodedPrompt
from diagnostics.support.digests import json_digest


def inputs_digest(encoded: Iterable[EncodedPrompt]) -> str:
    """SHA-256 (hex) of what a model reads: the tokens of each prompt and its reference, and where evidence is.

    Tokens decide, so another tokenizer, another chat template or a date in one makes another digest.
    """
    digest = hashlib.sha256()
    for prompt in encoded:
        digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, prompt.reference_ids, prompt.evidence]).encode())
    return digest.hexdigest()


def tokens_digest(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) of rows of token ids, or of anything else that JSON can hold."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of how a tokenizer reads texts and conversations, as of now: a template may hold the date."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        vocabulary = json.loads(fast.to_str())
        for call in ("truncation", "padding"):  # how it was last called
            vocabulary.pop(call, None)
    else:
        vocabulary = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    template = getattr(tokenizer, "chat_template", None)
    rendered = None
    if template:
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        try:
            rendered = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like; those that raise are told apart by their text
            rendered = type(error).__name__
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return json_digest([vocabulary, template, rendered, special])
