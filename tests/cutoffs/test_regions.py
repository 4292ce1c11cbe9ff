from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diagnostics import RegionRules, UserError, find_regions
from diagnostics.cutoffs.regions import Region, selection_below, selection_intervals, stable_interval, uptake
from tests.support.runs import make_run

RULES = RegionRules()  # 40% of the largest uptake, at least 0.02; gaps of 2; two layers or more
NAN = np.nan


def curve(n_layers, *peaks, rest=0.0):
    values = np.full(n_layers, rest)
    for first, last, height in peaks:
        values[first : last + 1] = height
    return values


# --- Selection ---


def test_intervals_come_strongest_first():
    assert selection_intervals(curve(20, (2, 5, 0.1), (12, 16, 0.12)), RULES) == [(12, 16), (2, 5)]
    # By total uptake, not by the highest peak.
    assert selection_intervals(curve(20, (2, 9, 0.1), (14, 15, 0.2)), RULES) == [(2, 9), (14, 15)]


def test_the_share_of_the_largest_decides():
    values = curve(12, (1, 3, 0.1), (6, 8, 0.0401), (10, 11, 0.0399))
    assert selection_intervals(values, RULES) == [(1, 8)]
    assert selection_intervals(values, RegionRules(max_gap=1)) == [(1, 3), (6, 8)]
    assert selection_intervals(values, RegionRules(uptake_share=0.5)) == [(1, 3)]


@pytest.mark.parametrize(("gap", "expected"), [(1, [(2, 8)]), (2, [(2, 9)]), (3, [(2, 4), (8, 10)])])
def test_gaps_up_to_max_gap_are_bridged(gap, expected):
    assert selection_intervals(curve(15, (2, 4, 0.1), (5 + gap, 7 + gap, 0.1)), RULES) == expected


def test_single_layers_are_dropped():
    values = curve(20, (3, 3, 0.2), (10, 12, 0.1))
    assert selection_intervals(values, RULES) == [(10, 12)]
    assert selection_intervals(values, RegionRules(min_layers=1)) == [(10, 12), (3, 3)]
    assert selection_intervals(curve(20, (3, 3, 0.2)), RULES) == []


def test_no_uptake_is_no_region():
    assert selection_intervals(curve(10, (2, 5, 0.0199)), RULES) == []
    assert selection_intervals(curve(10, (2, 5, 0.0201)), RULES) == [(2, 5)]
    assert selection_intervals(np.full(10, NAN), RULES) == []
    assert selection_intervals(np.zeros(10), RULES) == []


def test_layers_without_a_value_do_not_select():
    values = curve(12, (1, 4, 0.1), (8, 11, 0.2))
    values[[0, 9]] = NAN
    # The gap is bridged, and does not hide that this interval is the strongest.
    assert selection_intervals(values, RULES) == [(8, 11), (1, 4)]


finite_curves = arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1))
curves = arrays(np.float64, st.integers(1, 40), elements=st.one_of(st.floats(0, 1), st.just(NAN)))


@given(curves, st.floats(0.05, 1), st.integers(0, 4), st.integers(1, 4))
def test_intervals_are_inside_apart_and_sorted(values, share, max_gap, min_layers):
    rules = RegionRules(uptake_share=share, max_gap=max_gap, min_layers=min_layers)
    found = selection_intervals(values, rules)
    layers = [layer for first, last in found for layer in range(first, last + 1)]
    assert len(layers) == len(set(layers))
    assert all(0 <= layer < len(values) for layer in layers)
    assert all(last - first + 1 >= min_layers for first, last in found)
    strength = [np.nansum(values[first : last + 1]) for first, last in found]
    assert strength == sorted(strength, reverse=True)
    ends = sorted(found)
    assert all(later[0] - earlier[1] > max_gap + 1 for earlier, later in pairwise(ends))
    assert all(values[end] >= share * np.nanmax(values) for interval in found for end in interval)


@given(finite_curves, st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_higher_share_never_adds_layers(values, a, b):
    def layers(share):
        found = selection_intervals(values, RegionRules(uptake_share=share))
        return {layer for first, last in found for layer in range(first, last + 1)}

    assert layers(max(a, b)) <= layers(min(a, b))


def test_the_selection_region_ends_where_the_rule_does():
    values = curve(20, (2, 4, 0.1), (8, 10, 0.3), (14, 15, 0.11), (18, 18, 0.15))
    # Above 0.2: layer 18 has 0.15, layer 15 brings it to 0.26. The strongest interval begins the region.
    assert selection_below(values, RULES, 0.2) == [(8, 15)]
    assert selection_below(values, RegionRules(uptake_share=0.3), 0.2) == [(8, 15), (2, 4)]
    assert selection_below(values, RegionRules(uptake_share=0.3), 0.3) == [(8, 14), (2, 4)]
    assert selection_below(values, RULES, 0.1) == [(8, 18)]
    # What lies above the cutoff begins no region, however strong it is.
    assert selection_below(curve(12, (2, 4, 0.1), (9, 10, 0.12)), RULES, 0.25) == [(2, 4)]


def test_uptake_that_may_all_be_left_above_is_no_region():
    values = curve(12, (2, 4, 0.1))
    assert selection_below(values, RULES, 0.31) == []
    assert selection_below(values, RULES, 0.15) == [(2, 3)]
    assert selection_below(np.full(12, NAN), RULES, 0.2) == []


@given(curves, st.floats(0, 2), st.floats(0, 2))
def test_a_larger_limit_never_extends_the_region(values, a, b):
    less, more = (selection_below(values, RULES, limit)[:1] for limit in sorted((a, b)))
    if less and more:
        assert more[0][1] <= less[0][1]
    if less:
        first, last = less[0]
        assert 0 <= first <= last < len(values)
        assert np.nansum(values[last + 1 :]) <= min(a, b)


# --- Stabilization ---


def test_stable_from_the_first_layer_after_which_nothing_drifts():
    drift = np.array([0.5, 0.05, 0.3, 0.09, 0.1, 0.02, 0.4])
    calm_overlap = np.full(7, 0.9)
    # Layer 2 drifts, so calm begins at 3; the last layer's drift feeds no keys and does not count.
    assert stable_interval(drift, calm_overlap, RULES) == [(3, 6)]
    drift[5] = 0.2
    assert stable_interval(drift, calm_overlap, RULES) == []


def test_stable_from_the_start():
    assert stable_interval(np.zeros(6), np.ones(6), RULES) == [(0, 5)]


def test_stable_needs_the_salient_tokens_to_remain():
    overlap = np.array([0.9, 0.9, 0.49, 0.5, 0.9, NAN])
    assert stable_interval(np.zeros(6), overlap, RULES) == [(3, 5)]


def test_overlap_without_a_value_does_not_stand_in_the_way_but_drift_does():
    assert stable_interval(np.zeros(6), np.full(6, NAN), RULES) == [(0, 5)]
    assert stable_interval(np.full(6, NAN), np.ones(6), RULES) == []


def test_stable_region_needs_layers_before_the_last():
    drift = np.array([0.5, 0.5, 0.5, 0.0, 0.0, 0.5])
    assert stable_interval(drift, np.ones(6), RULES) == [(3, 5)]
    drift[3] = 0.5
    assert stable_interval(drift, np.ones(6), RULES) == []
    assert stable_interval(np.zeros(1), np.ones(1), RULES) == []


@given(finite_curves, st.floats(0, 1), st.floats(0, 1))
def test_more_drift_allowed_never_shrinks_the_stable_region(drift, a, b):
    low, high = (stable_interval(drift, np.ones(len(drift)), RegionRules(max_drift=limit)) for limit in sorted((a, b)))
    if low:
        assert high
        assert high[0][0] <= low[0][0]
        assert high[0][1] == low[0][1] == len(drift) - 1


# --- On a run ---


def noisy(mean, n_prompts, noise, seed=0):
    return np.clip(mean + noise * np.random.default_rng(seed).standard_normal((n_prompts, len(mean))), 0, None)


def region_run(n_prompts=12, noise=0.0):
    """12 layers: 2-3 select a little, 5-8 select, the prompt is stable from layer 9 on."""
    return make_run(
        np.zeros((n_prompts, 12)),
        layers={
            "selectivity": noisy(curve(12, (5, 8, 0.6), (1, 1, 0.5), (2, 2, 0.5), rest=0.1), n_prompts, noise),
            "prompt_contribution": 0.2,
            "update_decode": 0.5,
            "drift_prompt_centred": noisy(curve(12, (0, 8, 0.3), rest=0.05), n_prompts, noise, seed=1),
            "saliency_overlap": curve(12, (7, 11, 0.8), rest=0.3),
        },
    )


def test_regions_of_a_run():
    regions = find_regions(region_run(), RegionRules(max_gap=1))
    assert (regions.selection.first, regions.selection.last) == (5, 8)
    assert regions.selection.others == ((1, 2),)
    assert (regions.stabilization.first, regions.stabilization.last) == (9, 11)
    for region in (regions.selection, regions.stabilization):  # all prompts agree
        assert region.first_range == (region.first, region.first)
        assert region.last_range == (region.last, region.last)
        assert region.found == 1
    assert regions.uptake == pytest.approx(curve(12, (5, 8, 0.24), (1, 2, 0.2), rest=0.04))


def test_uptake_is_selectivity_times_contribution_per_update_in_the_order_of_the_prompts():
    rng = np.random.default_rng(0)
    selectivity, contribution, update = rng.uniform(0.1, 1, (3, 11, 6))
    layers = {"selectivity": selectivity, "prompt_contribution": contribution, "update_decode": update}
    run = make_run(np.zeros((11, 6)), layers=layers)
    assert sorted(run.prompts["prompt_id"]) != list(run.prompts["prompt_id"])
    np.testing.assert_allclose(uptake(run), selectivity * contribution / update)


def test_ends_are_less_certain_on_noisy_prompts():
    # Slopes, so that noise moves the layer where a threshold is crossed.
    hill = 1 - np.abs(np.arange(20) - 9) / 10
    slope = np.linspace(0.2, 0.0, 20)

    def width(noise):
        layers = {
            "selectivity": noisy(hill, 8, noise),
            "prompt_contribution": 0.2,
            "drift_prompt_centred": noisy(slope, 8, noise / 5, seed=1),
            "saliency_overlap": 0.8,
        }
        regions = find_regions(make_run(np.zeros((8, 20)), layers=layers))
        ends = [
            r for region in (regions.selection, regions.stabilization) for r in (region.first_range, region.last_range)
        ]
        return sum(high - low for low, high in ends)

    assert width(0.0) == 0
    assert 0 < width(0.1) < width(0.3)


def test_resamples_that_find_nothing_are_counted():
    # One of eight prompts selects, so a resample without it, of which there are (7/8)^8 = 34%, finds nothing.
    selectivity = np.zeros((8, 6))
    selectivity[0, 2:4] = 1.0
    layers = {"selectivity": selectivity, "prompt_contribution": 5.0}
    region = find_regions(make_run(np.zeros((8, 6)), layers=layers)).selection
    assert (region.first, region.last) == (2, 3)
    assert region.found == pytest.approx(1 - (7 / 8) ** 8, abs=0.05)


def test_regions_are_reproducible_and_depend_on_the_seed_only():
    a, b = (find_regions(region_run(noise=0.2), seed=7) for _ in range(2))
    assert (a.selection, a.stabilization) == (b.selection, b.stabilization)


def test_few_prompts_have_a_region_without_ranges():
    region = find_regions(region_run(n_prompts=4)).selection
    assert (region.first, region.last) == (1, 8)
    assert region.first_range is region.last_range is region.found is None


def test_a_run_without_any_value_has_no_regions():
    nothing = dict.fromkeys(("selectivity", "drift_prompt_centred", "saliency_overlap"), NAN)
    regions = find_regions(make_run(np.zeros((6, 5)), layers=nothing))
    assert regions.selection is None
    assert regions.stabilization is None
    assert np.isnan(regions.uptake).all()


@pytest.mark.parametrize(
    ("rule", "value"),
    [("uptake_share", 0), ("uptake_share", 1.5), ("uptake_share", NAN), ("max_gap", -1), ("max_drift", np.inf)],
)
def test_thresholds_that_make_no_sense_are_refused(rule, value):
    with pytest.raises(UserError, match=rule):
        RegionRules(**{rule: value})


def test_an_infinite_update_is_no_uptake():
    """A decode token whose embedding is 0 makes contribution and update of the first layer infinite."""
    curve = np.full((3, 8), 0.2)
    curve[1, 0] = np.inf
    run = make_run(np.ones((3, 8)), layers={"prompt_contribution": curve, "update_decode": curve})
    assert np.isnan(uptake(run)[:, 0]).sum() == 1
    assert np.isfinite(uptake(run)[:, 1:]).all()
    assert find_regions(run).selection is None


def test_a_region_reads_as_a_sentence():
    assert str(Region(3, 5)) == "layers 3 to 5"
    region = Region(14, 24, (14, 14), (23, 24), 1.0, ((7, 8), (2, 3)))
    assert str(region) == "layers 14 to 24 (90% of resamples: from 14 to 23-24); weaker 7 to 8, 2 to 3"
