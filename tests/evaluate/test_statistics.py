"""Statistics of scores: intervals, paired tests, correction for many tasks, non-inferiority."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diagnostics.evaluate.statistics import (
    average,
    difference,
    estimate,
    holm,
    mcnemar,
    tango_lower_bound,
    wilcoxon,
)
from tests.support.examples import examples


def test_mean_and_standard_error_by_the_formula():
    scores = [0.0, 1.0, 1.0, 0.5, 0.25]
    made = estimate(scores)
    assert (made.n, made.mean) == (5, pytest.approx(0.55))
    assert made.standard_error == pytest.approx(np.std(scores, ddof=1) / math.sqrt(5))
    assert made.low < made.mean < made.high


def test_the_interval_is_the_bootstraps():
    scores = np.random.default_rng(1).random(200)
    made = estimate(scores)
    own = stats.bootstrap((scores,), np.mean, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    assert (made.low, made.high) == pytest.approx((own.low, own.high), abs=0.003)


def test_the_lower_bound_is_one_sided():
    """5% of what the mean may be lies below it, by the normal law of means of many items."""
    rng = np.random.default_rng(3)
    ours, theirs = rng.random(4000), rng.random(4000)
    paired = ours - theirs
    wanted = paired.mean() + stats.norm.ppf(0.05) * paired.std(ddof=1) / math.sqrt(len(paired))
    made = difference(ours, theirs)
    half = paired.mean() - wanted
    assert made.lower_bound == pytest.approx(wanted, abs=0.05 * half)  # a bound of 2.5% would be 0.19 of it away
    assert made.low < made.lower_bound < paired.mean() < made.high
    assert average({"a": paired}).lower_bound == pytest.approx(wanted, abs=0.05 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [e.low <= 0.7 <= e.high for e in (estimate(rng.random(120) < 0.7, seed=i) for i in range(150))]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_few_items_have_no_interval():
    assert math.isnan(estimate([]).mean)
    one = estimate([1.0])
    assert one.mean == 1
    assert all(map(math.isnan, (one.standard_error, one.low, one.high)))
    same = estimate([0.5] * 9)
    assert (same.low, same.high, same.standard_error) == (0.5, 0.5, 0)


def test_the_average_counts_tasks_and_not_items():
    tasks = {"small": [1.0, 0.0], "large": [1.0] * 98 + [0.0] * 2}
    made = average(tasks)
    assert made.mean == pytest.approx((0.5 + 0.98) / 2)
    errors = [estimate(scores).standard_error for scores in tasks.values()]
    assert made.standard_error == pytest.approx(math.hypot(*errors) / 2)
    assert made.low < made.mean < made.high
    assert math.isnan(average({}).mean)
    assert math.isnan(average({"a": [1.0], "b": []}).mean)


def test_pairs_tell_what_independent_means_cannot():
    """Two policies that differ on few items, by little of what items differ among themselves."""
    rng = np.random.default_rng(0)
    base = rng.random(300)
    made = difference(base - 0.02 + 0.01 * rng.standard_normal(300), base)
    assert made.test == "wilcoxon"
    assert made.high < 0
    assert made.p_value < 1e-6
    independent = 1.96 * math.hypot(*[base.std() / math.sqrt(300)] * 2)
    assert made.high - made.low < independent / 5


def test_mcnemar_by_hand():
    # 9 items differ, 8 of them in favour of the baseline: 2 * (1 + 9) / 2 ** 9.
    ours = np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    theirs = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    assert mcnemar(ours, theirs) == pytest.approx(20 / 512)
    made = difference(ours, theirs)
    assert (made.test, made.p_value) == ("mcnemar", pytest.approx(20 / 512))
    assert made.mean == pytest.approx(-7 / 12)
    assert mcnemar(ours, ours) == 1


def test_wilcoxon_is_scipys_on_what_differs():
    paired = np.array([0.3, -0.1, 0.0, 0.2, 0.4, -0.05, 0.0, 0.6])
    assert wilcoxon(paired) == pytest.approx(stats.wilcoxon(paired[paired != 0]).pvalue)
    assert wilcoxon(np.zeros(4)) == 1


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        difference([1.0, 0.0], [1.0])


def test_non_inferiority_needs_its_bound_above_the_margin():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.6).astype(float)
    flipped = np.where(rng.random(400) < 0.02, 1 - base, base)
    made = difference(flipped, base)
    assert made.low - 0.01 <= made.lower_bound <= made.mean
    assert made.non_inferior(0.05)
    assert not made.non_inferior(-made.lower_bound)
    assert not difference(base * 0, base).non_inferior(0.05)
    # A single item proves nothing.
    assert not difference([1.0], [1.0]).non_inferior(0.05)


def test_without_a_single_loss_the_bound_is_the_closed_form():
    z = stats.norm.ppf(0.95)
    for n in (1, 40, 1000):
        assert tango_lower_bound(0, 0, n) == pytest.approx(-(z**2) / (n + z**2), abs=1e-6)
    # Nothing was lost among 40 items, and yet 2 points cannot be excluded.
    same = difference([1.0, 0.0] * 20, [1.0, 0.0] * 20)
    assert (same.low, same.high) == (0, 0)
    assert not same.non_inferior(0.02)
    assert difference([1.0, 0.0] * 200, [1.0, 0.0] * 200).non_inferior(0.02)
    assert tango_lower_bound(0, 7, 7) == -1


@examples(200)
@given(n=st.integers(1, 400), data=st.data())
def test_the_bound_is_where_the_score_statistic_is_the_quantile(n, data):
    wins = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - wins))
    bound = tango_lower_bound(wins, losses, n)
    assert -1 <= bound <= (wins - losses) / n
    if -1 < bound < (wins - losses) / n - 1e-6:
        # The most likely share of losses under this difference, by brute force on the likelihood.
        lost = np.linspace(max(0, -bound), min(1, (1 - bound) / 2), 200001)[1:-1]
        won, tied = np.clip(lost + bound, 1e-300, 1), np.clip(1 - 2 * lost - bound, 1e-300, 1)
        likelihood = wins * np.log(won) + losses * np.log(lost) + (n - wins - losses) * np.log(tied)
        best = lost[likelihood.argmax()]
        score = (wins - losses - n * bound) / math.sqrt(n * (2 * best + bound * (1 - bound)))
        assert score == pytest.approx(stats.norm.ppf(0.95), abs=0.02)


def test_the_bound_holds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.multinomial(150, [0.04, 0.07, 0.89], size=1500)
    held = np.mean([tango_lower_bound(wins, losses, 150) <= 0.04 - 0.07 for wins, losses, _ in draws])
    assert 0.93 <= held <= 0.98


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    corrected = holm([0.01, math.nan, 0.02])
    assert corrected[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(corrected[1])
    assert holm([]) == []


@examples(60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_is_at_most_bonferroni(p_values):
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c + 1e-12
        assert c <= min(1, p * len(p_values)) + 1e-12 or any(q < p for q in p_values)
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()
