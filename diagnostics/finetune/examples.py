"""A row to train on, and the counts of what became of the data. Nothing here loads torch: readers of results use it."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TypedDict

IGNORED = -100  # the label of a token that is no target, as everywhere in transformers


class Example(TypedDict):
    """A row to train on: ``input_ids`` and ``labels`` of the same length, -100 where there is no target."""

    id: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Counts:
    """How many conversations or prompts were kept, cut and dropped, and the tokens of those kept.

    ``cut`` counts those kept without their end: without turns that did not fit or that nothing answers, part of a
    document, or the rest of a generated answer. ``target_tokens`` have a label, ``prompt_tokens`` have none.
    """

    loaded: int = 0
    kept: int = 0
    cut: int = 0
    dropped_too_long: int = 0
    dropped_without_target: int = 0
    prompt_tokens: int = 0
    target_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of_kept(cls, example: Example, *, cut: bool) -> Counts:
        """Count one row that is kept."""
        prompt = example["labels"].count(IGNORED)
        return cls(loaded=1, kept=1, cut=int(cut), prompt_tokens=prompt, target_tokens=len(example["labels"]) - prompt)

    def said(self) -> str:
        """Return the counts as one line of text."""
        return (
            f"{self.loaded:,} loaded: {self.kept:,} kept ({self.cut:,} of them cut at the end), "
            f"{self.dropped_too_long:,} dropped as too long, {self.dropped_without_target:,} without an answer; "
            f"{self.prompt_tokens:,} prompt tokens, {self.target_tokens:,} target tokens"
        )
