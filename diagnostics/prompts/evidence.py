"""Finds a prompt's evidence among its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from diagnostics.prompts.chat_template import Span
from diagnostics.prompts.prompt import Prompt
from diagnostics.prompts.tokenized import Tokenized


def evidence_spans(prompt: Prompt, tokens: Tokenized, notes: list[str]) -> tuple[Span, ...]:
    """Return the token spans of the evidence, merged where they touch; add a note for evidence that is not marked."""
    if not prompt.evidence:
        return ()
    if tokens.offsets is None:
        notes.append("evidence not used: the tokenizer cannot tell the characters of a token")
        return ()
    spans = [_occurrences(tokens, span) if isinstance(span, str) else [span] for span in prompt.evidence]
    if lost := sum(not occurrences for occurrences in spans):
        notes.append(f"{lost} of {len(spans)} evidence strings are not in the prompt as encoded")
    marked = bytearray(len(tokens.text))
    for start, stop in {span for occurrences in spans for span in occurrences}:
        marked[start:stop] = b"\1" * (stop - start)
    return tuple(_runs([marked.find(1, *offset) >= 0 for offset in tokens.offsets[: len(tokens.ids)]]))


def _occurrences(tokens: Tokenized, part: str) -> list[Span]:
    """Return the spans of a string in the author's text, including overlapping ones."""
    spans = []
    for start, stop in tokens.contents:
        position = tokens.text.find(part, start, stop)
        while position >= 0:
            spans.append((position, position + len(part)))
            position = tokens.text.find(part, position + 1, stop)
    return spans


def _runs(flags: Sequence[bool]) -> list[Span]:
    """Return the half-open ranges where ``flags`` are true."""
    runs: list[Span] = []
    for index, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif flag:
            runs.append((index, index + 1))
    return runs
