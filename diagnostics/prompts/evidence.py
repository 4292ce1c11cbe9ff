"""Where a prompt's evidence is among its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from diagnostics.prompts.chat_template import Span
from diagnostics.prompts.prompt import Prompt
from diagnostics.prompts.tokenized import Tokenized


def evidence_spans(prompt: Prompt, tokens: Tokenized, notes: list[str]) -> tuple[Span, ...]:
    """Return the token spans of the evidence, merged where they touch; add to ``notes`` what is not marked."""
    if not prompt.evidence:
        return ()
    if tokens.offsets is None:
        notes.append("evidence not used: the tokenizer cannot tell the characters of a token")
        return ()
    found = [_occurrences(tokens, span) if isinstance(span, str) else [span] for span in prompt.evidence]
    if lost := sum(not places for places in found):
        notes.append(f"{lost} of {len(found)} evidence strings are not in the prompt as encoded")
    marked = bytearray(len(tokens.text))
    for start, stop in {place for places in found for place in places}:
        marked[start:stop] = b"\1" * (stop - start)
    return tuple(_runs([marked.find(1, *offset) >= 0 for offset in tokens.offsets[: len(tokens.ids)]]))


def _occurrences(tokens: Tokenized, part: str) -> list[Span]:
    """Where a string stands in what the author wrote, overlapping ones included."""
    places = []
    for start, stop in tokens.contents:
        at = tokens.text.find(part, start, stop)
        while at >= 0:
            places.append((at, at + len(part)))
            at = tokens.text.find(part, at + 1, stop)
    return places


def _runs(flags: Sequence[bool]) -> list[Span]:
    """The half-open ranges where ``flags`` are true."""
    runs: list[Span] = []
    for index, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif flag:
            runs.append((index, index + 1))
    return runs
