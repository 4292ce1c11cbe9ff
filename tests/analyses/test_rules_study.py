"""The study of rules: real pages as prompts, scores that count what happened, thresholds fitted to other models."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from diagnostics.cutoffs.rules.rule import Rule, first_where
from diagnostics.cutoffs.rules.uptake import Uptake
from rules_study.scores import Measured, by_rule, fitted, readings, threshold_of
from rules_study.texts import PAGES, prompts
from tests.support.runs import FALLING, make_run, spread
from tests.support.tiny import tiny_model

RISE = np.arange(8) / 10  # of a measure: layer l has l tenths


@dataclass(frozen=True)
class Above(Rule):
    """First layer whose drift is above a limit."""

    limit: float = 0.05
    name = "above"
    title = "Above"
    ours = False
    reads = ("drift_prompt",)

    def cutoff(self, curves):
        found = first_where(curves.layers["drift_prompt"] > self.limit)
        return None if found is None else max(1, found)


def measured(model, shift=0.0):
    """A run of 8 layers with its knee at 6 for a goal of 0.1, where the limit that finds it is 0.5 + shift."""
    run = make_run(spread(FALLING, 6), layers={"drift_prompt": RISE + shift})
    return Measured(model, "made", 512, run)


def test_pages_are_followed_by_their_own_text():
    lm = tiny_model("llama")
    (first, _) = prompts("documentation", lm.tokenizer, 40, 2, 8)
    from pydoc_data.topics import topics

    ids = lm.tokenizer(topics[PAGES[0]], add_special_tokens=False)["input_ids"]
    assert first.text == lm.tokenizer.decode(ids[:40])
    assert first.reference == lm.tokenizer.decode(ids[40:48])


def test_scores_count_runs_in_which_a_rule_finds_nothing_as_missed():
    table = pd.DataFrame(
        {
            "goal": 0.1,
            "rule": "above",
            "title": "Above",
            "off": pd.array([0, -1, 3, None, None], dtype="Int64"),
            "kl": [0.1, 0.2, 0.01, np.nan, np.nan],
            "note": ["", "", "", "finds none", "not measured: `rules='all,above'`"],
        }
    )
    (row,) = by_rule(table).to_dict("records")
    assert (row["runs"], row["found"], row["exact"], row["within_1"]) == (4, 3, 0.25, 0.5)
    assert (row["mean_error"], row["lowest"], row["highest"]) == (pytest.approx(4 / 3), -1, 3)


def test_readings_name_the_run_and_the_goal():
    table = readings([measured("a"), measured("b")], [0.05, 0.1])
    assert set(zip(table["model"], table["goal"], strict=True)) == {(m, g) for m in "ab" for g in (0.05, 0.1)}
    assert (table.loc[table["goal"] == 0.1, "knee"] == 6).all()


def test_a_threshold_is_fitted_to_the_other_models():
    # Two models agree on the limit; the third needs one that is 0.3 higher, and gets theirs: three layers too few.
    runs = [measured("a"), measured("b"), measured("c", shift=0.3)]
    (row,) = fitted(runs, [0.1], {"above": Above()}).to_dict("records")
    assert (row["threshold"], row["own"], row["runs"]) == ("limit", 0.05, 3)
    assert row["left_out_worst"] == -3
    assert np.isnan(row["low"]), "no limit stays within one layer on all three"
    (row,) = fitted(runs[:2], [0.1], {"above": Above()}).to_dict("records")
    assert row["left_out_within_1"] == 1
    assert 0.4 <= row["low"] < 0.5 < row["high"] < 0.7


def test_a_rule_has_one_threshold_or_is_not_fitted():
    assert threshold_of(Uptake()) == "max_uptake_above"
    assert fitted([measured("a")], [0.1], {"uptake": Uptake()}).shape[0] == 1
