"""Digests that identify a model's input: of encoded prompts, of rows of tokens, and of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from diagnostics.prompts.encoding import EncodedPrompt
from diagnostics.support.digests import json_digest


def inputs_digest(encoded: Iterable[EncodedPrompt]) -> str:
    """SHA-256 (hex) of a model's input: the tokens of each prompt and its reference, and the evidence spans.

    The digest depends on tokens, so another tokenizer, another chat template or a date in one changes it.
    """
    digest = hashlib.sha256()
    for prompt in encoded:
        digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, prompt.reference_ids, prompt.evidence]).encode())
    return digest.hexdigest()


def tokens_digest(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) of rows of token ids, or of any other JSON values."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of how a tokenizer encodes texts and conversations at present: a template may insert the date."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        vocabulary = json.loads(fast.to_str())
        for setting in ("truncation", "padding"):  # state of the latest call
            vocabulary.pop(setting, None)
    else:
        vocabulary = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    template = getattr(tokenizer, "chat_template", None)
    rendered = None
    if template:
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        try:
            rendered = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates may raise anything; then only their text distinguishes them
            rendered = type(error).__name__
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return json_digest([vocabulary, template, rendered, special])
