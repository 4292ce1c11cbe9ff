"""What results, models and policies show of themselves at a prompt of Python and in a notebook."""

import re

import numpy as np
import pytest

from diagnostics import FullPolicy, SpeedPolicy, UserError, load_run, recommend
from diagnostics.cutoffs.answer import answer
from diagnostics.runs.example import RUN, example_folder
from diagnostics.support.overview import Overview
from tests.support.evaluations import make_evaluation
from tests.support.finetunings import make_finetuning
from tests.support.runs import make_run
from tests.support.tiny import tiny_model


def run_of(model="made"):
    return make_run(np.tile([2.0, 1.0, 0.05, 0.01, 0.0], (6, 1)), model=model)


def test_a_recommendation_is_its_answer_and_a_few_facts():
    recommendation = recommend(run_of())
    lines = repr(recommendation).splitlines()
    assert lines[0] == "Cutoff 3 of 5 for made"
    assert lines[1].strip() == answer(recommendation)
    assert re.search(r"goal +KL at most 0.1$", lines[2])
    assert "KL 0.0500 nats per token" in lines[3]
    assert str(recommendation) == repr(recommendation)
    assert len(repr(recommendation)) < 1000


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (run_of(), ["Run made: 6 prompts", "made, 5 layers", "cutoffs (30 rows)"]),
        (
            tiny_model("llama"),
            ["Model tiny-llama", "5, each 4 heads of 8 (2 KV)", "float32 on cpu"],
        ),
        (make_evaluation(), ["Evaluation of made-model", "arc_easy (120 items)", "speed:24 "]),
        (make_finetuning(anchors=1), ["Fine-tuning of ", "KL at that cutoff", " before, "]),
    ],
    ids=lambda shown: type(shown).__name__,
)
def test_results_and_models_are_a_few_lines(shown, said):
    text = repr(shown)
    assert len(text.splitlines()) <= 8
    assert max(map(len, text.splitlines())) < 400
    page = shown._repr_html_()
    for part in said:
        assert part in text
        assert part in page


def test_a_recommendation_is_made_of_a_run_or_its_folder():
    assert recommend(example_folder() / RUN).data == recommend(load_run(str(example_folder() / RUN))).data
    with pytest.raises(UserError, match="the run is 24: give what `diagnose` returns, or a run folder"):
        recommend(24)


def test_policies_stay_what_python_reads_and_have_a_card():
    policy = SpeedPolicy(24, anchors=2)
    assert eval(repr(policy)) == policy
    assert "SPEED (speed:24:anchors=2)" in policy._repr_html_()
    assert ">anchors</th>" in policy._repr_html_()
    assert "<table" not in FullPolicy()._repr_html_()


def test_a_card_has_no_markup_of_others_and_no_colour_of_its_own():
    hostile = "<script>alert(1)</script>"
    for page in (run_of(hostile)._repr_html_(), Overview(hostile, hostile, {hostile: hostile}).html()):
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert not re.search(r"[^-]color:|background:(?!none)", page)


def test_what_is_not_known_is_left_out():
    assert Overview("title", facts={"a": None, "bc": 0}).text() == "title\n  bc  0"
