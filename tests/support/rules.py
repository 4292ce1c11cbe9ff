"""Rules to show: a run whose knee is known, recommendations with rules made by hand, and runs without a sweep."""

from dataclasses import replace

import numpy as np

from diagnostics import recommend
from tests.support.runs import FALLING, make_run, region_layers, spread

KNEE = 6  # of FALLING at a goal of 0.1
# Mean KL of `spread(FALLING)` is close to FALLING.
KL = dict(enumerate(FALLING, start=1))
NOTHING = dict.fromkeys(("low", "high", "knee", "off", "kl", "nll_increase", "saved", "saved_vs_knee"))


def verdict(rule, cutoff, *, title=None, knee=KNEE, note="", n_layers=8, **more):
    """A record of `judge_rules` for a rule that names ``cutoff``, or none."""
    record = {"rule": rule, "title": title or rule.title(), "cutoff": cutoff, **NOTHING, "note": note}
    if cutoff is not None:
        record |= {"saved": 1 - cutoff / n_layers}
    if knee is not None:
        record |= {"knee": knee}
        if cutoff is not None:
            record |= {"off": cutoff - knee, "saved_vs_knee": (knee - cutoff) / n_layers}
            record |= {"kl": KL[cutoff], "nll_increase": KL[cutoff]}
    return record | more


def judged(*records, run=None, **goal):
    """A run, and its recommendation with these records in place of those of the rules that exist."""
    run = run or make_run(spread(FALLING), layers=region_layers(2, 4, 5))
    recommendation = recommend(run, **goal)
    return run, replace(recommendation, data=recommendation.data | {"rules": list(records)})


def without_sweep(run):
    """The same run, as if the loss had not been measured."""
    cutoffs = run.cutoffs.assign(**dict.fromkeys(("kl", "top1_agreement", "nll", "nll_full"), np.nan))
    return replace(run, manifest=run.manifest | {"sweep": False}, tables=run.tables | {"cutoffs": cutoffs})
