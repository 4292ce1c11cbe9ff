"""Texts that keep their relative depth in a document after it is cut: needles, chains, functions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diagnostics.support.fields import check_text, wrong

# Ends after which an insert may go, best first. The white space of the end is then on both sides of the insert.
# Indented text is avoided if any other end exists: it may be code.
_BLOCK_ENDS = re.compile(r"\n\n+(?=\S)")
_SENTENCE_ENDS = re.compile(r"""\n\n+(?=\S)|(?:(?<=[.!?])|(?<=[.!?]["')]))(?: +|\n)(?=[A-Z])""")
_LINE_ENDS = re.compile(r"\n(?=\S)")
_WORD_ENDS = re.compile(r"\s+")
_REACH = 2000  # characters to search for an end, in both directions; paragraphs may be farther apart


@dataclass(frozen=True)
class Insert:
    """A text at a relative depth of the document, wherever the document is cut.

    ``depth`` runs from 0 (before the document) to 1 (after it). The text goes to the nearest end of a sentence or
    paragraph; a text of several lines goes only between paragraphs that are not indented.
    """

    depth: float
    text: str

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 1:
            raise wrong("inserts", f"depth {self.depth} is not between 0 and 1")
        check_text("inserts", self.text)


def place_inserts(document: str, inserts: Sequence[Insert]) -> str:
    """Return the document with every insert near its depth; without a document, the inserts in order of depth."""
    ordered = sorted(inserts, key=lambda insert: insert.depth)
    if not document:
        return "\n\n".join(insert.text for insert in ordered)
    pieces, copied = [], 0
    for insert in ordered:
        position, before, after = _insertion_point(document, insert)
        # Two inserts that search for different kinds of ends may find them in reverse: keep the order of depth.
        position = max(position, copied)
        pieces += [document[copied:position], before, insert.text, after]
        copied = position
    return "".join([*pieces, document[copied:]])


def _insertion_point(document: str, insert: Insert) -> tuple[int, str, str]:
    """Return the position of an insert, and the separators from the text before and after it."""
    target = round(insert.depth * len(document))
    outside = [(0, "", "\n\n"), (len(document), "\n\n", "")]
    if "\n" in insert.text:
        reach = _REACH
        while not (ends := _near(_BLOCK_ENDS, document, target, reach)) and reach < len(document):
            reach *= 2
    else:
        kinds = (_SENTENCE_ENDS, _LINE_ENDS, _WORD_ENDS)
        ends = next((near for kind in kinds if (near := _near(kind, document, target, _REACH))), [])
        if not ends:
            return target, " ", " "
    return min(outside + ends, key=lambda end: abs(end[0] - target))


def _near(ends: re.Pattern[str], document: str, target: int, reach: int) -> list[tuple[int, str, str]]:
    """Return the ends within ``reach`` of a target, each with its white space."""
    matches = ends.finditer(document, max(target - reach, 0), min(target + reach, len(document)))
    return [(match.start(), match[0], "") for match in matches]
