"""Leave-one-out: what is lost if decode rows do not see the prompt in one layer alone."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_tail_within, largest

BLIND = "layers that stand in for each other: what one of them loses, another makes up for"


@dataclass(frozen=True)
class LastSensitive(Rule):
    """All layers up to the last one whose loss is above an even share of the goal."""

    name = "leave-one-out"
    title = "Leave-one-out: last sensitive layer"
    source = "DepthKV, arXiv 2604.24647 (there by a permutation test)"
    thresholds = "loss of one layer above max_kl / L, which is ours"
    mapping = "k = 1 + the last layer whose loss is above the share; 1 if none is"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("leave_one_out_kl",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the last sensitive one."""
        if not curves.complete("leave_one_out_kl"):
            return None
        found = np.flatnonzero(curves.layers["leave_one_out_kl"] > curves.max_kl / curves.n_layers)
        return int(found[-1]) + 1 if len(found) else 1


@dataclass(frozen=True)
class SummedLoss(Rule):
    """Smallest k with the summed losses of the layers from k on within the goal."""

    name = "leave-one-out-sum"
    title = "Leave-one-out: summed loss above"
    source = "this project, after leave-one-out losses of others"
    thresholds = "the goal: nothing is fitted"
    mapping = "smallest k with the sum of the losses over the layers from k on at most max_kl"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("leave_one_out_kl",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the smallest cutoff above which the losses add up to at most the goal."""
        losses = curves.layers.get("leave_one_out_kl")
        return None if losses is None else first_tail_within(losses, curves.max_kl)


@dataclass(frozen=True)
class KeptLayers(Rule):
    """All layers up to the last one of the quarter that must see most."""

    share_of_layers: float = 0.25
    name = "leave-one-out-top"
    title = "Leave-one-out: most sensitive quarter"
    source = "arXiv 2606.27791 (there a sliding window stands for not seeing)"
    thresholds = "a quarter of the layers keeps full attention"
    mapping = "k = 1 + the last layer of the quarter with the largest rise of the NLL"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("leave_one_out_nll",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the last one of the quarter."""
        if not curves.complete("leave_one_out_nll"):
            return None
        count = max(1, round(self.share_of_layers * curves.n_layers))
        return int(np.flatnonzero(largest(curves.layers["leave_one_out_nll"], count))[-1]) + 1


RULES = (LastSensitive(), SummedLoss(), KeptLayers())
