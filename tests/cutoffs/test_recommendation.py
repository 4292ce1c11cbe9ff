import io
import json
import tracemalloc

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from diagnostics import LoadedModel, Prompt, PromptSet, UserError, diagnose, recommend
from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.bounds import upper_bound
from diagnostics.support.files import read_json
from diagnostics.terminal.diagnosis import show_recommendation, show_run
from tests.support.runs import FALLING, llama_8b_shape, make_run, region_layers, spread
from tests.support.tiny import tiny_model


def evidence(recommendation, name):
    return [row[name] for row in recommendation.evidence]


def strict(recommendation):
    """The JSON as a strict reader takes it: no NaN and no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(recommendation.to_json(), parse_constant=refuse)


# --- Which cutoff ---


def test_smallest_cutoff_within_the_goal():
    recommendation = recommend(make_run(spread(FALLING)))
    assert recommendation.cutoff == 6
    assert evidence(recommendation, "admissible") == [False] * 5 + [True] * 3
    assert evidence(recommendation, "kl") == pytest.approx(spread(FALLING).mean(axis=0))
    assert strict(recommendation)["criterion"] == {"max_kl": 0.1, "confidence": 0.95}
    assert recommend(make_run(spread(FALLING)), max_kl=0.6).cutoff == 3
    assert recommend(make_run(spread(FALLING)), max_kl=0.05).cutoff == 7


def test_the_bound_decides_and_not_the_mean():
    loss = spread([1.0, 0.098, 0.05, 0.0], relative=0.3)
    assert loss.mean(axis=0)[1] < 0.1
    recommendation = recommend(make_run(loss))
    assert recommendation.evidence[1]["kl_bound"] > 0.1
    assert recommendation.cutoff == 3


def test_an_admissible_cutoff_below_one_that_is_not_is_not_taken():
    recommendation = recommend(make_run(spread([0.5, 0.02, 0.01, 0.3, 0.05, 0.01, 0.0])))
    assert recommendation.cutoff == 5
    assert evidence(recommendation, "admissible") == [False, True, True, False, True, True, True]


def test_nothing_admissible_is_full_depth_and_says_so():
    recommendation = recommend(make_run(spread([3.0, 2.0, 1.0, 0.0])))
    assert recommendation.cutoff == 4
    assert any("no cutoff below full depth" in note for note in recommendation.data["notes"])
    predicted = recommendation.data["predicted"]
    assert all(row["ttft_ratio"] == row["kv_ratio"] == 1 for row in predicted)


def test_no_loss_anywhere_is_one_layer():
    recommendation = recommend(make_run(np.zeros((6, 5))))
    assert recommendation.cutoff == 1
    (note,) = recommendation.data["notes"]  # nor is anything taken from the prompt
    assert note.startswith("there is no selection region: the uptake of all layers together, 0, is within what")
    assert evidence(recommendation, "kl_bound") == [0.0] * 5


def test_few_prompts_have_no_bound_and_the_mean_decides():
    loss = spread([1.0, 0.098, 0.05, 0.0], n_prompts=4, relative=0.3)
    loss *= [1.0, 0.098, 0.05, 0.0] / loss.mean(axis=0).clip(1e-12)
    recommendation = recommend(make_run(loss))
    assert recommendation.cutoff == 2
    for name in ("kl_bound", "nll_increase_bound", "disagreement_bound"):
        assert evidence(recommendation, name) == [None] * 4
    assert any("too few prompts for a confidence bound (4 of" in note for note in recommendation.data["notes"])
    assert "too few" not in str(recommend(make_run(spread(FALLING, n_prompts=5))).data["notes"])


def test_prompts_without_anything_to_cut_are_pointed_out():
    run = make_run(np.zeros((6, 5)), n_prompt=[100, 100, 2, 1, 3, 100])
    assert any("2 of 6 prompts are too short" in note for note in recommend(run).data["notes"])


# --- Goals ---


def test_each_goal_looks_at_its_own_loss():
    ones = np.ones((20, 1))
    run = make_run(
        spread(FALLING),
        nll_increase=ones * [1.0, 0.5, 0.2, 0.05, -0.01, 0.03, 0.01, 0.0],
        agreement=ones * [0.1, 0.5, 0.91, 0.93, 0.95, 0.97, 0.99, 1.0],
    )
    assert recommend(run, max_nll_increase=0.1).cutoff == 4
    assert recommend(run, max_nll_increase=0.02).cutoff == 7  # 5 is better than full depth, but 6 is not
    assert recommend(run, min_agreement=0.9).cutoff == 3
    assert recommend(run, min_agreement=0.96).cutoff == 6
    assert recommend(run, max_kl=0.6, min_agreement=0.96).cutoff == 6
    assert recommend(run, max_kl=0.05, min_agreement=0.96, max_nll_increase=0.1).cutoff == 7
    assert recommend(run, min_agreement=0.9).data["criterion"] == {"min_agreement": 0.9, "confidence": 0.95}


def test_agreement_exactly_at_the_goal_is_enough():
    for n_prompts in range(3, 25):
        run = make_run(np.zeros((n_prompts, 5)), agreement=np.ones((n_prompts, 1)) * [0.3, 0.7, 0.8, 0.9, 1.0])
        assert [recommend(run, min_agreement=goal).cutoff for goal in (0.7, 0.8, 0.9)] == [2, 3, 4]
        assert recommend(run, min_agreement=0.9001).cutoff == 5


@pytest.mark.parametrize(("budget", "cutoff"), [(1.0, 10), (0.99, 9), (0.75, 7), (0.7, 7), (0.3, 3), (0.1, 1)])
def test_kv_budget_takes_the_largest_that_fits_whatever_its_loss(budget, cutoff):
    recommendation = recommend(make_run(spread([5.0] * 9 + [0.0])), kv_budget=budget)
    assert recommendation.cutoff == cutoff
    assert evidence(recommendation, "admissible") == [k <= cutoff for k in range(1, 11)]
    assert recommendation.data["predicted"][-1]["kv_ratio"] <= budget + 1e-4


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"max_kl": -0.1}, "max_kl"),
        ({"max_kl": np.nan}, "max_kl"),
        ({"max_kl": np.inf}, "max_kl"),
        ({"max_nll_increase": -1}, "max_nll_increase"),
        ({"min_agreement": 1.5}, "min_agreement"),
        ({"min_agreement": np.nan}, "min_agreement"),
        ({"kv_budget": 2}, "kv_budget"),
        ({"kv_budget": 0.01}, "at least 0.125"),
        ({"kv_budget": 0.5, "max_kl": 0.1}, "without a loss goal"),
        ({"kv_budget": 0.5, "every_category": True}, "without a loss goal"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 0.4}, "confidence"),
    ],
)
def test_goals_that_make_no_sense_are_refused(goal, said):
    with pytest.raises(UserError, match=said):
        recommend(make_run(spread(FALLING)), **goal)


# --- The bound ---


def test_bound_is_the_analytic_one_for_normal_losses():
    values = np.random.default_rng(1).normal(2.0, 0.5, (200, 3))
    bound = upper_bound(values)
    error = values.std(axis=0, ddof=1) / np.sqrt(200)
    np.testing.assert_allclose(bound, values.mean(axis=0) + 1.645 * error, atol=0.1 * error.min())


def test_bound_agrees_with_a_percentile_bootstrap():
    values = np.random.default_rng(2).gamma(4.0, 0.1, (60, 2))
    rng = np.random.default_rng(3)
    means = values[rng.integers(60, size=(20000, 60))].mean(axis=1)
    error = values.std(axis=0) / np.sqrt(60)
    # BCa shifts the percentile a little to the right on skewed losses, and never by more than a fraction of the error.
    np.testing.assert_allclose(upper_bound(values), np.percentile(means, 95, axis=0), atol=0.25 * error.max())
    assert (upper_bound(values) > np.percentile(means, 95, axis=0)).all()


def test_bound_holds_as_often_as_it_promises():
    # Skewed losses of 25 prompts in 400 experiments; the true mean is 1. A percentile bootstrap holds in 90.5% of them.
    values = np.random.default_rng(4).exponential(size=(25, 400))
    held = (upper_bound(values, n_resamples=999) >= 1).mean()
    assert 0.915 <= held <= 0.98


def test_bound_grows_with_confidence_and_is_never_below_the_mean():
    rng = np.random.default_rng(5)
    for values in (
        rng.exponential(size=(7, 30)),
        (rng.random((9, 30)) < 0.2).astype(float),
        (rng.random((5, 30)) < 0.8).astype(float),
        np.eye(6),
    ):
        means = values.mean(axis=0)
        bounds = [upper_bound(values, confidence=c, n_resamples=1999) for c in (0.6, 0.9, 0.99)]
        assert np.isfinite(bounds).all()
        assert (means <= bounds[1] + 1e-12).all()
        assert (bounds[0] <= bounds[1]).all()
        assert (bounds[1] <= bounds[2]).all()


def test_bound_of_prompts_that_agree_is_their_value():
    values = np.column_stack([np.full(8, 0.25), np.arange(8.0)])
    bound = upper_bound(values)
    assert bound[0] == 0.25
    assert 3.5 < bound[1] < 7


def test_bound_is_reproducible():
    values = np.random.default_rng(6).exponential(size=(12, 4))
    assert (upper_bound(values, seed=3) == upper_bound(values, seed=3)).all()
    assert (upper_bound(values, seed=3) != upper_bound(values, seed=4)).any()
    loss = spread(FALLING)
    assert recommend(make_run(loss), seed=5).to_json() == recommend(make_run(loss), seed=5).to_json()


# --- What is said beside the cutoff ---


def test_regions_beside_the_measured_cutoff():
    close = recommend(make_run(spread(FALLING), layers=region_layers(2, 4, 5))).data
    assert close["selection_region"]["first"] == 2
    assert close["selection_region"]["last"] == 4
    assert close["stabilization_region"]["first"] == 5
    assert close["agreement"] == {
        "cutoff_by_selection": 5,
        "stands_for_kl": 0.1,
        "max_uptake_above": 0.2,
        "tolerance_layers": 1,
        "agree": True,
    }
    far = recommend(make_run(spread(FALLING), layers=region_layers(1, 3, 5))).data
    assert far["agreement"]["cutoff_by_selection"] == 4
    assert far["agreement"]["agree"] is False
    nothing = recommend(make_run(spread(FALLING))).data
    assert nothing["selection_region"] is nothing["stabilization_region"] is nothing["agreement"]["agree"] is None


def test_retention_is_the_share_below_the_cutoff():
    layers = {"mass_prompt": np.arange(8.0), "prompt_contribution": [1, 0, 0, 0, 0, 0, 0, 1]}
    data = recommend(make_run(spread(FALLING), layers=layers)).data
    assert data["cutoff"] == 6
    assert data["retention"] == pytest.approx({"mass_prompt": 15 / 28, "prompt_contribution": 0.5})


def test_loss_by_category():
    loss = spread(FALLING)
    data = recommend(make_run(loss)).data
    assert data["by_category"] == pytest.approx({"category 0": loss[::2, 5].mean(), "category 1": loss[1::2, 5].mean()})


def uneven():
    """Prompts of two categories in turns; the second loses twice what the first does."""
    return make_run(spread(FALLING) * np.where(np.arange(20) % 2, 1.4, 0.7)[:, None], layers=region_layers(2, 4, 5))


def test_a_category_above_the_goal_is_noted_and_may_decide():
    run = uneven()
    recommendation = recommend(run, max_kl=0.105)
    worst = max(recommendation.data["by_category"].items(), key=lambda item: item[1])
    assert (recommendation.cutoff, worst[1] > 0.105) == (6, True)
    (note,) = recommendation.data["notes"]
    assert note.startswith(f"prompts of category {worst[0]} lose {worst[1]:.3g} nats per token there, above the goal")
    assert "every category is within it from cutoff 7 on (`every_category=True`)" in note
    every = recommend(run, max_kl=0.105, every_category=True)
    assert every.cutoff == 7
    assert every.data["notes"] == []
    assert strict(every)["criterion"] == {"max_kl": 0.105, "confidence": 0.95, "every_category": True}
    assert max(every.data["by_category"].values()) <= 0.105
    # The other losses, too: 1 - agreement is a tenth of the KL here.
    assert recommend(run, min_agreement=0.9895).cutoff == 6
    assert recommend(run, min_agreement=0.9895, every_category=True).cutoff == 7
    console = Console(width=120, record=True, file=io.StringIO())
    show_recommendation(run, every, console)
    assert "KL at most 0.105, in every category" in " ".join(console.export_text().split())


def test_an_interrupted_run_is_noted():
    recommendation = recommend(make_run(spread(FALLING), n_prompts=50))
    assert any("not complete: 20 of 50 prompts" in note for note in recommendation.data["notes"])


def test_contract_of_the_file(tmp_path):
    recommendation = recommend(make_run(spread(FALLING), anchors=2))
    recommendation.save(tmp_path / "recommendation.json")
    data = read_json(tmp_path / "recommendation.json")
    assert data == strict(recommendation)
    names = "model n_layers cutoff depth_fraction anchors criterion evidence predicted"
    assert {*names.split(), "selection_region", "stabilization_region"} <= set(data)
    assert (data["model"], data["n_layers"], data["depth_fraction"], data["anchors"]) == ("made", 8, 6 / 8, 2)
    assert [row["cutoff"] for row in data["evidence"]] == list(range(1, 9))
    assert {"kl", "kl_bound", "top1_agreement", "nll_increase"} <= set(data["evidence"][0])
    assert [row["n_prompt"] for row in data["predicted"]] == [1024, 8192, 32768, 131072]
    with pytest.raises(UserError, match="cannot write"):
        recommendation.save(tmp_path / "no folder" / "recommendation.json")


def test_losses_that_are_not_numbers_are_refused_by_name():
    loss = spread(FALLING)
    loss[3, 2] = np.nan
    with pytest.raises(UserError, match="kl of prompt 'p16'"):  # the fourth of p19, p18, ...
        recommend(make_run(loss))


def test_one_token_prompts_and_one_layer_models_still_work():
    lm = tiny_model("llama")
    short = PromptSet(tuple(Prompt(id=f"p{i}", text=f"w{i + 5}") for i in range(6)), "short")
    recommendation = recommend(run := diagnose(lm, short, decode_tokens=3))
    assert run.layers[["drift_prompt", "prompt_entropy", "saliency_overlap"]].isna().all(axis=None)
    data = strict(recommendation)
    assert data["selection_region"] is data["stabilization_region"] is None
    assert data["retention"] == {"mass_prompt": None, "prompt_contribution": None}
    shown = render(lambda console: show_recommendation(run, recommendation, console), 80)
    assert shown.count("none found") == 2

    del lm.model.model.layers[1:]
    lm.model.config.num_hidden_layers = 1
    one_layer = LoadedModel.wrap(lm.model, lm.tokenizer)
    prompts = PromptSet(tuple(Prompt(id=f"p{i}", text=f"<s> w5 w6 w7 w{i + 8}") for i in range(6)), "few")
    run = diagnose(one_layer, prompts, decode_tokens=3)
    assert recommend(run).cutoff == 1
    assert "layer 0" in render(lambda console: show_recommendation(run, recommend(run), console), 80)


# --- What is printed ---


def render(show, width):
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console)
    return console.export_text()


def deep_run(n_layers):
    """A deep model, losses of all sizes, regions with ranges, and a folder name longer than the line."""
    rng = np.random.default_rng(0)
    loss = np.geomspace(12, 1e-4, n_layers) * rng.uniform(0.5, 1.5, (9, 1))
    layers = {
        "selectivity": rng.uniform(0, 1, (9, n_layers)),
        "drift_prompt_centred": np.linspace(0.4, 0, n_layers) + rng.uniform(0, 0.1, (9, n_layers)),
        "saliency_overlap": 0.9,
    }
    run = make_run(loss, layers=layers, model="/a/very/long/folder" * 8 + "/[bold]model", n_prompts=12)
    run.manifest["notes"].append(
        "2 of 9 prompts do not begin with a BoS token: [their] first anchor is an ordinary one"
    )
    return run


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("n_layers", [1, 5, 32, 40, 41, 80, 126])
def test_nothing_printed_is_cut_off(n_layers, width):
    run = deep_run(n_layers)
    for goal in ({}, {"max_kl": 2, "max_nll_increase": 2.5, "min_agreement": 0.25}, {"kv_budget": 1}):
        recommendation = recommend(run, confidence=0.975, **goal)
        text = render(lambda console, r=recommendation: show_recommendation(run, r, console), width)
        lines = text.splitlines()
        assert "…" not in text
        assert max(map(len, lines)) <= width
        cutoff = recommendation.cutoff
        for row in recommendation.evidence[max(0, cutoff - 4) : cutoff + 3]:
            (line,) = [x for x in lines if x.split()[:1] == [str(row["cutoff"])] and f"{row['kl']:.4f}" in x]
            assert f"{row['kl_bound']:.4f}" in line
            assert f"{row['top1_agreement']:.1%}" in line
            assert line.split()[-1] == ("met" if row["admissible"] else "missed")
        for row in recommendation.data["predicted"]:
            (line,) = [x for x in lines if x.split()[:1] == [f"{row['n_prompt']:,}"]]
            assert line.split()[-3] == "of"
            assert line.split()[-1] in ("MiB", "GiB")
            assert f"{row['speedup_ttft']:.2f}x" in line
        bars = [line for line in lines if "loss if cut above" in line]
        blocks = "".join(line.split("KL ")[1].split(" 0 ..")[0].strip() for line in bars)
        assert len(blocks) == n_layers
        joined = "".join(text.split())
        assert "/[bold]model" in joined
        assert "[their]firstanchor" in joined
        assert f"Recommended cutoff: {cutoff} of {n_layers} layers" in text


def test_the_run_is_shown_without_a_recommendation():
    text = render(lambda console: show_run(deep_run(80), console), 80)
    assert "…" not in text
    assert text.count("attention on prompt") == 2
    assert "regions" not in text


def test_marks_and_ruler_stand_below_their_layers():
    run = make_run(spread(FALLING), layers=region_layers(2, 4, 5))
    text = render(lambda console: show_recommendation(run, recommend(run), console), 80)
    names = ("regions", "prompt runs through", "layer")
    marks, depth, ruler = (
        next(x for x in text.splitlines() if x.startswith("│") and f" {name} " in x[:26]) for name in names
    )
    start = ruler.index("0")
    assert marks[start : start + 8] == "··sss==="
    assert depth[start : start + 8] == "━━━━━━··"  # cutoff 6: layer 5 is the last that the prompt runs through
    assert ruler[start + 5] == "5"
    assert "goal: KL at most 0.1" in text


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        (
            (2, 4, 5),
            "The layers alone say 5, which stands for a KL of 0.1; the measured loss agrees, within 1 layer.",
        ),
        (
            (1, 2, 3),
            "The layers alone say 3, which stands for a KL of 0.1; the measured loss DISAGREES, by more than 1 layer,",
        ),
    ],
)
def test_how_far_apart_agreement_may_be_is_said(regions, said):
    run = make_run(spread(FALLING), layers=region_layers(*regions))
    text = render(lambda console: show_recommendation(run, recommend(run), console), 200)
    assert said in text


def test_the_answer_stands_first_and_last():
    run = make_run(spread(FALLING), layers=region_layers(2, 4, 5))
    recommendation = recommend(run)
    lines = render(lambda console: show_recommendation(run, recommendation, console), 200).splitlines()
    assert lines[0] == lines[-1] == answer(recommendation)


def test_savings_of_the_paper_as_printed():
    loss = np.where(np.arange(1, 33) >= 24, 0.01, 1.0) * np.ones((6, 1))
    run = make_run(loss)
    assert run.manifest["shape"] == llama_8b_shape()
    text = render(lambda console: show_recommendation(run, recommend(run), console), 80)
    (line,) = [x for x in text.splitlines() if "131,072" in x]
    assert line.split() == ["131,072", "*", "-25.0%", "1.33x", "-13.3%", "-25.0%", "12.0", "GiB", "of", "16.0", "GiB"]


def test_normal_bound_is_what_scipy_says():
    # The plain use of scipy, one column at a time, for the numbers in a recommendation.
    loss = spread(FALLING, relative=0.4)
    recommendation = recommend(make_run(loss), seed=11)
    for column in (0, 4):
        expected = stats.bootstrap(
            (loss[:, column],), np.mean, alternative="less", confidence_level=0.95, rng=np.random.default_rng(1)
        ).confidence_interval.high
        assert recommendation.evidence[column]["kl_bound"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("n_prompts", [28, 300])
def test_the_bound_is_that_of_scipy(n_prompts):
    """Which draws the same resamples, and holds all of their values at once."""
    values = np.random.default_rng(3).exponential(size=(n_prompts, 5))
    for confidence in (0.6, 0.95):
        found = stats.bootstrap(
            (values,), np.mean, axis=0, alternative="less", confidence_level=confidence, rng=np.random.default_rng(0)
        )
        bound = upper_bound(values, confidence=confidence)
        np.testing.assert_allclose(bound, found.confidence_interval.high, rtol=1e-12)


def test_thousands_of_prompts_need_little_memory():
    """All values of all resamples of one loss would be 12 GB."""
    values = np.random.default_rng(4).exponential(size=(5000, 32))
    tracemalloc.start()
    try:
        bound = upper_bound(values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20
    error = values.std(axis=0) / np.sqrt(len(values))
    np.testing.assert_allclose(bound, values.mean(axis=0) + 1.645 * error, atol=0.3 * error.max())


def test_a_recommendation_that_is_no_number_is_refused_by_name():
    """The command's JSON is read by programs."""
    found = recommend(make_run([[0.5, 0.0]] * 6))
    found.data["evidence"][1]["kl"] = float("nan")
    with pytest.raises(UserError, match=r"evidence\[1\]\.kl is not a finite number"):
        found.to_json()
