"""A run without a sweep has the cutoff by selection, and says that it was not measured."""

import json

import pytest

from diagnostics import SpeedPolicy, UserError, load_run, recommend
from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.goals import saved_goals
from diagnostics.cutoffs.rules.uptake import UPTAKE_HELD
from diagnostics.support.files import read_json
from tests.support.runs import FALLING, make_run, region_layers, spread, without_sweep

LAYERS = region_layers(2, 4, 5)


@pytest.fixture(scope="module")
def run():
    return without_sweep(make_run(spread(FALLING), layers=LAYERS, anchors=2))


def test_the_cutoff_is_by_selection_and_not_measured(run):
    recommendation = recommend(run)
    data = json.loads(recommendation.to_json(), parse_constant=pytest.fail)
    assert (recommendation.cutoff, data["measured"], data["evidence"], data["by_category"]) == (5, False, [], {})
    assert data["agreement"] == {
        "cutoff_by_selection": 5,
        "stands_for_kl": 0.1,
        "max_uptake_above": 0.2,
        "tolerance_layers": 1,
        "agree": None,
    }
    assert {rule["rule"]: rule["cutoff"] for rule in data["rules"]}["uptake"] == 5
    assert not recommendation.measured
    assert recommend(make_run(spread(FALLING), layers=LAYERS)).data["measured"] is True


def test_the_cutoff_follows_the_goal(run):
    # 0.24 of uptake in each of three layers: two of them are left above from a limit of 0.48 on, at 0.576 nats.
    assert [recommend(run, max_kl=goal).cutoff for goal in (0.1, 0.5, 0.58, 2)] == [5, 4, 3, 1]
    assert recommend(run, max_kl=0.4).data["agreement"]["max_uptake_above"] == pytest.approx(0.4)
    assert recommend(run, kv_budget=0.5).cutoff == 4


def test_the_answer_says_so(run):
    said = answer(recommend(run))
    assert said.startswith("Prompts can stop at layer 5 of 8: at 8,192 tokens that saves a predicted ")
    assert said.endswith(f". That is by the uptake of the layers, not measured; this rule was {UPTAKE_HELD}.")
    assert answer(recommend(run, kv_budget=0.5)).endswith(". What that changes was not measured.")
    high = without_sweep(make_run(spread(FALLING), layers=region_layers(2, 7, 5)))
    assert answer(recommend(high)).startswith("Prompts must run through all 8 layers. That is by the uptake")
    overview = recommend(run).overview()
    assert overview.answer == said
    assert overview.facts["measured there"] == "nothing"


@pytest.mark.parametrize("goal", [{"max_nll_increase": 0.1}, {"min_agreement": 0.9}, {"every_category": True}])
def test_goals_that_need_the_loss_are_refused_by_name(run, goal):
    (name,) = goal
    with pytest.raises(UserError, match=f"`{name}` needs the measured loss, which a run with `sweep=False`"):
        recommend(run, **goal)
    with pytest.raises(UserError, match="`every_category` needs"):
        recommend(run, max_kl=0.1, every_category=True)


def test_layers_without_uptake_have_no_cutoff():
    run = without_sweep(make_run(spread(FALLING), layers=LAYERS | {"prompt_contribution": float("nan")}))
    with pytest.raises(UserError, match="no cutoff by selection, since some layers have no uptake"):
        recommend(run)
    assert recommend(run, kv_budget=0.5).cutoff == 4


def test_policies_follow_the_file(run, tmp_path):
    recommendation = recommend(run, max_kl=0.58)
    recommendation.save(tmp_path / "recommendation.json")
    policy = SpeedPolicy.from_recommendation(tmp_path)
    assert (policy.cutoff, policy.anchors) == (3, 2)
    assert read_json(tmp_path / "recommendation.json") == json.loads(recommendation.to_json())
    assert recommend(run, **saved_goals(tmp_path)).data == recommendation.data


def test_a_folder_without_a_sweep_is_recommended_from(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(run.manifest))
    run.tables["heads"]["selectivity"] = 0.0
    for name, table in run.tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    assert not load_run(folder).has_sweep
    assert recommend(folder).cutoff == 5
