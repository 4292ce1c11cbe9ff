"""Prompts of the study: the built-in ones, and real documentation with its own continuation as the reference."""

from typing import Any

from diagnostics import Prompt, load_prompts
from diagnostics.prompts.prompt import PromptSet, escaped

KINDS = ("builtin", "documentation")
# Pages of Python's own documentation, long enough for 4,096 tokens of every tokenizer.
PAGES = ("specialnames", "compound", "types", "formatstrings", "string-methods", "typesseq")


def prompts(kind: str, tokenizer: Any, n_tokens: int, n_prompts: int, decode_tokens: int) -> PromptSet:
    """Return up to ``n_prompts`` prompts of ``n_tokens`` tokens of one of `KINDS`."""
    if kind == "builtin":
        return load_prompts("builtin", context_length=n_tokens, max_prompts=n_prompts)
    return PromptSet(tuple(_pages(tokenizer, n_tokens, n_prompts, decode_tokens)), kind)


def _pages(tokenizer: Any, n_tokens: int, n_prompts: int, decode_tokens: int) -> list[Prompt]:
    from pydoc_data.topics import topics  # part of Python, so that every reader has the same kind of text

    found = []
    for page in PAGES[:n_prompts]:
        ids = tokenizer(topics[page], add_special_tokens=False)["input_ids"]
        text, following = tokenizer.decode(ids[:n_tokens]), tokenizer.decode(ids[n_tokens : n_tokens + decode_tokens])
        found.append(Prompt(page, text=escaped(text), reference=following, category="documentation"))
    return found
