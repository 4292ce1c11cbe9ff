"""Two generated texts token by token: which tokens of each the other lacks."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from diagnostics.prompts.token_text import token_texts

Marked = list[tuple[str, bool]]


def differing(left: Sequence[int], right: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Return for every token of two sequences whether it is outside their longest matching blocks."""
    marks = [True] * len(left), [True] * len(right)
    for block in SequenceMatcher(a=left, b=right, autojunk=False).get_matching_blocks():
        for tokens, start in zip(marks, (block.a, block.b), strict=True):
            tokens[start : start + block.size] = [False] * block.size
    return marks


def same_start(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def marked_text(tokenizer: Any, ids: Sequence[int], differs: Sequence[bool]) -> Marked:
    """Return the text of tokens in pieces, each with its mark; a piece is a token, or the tokens of one character."""
    pieces: Marked = []
    waiting = False
    for text, differ in zip(token_texts(tokenizer, ids, skip_special_tokens=True), differs, strict=True):
        waiting |= differ
        if text:
            pieces.append((text, waiting))
            waiting = False
    return pieces
