"""Figures of an evaluation show its table's numbers: scores, differences, cutoffs and failures."""

import html
import json
import subprocess
import sys

import numpy as np
import pytest

from diagnostics import figures
from diagnostics.evaluate.evaluation_folder import EVALUATION, ITEMS, Evaluation
from diagnostics.evaluate.score_table import AVERAGE, cell, summarize
from diagnostics.figures.quality import policy_label
from tests.support.evaluations import CHOICE, POLICIES, WRITTEN, make_evaluation, save_evaluation
from tests.support.figures import assert_complete_figure
from tests.support.runs import run_command

MARKUP = "<b>x</b> & $y$"


@pytest.fixture(scope="module")
def summary():
    return summarize(make_evaluation())


def rows_of(summary, policy):
    return summary[summary["policy"] == policy]


def trace(figure, name):
    (found,) = [t for t in figure.data if t.name == name and t.hovertemplate]
    return found


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("full", "full depth"),
        ("speed:24", "SPEED 24"),
        ("speed:24:anchors=0", "SPEED 24, no anchor"),
        ("speed:24:anchors=4:boundary=3", "SPEED 24, anchors 4, boundary 3"),
        ("projected:22", "Projected 22"),
        ("fastkv", "FastKV"),
        ("fastkv:14:retention_rate=0.2", "FastKV, tsp layer 14, retention rate 0.2"),
        ("later:24", "later:24"),
        ("speed:0", "speed:0"),
        ("", ""),
    ],
)
def test_policies_have_names_for_readers(spec, label):
    assert policy_label(spec) == label


def test_scores_are_dots_between_their_bounds(summary):
    figure = figures.quality_scores(summary)
    assert_complete_figure(figure)
    tasks = list(figure.layout.yaxis.ticktext)
    assert tasks == ["arc_easy", "boolq", "gsm8k", f"<b>{AVERAGE}</b>"]
    for policy in POLICIES:
        rows = rows_of(summary, policy)
        dots = trace(figure, policy_label(policy))
        if policy == "full":
            np.testing.assert_allclose(np.array(dots.x, float)[::4], 100 * rows["score"])
            continue
        np.testing.assert_allclose(dots.x, 100 * rows["score"])
        np.testing.assert_allclose(dots.x + dots.error_x.array, 100 * rows["high"])
        np.testing.assert_allclose(dots.x - dots.error_x.arrayminus, 100 * rows["low"])
        assert [round(y) for y in dots.y] == [0, 1, 2, 3]
        assert [told[0] for told in dots.customdata] == list(rows["task"])
    heights = [y for policy in list(POLICIES)[1:] for y in trace(figure, policy_label(policy)).y]
    assert len(set(np.round(heights, 6))) == len(heights)
    colours = {trace(figure, policy_label(policy)).marker.color for policy in list(POLICIES)[1:]}
    assert len(colours) == len(POLICIES) - 1


def test_more_policies_than_colours_differ_in_their_marks():
    summary = summarize(make_evaluation(policies={"full": 1.0} | {f"speed:{k}": 0.9 for k in range(1, 17)}, n=5))
    figure = figures.quality_scores(summary)
    looks = {(t.marker.color, t.marker.symbol) for t in figure.data if t.mode == "markers"}
    assert len(looks) == 16


def test_differences_are_drawn_beside_zero_and_the_margin(summary):
    figure = figures.quality_differences(summary, 0.03)
    assert_complete_figure(figure)
    assert {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1} == {0, -3}
    assert figure.layout.annotations[0].text == "margin 3"
    significant = 0
    for policy in list(POLICIES)[1:]:
        rows = rows_of(summary, policy)
        dots = trace(figure, policy_label(policy))
        np.testing.assert_allclose(dots.x, 100 * rows["difference"])
        np.testing.assert_allclose(dots.x + dots.error_x.array, 100 * rows["difference_high"])
        np.testing.assert_allclose(dots.x - dots.error_x.arrayminus, 100 * rows["difference_low"])
        (stars,) = [t for t in figure.data if t.mode == "text" and t.legendgroup == policy_label(policy)]
        marked = (rows["p_holm"] < 0.05).to_numpy()
        np.testing.assert_allclose(stars.y, np.array(dots.y)[marked])
        np.testing.assert_allclose(stars.x, 100 * rows["difference_high"][marked])
        significant += len(stars.x)
        assert ["corrected" in told[1] for told in dots.customdata] == [True, True, True, False]
    assert 0 < significant < 18
    assert policy_label("full") not in {t.name for t in figure.data}


def test_full_depth_alone_has_nothing_to_compare():
    summary = summarize(make_evaluation(policies={"full": 1.0}, n=5))
    assert_complete_figure(figures.quality_scores(summary))
    assert figures.quality_differences(summary, 0.02) is None
    assert figures.quality_by_cutoff(summary) is None


def test_cutoffs_are_shares_of_full_depth_in_order(summary):
    figure = figures.quality_by_cutoff(summary)
    assert_complete_figure(figure)
    assert [a.text for a in figure.layout.annotations] == ["SPEED"]  # the other kinds have one cutoff each
    full = rows_of(summary, "full").set_index("task")["score"]
    for task in (*CHOICE, *WRITTEN, AVERAGE):
        line = trace(figure, f"<b>{task}</b>" if task == AVERAGE else task)
        assert list(line.x) == [22, 24, 26]
        scores = [rows_of(summary, f"speed:{k}").set_index("task")["score"][task] for k in line.x]
        np.testing.assert_allclose(line.y, 100 * np.array(scores) / full[task])
        np.testing.assert_allclose(list(line.customdata), scores)
    widths = {t.name: t.line.width for t in figure.data}
    assert widths[f"<b>{AVERAGE}</b>"] > widths["boolq"]
    assert [shape.y0 for shape in figure.layout.shapes] == [100]


def test_every_kind_with_two_cutoffs_has_a_panel():
    shares = {"full": 1.0, "speed:4": 0.5, "speed:8": 0.9, "projected:6": 0.7, "projected:3": 0.2}
    shares |= {"speed:4:anchors=0": 0.3, "speed:8:anchors=0": 0.4, "speed:4:boundary=2": 0.5, "unknown:7": 0.1}
    summary = summarize(make_evaluation(policies=shares, n=30))
    figure = figures.quality_by_cutoff(summary)
    assert [a.text for a in figure.layout.annotations] == ["SPEED", "Projected", "SPEED, no anchor"]
    assert len([t for t in figure.data if t.name == "boolq"]) == 3
    assert [t.showlegend for t in figure.data if t.name == "boolq"] == [True, False, False]
    (projected,) = [t for t in figure.data if t.name == "boolq" and t.yaxis == "y2"]
    assert list(projected.x) == [3, 6]
    assert len(figure.layout.shapes) == 3


def test_a_cutoff_figure_needs_full_depth_to_compare_with():
    evaluation = make_evaluation(policies={"speed:4": 0.5, "speed:8": 0.9}, n=10)
    assert figures.quality_by_cutoff(summarize(evaluation)) is None
    # Of full depth that has nothing right there is no share; of the other tasks there is.
    nothing = summarize(make_evaluation(choice=CHOICE | {"hard": 0.0}, n=30))
    assert_complete_figure(figures.quality_by_cutoff(nothing))
    assert {t.name for t in figures.quality_by_cutoff(nothing).data} == {*CHOICE, *WRITTEN, f"<b>{AVERAGE}</b>"}


def test_failures_are_means_over_generation_tasks(summary):
    figure = figures.quality_failures(summary)
    assert_complete_figure(figure)
    assert [bars.name for bars in figure.data] == ["empty"]  # what never happens has no bars
    rates = dict(zip(figure.data[0].y, figure.data[0].x, strict=True))
    assert list(rates) == [policy_label(policy) for policy in POLICIES]
    assert rates["FastKV"] == pytest.approx(100 * rows_of(summary, "fastkv")["empty"].mean())
    assert rates["FastKV"] > 0
    assert rates["SPEED 24"] == 0


@pytest.mark.parametrize("written", [{}, WRITTEN], ids=["choices", "no failure"])
def test_without_failures_there_is_no_figure(written):
    summary = summarize(make_evaluation(written=written, policies={"full": 1.0, "speed:4": 0.9}, n=10))
    assert figures.quality_failures(summary) is None


def test_what_did_not_finish_leaves_a_gap():
    evaluation = make_evaluation(n=20)
    items = evaluation.items
    gone = (items["policy"] == "speed:24") & (items["task"].isin(["boolq", "gsm8k"]))
    gone |= (items["policy"] == "full") & (items["task"] == "gsm8k")
    summary = summarize(Evaluation(evaluation.manifest, items[~gone]))
    scores, differences = figures.quality_scores(summary), figures.quality_differences(summary, 0.02)
    for figure in (scores, differences, figures.quality_by_cutoff(summary), figures.quality_failures(summary)):
        assert_complete_figure(figure)
    assert [told[0] for told in trace(scores, "SPEED 24").customdata] == ["arc_easy"]
    assert [told[0] for told in trace(differences, "SPEED 24").customdata] == ["arc_easy"]
    assert list(np.isnan(trace(figures.quality_by_cutoff(summary), "boolq").y)) == [False, True, False]


def test_one_item_has_no_interval():
    summary = summarize(make_evaluation(n=1))
    for figure in (figures.quality_scores(summary), figures.quality_differences(summary, 0.02)):
        assert_complete_figure(figure)


def test_names_are_text():
    evaluation = make_evaluation(choice={MARKUP: 0.8}, written={"long" * 30: 0.5}, n=20)
    evaluation.items["policy"] = evaluation.items["policy"].replace({"fastkv": "<i>later</i>"})
    summary = summarize(evaluation)
    drawn = [figures.quality_scores(summary), figures.quality_differences(summary, 0.02)]
    drawn += [figures.quality_by_cutoff(summary), figures.quality_failures(summary)]
    for figure in drawn:
        text = json.dumps(figure.to_plotly_json(), default=str)
        assert "<b>x" not in text
        assert "<i>" not in text
    assert "&lt;b&gt;x&lt;/b&gt; &amp; $y$" in drawn[0].layout.yaxis.ticktext
    assert max(map(len, drawn[0].layout.yaxis.ticktext)) < 40


def test_the_figures_package_does_not_load_torch():
    code = "import diagnostics.figures, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- The report of an evaluation ---


def test_the_report_has_the_table_and_every_figure(tmp_path, monkeypatch, capfd):
    made = make_evaluation(choice={MARKUP: 0.8, "boolq": 0.7}, n=60)
    made.manifest["arguments"] = {"margin": 0.07}
    folder = save_evaluation(tmp_path / "eval", made)
    status, out, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert (status, err) == (0, "")
    assert "Report: " in out
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count('class="drawing"') == 4
    assert "margin 7" in page
    table = summarize(made, margin=0.07)
    for _, row in table.iterrows():
        assert html.escape(cell(row)) in page
    assert html.escape(MARKUP) in page
    assert MARKUP not in page
    assert "Quality of made-model under 7 policies" in page


def test_the_report_leaves_out_what_cannot_be_drawn(tmp_path, monkeypatch, capfd):
    folder = save_evaluation(tmp_path / "eval", make_evaluation(policies={"full": 1.0}, n=5))
    (folder / EVALUATION).write_text('{"model": "m"}')
    status, *_ = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert status == 0
    assert (tmp_path / "a.html").read_text(encoding="utf-8").count('class="drawing"') == 1


def test_a_field_of_the_wrong_kind_is_named(tmp_path, monkeypatch, capfd):
    folder = save_evaluation(tmp_path / "eval", make_evaluation(policies={"full": 1.0}, n=5))
    (folder / EVALUATION).write_text('{"model": "m", "identity": 1}')
    status, _, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert status == 2
    assert "is damaged: evaluation.json: field identity is missing or wrong" in err


def test_a_damaged_evaluation_has_no_report(tmp_path, monkeypatch, capfd):
    folder = save_evaluation(tmp_path / "eval", make_evaluation(n=5))
    (folder / ITEMS).unlink()
    status, out, err = run_command(monkeypatch, capfd, "report", folder, "--html", tmp_path / "a.html")
    assert (status, out) == (2, "")
    assert "is not finished" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.html").exists()
