"""Figures of a fine-tuning show its tables' numbers; so does its report."""

import html
import json

import numpy as np
import pytest

from diagnostics import figures, recommend
from diagnostics.finetune.finetuning_folder import AFTER, BEFORE, FineTuning, load_finetuning
from diagnostics.report import finetuning_data
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.support.errors import UserError
from tests.support.figures import assert_complete_figure
from tests.support.finetunings import DAMAGE, N_LAYERS, TRAINED, make_finetuning, save_finetuning
from tests.support.runs import run_command

MARKUP = "<b>x</b> & $y$"


@pytest.fixture(scope="module")
def made():
    return make_finetuning()


def named(figure, name):
    (found,) = [trace for trace in figure.data if trace.name == name and trace.showlegend is not False]
    return found


# --- Cutoffs ---


def test_cutoffs_before_and_after_are_means_over_prompts(made):
    figure = figures.finetuning_cutoffs(made, 0.2)
    assert_complete_figure(figure)
    for name, step in (("before", 0), ("after", 40)):
        line = named(figure, name)
        mean = made.sweeps[made.sweeps["step"] == step].groupby("cutoff")["kl"].mean()
        assert list(line.x) == list(range(1, N_LAYERS + 1))
        np.testing.assert_allclose(line.y[:-1], mean.to_numpy()[:-1])
        np.testing.assert_allclose(line.customdata, made.curve(step, "top1_agreement"))
    assert np.isnan(named(figure, "before").y[-1])  # it is compared with itself there
    assert named(figure, "after").y[-1] == pytest.approx(0.01, abs=1e-4)  # its own drift
    assert figure.layout.yaxis.type == "log"
    assert {shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1} == {0.2}
    assert {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1} == {TRAINED}
    assert {note.text for note in figure.layout.annotations} == {"goal 0.2", "trained at 3"}
    assert "full depth before training" in figure.layout.yaxis.title.text


def test_measurements_on_the_way_darken(made):
    figure = figures.finetuning_cutoffs(made)
    between = [trace for trace in figure.data if trace.legendgroup == "between"]
    assert [trace.hovertemplate.partition("<")[0] for trace in between] == ["step 10", "step 20", "step 30"]
    for trace, step in zip(between, (10, 20, 30), strict=True):
        np.testing.assert_allclose(trace.y, made.curve(step))
    shades = [trace.opacity for trace in between]
    assert shades == sorted(set(shades))
    assert [trace.name for trace in between if trace.showlegend] == ["steps 10 to 30"]
    assert not [shape for shape in figure.layout.shapes if shape.y0 == shape.y1 == 0.2]


def test_of_many_measurements_few_are_drawn():
    made = make_finetuning(n_steps=100, every=1, n_prompts=2)
    figure = figures.finetuning_cutoffs(made)
    assert_complete_figure(figure)
    between = [trace.hovertemplate.partition("<")[0] for trace in figure.data if trace.legendgroup == "between"]
    assert len(between) == len(set(between)) == 8
    assert (between[0], between[-1]) == ("step 1", "step 99")
    assert list(named(figures.finetuning_steps(made), "KL at cutoff 3, held-out prompts").x) == list(range(101))


def test_against_itself_full_depth_has_no_place():
    made = make_finetuning(against="itself")
    figure = figures.finetuning_cutoffs(made)
    assert all(np.isnan(trace.y[-1]) for trace in figure.data)
    assert "own full depth" in figure.layout.yaxis.title.text


def test_unfinished_it_is_not_called_after():
    made = make_finetuning(status="running")
    assert {"before", "step 40"} <= {trace.name for trace in figures.finetuning_cutoffs(made).data}
    assert "step 40" in {trace.name for trace in figures.finetuning_categories(made).data}
    two = FineTuning(made.manifest, made.steps, made.sweeps[made.sweeps["step"].isin([0, 10])])
    assert [trace.name for trace in figures.finetuning_cutoffs(two).data] == ["before", "step 10"]


@pytest.mark.parametrize("n_steps", [0, 5])
def test_one_measurement_is_drawn_alone(made, n_steps):
    part = FineTuning(made.manifest | {"status": "running"}, made.steps[:n_steps], made.sweeps.query("step == 0"))
    drawn = [figures.finetuning_cutoffs(part), figures.finetuning_steps(part), figures.finetuning_categories(part)]
    for figure in drawn:
        assert_complete_figure(figure)
    assert [trace.name for trace in drawn[0].data] == ["before"]
    assert {trace.name for trace in drawn[2].data} == {"before"}
    assert list(drawn[2].data[0].y) == [0, 1]
    assert all(figure.layout.showlegend for figure in drawn)
    assert ("training loss" in {trace.name for trace in drawn[1].data}) == bool(n_steps)
    assert list(named(drawn[1], "KL at cutoff 3, held-out prompts").x) == [0]


def test_nothing_measured_is_no_figure(made):
    none = FineTuning(made.manifest, made.steps[:0], made.sweeps[:0])
    assert figures.finetuning_cutoffs(none) is None
    assert figures.finetuning_steps(none) is None
    assert figures.finetuning_categories(none) is None
    loss = FineTuning(made.manifest, made.steps, made.sweeps[:0])
    assert [trace.name for trace in figures.finetuning_steps(loss).data] == ["training loss", "its mean over 4 steps"]


# --- Steps ---


def test_the_loss_of_every_step_its_mean_and_held_out_prompts(made):
    figure = figures.finetuning_steps(made)
    assert_complete_figure(figure)
    loss = made.steps["loss"].to_numpy()
    np.testing.assert_allclose(named(figure, "training loss").y, loss)
    assert list(named(figure, "training loss").x) == list(range(1, 41))
    mean = named(figure, "its mean over 4 steps").y
    assert mean[0] == loss[0]
    np.testing.assert_allclose(mean[3:], np.convolve(loss, np.ones(4) / 4, "valid"))
    held_out = named(figure, "KL at cutoff 3, held-out prompts")
    assert list(held_out.x) == [0, 10, 20, 30, 40]
    np.testing.assert_allclose(held_out.y, [made.curve(step)[TRAINED] for step in held_out.x])
    assert {trace.yaxis for trace in figure.data} == {"y"}  # a cutoff that stays has no panel


def test_a_cutoff_that_is_lowered_has_a_panel():
    made = make_finetuning(start=5)
    figure = figures.finetuning_steps(made)
    assert_complete_figure(figure)
    line = named(figure, "cutoff of the step")
    assert (line.yaxis, line.line.shape) == ("y2", "hv")
    assert list(line.y) == list(made.steps["cutoff"])
    assert (line.y[0], line.y[-1]) == (5, TRAINED)
    held_out = named(figure, "KL at cutoff 3, held-out prompts")
    assert held_out.yaxis == "y"


def test_few_steps_have_points_and_no_mean():
    figure = figures.finetuning_steps(make_finetuning(n_steps=4, every=2))
    assert [trace.name for trace in figure.data] == ["training loss", "KL at cutoff 3, held-out prompts"]
    assert figure.data[0].mode == "lines+markers"
    assert figure.layout.xaxis.dtick == 2


# --- Categories ---


@pytest.mark.parametrize("cutoff", [None, 5])
def test_categories_are_means_with_their_prompts(made, cutoff):
    figure = figures.finetuning_categories(made, cutoff, 0.2)
    assert_complete_figure(figure)
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]
    at = made.sweeps[made.sweeps["cutoff"] == (cutoff or TRAINED)]
    for name, step in (("before", 0), ("after", 40)):
        rows = at[at["step"] == step]
        bars, dots = [trace for trace in figure.data if trace.name == name]
        np.testing.assert_allclose(bars.x, rows.groupby("category")["kl"].mean())
        assert [told[1] for told in bars.customdata] == [3, 3]
        np.testing.assert_allclose(dots.x, rows["kl"])
        assert list(dots.text) == list(rows["prompt_id"])
        # Each dot lies in the bar of its category, and none on another.
        centre = np.array([bars.y[["a", "b"].index(category)] for category in rows["category"]])
        assert (np.abs(dots.y - centre) < bars.width / 2).all()
        assert len(set(np.round(dots.y, 6))) == len(dots.y)
    assert f"cutoff {cutoff or TRAINED}" in figure.layout.xaxis.title.text
    assert "goal 0.2" in figure.layout.xaxis.title.text
    assert {shape.x0 for shape in figure.layout.shapes} == {0.2}


@pytest.mark.parametrize("cutoff", [0, 7, -1])
def test_a_cutoff_that_the_model_does_not_have(made, cutoff):
    with pytest.raises(UserError, match="give 1 to 6"):
        figures.finetuning_categories(made, cutoff)


def test_names_are_text():
    made = make_finetuning(categories=(MARKUP, "plain"))
    made.manifest["model"] = MARKUP
    made.sweeps["prompt_id"] = made.sweeps["prompt_id"].replace({"p0": MARKUP})
    for figure in (
        figures.finetuning_cutoffs(made),
        figures.finetuning_steps(made),
        figures.finetuning_categories(made),
    ):
        assert "<b>x" not in json.dumps(figure.to_plotly_json(), default=str)
        assert "&lt;b&gt;x" in figure.layout.title.text
    assert "&lt;b&gt;x&lt;/b&gt; &amp; $y$" in figure.layout.yaxis.ticktext


# --- Reading and reporting ---


def test_what_became_of_the_data_is_one_line(made):
    assert "10 loaded: 8 kept (1 of them cut at the end), 2 dropped" in finetuning_data(made.manifest)
    for data in (None, [], {"more": 1}, {"loaded": "x"}):
        assert finetuning_data({"data": data}) == ""
    assert finetuning_data({}) == ""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_fine_tuning_has_no_report(tmp_path, monkeypatch, capfd, damage):
    folder = save_finetuning(tmp_path / "tuned", make_finetuning())
    assert load_finetuning(folder).complete
    DAMAGE[damage](folder)
    with pytest.raises(UserError, match="tuned"):
        load_finetuning(folder)
    status, out, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "a.html").exists()


def test_the_report_has_both_recommendations_and_every_figure(tmp_path, monkeypatch, capfd):
    made = make_finetuning(categories=(MARKUP, "plain"))
    folder = save_finetuning(tmp_path / "tuned", made, goals={"max_kl": 0.3})
    status, out, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert (status, err) == (0, "")
    assert "Report: " in out
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count('class="drawing"') == 12
    cutoffs = [recommend(run, max_kl=0.3).cutoff for run in map(saved_run(folder), (BEFORE, AFTER))]
    assert cutoffs[0] > cutoffs[1]
    assert f"Goal of 0.3 nats per token: cutoff {cutoffs[0]} of 6 before training, {cutoffs[1]} after it." in page
    assert f"<h1>Cutoff {cutoffs[1]} of 6 for made-model trained at 3</h1>" in page
    assert "10 loaded: 8 kept" in page
    assert html.escape(MARKUP) in page
    assert MARKUP not in page


def saved_run(folder):
    from diagnostics import load_run

    return lambda name: load_run(folder / name)


def test_an_unfinished_one_has_no_report_yet(tmp_path, monkeypatch, capfd):
    folder = save_finetuning(tmp_path / "tuned", make_finetuning(status="running"), runs=(BEFORE,))
    status, _, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert status == 2
    assert "is not finished: continue it with --resume" in err
    assert not load_finetuning(folder).complete


@pytest.mark.parametrize("text", ["{}", "[]", '{"criterion": {"max_kl": "low"}}', '{"criterion": {"max_kl": 0.1}}'])
def test_a_recommendation_changed_by_hand_is_one_line(tmp_path, monkeypatch, capfd, text):
    folder = save_finetuning(tmp_path / "tuned", make_finetuning())
    (folder / RECOMMENDATION).write_text(text)
    status, out, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "tuned" in err
