"""Locates the layers that select from the prompt, and the layers in which the prompt no longer changes.

Selection. A layer selects from the prompt if different queries attend to different prompt tokens (*selectivity*) and if
what they read there is a large part of what the layer writes (*contribution* relative to the update). The product is
the layer's *uptake*:

    uptake_l = selectivity_l * prompt_contribution_l / update_decode_l

Attention mass alone is no evidence: sinks on common tokens have mass without selectivity, and late layers have mass
without contribution. The cutoff by selection is the smallest k above which little uptake is left: the sum over the
layers from k on is at most ``max_uptake_above`` (`diagnostics.cutoffs.rules.uptake`).

The selection region ends below that cutoff, at layer k - 1. It begins where most of the uptake lies: selection layers
are those below k whose uptake reaches ``uptake_share`` of the largest; selection layers with at most ``max_gap`` other
layers between them form one interval, intervals shorter than ``min_layers`` are dropped, and the region begins with the
interval that has the largest total uptake. If no uptake reaches ``min_uptake``, or if the uptake of all layers together
is within ``max_uptake_above``, there is none.

Stabilization. From layer s on the prompt is stable if no later layer changes the input of the next ones: centred drift
is at most ``max_drift`` (cosine 0.9), and the salient tokens remain the same, with an overlap of at least
``min_overlap``. The last layer's own drift does not count: no key or value is computed from its output. This describes
the prompt and says nothing of the cutoff: no threshold on drift or overlap foretold the measured loss on three models.

Both regions are computed from the mean curves over prompts; a bootstrap over prompts gives the range of their ends.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diagnostics.cutoffs.bounds import MIN_PROMPTS, resample_counts
from diagnostics.cutoffs.rules.rule import first_tail_within
from diagnostics.cutoffs.rules.uptake import uptake_limit
from diagnostics.runs.run import Run
from diagnostics.support.defaults import MAX_KL
from diagnostics.support.errors import UserError
from diagnostics.support.finite import finite_mean, weighted_mean

N_RESAMPLES = 1000


@dataclass(frozen=True)
class RegionRules:
    """Thresholds of both regions; see the module's docstring.

    ``max_uptake_above`` None follows the goal: see `diagnostics.cutoffs.rules.uptake.uptake_limit`.
    """

    max_uptake_above: float | None = None
    uptake_share: float = 0.4
    min_uptake: float = 0.02
    max_gap: int = 2
    max_drift: float = 0.1
    min_overlap: float = 0.5
    min_layers: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            # "not ... <=" so that NaN is refused as well
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"region rule {name} is {value}: give 0 or more")
        if not 0 < self.uptake_share <= 1:
            raise UserError(f"region rule uptake_share is {self.uptake_share}: give a share above 0, 1 at most")


@dataclass(frozen=True)
class Region:
    """An inclusive interval of layers ``[first, last]``.

    ``first_range`` and ``last_range`` contain 90% of the bootstrap's ends; ``found`` is the share of resamples with a
    region, 0..1. They are None with too few prompts. ``others`` are further intervals, strongest first.
    """

    first: int
    last: int
    first_range: tuple[int, int] | None = None
    last_range: tuple[int, int] | None = None
    found: float | None = None
    others: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        """Say which layers these are, and how sure the ends are."""
        text = f"layers {self.first} to {self.last}"
        if self.first_range and self.last_range:
            ends = (f"{a}" if a == b else f"{a}-{b}" for a, b in (self.first_range, self.last_range))
            text += " (90% of resamples: from {} to {})".format(*ends)
        if self.others:
            text += "; weaker " + ", ".join(f"{a} to {b}" for a, b in self.others)
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Regions:
    """Both regions of a run, each None if there is none, with the rules and the mean uptake per layer [L].

    ``cutoff`` is the cutoff by selection, 1..L, with at most ``max_uptake_above`` from it on; None where layers have no
    uptake that could be measured. ``stands_for_kl`` is the goal that this limit follows, in nats per token; None for a
    limit of the user's own.
    """

    selection: Region | None
    stabilization: Region | None
    uptake: np.ndarray
    rules: RegionRules
    cutoff: int | None
    max_uptake_above: float
    stands_for_kl: float | None


def find_regions(run: Run, rules: RegionRules | None = None, *, max_kl: float | None = None, seed: int = 0) -> Regions:
    """Locate the selection and the stabilization region of a run, the former for the goal ``max_kl``, default 0.1."""
    rules = rules or RegionRules()
    stands_for = None if rules.max_uptake_above is not None else MAX_KL if max_kl is None else max_kl
    limit = rules.max_uptake_above if stands_for is None else uptake_limit(stands_for)
    assert limit is not None
    curves = {name: per_prompt(run, name) for name in ("drift_prompt_centred", "saliency_overlap")}
    curves["uptake"] = uptake(run)
    n_prompts = len(curves["uptake"])

    means = {name: finite_mean(values, axis=0) for name, values in curves.items()}
    resampled: dict[str, list[np.ndarray]] = {name: [] for name in curves}
    for counts in resample_counts(
        np.random.default_rng(seed), n_prompts, N_RESAMPLES if n_prompts >= MIN_PROMPTS else 0
    ):
        for name, values in curves.items():
            resampled[name].extend(weighted_mean(values, counts))

    def selection(curve: np.ndarray) -> list[tuple[int, int]]:
        return selection_below(curve, rules, limit)

    def stabilization(drift: np.ndarray, overlap: np.ndarray) -> list[tuple[int, int]]:
        return stable_interval(drift, overlap, rules)

    selected, stable = (
        _region(
            find(*(means[name] for name in names)),
            [
                intervals[0] if (intervals := find(*drawn)) else None
                for drawn in zip(*(resampled[n] for n in names), strict=True)
            ],
        )
        for find, names in ((selection, ("uptake",)), (stabilization, ("drift_prompt_centred", "saliency_overlap")))
    )
    cutoff = first_tail_within(means["uptake"], limit)
    return Regions(selected, stable, means["uptake"], rules, cutoff, limit, stands_for)


def uptake(run: Run) -> np.ndarray:
    """Return selectivity * contribution / update per prompt and layer: [prompts, L]; NaN without a prompt segment."""
    with np.errstate(invalid="ignore"):  # a residual of 0, such as a padding token's embedding, makes both infinite
        return (
            per_prompt(run, "selectivity") * per_prompt(run, "prompt_contribution") / per_prompt(run, "update_decode")
        )


def selection_below(curve: np.ndarray, rules: RegionRules, limit: float) -> list[tuple[int, int]]:
    """Return the selection region and then weaker intervals below it, from the mean uptake per layer [L].

    ``limit`` is the uptake that may be left above the region.
    """
    cutoff = first_tail_within(curve, limit)
    if cutoff is None or np.nansum(curve) <= limit:
        return []
    intervals = selection_intervals(curve[:cutoff], rules)
    return [(first, cutoff - 1) for first, _ in intervals[:1]] + [i for i in intervals if i[1] < intervals[0][0]]


def selection_intervals(curve: np.ndarray, rules: RegionRules) -> list[tuple[int, int]]:
    """Return the intervals of selection layers, strongest first, from the mean uptake per layer [L]."""
    if not np.isfinite(curve).any() or np.nanmax(curve) < rules.min_uptake:
        return []
    layers = np.flatnonzero(curve >= rules.uptake_share * np.nanmax(curve))
    breaks = np.flatnonzero(np.diff(layers) > rules.max_gap + 1) + 1
    intervals = [(int(run[0]), int(run[-1])) for run in np.split(layers, breaks)]
    wide = [interval for interval in intervals if interval[1] - interval[0] + 1 >= rules.min_layers]
    return sorted(wide, key=lambda interval: -np.nansum(curve[interval[0] : interval[1] + 1]))


def stable_interval(drift: np.ndarray, overlap: np.ndarray, rules: RegionRules) -> list[tuple[int, int]]:
    """Return ``[(s, L-1)]`` or an empty list, from mean centred drift and saliency overlap per layer, each [L]."""
    n_layers = len(drift)
    stable = (drift <= rules.max_drift) & ((overlap >= rules.min_overlap) | np.isnan(overlap))
    first = n_layers - 1
    while first > 0 and stable[first - 1]:
        first -= 1
    return [(first, n_layers - 1)] if n_layers - first >= rules.min_layers + 1 else []


def _region(intervals: list[tuple[int, int]], resampled: list[tuple[int, int] | None]) -> Region | None:
    if not intervals:
        return None
    (first, last), others = intervals[0], tuple(intervals[1:])
    ends = np.array([interval for interval in resampled if interval])
    if not len(ends):
        return Region(first, last, others=others)
    low, high = np.percentile(ends, (5, 95), axis=0, method="nearest").astype(int).tolist()
    return Region(first, last, (low[0], high[0]), (low[1], high[1]), len(ends) / len(resampled), others)


def per_prompt(run: Run, column: str) -> np.ndarray:
    """Return one column of the layers table as [prompts, L], in the order of the prompts table."""
    table = run.layers.pivot(index="prompt_id", columns="layer", values=column)
    return table.loc[run.prompts["prompt_id"]].to_numpy()
