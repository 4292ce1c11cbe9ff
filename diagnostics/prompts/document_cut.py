"""How much of a document fits: the points where it may be cut, and the search for the last one that fits."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from diagnostics.prompts.prompt import Prompt
from diagnostics.prompts.tokenized import Tokenized

# After 40 characters without white space (Chinese, an address, a table) a cut is possible anywhere.
_CUTS = {
    "word": re.compile(r"\s+|(?<=\S{40})"),
    "line": re.compile(r"\n+"),
    "paragraph": re.compile(r"\n\s*\n"),
}
_LONGEST_TOKEN = 128  # characters; few tokenizers have longer tokens


def cut_points(prompt: Prompt) -> list[int]:
    """Return the sizes, in characters, to which the document may be cut: from 0 to its full size."""
    ends = (match.start() for match in _CUTS[prompt.cut].finditer(prompt.document))
    return sorted({0, *ends, len(prompt.document)})


def longest_fit(sizes: Sequence[int], encode: Callable[[int], Tokenized], allowed: int | None) -> tuple[int, Tokenized]:
    """Return about the longest of ``sizes`` that encodes to at most ``allowed`` tokens; the first if none does.

    Tokens are nearly proportional to characters, so interpolation usually needs few encodings; every third step is a
    bisection, which bounds their number in other cases.
    """
    if allowed is None:
        return sizes[-1], encode(sizes[-1])
    low, high = 0, len(sizes)  # sizes[low] fits; sizes[high] does not, or does not exist
    best = encode(sizes[0])
    rate, step = 0.25, 0  # tokens per character
    slack = max(2, allowed // 200)
    while high - low > 1 and len(best.ids) <= allowed - slack:
        step += 1
        estimate = sizes[low] + (allowed - len(best.ids) - slack / 2) / rate
        middle = (low + high) // 2 if step % 3 == 0 else bisect_right(sizes, estimate) - 1
        middle = min(max(middle, low + 1), high - 1)
        tokens = encode(sizes[middle])
        rate = max((len(tokens.ids) - len(best.ids)) / (sizes[middle] - sizes[low]), 1e-3)
        if len(tokens.ids) <= allowed:
            low, best = middle, tokens
        else:
            high = middle
    rest = sizes[-1] - sizes[low]
    if high == len(sizes) and 0 < rest <= _LONGEST_TOKEN * (allowed - len(best.ids)):
        # The tolerance must not cut a document that fits completely.
        tokens = encode(sizes[-1])
        if len(tokens.ids) <= allowed:
            return sizes[-1], tokens
    return sizes[low], best
