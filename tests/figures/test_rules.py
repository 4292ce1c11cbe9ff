"""Figures of rules: where they put the cutoff beside the knee, what our rule reads, and what must be seen."""

import numpy as np
import pytest

from diagnostics import UserError, figures, recommend
from diagnostics.figures.values import figure_values
from tests.support.figures import assert_complete_figure
from tests.support.rules import judged, verdict, without_sweep
from tests.support.runs import FALLING, make_run, region_layers, spread

RECORDS = (
    verdict("uptake", 5, title="Uptake above (ours)", low=4, high=6),
    verdict("asl", 6, title="<ASL>"),
    verdict("layerskip", 3, title="LayerSkip"),
    verdict("cka", None, title="CKA"),
)


def trace(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def vertical(figure):
    return [shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1]


@pytest.fixture
def run():
    return make_run(spread(FALLING), layers=region_layers(2, 4, 5))


def test_rules_stand_beside_the_knee_coloured_by_their_loss():
    run, recommendation = judged(*RECORDS)
    figure = figures.rule_cutoffs(run, recommendation)
    assert_complete_figure(figure)
    # KL 0.08, 0.15 and 0.5 at a goal of 0.1
    assert trace(figure, "within the goal").y == ("&lt;ASL&gt;",)
    assert list(trace(figure, "up to twice the goal").x) == [5]
    assert trace(figure, "above that").y == ("LayerSkip",)
    ours = trace(figure, "up to twice the goal")
    assert (list(ours.error_x.array), list(ours.error_x.arrayminus)) == ([1], [1])
    assert vertical(figure) == [6]
    assert list(figure.layout.yaxis.categoryarray)[-1] == "Uptake above (ours)"
    assert "CKA" not in figure.to_json()
    assert "arXiv 2601.07667" in str(trace(figure, "within the goal").customdata)


def test_marks_follow_the_goal():
    run, recommendation = judged(*RECORDS, max_kl=0.5)
    figure = figures.rule_cutoffs(run, recommendation)
    assert set(trace(figure, "within the goal").x) == {3, 5, 6}
    assert "KL 0.5" in figure.layout.title.text


def test_without_a_loss_rules_are_drawn_without_a_judgement(run):
    records = [verdict("uptake", 5, knee=None), verdict("asl", 6, knee=None)]
    run, recommendation = judged(*records, run=without_sweep(run))
    figure = figures.rule_cutoffs(run, recommendation)
    assert_complete_figure(figure)
    assert [t.name for t in figure.data] == ["loss not measured"]
    assert vertical(figure) == []


def test_what_our_rule_reads_is_the_uptake_left_above_each_cutoff(run):
    recommendation = recommend(run)
    figure = figures.uptake_above(run, recommendation)
    assert_complete_figure(figure)
    uptake = recommendation.regions.uptake
    tails = np.array([uptake[k:].sum() for k in range(1, 8)])
    drawn = np.array(trace(figure, "uptake left above").y, float)
    np.testing.assert_allclose(drawn[tails > 0], tails[tails > 0])
    assert np.isnan(drawn[tails == 0]).all(), "a logarithmic axis has no 0"
    kl = run.cutoffs.groupby("cutoff")["kl"].mean().to_numpy()[:-1]
    np.testing.assert_allclose(trace(figure, "KL from full depth, measured").y, kl)
    limits = {note.text for note in figure.layout.annotations}
    assert limits == {"limit 0.2", "limit 0.1"}
    assert set(vertical(figure)) == {recommendation.data["agreement"]["cutoff_by_selection"]}


def test_figures_without_a_loss_show_the_rest_and_claim_none(run):
    run = without_sweep(run)
    recommendation = recommend(run)
    above = figures.uptake_above(run, recommendation)
    assert_complete_figure(above)
    assert not [t for t in above.data if t.name and "KL" in t.name]
    savings = figures.cutoff_loss(run, recommendation, cutoff=3)
    assert {t.name for t in savings.data} == {"KV, predicted", "TTFT, predicted", "TPOT, predicted"}
    assert sorted(vertical(savings)) == [3, recommendation.cutoff]
    with pytest.raises(UserError, match="no measured loss"):
        figures.measured_loss(run, recommendation)


def test_leave_one_out_loss_stands_below_uptake(run):
    assert figures.must_see(run, recommend(run)) is None
    losses = np.array([0, 0, 0.3, 0.2, 0.1, 0, 0, 0])
    run = make_run(spread(FALLING), layers=region_layers(2, 4, 5) | {"leave_one_out_kl": losses})
    recommendation = recommend(run)
    figure = figures.must_see(run, recommendation)
    assert_complete_figure(figure)
    np.testing.assert_allclose(trace(figure, "loss without this layer").y, losses)
    np.testing.assert_allclose(trace(figure, "uptake").y, recommendation.regions.uptake)
    assert [shape.y0 for shape in figure.layout.shapes] == pytest.approx([losses.mean()])
    assert len(figure_values(figure)) == 16
