"""How much of a document fits: the places where it may be cut, and the search for the last that fits."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from diagnostics.prompts.prompt import Prompt
from diagnostics.prompts.tokenized import Tokenized

# A run of 40 characters without white space (Chinese, an address, a table) is cut anywhere from there on.
_CUTS = {
    "word": re.compile(r"\s+|(?<=\S{40})"),
    "line": re.compile(r"\n+"),
    "paragraph": re.compile(r"\n\s*\n"),
}
_LONGEST_TOKEN = 128  # characters; few tokenizers have one that is longer


def cut_points(prompt: Prompt) -> list[int]:
    """The sizes, in characters, that the document may be cut to: from 0 to all of it."""
    ends = (match.start() for match in _CUTS[prompt.cut].finditer(prompt.document))
    return sorted({0, *ends, len(prompt.document)})


def longest_fit(sizes: Sequence[int], encode: Callable[[int], Tokenized], allowed: int | None) -> tuple[int, Tokenized]:
    """The longest of ``sizes`` that encodes to ``allowed`` tokens, or nearly so; the first, if none does.

    Tokens are nearly proportional to characters, so interpolation needs a few encodings; every third
    step is a bisection, which bounds their number where it does not.
    """
    if allowed is None:
        return sizes[-1], encode(sizes[-1])
    low, high = 0, len(sizes)  # sizes[low] fits; sizes[high] does not, or does not exist
    best = encode(sizes[0])
    rate, step = 0.25, 0  # tokens per character
    slack = max(2, allowed // 200)
    while high - low > 1 and len(best.ids) <= allowed - slack:
        step += 1
        wanted = sizes[low] + (allowed - len(best.ids) - slack / 2) / rate
        middle = (low + high) // 2 if step % 3 == 0 else bisect_right(sizes, wanted) - 1
        middle = min(max(middle, low + 1), high - 1)
        tokens = encode(sizes[middle])
        rate = max((len(tokens.ids) - len(best.ids)) / (sizes[middle] - sizes[low]), 1e-3)
        if len(tokens.ids) <= allowed:
            low, best = middle, tokens
        else:
            high = middle
    rest = sizes[-1] - sizes[low]
    if high == len(sizes) and 0 < rest <= _LONGEST_TOKEN * (allowed - len(best.ids)):
        # The tolerance must not cut a document that fits whole.
        tokens = encode(sizes[-1])
        if len(tokens.ids) <= allowed:
            return sizes[-1], tokens
    return sizes[low], best
