"""Figures show the tables' numbers: curves, bands, regions, limits; at any number of prompts, layers and heads."""

import json

import numpy as np
import pandas as pd
import pytest

from diagnostics import figures, recommend
from diagnostics.cutoffs.regions import Region
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.generation.benchmark_folder import Benchmark
from tests.support.runs import llama_8b_shape, make_run

N_LAYERS = 32
RNG = np.random.default_rng(0)


def falling(n_prompts=6, n_layers=N_LAYERS):
    """Losses that fall to exactly 0 at full depth, a little different for each prompt."""
    curve = 3 * np.exp(-np.arange(n_layers) / 4)
    curve[-1] = 0
    return curve * RNG.uniform(0.9, 1.1, (n_prompts, 1))


@pytest.fixture(scope="module")
def run():
    uptake = np.where((np.arange(N_LAYERS) > 14) & (np.arange(N_LAYERS) < 22), 0.5, 0.01)
    drift = np.where(np.arange(N_LAYERS) < 20, 0.3, 0.02)
    layers = {"selectivity": uptake, "drift_prompt_centred": drift, "saliency_overlap": np.full(N_LAYERS, 0.9)}
    made = make_run(falling(), layers=layers)
    made.manifest["shape"] = llama_8b_shape()
    return made


@pytest.fixture(scope="module")
def recommendation(run):
    return recommend(run)


def trace(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def assert_complete_figure(figure):
    """It is JSON, without NaN, has a title, titled axes and hover texts; nothing is drawn in black or white."""
    text = figure.to_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert figure.layout.title.text
    drawn = [t for t in figure.data if t.hoverinfo != "skip" and t.x is not None and len(t.x) and t.x[0] is not None]
    assert all(t.hovertemplate and "extra" in t.hovertemplate for t in drawn)
    assert any(axis.title.text for axis in figure.select_xaxes())
    assert any(axis.title.text for axis in figure.select_yaxes())
    assert "#000000" not in text
    assert "rgba(0, 0, 0, 0)" in (figure.layout.paper_bgcolor, figure.layout.plot_bgcolor)


def test_layer_curves_are_means_between_quartiles(run, recommendation):
    figure = figures.layer_curves(run, recommendation)
    assert_complete_figure(figure)
    drift = run.array("drift_prompt_centred")
    np.testing.assert_allclose(trace(figure, "drift: prompt, centred").y, drift.mean(axis=0))
    bands = [t for t in figure.data if t.legendgroup == "drift: prompt, centred" and t.hoverinfo == "skip"]
    np.testing.assert_allclose([band.y for band in bands], np.quantile(drift, [0.25, 0.75], axis=0))
    np.testing.assert_allclose(
        trace(figure, "share of the attention: on the prompt").y, run.array("mass_prompt").mean(axis=(0, 2))
    )


def test_regions_and_cutoff_are_marked_between_layers(run, recommendation):
    selection, stable = recommendation.selection_region, recommendation.stabilization_region
    assert isinstance(selection, Region)
    assert isinstance(stable, Region)
    shapes = figures.layer_curves(run, recommendation).layout.shapes
    spans = {(s.x0, s.x1) for s in shapes if s.type == "rect"}
    assert spans == {(r.first - 0.5, r.last + 0.5) for r in (selection, stable)}
    assert {s.x0 for s in shapes if s.type == "line"} == {recommendation.cutoff - 0.5}
    assert not figures.layer_curves(run).layout.shapes


def test_head_map(run):
    figure = figures.head_map(run, "mass_prompt")
    assert_complete_figure(figure)
    np.testing.assert_allclose(figure.data[0].z, run.array("mass_prompt").mean(axis=0))
    with pytest.raises(ValueError, match="not measured per head"):
        figures.head_map(run, "drift_prompt")


def test_loss_tolerance_bound_and_savings(run, recommendation):
    figure = figures.cutoff_loss(run, recommendation, n_prompt=4096)
    assert_complete_figure(figure)
    shown = trace(figure, "KL from full depth")
    kl = run.array("kl").mean(axis=0)
    np.testing.assert_allclose(np.array(shown.y, float)[:-1], kl[:-1])
    assert shown.y[-1] is None or np.isnan(shown.y[-1])  # 0 has no place on a logarithmic axis
    tolerance = [s for s in figure.layout.shapes if s.line.dash == "dash"]
    assert [s.y0 for s in tolerance] == [0.1]
    (said,) = [a for a in figure.layout.annotations if a.text == "tolerance 0.1"]
    assert said.y == pytest.approx(-1)  # of a logarithmic axis
    (band,) = [t for t in figure.data if t.fill == "tonexty"]
    bound = [row["kl_bound"] for row in recommendation.evidence]
    np.testing.assert_allclose(np.array(band.y, float)[:-1], bound[:-1])
    assert (np.array(bound)[:-1] > kl[:-1]).all()
    for name, field in (("TTFT", "ttft_ratio"), ("TPOT", "tpot_ratio"), ("KV", "kv_ratio")):
        expected = [
            getattr(predict_savings(run.manifest["shape"], k, lengths=[4096])[0], field) for k in range(1, N_LAYERS + 1)
        ]
        np.testing.assert_allclose(trace(figure, f"{name}, predicted").y, expected)


def test_without_a_bound_there_is_no_band():
    run = make_run(falling(n_prompts=2))
    run.manifest["shape"] = llama_8b_shape()
    figure = figures.cutoff_loss(run, recommend(run))
    assert_complete_figure(figure)
    assert not [t for t in figure.data if t.fill == "tonexty"]


def test_retention_ends_at_one_and_passes_the_recommendations_number(run, recommendation):
    figure = figures.retention(run, recommendation)
    assert_complete_figure(figure)
    curve = trace(figure, "attention mass").y
    assert curve[-1] == pytest.approx(1)
    assert (np.diff(curve) >= 0).all()
    assert curve[recommendation.cutoff - 1] == pytest.approx(recommendation.data["retention"]["mass_prompt"], abs=1e-6)


@pytest.mark.parametrize(("n_prompts", "n_layers"), [(1, 2), (2, 5), (3, 80)])
def test_small_and_large_runs(n_prompts, n_layers):
    run = make_run(falling(n_prompts, n_layers))
    shape = llama_8b_shape()
    layers = {"layer_parameters": [10] * n_layers, "layer_types": ["full_attention"] * n_layers}
    run.manifest["shape"] = shape | layers
    recommendation = recommend(run)
    made = [
        figures.layer_curves(run, recommendation),
        figures.head_map(run, "mass_prompt"),
        figures.cutoff_loss(run, recommendation),
        figures.retention(run),
        figures.compare_runs([run]),
    ]
    for figure in made:
        assert_complete_figure(figure)
    for axis in made[0].select_xaxes():
        assert axis.dtick is None or n_layers / axis.dtick <= 20


def test_benchmark_ratios():
    rows = [
        {
            "policy": policy,
            "spec": spec,
            "cutoff": 3,
            "n_prompt": n,
            "batch_size": 1,
            "repeat": repeat,
            "ttft_s": seconds * n / 1000,
            "tpot_s": seconds / 10,
            "kv_bytes": int(100 * seconds),
            "peak_bytes": 1.0,
            "kv_bytes_formula": 1,
            "prefill_tflops": 1.0,
            "decode_gb_s": 1.0,
            "ttft_limit": 0.4,
            "tpot_limit": 0.6,
            "kv_limit": 0.5,
        }
        for policy, spec, seconds in (("full", "full", 2.0), ("speed", "speed:3", 1.0))
        for n in (512, 2048)
        for repeat in range(2)
    ]
    figure = figures.benchmark_ratios(Benchmark({"model": "m", "hardware": "h"}, pd.DataFrame(rows)))
    assert_complete_figure(figure)
    measured = [t for t in figure.data if t.name == "speed:3"]
    assert [list(t.y) for t in measured] == [[0.5, 0.5]] * 3
    assert [list(t.x) for t in measured] == [[512, 2048]] * 3
    assert sorted(t.y[0] for t in figure.data if t.name == "speed:3: limit") == [0.4, 0.5, 0.6]
    assert [t.showlegend for t in measured] == [True, False, False]


def test_runs_compared_on_relative_depth():
    runs = [make_run(falling(3, n), model=f"m{n}") for n in (4, 8)]
    figure = figures.compare_runs(runs)
    assert_complete_figure(figure)
    for run, drawn in zip(runs, figure.data, strict=True):
        assert drawn.name == run.name
        np.testing.assert_allclose(drawn.x, np.arange(1, run.n_layers + 1) / run.n_layers)
        np.testing.assert_allclose(np.array(drawn.y, float)[:-1], run.array("kl").mean(axis=0)[:-1])
        assert drawn.y[-1] is None or np.isnan(drawn.y[-1])  # full depth against itself
    assert [line.name for line in figures.compare_runs(runs, names=["<b>", "y"]).data] == ["&lt;b&gt;", "y"]


def test_full_depth_is_drawn_where_it_is_compared_with_a_teacher():
    run = make_run(falling(3, 8) + 0.05)
    run.manifest["identity"] = run.manifest.get("identity", {}) | {"teacher": "0123"}
    wanted = run.array("kl").mean(axis=0)
    np.testing.assert_allclose(np.array(figures.compare_runs([run]).data[0].y, float), wanted)
    drawn = trace(figures.cutoff_loss(run, recommend(run)), "KL from full depth").y
    np.testing.assert_allclose(np.array(drawn, float), wanted)


def test_what_is_missing_or_infinite_leaves_a_gap():
    """A zero embedding makes the first layer's contribution infinite; the last layer has no saliency overlap."""
    curve = np.full((4, 8), 0.2)
    curve[1, 0], curve[:, 7] = np.inf, np.nan
    run = make_run(falling(4, 8), layers={"prompt_contribution": curve, "selectivity": curve})
    run.manifest["shape"] = llama_8b_shape() | {"layer_parameters": [1] * 8, "layer_types": ["full_attention"] * 8}
    for figure in (figures.layer_curves(run), figures.retention(run)):
        assert_complete_figure(figure)
    drawn = np.array(trace(figures.layer_curves(run), "taken from the prompt: contribution").y, float)
    np.testing.assert_allclose(drawn[:7], 0.2)
    assert np.isnan(drawn[7])
