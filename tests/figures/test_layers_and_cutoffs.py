"""Figures show the tables' numbers: curves, bands, regions, limits; at any number of prompts, layers and heads."""

import json

import numpy as np
import pandas as pd
import pytest
from plotly.colors import hex_to_rgb, sample_colorscale, unlabel_rgb

from diagnostics import figures, recommend
from diagnostics.cutoffs.regions import Region
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.figures.layers import PANELS
from diagnostics.figures.style import SEQUENTIAL, readable_on
from diagnostics.generation.benchmark_folder import Benchmark
from diagnostics.runs.run import Run
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
    np.testing.assert_allclose(trace(figure, "prompt, centred").y, drift.mean(axis=0))
    bands = [t for t in figure.data if t.legendgroup == "prompt, centred" and t.hoverinfo == "skip"]
    np.testing.assert_allclose([band.y for band in bands], np.quantile(drift, [0.25, 0.75], axis=0))
    np.testing.assert_allclose(trace(figure, "on the prompt").y, run.array("mass_prompt").mean(axis=(0, 2)))


def test_every_panel_has_its_heading_and_its_own_legend(run, recommendation):
    figure = figures.layer_curves(run, recommendation)
    headings = {note.text: note.y for note in figure.layout.annotations}
    assert list(headings) == [f"<b>{panel.question}</b>" for panel in PANELS.values()]
    for row, panel in enumerate(PANELS.values(), start=1):
        number = "" if row == 1 else row
        top = figure.layout[f"yaxis{number}"].domain[1]
        assert headings[f"<b>{panel.question}</b>"] == figure.layout[f"legend{number}"].y == top
        for _, name in panel.curves:
            assert (trace(figure, name).legend, trace(figure, name).yaxis) == (f"legend{number}", f"y{number}")
    assert trace(figure, "selection region").legend == "legend5"


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_alone_is_the_panel_of_all(run, recommendation, name):
    together, alone = figures.layer_curves(run, recommendation), figures.layer_panel(run, name, recommendation)
    assert_complete_figure(alone)
    assert alone.layout.title.text.startswith(PANELS[name].question)
    for _, curve in PANELS[name].curves:
        np.testing.assert_array_equal(trace(alone, curve).y, trace(together, curve).y)
    assert f"cutoff {recommendation.cutoff}" in {t.name for t in alone.data}
    assert {(s.type, s.x0, s.x1) for s in alone.layout.shapes} == {(s.type, s.x0, s.x1) for s in together.layout.shapes}


def test_sentences_say_what_the_curves_show():
    def curve(**at):
        return np.array([at.get(f"l{layer}", 0.1) for layer in range(8)])

    layers = {
        "mass_prompt": curve(l2=0.625),
        "selectivity": curve(l5=0.9),
        "prompt_contribution": curve(l3=0.6, l6=0.6),
        "drift_prompt_centred": np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]),
        "lens_kl": np.array([3.0, 9, 8, 8, 4.6, 4, 1, 0]),
    }
    kl = np.array([[3.0, 2, 1, 1, 1, 0.01, 0.01, 0]] * 6)
    made = make_run(kl, layers=layers)
    recommendation = recommend(made)
    assert recommendation.cutoff == 6
    said = figures.layer_sentences(made, recommendation)
    assert list(said) == list(PANELS)
    assert "in layer 2, 62% of it" in said["attention"]
    assert "in layer 5." in said["uptake"]
    assert "above cutoff 6 take 39% of" in said["uptake"]  # (0.6 + 0.1) / 1.8
    assert "below cutoff 6 turns the prompt's residuals by 0.50, above it by 0.25" in said["drift"]
    assert said["lens"].startswith("From layer 5 on")
    alone = figures.layer_sentences(made)
    assert "from the prompt in layer 3." in alone["uptake"]
    assert "cutoff" not in "".join(alone.values())
    missing = make_run(kl, layers=dict.fromkeys(layers, np.full(8, np.nan)))
    assert figures.layer_sentences(missing, recommendation) == dict.fromkeys(PANELS, "")


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
    # Clicks are reported for points only: there is one on every cell, with the cell's value.
    cells, points = figure.data
    assert cells.hoverinfo == "skip"
    at = np.full(np.shape(cells.z), np.nan)
    at[points.y, points.x] = points.customdata
    np.testing.assert_array_equal(at, cells.z)
    assert not figure.layout.shapes
    (frame,) = figures.head_map(run, "mass_prompt", marked=(7, 0)).layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (-0.5, 0.5, 6.5, 7.5)
    with pytest.raises(ValueError, match="not measured per head"):
        figures.head_map(run, "drift_prompt")


def test_texts_on_heat_maps_have_contrast():
    shares = np.linspace(0, 1, 101).reshape(1, 101)
    colours = readable_on(shares)
    assert colours.shape == shares.shape
    background = [unlabel_rgb(colour) for colour in sample_colorscale(SEQUENTIAL, shares[0].tolist())]

    def luminance(rgb):
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for text, colour in zip(colours[0], background, strict=True):
        dark, light = sorted((luminance(hex_to_rgb(text)), luminance(colour)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # what WCAG asks of small texts


def test_the_lens_writes_every_cell_once_and_what_is_cut_is_in_its_hover_text():
    lens = pd.DataFrame(
        {
            "prompt_id": "p0",
            "position": np.repeat(np.arange(10), 4),
            "layer": np.tile(np.arange(4), 10),
            "lens_token": np.tile([1, 2, 3, 3], 10),
            "lens_text": np.tile([" extraordinary", "<b>", "\n", "\n"], 10),
            "lens_probability": np.tile([0.0, 0.4, 0.7, 1.0], 10),
        }
    )
    tokens = pd.DataFrame({"prompt_id": "p0", "position": range(11), "text": [f"t{i}" for i in range(11)]})
    made = make_run(falling(1, 4))
    made = Run(made.manifest, made.tables | {"lens": lens, "tokens": tokens})
    figure = figures.logit_lens(made, "p0", first=1)
    assert_complete_figure(figure)
    cells, *texts = figure.data
    assert np.shape(cells.z) == (4, 8)
    assert list(figure.layout.xaxis.ticktext) == [f"t{i}" for i in range(2, 10)]
    written = {(x, y): text for t in texts for x, y, text in zip(t.x, t.y, t.text, strict=True)}
    assert sum(len(t.x) for t in texts) == len(written) == 32
    assert [written[0, layer] for layer in range(4)] == ["·extra…", "&lt;b&gt;", "<b>↵</b>", "<b>↵</b>"]
    assert cells.customdata[0][0] == "·extraordinary"
    assert {t.textfont.color for t in texts} == {"#050505", "#FFFFFF"}


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
            "ttft_s": seconds * n / 1000 * (1 + repeat * (policy == "speed") / 2),
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
    made = Benchmark({"model": "m", "hardware": "h"}, pd.DataFrame(rows))
    figure = figures.benchmark_ratios(made)
    assert_complete_figure(figure)
    measured = [t for t in figure.data if t.name == "speed:3"]
    assert [list(t.y) for t in measured] == [[0.625, 0.625], [0.5, 0.5], [0.5, 0.5]]
    for drawn, low, high in zip(measured, (0.5, 0.5, 0.5), (0.75, 0.5, 0.5), strict=True):
        # Bars reach over the ratios of all repeats.
        np.testing.assert_allclose(np.subtract(drawn.y, drawn.error_y.arrayminus), low)
        np.testing.assert_allclose(np.add(drawn.y, drawn.error_y.array), high)
    assert figures.benchmark_sentences(made) == {
        "speed:3": "At 2,048 tokens speed:3 needs 0.62 of full depth's time to first token, 0.50 of its time per "
        "further token and 0.50 of its KV cache."
    }
    alone = Benchmark(made.manifest, made.rows[made.rows["policy"] == "speed"])
    assert figures.benchmark_sentences(alone) == {}
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
    drawn = np.array(trace(figures.layer_curves(run), "contribution").y, float)
    np.testing.assert_allclose(drawn[:7], 0.2)
    assert np.isnan(drawn[7])
