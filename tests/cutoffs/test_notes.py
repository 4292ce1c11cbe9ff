"""What a recommendation says beside its cutoff: lengths, windows, missing regions, layers that must see the prompt."""

import numpy as np
import pytest
from scipy import stats

from diagnostics import RegionRules, recommend
from tests.support.runs import FALLING, make_run, region_layers, spread

LAYERS = region_layers(2, 4, 5)


def notes(run, **goals):
    return recommend(run, **goals).data["notes"]


def test_measured_lengths():
    run = make_run(spread(FALLING), layers=LAYERS, n_prompt=np.arange(100, 120))
    assert recommend(run).data["measured_lengths"] == {"min": 100, "max": 119}
    assert notes(run) == []


@pytest.mark.parametrize(("longest", "noted"), [(300, True), (1023, True), (1024, False), (4096, False)])
def test_prompts_not_well_beyond_a_window_are_noted(longest, noted):
    run = make_run(spread(FALLING), layers=LAYERS, n_prompt=np.linspace(200, longest, 20).astype(int))
    kinds = ["sliding_attention"] * 6 + ["full_attention"] * 2
    run.manifest["shape"] |= {"layer_types": kinds, "sliding_window": 512}
    found = [note for note in notes(run) if note.startswith(f"measured at up to {longest:,} tokens, and 6 of 8 layers")]
    assert len(found) == noted
    assert all("a window of 512" in note and note.endswith("or take one layer more") for note in found)


def test_a_missing_selection_region_is_named():
    (note,) = notes(make_run(spread(FALLING), layers=LAYERS), max_kl=2)
    assert note.startswith("there is no selection region: the uptake of all layers together, 0.72, is within")
    (note,) = notes(make_run(spread(FALLING), layers=LAYERS | {"selectivity": np.nan}))
    assert note == "there is no selection region: some layers have no uptake that could be measured"
    # 0.04 in each layer is 0.32 in all, and no two neighbours reach a share of 0.1 of one layer's.
    lone = np.where(np.arange(8) == 3, 1.0, 0.05)
    (note,) = notes(make_run(spread(FALLING), layers=LAYERS | {"selectivity": lone}))
    assert note == "there is no selection region: no layers stand out, though together they take from the prompt"


def test_agreement_needs_a_region_and_says_its_goal():
    run = make_run(spread(FALLING), layers=LAYERS)
    said = recommend(run, min_agreement=0.9).data["agreement"]
    assert (said["stands_for_kl"], said["max_uptake_above"]) == (0.1, 0.2)
    said = recommend(run, max_kl=0.4).data["agreement"]
    assert (said["stands_for_kl"], said["max_uptake_above"]) == (0.4, pytest.approx(0.4))
    said = recommend(run, rules=RegionRules(max_uptake_above=0.5)).data["agreement"]
    assert (said["cutoff_by_selection"], said["stands_for_kl"], said["max_uptake_above"]) == (3, None, 0.5)
    said = recommend(run, max_kl=2).data["agreement"]
    assert (said["cutoff_by_selection"], said["agree"]) == (1, None)


def test_layers_that_must_see_the_prompt():
    losses = np.array([0.0, 0.001, 0.2, 0.3, 0.013, 0.012, 0.0, 0.02])
    per_prompt = losses * np.linspace(0.5, 1.5, 20)[:, None]
    uptake = np.array([0.1, 0.2, 0.6, 0.8, 0.3, 0.4, 0.05, 0.7]) / 2
    layers = LAYERS | {"leave_one_out_kl": per_prompt, "selectivity": uptake, "prompt_contribution": 0.5}
    data = recommend(make_run(spread(FALLING), layers=layers)).data
    found = data["must_see"]
    assert found["leave_one_out_kl"] == pytest.approx(losses)
    assert (found["above"], found["layers"]) == (pytest.approx(losses.mean()), [2, 3])
    assert found["uptake_rank_correlation"] == pytest.approx(stats.spearmanr(losses, uptake).statistic)
    assert recommend(make_run(spread(FALLING), layers=layers), max_kl=0.8).data["must_see"] == found
    assert recommend(make_run(spread(FALLING), layers=LAYERS)).data["must_see"] is None


def test_leave_one_out_losses_that_are_missing_are_none():
    losses = np.array([np.nan, 0.0, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0])
    found = recommend(make_run(spread(FALLING), layers=LAYERS | {"leave_one_out_kl": losses})).data["must_see"]
    assert found["leave_one_out_kl"][0] is None
    assert found["layers"] == [2, 3]
    uptake = [0, 0.24, 0.24, 0.24, 0, 0, 0]
    assert found["uptake_rank_correlation"] == pytest.approx(stats.spearmanr(losses[1:], uptake).statistic)
    flat = recommend(make_run(spread(FALLING), layers=LAYERS | {"leave_one_out_kl": 0.0})).data["must_see"]
    assert flat["uptake_rank_correlation"] is None
    assert flat["layers"] == []


def test_rules_are_judged_in_the_file():
    data = recommend(make_run(spread(FALLING), layers=LAYERS), max_kl=0.2).data
    first = data["rules"][0]
    assert (first["rule"], first["cutoff"], first["knee"], first["off"]) == ("uptake", 4, 5, -1)
    assert first["kl"] == pytest.approx(data["evidence"][3]["kl"])
    absent = next(rule for rule in data["rules"] if rule["rule"] == "asl")
    assert absent["cutoff"] is absent["kl"] is absent["off"] is None
    assert absent["note"] == "not measured: diagnose with `rules='all,asl'`"
