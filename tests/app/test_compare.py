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
    assert at.multiselect(key="compared").value == ["real", "tiny", "plain"], "finished ones"
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


def test_equal_runs_are_both_visible(copy, open_app):
    copy("tiny", into="one")
    at = open_app(copy("tiny", into="two").parent, "compare")
    looks = [(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for t in figure(at)["data"]]
    assert all(len(set(values)) == 2 for values in zip(*looks, strict=True))
    assert any("same settings" in caption.value for caption in at.caption)


def test_a_run_keeps_its_colour_while_others_come_and_go(library, open_app):
    at = open_app(library, "compare")
    colours = {t["name"]: t["line"]["color"] for t in figure(at)["data"]}
    assert len(set(colours.values())) == 3
    at.multiselect(key="compared").set_value(["plain", "real"]).run()
    assert {t["name"]: t["line"]["color"] for t in figure(at)["data"]} == {n: colours[n] for n in ("plain", "real")}


def test_the_settings_that_differ_are_shown_and_only_these(library, run, open_app):
    at = open_app(library, "compare")
    at.multiselect(key="compared").set_value(["real", "tiny"]).run()
    rows = table(at, 1).set_index("setting")
    assert rows.loc["model"].tolist() == ["smollm2-135m-instruct", "tiny-llama"]
    assert rows.loc["n layers"].tolist() == ["30", "5"]
    assert rows.loc["context length"].tolist()[0] == "256"
    assert (rows["real"] != rows["tiny"]).all()
    assert not rows.isna().to_numpy().any()
    assert "anchors" not in rows.index
    assert "None" not in rows.to_numpy()


def test_the_comparison_is_kept_in_the_address(library, open_app):
    at = open_app(library, "compare")
    at.selectbox(key="measure").select("selectivity")
    at.multiselect(key="compared").set_value(["tiny", "real"]).run()
    asked = dict(at.query_params)
    assert asked["compared"] == ["tiny", "real"]
    again = open_app(library, "compare", **asked)
    assert [trace["name"] for trace in figure(again)["data"]] == ["tiny", "real"]
    assert again.selectbox(key="measure").value == "selectivity"
    gone = open_app(library, "compare", compared=["tiny", "gone"])
    assert "compared is some of" in gone.warning[0].value
    assert calm(gone) == []
