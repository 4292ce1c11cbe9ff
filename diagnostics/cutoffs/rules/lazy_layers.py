"""Lazy layers: those whose last prompt query attends to the first and the last tokens alone.

SimLayerKV calls a layer lazy whose share of attention there is above a threshold; LightTransfer takes the half of the
layers with the largest share.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_from, largest

PUBLISHED_TOKENS = 4 + 1024 + 1  # up to here a prompt has an eighth of its tokens in place of the last 1024


class _LazyFrom(Rule):
    """Smallest k from which on every layer is lazy."""

    mapping = "smallest k from which on every layer is lazy"
    blind = "layers with sliding windows, which see the last tokens alone; what the few tokens far away add"
    reads: ClassVar[tuple[str, ...]] = ("lazy_share",)

    @abstractmethod
    def lazy(self, share: np.ndarray) -> np.ndarray:
        """Return which layers are lazy, from the attention on the first and the last tokens [L]: bool [L]."""

    def cutoff(self, curves: Curves) -> int | None:
        """Return the start of the lazy layers that reach the last one, 1 at least; None if that is not lazy."""
        if not curves.complete("lazy_share"):
            return None
        found = first_from(self.lazy(curves.layers["lazy_share"]))
        return None if found is None else max(1, found)

    def remark(self, curves: Curves) -> str:
        """Say that short prompts have a scaled window."""
        return "scaled to short prompts" if curves.shortest is not None and curves.shortest <= PUBLISHED_TOKENS else ""


@dataclass(frozen=True)
class LazyLayers(_LazyFrom):
    """A layer is lazy above a share of attention."""

    min_share: float = 0.9
    name = "simlayerkv"
    title = "SimLayerKV: lazy layers"
    source = "SimLayerKV, arXiv 2410.13846"
    thresholds = "above 0.9 for Llama 3 (0.65 to 0.85 for others); 4 first and 1024 last tokens"

    def lazy(self, share: np.ndarray) -> np.ndarray:
        """Return the layers above the share."""
        return share > self.min_share


@dataclass(frozen=True)
class LaziestLayers(_LazyFrom):
    """A share of the layers is lazy: the laziest."""

    share_of_layers: float = 0.5
    name = "lighttransfer"
    title = "LightTransfer: laziest half"
    source = "LightTransfer, arXiv 2410.13846"
    thresholds = "the half of the layers that is laziest"

    def lazy(self, share: np.ndarray) -> np.ndarray:
        """Return the laziest layers."""
        return largest(share, round(self.share_of_layers * len(share)))


RULES = (LazyLayers(), LaziestLayers())
