"""Rules are judged by the loss that was measured at their cutoffs."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from diagnostics.cutoffs.judgement import COLUMNS, judge_rules, knee
from diagnostics.cutoffs.rules import all_rules
from diagnostics.cutoffs.rules.rule import Rule, first_where
from tests.support.runs import FALLING, make_run, region_layers, spread, without_sweep


@dataclass(frozen=True)
class Above(Rule):
    """First layer whose drift is above a limit."""

    limit: float
    name = "above"
    title = "Above"
    ours = False
    reads = ("drift_prompt",)

    def cutoff(self, curves):
        found = first_where(curves.layers["drift_prompt"] > self.limit)
        return None if found is None else max(1, found)


def row(table, rule="above"):
    (found,) = table[table["rule"] == rule].to_dict("records")
    return found


def rising(n_prompts=20):
    """A run of 8 layers whose drift is 0, 1, ..., 7 tenths in every prompt."""
    return make_run(spread(FALLING, n_prompts), layers={"drift_prompt": np.arange(8) / 10})


def test_a_rule_is_judged_by_the_loss_at_its_cutoff():
    run = rising()
    found = row(judge_rules(run, rules=[Above(0.25)]))
    kl = run.cutoffs[run.cutoffs["cutoff"] == 3]["kl"].mean()
    assert (found["cutoff"], found["low"], found["high"], found["knee"], found["off"]) == (3, 3, 3, 6, -3)
    assert (found["kl"], found["nll_increase"]) == pytest.approx((kl, kl))  # the tables say so
    assert (found["saved"], found["saved_vs_knee"]) == pytest.approx((5 / 8, 3 / 8))
    assert found["note"] == ""


def test_the_knee_is_where_all_later_losses_are_within_the_goal():
    run = make_run(np.ones((6, 1)) * [0.01, 0.5, 0.1, 0.3, 0.1, 0.02, 0.0])
    assert [knee(run, goal) for goal in (0.6, 0.3, 0.1, 0.02, 0.01)] == [1, 3, 5, 6, 7]
    assert knee(without_sweep(run), 0.1) is None
    worse = make_run(np.ones((6, 1)) * [0.5, 0.4, 0.2])  # than a teacher, at full depth too
    assert knee(worse, 0.1) is None


def test_the_range_holds_nine_tenths_of_the_resamples():
    # Half of the prompts begin to drift at layer 2, half at 6: their mean passes 0.45 at 2 where they are the more.
    drift = np.zeros((40, 8))
    drift[:20, 2:], drift[20:, 6:] = 1.0, 1.0
    run = make_run(spread(FALLING, 40), layers={"drift_prompt": drift})
    found = row(judge_rules(run, rules=[Above(0.45)]))
    assert (found["cutoff"], found["low"], found["high"]) == (2, 2, 6)
    assert judge_rules(run, seed=3).equals(judge_rules(run, seed=3))
    few = row(judge_rules(run.select(run.prompts["prompt_id"][:4]), rules=[Above(0.45)]))
    assert few["cutoff"] == 2
    assert pd.isna(few["low"])
    assert pd.isna(few["high"])


def test_resamples_without_a_cutoff_are_said():
    drift = np.zeros((8, 8))
    drift[0, 3] = 1.0
    found = row(judge_rules(make_run(spread(FALLING, 8), layers={"drift_prompt": drift}), rules=[Above(0.1)]))
    assert (found["cutoff"], found["low"], found["high"]) == (3, 3, 3)
    found, of = map(int, found["note"].removeprefix("found in ").removesuffix(" resamples").split(" of "))
    assert of == 200
    assert found / of == pytest.approx(1 - (7 / 8) ** 8, abs=0.1)


def test_without_a_sweep_there_are_cutoffs_alone():
    found = row(judge_rules(without_sweep(rising()), rules=[Above(0.25)]))
    assert (found["cutoff"], found["low"], found["saved"]) == (3, 3, 5 / 8)
    assert all(pd.isna(found[name]) for name in ("knee", "off", "kl", "nll_increase", "saved_vs_knee"))


def test_a_rule_without_a_cutoff_says_why():
    run = rising()
    assert row(judge_rules(run, rules=[Above(2)]))["note"] == "finds none"
    drift = np.full(8, 0.1)
    drift[[2, 5]] = np.nan
    run = make_run(spread(FALLING), layers={"drift_prompt": drift})
    assert row(judge_rules(run, rules=[Above(2)]))["note"] == "finds none: drift_prompt has no value in 2 of 8 layers"
    del run.tables["layers"]["drift_prompt"]
    found = row(judge_rules(run, rules=[Above(2)]))
    assert found["note"] == "not measured: diagnose with `rules='all,above'`"
    assert pd.isna(found["cutoff"])
    assert pd.isna(found["kl"])


def test_every_rule_has_a_row_and_ours_stand_first():
    table = judge_rules(make_run(spread(FALLING), layers=region_layers(2, 4, 5)))
    assert list(table.columns) == list(COLUMNS)
    assert set(table["rule"]) == set(all_rules())
    assert table["rule"][0] == "uptake"
    assert table["cutoff"][0] == 5
    assert table["cutoff"].between(1, 8).sum() == table["cutoff"].notna().sum()
