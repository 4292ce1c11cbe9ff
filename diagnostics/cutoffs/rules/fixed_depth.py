"""Cutoffs at a fixed share of the depth: what papers chose for their own models, without looking at the layers."""

from dataclasses import dataclass

from diagnostics.cutoffs.rules.rule import Curves, Rule


@dataclass(frozen=True)
class FixedDepth(Rule):
    """The number of layers nearest to a share of the depth; of two that are as near, the even one."""

    name: str
    title: str
    source: str
    thresholds: str
    share: float
    ours: bool = False
    mapping = "the share of the layers, rounded"
    blind = "everything: it is the same for every model and every text"

    def cutoff(self, curves: Curves) -> int:
        """Return the share of the layers, 1 at least."""
        return max(1, round(self.share * curves.n_layers))


RULES = (
    FixedDepth("speed-depth", "SPEED's depth", "SPEED, arXiv 2605.06105", "24 of 32 layers", 0.75),
    FixedDepth("pop-depth", "POP's depth", "POP, arXiv 2602.03295", "the last third of the layers is skipped", 2 / 3),
    FixedDepth("fastkv-depth", "FastKV's depth", "FastKV, arXiv 2502.01068", "half of the layers", 0.5),
    FixedDepth("swiftkv-depth", "SwiftKV's depth", "SwiftKV, arXiv 2410.03960", "half of the layers", 0.5),
    FixedDepth("gemfilter-depth", "GemFilter's depth", "GemFilter, arXiv 2409.17422", "layer 13 of 32", 14 / 32),
    FixedDepth("dash-depth", "DASH's depth", "DASH, arXiv 2604.18103", "0.4 of the layers", 0.4),
)
