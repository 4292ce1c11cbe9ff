"""What a rule is: it names a cutoff from the layers alone, without the measured loss.

To add a rule, add one file to this package with a subclass of `Rule` and its instances in ``RULES``, or name an
instance in an entry point of another distribution: `diagnostics.cutoffs.rules` finds both. What a rule reads is
measured by a probe; a probe that serves rules alone sets ``optional``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Curves:
    """What rules read of a run: means over its prompts.

    Attributes
    ----------
    layers
        Columns of the table ``layers``, [L] each; NaN where nothing could be measured.
    heads
        Columns of the table ``heads``, [L, heads] each.
    n_layers
        Number of layers L.
    max_kl
        The goal that a cutoff should meet, in nats per token, for rules whose threshold follows it.
    shortest
        Tokens of the shortest prompt, for rules that are defined for longer ones; None if unknown.
    """

    layers: Mapping[str, np.ndarray]
    heads: Mapping[str, np.ndarray]
    n_layers: int
    max_kl: float
    shortest: int | None = None

    def complete(self, column: str) -> bool:
        """Whether a column of ``layers`` is there and a number in every layer."""
        return column in self.layers and bool(np.isfinite(self.layers[column]).all())


class Rule(ABC):
    """Base class of rules; its instances are immutable, and their fields are thresholds.

    Attributes
    ----------
    name
        Unique among rules, as in ``--rules asl``.
    title
        Name in tables and figures.
    reads, reads_heads
        Columns of ``layers`` and of ``heads`` that the rule reads.
    source
        Paper or code that published the rule.
    thresholds
        The published thresholds, in words.
    mapping
        How the curve becomes a cutoff, in words; ``ours`` says that this step is not of the source.
    blind
        What the rule cannot judge.
    """

    name: str
    title: str
    source: str
    thresholds: str
    mapping: str
    blind: str
    ours: bool = True
    reads: ClassVar[tuple[str, ...]] = ()
    reads_heads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def cutoff(self, curves: Curves) -> int | None:
        """Return the number of layers that prompts should run through, 1..L; None where the rule finds none."""

    def remark(self, curves: Curves) -> str:
        """Return what a reader must know of this cutoff, such as thresholds that were scaled; else ""."""
        return ""

    def why_none(self, curves: Curves) -> str:
        """Say why a rule that has its columns finds no cutoff: numbers are missing, or its condition never holds."""
        for columns, names in ((curves.layers, self.reads), (curves.heads, self.reads_heads)):
            for name in names:
                missing = int(np.isnan(columns[name].reshape(curves.n_layers, -1)).any(axis=1).sum())
                if missing:
                    return f"finds none: {name} has no value in {missing} of {curves.n_layers} layers"
        return "finds none"

    def curve(self, curves: Curves) -> np.ndarray | None:
        """Return what the rule looks at, one number per layer [L]; None for a rule that looks at nothing."""
        return curves.layers[self.reads[0]] if self.reads and self.reads[0] in curves.layers else None


def first_from(met: np.ndarray, upto: int | None = None) -> int | None:
    """Return the first index from which on ``met`` [n] holds, up to ``upto`` (default n); None if not at its end."""
    met = np.asarray(met, dtype=bool)[:upto]
    if not len(met) or not met[-1]:
        return None
    return int(len(met) - np.argmin(met[::-1])) if not met.all() else 0


def first_where(met: np.ndarray) -> int | None:
    """Return the first index at which ``met`` [n] holds; None if nowhere."""
    found = np.flatnonzero(np.asarray(met, dtype=bool))
    return int(found[0]) if len(found) else None


def first_tail_within(values: np.ndarray, limit: float) -> int | None:
    """Return the smallest k in 1..L at which the sum of ``values[k:]`` is at most ``limit``, from values >= 0 [L].

    None where a value that decides is not a number. Layer 0 is below every cutoff, and its value never decides.
    """
    k = len(values)
    tail = 0.0
    while k > 1:
        tail += float(values[k - 1])
        if not math.isfinite(tail):
            return None
        if tail > limit:
            break
        k -= 1
    return k


def first_tail_share(values: np.ndarray, share: float) -> int | None:
    """Return the smallest k in 1..L with at most a share of the sum of ``values`` [L], all >= 0, from k on.

    None where a value is not a number, or all are 0.
    """
    total = float(np.sum(values))
    return first_tail_within(values, share * total) if 0 < total < math.inf else None


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return which ``count`` of the values [n] are the largest, the lower index first of equal ones: bool [n]."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen
