"""``recommend RUN``: which goal it judges by, what it saves, and what it says of both."""

import json
from dataclasses import asdict

import pytest

from diagnostics.cutoffs import recommend
from diagnostics.cutoffs.goals import saved_goals
from diagnostics.cutoffs.regions import RegionRules
from diagnostics.runs.run import load_run
from diagnostics.support.files import read_json
from tests.support.runs import contents, run_command, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", n_prompts=6)


@pytest.fixture
def command(run, monkeypatch, capfd):
    def call(*arguments, signs=True):
        return run_command(monkeypatch, capfd, "recommend", run, *arguments, signs=signs)

    return call


def saved(run):
    return read_json(run / "recommendation.json")


GOALS = {
    "another tolerance": ("--max-kl", 0.005),
    "two goals": ("--max-nll-increase", 0.5, "--min-agreement", 0.2),
    "a budget": ("--kv-budget", 0.5),
    "confidence": ("--confidence", 0.8),
    "categories": ("--max-kl", 0.02, "--every-category"),
    "region rules": ("--region-rule", "max_gap=1", "--region-rule", "max_drift=0.3"),
}


@pytest.mark.parametrize("name", GOALS)
def test_without_a_goal_the_saved_one_is_kept(command, run, name):
    status, out, err = command(*GOALS[name])
    assert status == 0
    assert err.startswith("Goal: ")
    assert err.endswith(f"; saved in {run / 'recommendation.json'}.\n")
    before, first = contents(run), saved(run)
    for arguments in ((), ("--json",)):
        status, again, err = command(*arguments)
        assert status == 0
        assert err.endswith(f", kept from the last time; {run / 'recommendation.json'} has it already.\n")
        assert (json.loads(again) == first) if arguments else (again == out)
        assert contents(run) == before


def test_the_goal_is_said_in_words(command):
    _, _, err = command("--max-kl", 0.02, "--min-agreement", 0.5, "--every-category", "--confidence", 0.9)
    assert "Goal: KL at most 0.02 and same top token at least 0.5, in every category, 90% confidence; saved in" in err


def test_a_goal_replaces_all_of_the_saved_one(command, run):
    command("--max-kl", 0.02, "--every-category", "--confidence", 0.8, "--region-rule", "max_gap=1")
    command("--max-kl", 0.03)
    assert saved(run)["criterion"] == {"max_kl": 0.03, "confidence": 0.95}
    assert saved(run)["region_rules"] == asdict(RegionRules())


def test_a_recommendation_that_does_not_change_is_not_written(run):
    made = recommend(load_run(run), max_kl=0.02)
    path = run / "recommendation.json"
    assert made.save(path)
    stamp = path.stat().st_mtime_ns
    assert not made.save(path)
    assert path.stat().st_mtime_ns == stamp
    path.write_text(path.read_text().replace("0.02", "0.03"))  # damaged: its seal is not that of its content
    assert made.save(path)
    assert saved(run)["criterion"]["max_kl"] == 0.02


def test_quiet_says_nothing_of_goals(command):
    assert command("--max-kl", 0.02, signs=False)[2] == ""


def test_goals_of_a_folder_are_the_arguments_of_recommend(run):
    assert saved_goals(run) == {}
    rules = RegionRules(max_drift=0.4)
    made = recommend(load_run(run), min_agreement=0.3, confidence=0.7, every_category=True, rules=rules)
    made.save(run / "recommendation.json")
    assert saved_goals(run) == {"min_agreement": 0.3, "confidence": 0.7, "every_category": True, "rules": rules}
    assert recommend(load_run(run), **saved_goals(run)).data == made.data


@pytest.mark.parametrize("text", ["{", "[]", '{"criterion": {"max_kl": "low"}}', '{"region_rules": {"max_gap": []}}'])
def test_a_damaged_recommendation_is_one_line_and_a_goal_makes_it_anew(command, run, text):
    (run / "recommendation.json").write_text(text)
    status, out, err = command()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("with a goal, such as --max-kl 0.1, it is made anew\n")
    assert (run / "recommendation.json").read_text() == text
    assert command("--max-kl", 0.1)[0] == 0
    assert saved(run)["criterion"]["max_kl"] == 0.1
