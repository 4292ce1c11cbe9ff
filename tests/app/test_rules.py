"""The part of the page *Cutoff* on rules, and every page of a run whose loss was not measured."""

import io

import numpy as np
import pandas as pd
import pytest

from diagnostics import load_run, recommend
from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.rule_verdicts import rule_verdicts, rules_sentence
from diagnostics.cutoffs.rules import all_rules
from diagnostics.report import report
from diagnostics.runs.schema import COLUMNS
from diagnostics.support.glossary import GLOSSARY
from tests.support.pages import (
    calm,
    curve,
    downloads,
    edit_manifest,
    edit_table,
    figure,
    figure_title,
    go,
    literal,
    metrics,
    same,
    table,
)

RULES_FIGURE = 2  # behind the loss and the retention
LOSSES = ("kl", "top1_agreement", "nll", "nll_full")


def texts(at):
    return [literal(element.value) for element in (*at.markdown, *at.caption, *at.info)]


@pytest.fixture
def unmeasured(copy):
    """The run of the embedded model without its sweep, alone in a folder."""
    folder = copy("real")
    edit_manifest(folder, sweep=False)
    edit_table(folder, "cutoffs", lambda rows: rows.assign(**dict.fromkeys(LOSSES, np.nan)))
    return folder


# --- Rules ---


def test_one_sentence_figure_and_table_say_which_rules_would_have_been_right(library, run, open_app):
    at = open_app(library, "cutoff")
    assert calm(at) == []
    recommendation = recommend(run, max_kl=0.3)
    assert rules_sentence(recommendation) in texts(at)
    assert figure_title(at, RULES_FIGURE).startswith("Where rules put the cutoff for KL 0.3")
    verdicts = rule_verdicts(recommendation)
    drawn = figure(at, RULES_FIGURE)
    lines = {shape["x0"] for shape in drawn["layout"]["shapes"]}
    assert lines == {verdicts["knee"].iloc[0]}
    shown = table(at, 1)
    assert list(shown["title"]) == list(verdicts["title"])
    pd.testing.assert_series_equal(shown["cutoff"], verdicts["cutoff"])
    pd.testing.assert_series_equal(shown["kl"], verdicts["kl"])
    same(shown["saved_vs_knee"], 100 * verdicts["saved_vs_knee"])
    whole = "\n".join(texts(at))
    assert all(rule.title in whole for rule in all_rules().values())


def test_rules_follow_the_goal_of_the_page(library, run, open_app):
    at = open_app(library, "cutoff")
    knees = set()
    for limit in (0.01, 0.1, 1.0):
        (slider,) = [s for s in at.slider if " most, " in s.label]
        slider.set_value(limit).run()
        assert calm(at) == []
        recommendation = recommend(run, max_kl=limit)
        assert rules_sentence(recommendation) in texts(at)
        knees.add(rule_verdicts(recommendation)["knee"].iloc[0])
    assert len(knees) > 1


def test_the_table_of_rules_can_be_taken_along(library, run, open_app, monkeypatch):
    offered = downloads(monkeypatch)
    open_app(library, "cutoff")
    taken = pd.read_csv(io.BytesIO(offered["real-rules.csv"]))
    verdicts = rule_verdicts(recommend(run, max_kl=0.3))
    assert list(taken["rule"]) == list(verdicts["rule"])
    same(taken["cutoff"].to_numpy(float), verdicts["cutoff"].to_numpy(float))


def test_a_run_from_before_the_rules_says_how_to_measure_them(copy, open_app):
    folder = copy("tiny")
    read_by_rules = {column for rule in all_rules().values() for column in rule.reads}
    since = [name for name in load_run(folder).layers if name in read_by_rules - set(COLUMNS["layers"].split())]
    edit_table(folder, "layers", lambda rows: rows.drop(columns=since))
    at = open_app(folder.parent, "cutoff")
    assert calm(at) == []
    absent = rule_verdicts(recommend(load_run(folder)))
    assert absent["absent"].sum() > 5
    assert any("`speed-diagnostics recommend MODEL --rules all`" in text for text in texts(at))


# --- No loss was measured ---


def test_the_overview_says_that_no_loss_was_measured(unmeasured, open_app):
    at = open_app(unmeasured.parent)
    assert calm(at) == []
    recommendation = recommend(load_run(unmeasured), max_kl=0.3)
    assert f"#### {answer(recommendation)}" in texts(at)
    assert any("no loss was measured" in text for text in texts(at))
    left = recommendation.regions.uptake[recommendation.cutoff :].sum()
    assert metrics(at)["Uptake left above"] == f"{left:.3f}"
    assert "KL from full depth" not in metrics(at)
    assert figure_title(at).startswith("What our rule reads")
    assert np.isfinite(curve(figure(at), "uptake left above")[:-1]).all()
    line = table(at).set_index("run").loc["real"]
    assert line["cutoff"] == recommendation.cutoff
    assert np.isnan(line["KL"])


def test_the_page_cutoff_works_without_a_loss(unmeasured, open_app):
    at = open_app(unmeasured.parent, "cutoff")
    assert calm(at) == []
    run = load_run(unmeasured)
    assert any("No loss was measured. Our rule says" in text for text in texts(at))
    assert not at.success
    assert not at.warning
    assert "KL from full depth" not in metrics(at)
    assert figure_title(at).startswith("Savings at 8,192 tokens")
    assert rules_sentence(recommend(run, max_kl=0.3)) in texts(at)
    (goals,) = [box for box in at.multiselect if box.label == "What is limited"]
    assert len(goals.options) == 2, "those that need no measured loss"
    (slider,) = [s for s in at.slider if " most, " in s.label]
    slider.set_value(0.05).run()
    (cutoff,) = [s for s in at.slider if s.label.startswith("Cutoff")]
    assert cutoff.value == recommend(run, max_kl=0.05).cutoff
    cutoff.set_value(3).run()
    assert any("and 3 is lower" in text for text in texts(at))
    goals.set_value(["kv_budget"]).run()
    assert calm(at) == []


def test_other_pages_and_the_report_work_without_a_loss(unmeasured, open_app):
    at = open_app(unmeasured.parent, "layers")
    assert calm(at) == []
    assert at.get("plotly_chart")
    go(at, "compare")
    assert calm(at) == []
    assert "No loss was measured in real" in literal(at.info[0].value)
    assert not at.get("plotly_chart")
    at.selectbox(key="measure").select("selectivity").run()
    assert calm(at) == []
    assert at.get("plotly_chart")
    go(at, "playground")
    assert calm(at) == []
    run = load_run(unmeasured)
    assert "No loss was measured" in report(run, recommend(run))


def test_a_run_with_a_loss_is_compared_with_one_without(unmeasured, copy, open_app):
    copy("tiny")
    at = open_app(unmeasured.parent, "compare")
    assert calm(at) == []
    assert [trace["name"] for trace in figure(at)["data"]] == ["tiny"]
    assert list(table(at)["run"]) == ["real", "tiny"]


def test_terms_are_explained(library, open_app):
    at = open_app(library, "cutoff")
    helps = {element.proto.help for element in (*at.markdown, *at.subheader) if element.proto.help}
    assert {GLOSSARY["rule"], GLOSSARY["knee"], GLOSSARY["uptake"]} <= helps
