"""The calibration study: rules bound what they claim, tables count what happened, predictors are those of the run."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import study_calibration
from calibration_study import pool as pool_module
from calibration_study.coverage import GOALS, RULES, SIZES, coverage, cutoff_by, left_out, transfer
from calibration_study.prediction import correlations, predictors, price, spearman, task_losses
from diagnostics.evaluate import evaluation
from diagnostics.evaluate.evaluation_folder import Evaluation
from tests.support.runs import make_run
from tests.support.tiny import tiny_model

N_LAYERS = 8


def skewed(n, seed=0, columns=1):
    """Losses [n, columns] as of real prompts: many small, few large; the mean is 1."""
    return np.random.default_rng(seed).gamma(0.5, 2, size=(n, columns))


@pytest.mark.parametrize("name", RULES)
def test_equal_losses_are_their_own_bound(name):
    assert RULES[name](np.full((12, 3), 0.25), 0) == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_about_what_they_claim(name):
    draws = [RULES[name](skewed(24, seed), seed)[0] >= 1 for seed in range(300)]
    low, high = {"mean": (0.3, 0.55), "bootstrap-t": (0.88, 1)}.get(name, (0.82, 0.97))
    assert low < np.mean(draws) < high


def test_bounds_are_above_the_mean_and_student_is_the_textbook_one():
    rows = skewed(16, 3, columns=4)
    for name, rule in RULES.items():
        assert (rule(rows, 0) >= rows.mean(axis=0)).all(), name
    textbook = stats.ttest_1samp(rows, 0, alternative="less").confidence_interval(0.95).high
    assert RULES["student"](rows, 0) == pytest.approx(textbook)


def falling(n, seed=0):
    """Losses [n, L] that fall with depth and end at 0."""
    return skewed(n, seed) * np.array([2.0, 1.2, 0.8, 0.4, 0.2, 0.06, 0.02, 0.0])


def test_coverage_counts_what_the_others_say():
    losses = falling(60, 1)
    table = coverage(losses, draws=30)
    assert set(table["n"]) == {8, 16}.union(n for n in SIZES if n <= 30)
    assert set(table["rule"]) == set(RULES)
    assert set(table["goal"]) == set(GOALS)
    by = table.set_index(["n", "rule", "goal"])
    assert table["kept"].between(0, 1).all()
    # A bound never recommends less than the mean does, and keeps no fewer promises.
    for n, goal in {(row.n, row.goal) for row in table.itertuples()}:
        assert by.loc[(n, "bca", goal), "cutoff"] >= by.loc[(n, "mean", goal), "cutoff"]
        assert by.loc[(n, "bca", goal), "kept"] >= by.loc[(n, "mean", goal), "kept"]
    pd.testing.assert_frame_equal(table, coverage(losses, draws=30))


def test_a_goal_that_all_prompts_agree_on_is_always_met():
    table = coverage(np.tile(falling(1), (40, 1)), draws=5)
    assert (table["kept"] == 1).all()
    assert (table["excess"] == 0).all()


def test_transfer_holds_a_cutoff_against_other_prompts():
    seen = falling(40, 2)
    table = transfer(seen, {"same": seen, "harder": 4 * seen}).set_index(["prompts", "goal"])
    assert table.loc["same", "kept"].all()
    for goal, k in zip(GOALS, cutoff_by(RULES["bca"], seen, GOALS, 0), strict=True):
        row = table.loc[("harder", goal)]
        assert row["cutoff"] == k
        assert row["loss"] == pytest.approx(4 * seen.mean(axis=0)[k - 1])
        assert row["kept"] == (row["loss"] <= goal)
        assert row["ideal"] >= table.loc[("same", goal), "ideal"]


def test_every_source_counts_where_that_is_asked_for():
    easy, hard = falling(40, 3) / 4, falling(40, 4)
    table = left_out({"easy": easy, "hard": hard, "as hard": hard.copy()}).set_index(["rule", "prompts", "goal"])
    for goal in GOALS:
        # What was seen has a source just as hard as the one left out.
        assert table.loc[("every source", "hard", goal), "kept"]
        assert table.loc[("every source", "hard", goal), "cutoff"] >= table.loc[("bca", "hard", goal), "cutoff"]
        assert table.loc[("bca", "easy", goal), "loss"] <= goal


# --- Prediction ---


def made_run():
    curve = np.arange(N_LAYERS, dtype=float)
    layers = {
        "prompt_contribution": curve,
        "selectivity": 1.0,
        "update_decode": 0.5,
        "drift_prompt_centred": curve / 10,
    }
    return make_run(falling(6), layers=layers)


def made_evaluation(lost, n=40):
    """Items of two tasks: at each cutoff a share ``lost[cutoff]`` of those that full depth has right goes wrong."""
    rows = []
    for task in ("one", "two"):
        for cutoff in (None, *lost):
            wrong = 0 if cutoff is None else round(n * lost[cutoff])
            spec = "full" if cutoff is None else f"speed:{cutoff}"
            rows += [
                {"task": task, "policy": spec, "item_id": str(i), "score": float(i >= wrong)}
                | {"gold_log_likelihood": -1.0 - (i < wrong)}
                for i in range(n)
            ]
    return Evaluation({"model": "made"}, pd.DataFrame(rows))


def test_predictors_are_sums_over_the_layers_that_lose_the_prompt():
    run, found = made_run(), predictors(made_run())
    assert {len(values) for values in found.values()} == {N_LAYERS}
    assert found["KL"] == pytest.approx(run.cutoffs.groupby("cutoff")["kl"].mean().to_numpy())
    assert found["NLL increase"][-1] == 0
    assert found["prompt contribution above"] == pytest.approx(
        [sum(range(k, N_LAYERS)) for k in range(1, N_LAYERS + 1)]
    )
    assert found["uptake above"] == pytest.approx(2 * found["prompt contribution above"])
    assert found["drift of the prompt at k (centred)"][:-1] == pytest.approx(np.arange(1, N_LAYERS) / 10)
    assert (np.diff(found["depth alone"]) < 0).all()


def test_losses_of_tasks_are_paired_with_full_depth():
    found = task_losses(made_evaluation({2: 0.5, 4: 0.25, 6: 0.0}))
    for task in ("one", "two"):
        assert found["score"][task].mean().to_dict() == {2: 0.5, 4: 0.25, 6: 0.0}
        assert found["likelihood"][task].mean().to_dict() == {2: 0.5, 4: 0.25, 6: 0.0}


def test_what_orders_the_losses_correlates_and_what_reverses_them_does_not():
    table = correlations(made_run(), made_evaluation({2: 0.6, 3: 0.5, 4: 0.3, 5: 0.2, 6: 0.05}), from_cutoffs=(2, 4))
    kl = table[table["predictor"] == "KL"]
    assert np.allclose(kl["rho"], 1)
    assert (kl["low"] <= kl["high"]).all()
    # The made drift grows with depth, so it foretells the contrary.
    assert np.allclose(table[table["predictor"].str.startswith("drift")]["rho"], -1)
    assert set(table["task"]) == {"one", "two", "all"}
    assert set(table["from_cutoff"]) == {2, 4}


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    values, rows = rng.integers(0, 5, 12).astype(float), rng.integers(0, 4, (6, 12)).astype(float)
    assert spearman(values, rows) == pytest.approx([stats.spearmanr(values, row).statistic for row in rows])
    assert np.isnan(spearman(np.ones(4), rows[:, :4])).all()


def test_the_price_of_a_cutoff_is_the_mean_over_tasks():
    table = price(made_run(), made_evaluation({2: 0.5, 6: 0.05})).set_index("cutoff")
    assert table.loc[2, "lost"] == pytest.approx(0.5)
    assert table.loc[2, "score"] == pytest.approx(0.5)
    assert table.loc[2, "low"] < 0.5 < table.loc[2, "high"]
    assert table.loc[6, "one"] == pytest.approx(0.05)
    assert table.loc[6, "kl"] == pytest.approx(falling(6).mean(axis=0)[5])


# --- The command ---


@pytest.fixture
def documents(monkeypatch):
    """Benchmarks of 30 made documents each, in place of the package's."""

    def raw(folder):
        text = {name: f"{folder} {name}" for name in ("query", "passage", "question", "prompt", "title", "abstract")}
        return [{name: f"w{i + 10} w{i + 5} {value}" for name, value in text.items()} for i in range(30)]

    monkeypatch.setattr(pool_module, "raw_documents", raw)


def test_the_pool_has_as_many_of_every_source_and_none_twice(documents):
    prompts = pool_module.pool(7)
    assert [prompt.category for prompt in prompts] == [s for s in pool_module.SOURCES for _ in range(7)]
    texts = {prompt.messages[0]["content"] for prompt in prompts}
    assert len(texts) == len(prompts) == len({prompt.id for prompt in prompts})
    assert pool_module.pool(7) == prompts != pool_module.pool(7, seed=1)


def test_the_study_runs_and_goes_on(documents, monkeypatch, tmp_path, capsys):
    from diagnostics.evaluate.items import ChoiceItem, Context, Task

    monkeypatch.setattr(study_calibration, "load_model", lambda _: tiny_model("llama"))
    original = study_calibration.load_prompts
    monkeypatch.setattr(
        study_calibration, "load_prompts", lambda name, **_: original(name, context_length=480, max_prompts=7)
    )
    items = [ChoiceItem(str(i), (Context(f"w5 w{i + 7} w9 w{i}"),) * 2, (" w5", " w6"), i % 2) for i in range(6)]
    monkeypatch.setattr(study_calibration, "load_task", lambda name, _: Task(name, tuple(items), "acc"))
    command = ["study_calibration.py", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(
        sys,
        "argv",
        [*command, "--per-source", "4", "--items", "5", "--decode-tokens", "3", "--draws", "4", "--first-cutoff", "2"],
    )
    study_calibration.main()
    names = {"coverage", "transfer_builtin", "transfer_left_out", "correlations", "price"}
    made = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert set(made) == {f"{name}.csv" for name in names} | {"study.json"}
    assert set(json.loads(capsys.readouterr().out)) == names
    # The second time there is nothing left to answer.
    monkeypatch.setattr(evaluation, "answer", lambda *_, **__: pytest.fail("answered before"))
    study_calibration.main()
    for name in names:
        assert (tmp_path / "results" / f"{name}.csv").read_text() == made[f"{name}.csv"]
