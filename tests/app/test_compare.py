"""The page *Compare*: runs side by side."""

import numpy as np
import pytest

from diagnostics import load_run, recommend
from diagnostics.figures.style import per_layer
from diagnostics.support.finite import finite_mean
from tests.support.pages import calm, figure, numbers, same, table


def test_runs_are_compared_at_relative_depth(library, run, open_app):
    at = open_app(library, "compare")
    assert calm(at) == []
    assert at.multiselect(key="compared").value == ["real", "tiny", "plain", "interrupted"]
    at.multiselect(key="compared").set_value(["tiny", "real"]).run()
    at.slider(key="same_goal").set_value(0.5).run()
    tiny = load_run(library / "tiny")
    drawn = figure(at)
    assert [trace["name"] for trace in drawn["data"]] == ["tiny", "real"]
    for found, trace in zip((tiny, run), drawn["data"], strict=True):
        n = found.n_layers
        same(numbers(trace["x"]), np.arange(1, n + 1) / n)
        same(numbers(trace["y"])[:-1], per_layer(found, "kl").mean(0)[:-1])
    lines = table(at).set_index("run")
    for name, found in (("tiny", tiny), ("real", run)):
        data = recommend(found, max_kl=0.5).data
        at_cutoff = data["evidence"][data["cutoff"] - 1]
        line = lines.loc[name]
        assert (line["cutoff"], line["layers"]) == (data["cutoff"], found.n_layers)
        assert line["KL"] == pytest.approx(at_cutoff["kl"], abs=6e-4)
        assert line["bound"] == pytest.approx(at_cutoff["kl_bound"], abs=6e-4)
        assert line["depth"] == pytest.approx(data["depth_fraction"], abs=6e-4)
    for measure in ("top1_agreement", "selectivity", "drift_prompt_centred", "saliency_overlap", "lens_kl"):
        at.selectbox(key="measure").select(measure).run()
        assert calm(at) == []
        same(numbers(figure(at)["data"][1]["y"]), finite_mean(per_layer(run, measure), axis=0))


def test_nothing_chosen_is_an_advice(library, open_app):
    at = open_app(library, "compare")
    at.multiselect(key="compared").set_value([]).run()
    assert calm(at) == []
    assert "Choose at least one run" in at.info[0].value
    assert not at.get("plotly_chart")


def test_a_single_run_is_compared_with_nothing(copy, open_app):
    at = open_app(copy("tiny").parent, "compare")
    assert calm(at) == []
    assert [trace["name"] for trace in figure(at)["data"]] == ["tiny"]
