"""The dashboard's pages, one by one, on a real run of the embedded model, on tiny runs, and on folders that are broken.

Every number on a page is compared with what the package itself says of the same folder.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.runtime.memory_media_file_storage import MemoryMediaFileStorage
from streamlit.testing.v1 import AppTest

from dashboard import jobs
from diagnostics import FullPolicy, SpeedPolicy, diagnose, load_prompts, load_run, recommend
from diagnostics.cutoffs.recommendation import loss_by_category, retention_at
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.figures.layers import CURVES
from diagnostics.figures.style import per_layer
from diagnostics.generation.benchmarks import BENCHMARK_MANIFEST, benchmark, load_benchmark
from diagnostics.generation.generation import generate
from diagnostics.prompts.encoding import encode_input
from diagnostics.runs.run import MANIFEST, RECOMMENDATION
from diagnostics.support.files import read_json
from diagnostics.support.finite import finite_mean
from tests.support.pages import (
    MAIN,
    ODD,
    calm,
    curve,
    edit_manifest,
    edit_table,
    figure,
    go,
    html,
    literal,
    metrics,
    numbers,
    same,
    table,
)
from tests.support.runs import save_tiny, write_prompts
from tests.support.tiny import tiny_model

BENCH = "benchmark.parquet"
RESULT_PAGES = ("overview", "layers", "cutoff", "compare")


@pytest.fixture(scope="module")
def library(smollm, tmp_path_factory):
    """A folder of runs: of the embedded model, of tiny ones, an interrupted one, a benchmark, and three broken ones."""
    place = tmp_path_factory.mktemp("library")
    runs = place / "runs"
    run = diagnose(
        smollm,
        load_prompts("builtin", context_length=256, max_prompts=6),
        decode_tokens=8,
        detail_prompts=2,
        out=runs / "real",
    )
    recommend(run, max_kl=0.3).save(runs / "real" / RECOMMENDATION)
    prompts = load_prompts(str(write_prompts(place / "p.jsonl")))
    llama = tiny_model("llama")
    diagnose(llama, prompts, decode_tokens=4, out=runs / "tiny")
    diagnose(tiny_model("gpt2"), prompts, decode_tokens=4, detail_prompts=0, out=runs / "plain")

    def stop(done, total, prompt_id):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(llama, prompts, decode_tokens=4, progress=stop, out=runs / "interrupted")
    benchmark(llama, [SpeedPolicy(3), SpeedPolicy(2)], lengths=[16, 32], repeats=2, new_tokens=3, out=runs / "bench")
    for name in ("broken", "foreign", "older"):
        (runs / name).mkdir()
    (runs / "broken" / MANIFEST).write_text("{")
    (runs / "foreign" / "thesis.txt").write_text("hello")
    (runs / "older" / MANIFEST).write_text('{"schema_version": 0}')
    for age, name in enumerate(("real", "tiny", "plain", "interrupted", "bench", "broken", "foreign", "older")):
        for file in (runs / name).rglob("*"):
            os.utime(file, (1.8e9 - 100 * age, 1.8e9 - 100 * age))
    return runs


@pytest.fixture(scope="module")
def run(library):
    return load_run(library / "real")


@pytest.fixture
def copy(library, tmp_path):
    """Copy one entry of the library to a folder of its own: ``copy("tiny")``; other names with ``into``."""

    def made(name, into=None):
        folder = tmp_path / "runs" / (into or name)
        shutil.copytree(library / name, folder)
        return folder

    return made


@pytest.fixture
def open_app(monkeypatch):
    """``open_app(folder, "layers", run="real")``: the dashboard over a folder, at a page."""

    def opened(folder, page="overview", **query):
        monkeypatch.setenv("SPEED_DIAGNOSTICS_RUNS", str(folder))
        at = AppTest.from_file(str(MAIN), default_timeout=60)
        for name, value in query.items():
            at.query_params[name] = value
        at.run()
        return at if page == "overview" else go(at, page)

    return opened


# --- Overview ---


def test_overview_lists_every_folder_with_its_state_and_recommendation(library, open_app):
    at = open_app(library)
    assert calm(at) == []
    lines = table(at).set_index("run")
    assert list(lines.index) == ["real", "tiny", "plain", "interrupted", "broken", "foreign", "older"]
    goals = {"real": {"max_kl": 0.3}, "tiny": {}, "plain": {}, "interrupted": {}}
    for name, goal in goals.items():
        found = load_run(library / name)
        data = recommend(found, **goal).data
        at_cutoff = data["evidence"][data["cutoff"] - 1]
        line = lines.loc[name]
        assert (line["cutoff"], line["layers"], line["prompts"]) == (data["cutoff"], found.n_layers, len(found.prompts))
        assert line["model"] == found.manifest["model"]
        assert line["KL"] == pytest.approx(at_cutoff["kl"])
        assert line["TTFT"] == pytest.approx(next(s for s in data["predicted"] if s["n_prompt"] == 8192)["ttft_ratio"])
        if at_cutoff["kl_bound"] is None:
            assert np.isnan(line["bound"])
        else:
            assert line["bound"] == pytest.approx(at_cutoff["kl_bound"])
    assert list(lines["status"]) == ["complete"] * 3 + ["2 of 6 prompts"] + ["not a run"] * 3
    assert "damaged manifest.json" in lines.loc["broken", "problem"]
    assert "it has no manifest.json" in lines.loc["foreign", "problem"]
    assert "another version" in lines.loc["older", "problem"]
    assert lines.loc["real", "context"] == 256


def test_the_headline_is_the_saved_recommendation(library, run, open_app):
    at = open_app(library)
    rec = recommend(run, max_kl=0.3)
    at_cutoff = rec.evidence[rec.cutoff - 1]
    (savings,) = predict_savings(run.manifest["shape"], rec.cutoff, lengths=[8192])
    assert metrics(at) == {
        "Cutoff": f"{rec.cutoff} / 30",
        "KL from full depth": f"{at_cutoff['kl']:.3f}",
        "Same top token": f"{at_cutoff['top1_agreement']:.1%}",
        "TTFT": f"{savings.ttft_ratio:.2f}",
        "KV cache": f"{savings.kv_ratio:.2f}",
    }
    captions = [literal(caption.value) for caption in at.caption]
    assert "6 prompts of builtin; goal: max kl 0.3, confidence 0.95" in captions
    assert f"nats per token, bound {at_cutoff['kl_bound']:.3f}" in captions
    assert literal(at.subheader[0].value) == f"smollm2-135m-instruct: cutoff {rec.cutoff} of 30 layers"
    for region in (rec.selection_region, rec.stabilization_region):
        expected = "none found" if region is None else f"layers {region.first} to {region.last}"
        assert any(expected in markdown.value for markdown in at.markdown)


def test_another_run_in_the_sidebar_is_followed_by_all_pages_and_the_address(library, open_app):
    at = open_app(library)
    assert at.sidebar.selectbox[0].options == ["real", "tiny", "plain", "interrupted"]
    assert at.query_params["run"] in ("real", ["real"])
    at.sidebar.selectbox[0].select("tiny").run()
    rec = recommend(load_run(library / "tiny"))
    assert literal(at.subheader[0].value) == f"tiny-llama: cutoff {rec.cutoff} of 5 layers"
    assert at.query_params["run"] in ("tiny", ["tiny"])
    for page in ("layers", "cutoff"):
        assert "tiny-llama" in figure(go(at, page))["layout"]["title"]["text"]
    assert literal(go(at, "overview").subheader[0].value).startswith("tiny-llama")
    assert calm(at) == []


@pytest.mark.parametrize(("asked", "shown"), [("plain", "tiny-gpt2"), ("gone", "smollm2"), ("broken", "smollm2")])
def test_the_address_chooses_the_run(library, open_app, asked, shown):
    at = open_app(library, run=asked)
    assert literal(at.subheader[0].value).startswith(shown)
    assert calm(at) == []


def test_an_interrupted_run_can_be_looked_at_on_every_page(library, open_app):
    at = open_app(library, run="interrupted")
    captions = [literal(caption.value) for caption in at.caption]
    assert any(c.startswith("2 prompts of") for c in captions)
    assert any("the run is not complete: 2 of 6 prompts" in c for c in captions)
    assert any("too few prompts for a confidence bound" in c for c in captions)
    for page in RESULT_PAGES:
        assert calm(go(at, page)) == []
        assert page == "overview" or at.get("plotly_chart")


@pytest.mark.parametrize("there", [True, False])
def test_without_runs_every_page_says_what_to_do(tmp_path, open_app, there):
    folder = tmp_path / "no_runs"
    if there:
        folder.mkdir()
    at = open_app(folder)
    for page in ("overview", "layers", "cutoff", "compare", "benchmark"):
        go(at, page)
        assert calm(at) == []
        assert "no_runs" in literal(at.info[0].value)
        assert "speed-diagnostics " in at.code[0].value
        assert not at.metric
        assert not at.get("plotly_chart")
    for page in ("playground", "diagnosis"):
        assert calm(go(at, page)) == []


def test_a_run_that_was_deleted_meanwhile_makes_place_for_another(copy, open_app):
    at = open_app(copy("tiny").parent, "layers")
    copy("plain")
    shutil.rmtree(copy("tiny", into="again").parent / "tiny")
    at.sidebar.selectbox[0].select("again") if "again" in at.sidebar.selectbox[0].options else None
    at.run()
    assert calm(at) == []
    assert at.get("plotly_chart")


def test_another_folder_is_looked_into(library, tmp_path, open_app):
    (tmp_path / "empty").mkdir()
    at = open_app(tmp_path / "empty")
    at.text_input(key="folder_asked").set_value(str(library)).run()
    at.button(key="look").click().run()
    assert len(table(at)) == 7
    at.text_input(key="folder_asked").set_value(str(tmp_path / "missing")).run()
    at.button(key="look").click().run()
    assert "There is no folder" in calm(at)[0]
    assert len(table(at)) == 7


def test_one_run_may_be_the_folder_itself(library, open_app):
    at = open_app(library / "tiny")
    assert list(table(at)["run"]) == ["tiny"]
    assert calm(go(at, "cutoff")) == []
    assert at.metric


def test_an_unreadable_folder_is_listed_with_its_reason(copy, open_app):
    folder = copy("tiny")
    (folder.parent / "loop").symlink_to("loop")
    (folder.parent / "file.txt").write_text("x")
    (folder.parent / "manifest_is_a_folder").mkdir()
    (folder.parent / "manifest_is_a_folder" / MANIFEST).mkdir()
    at = open_app(folder.parent)
    assert calm(at) == []
    assert set(table(at)["run"]) == {"tiny", "manifest_is_a_folder"}


# --- Layers ---


def test_layer_curves_are_the_means_over_all_prompts(library, run, open_app):
    at = open_app(library, "layers")
    assert calm(at) == []
    drawn = figure(at)
    for unit, lines in CURVES.items():
        for column, name in lines:
            shown = curve(drawn, f"{unit.split(',')[0]}: {name}")
            same(shown, finite_mean(per_layer(run, column), axis=0))
    names = {trace.get("name") for trace in drawn["data"]}
    rec = recommend(run, max_kl=0.3)
    assert f"cutoff {rec.cutoff}" in names
    assert ("selection region" in names) == (rec.selection_region is not None)
    at.toggle(key="regions").set_value(False).run()
    assert not {t.get("name") for t in figure(at)["data"]} & {f"cutoff {rec.cutoff}", "selection region"}


def test_categories_and_prompts_filter_curves_and_heads(library, run, open_app):
    at = open_app(library, "layers")
    name = "taken from the prompt: selectivity"
    everything = curve(figure(at), name)
    category = run.prompts["category"].iloc[3]
    at.multiselect(key="categories").set_value([category]).run()
    ids = list(run.prompts.loc[run.prompts["category"] == category, "prompt_id"])
    assert at.multiselect(key="prompts").options == ids
    same(curve(figure(at), name), finite_mean(per_layer(run.select(ids), "selectivity"), axis=0))
    same(numbers(figure(at, 1)["data"][0]["z"]), run.select(ids).array("selectivity").mean(0))
    at.multiselect(key="categories").set_value([]).run()
    two = list(run.prompts["prompt_id"][[1, 4]])
    at.multiselect(key="prompts").set_value(two).run()
    chosen = curve(figure(at), name)
    same(chosen, finite_mean(per_layer(run.select(two), "selectivity"), axis=0))
    assert not np.allclose(chosen, everything)
    assert "2 prompts" in figure(at)["layout"]["title"]["text"]
    # The regions stay those of the whole run.
    assert f"cutoff {recommend(run, max_kl=0.3).cutoff}" in {trace.get("name") for trace in figure(at)["data"]}


def test_every_head_measure_is_drawn(library, run, open_app):
    at = open_app(library, "layers")
    box = at.selectbox(key="head_measure")
    assert box.value == "selectivity"
    for measure in ("mass_prompt", "mass_anchor", "prompt_entropy", "prompt_top5"):
        at.selectbox(key="head_measure").select(measure).run()
        shown = numbers(figure(at, 1)["data"][0]["z"])
        assert shown.shape == (30, 9)
        same(shown, np.nanmean(run.array(measure), axis=0))
    assert calm(at) == []


def test_one_prompt_has_its_tokens_in_the_colour_of_their_attention(library, run, open_app):
    at = open_app(library, "layers")
    kept = list(dict.fromkeys(run.tokens["prompt_id"]))
    assert at.selectbox(key="one_prompt").options == kept
    assert len(kept) == 2
    at.selectbox(key="one_prompt").select(kept[1]).run()
    tokens = run.tokens[run.tokens["prompt_id"] == kept[1]].reset_index(drop=True)
    inside = tokens[tokens["segment"] == "prompt"]

    def spans():
        found = re.findall(r'<span title="token (\d+), (\w+)([^"]*)" style="([^"]*)">', html(at))
        return {int(position): (segment, note, style) for position, segment, note, style in found}

    def opacity(style):
        return float(re.search(r"rgba\(.*,([\d.]+)\)", style)[1])

    for layer in (None, 0, 17):
        if layer is not None:
            at.select_slider(key="layer").set_value(layer).run()
        weights = np.array([w.mean() if layer is None else w[layer] for w in inside["attention"]])
        shown = spans()
        assert all(shown[p][0] == s for p, s in zip(tokens["position"], tokens["segment"], strict=True) if p in shown)
        for position, weight in zip(inside["position"], weights, strict=True):
            if position in shown:
                assert shown[position][1] == f", attention {weight:.2g}"
                assert opacity(shown[position][2]) == pytest.approx(
                    0.85 * min(1, weight / np.quantile(weights, 0.99)), abs=0.006
                )
    coloured = spans()
    at.segmented_control(key="colour").set_value("segment").run()
    assert at.select_slider(key="layer").proto.disabled
    plain = {style for segment, _, style in spans().values() if segment == "prompt" and "border" not in style}
    assert len(plain) == 1
    assert coloured != spans()
    row = run.prompts.set_index("prompt_id").loc[kept[1]]
    assert any(literal(c.value).startswith(f"{row['n_prompt']} prompt tokens, 8 of") for c in at.caption)
    assert calm(at) == []


def test_what_a_prompt_says_is_text(smollm, tmp_path, open_app):
    evil = "<script>alert('x')</script> & <img src=x onerror=y> \"quoted\" **bold** $x$ [a](javascript:b)"
    lines = [{"id": ODD, "text": f"{evil} and more of it", "category": ODD}, {"id": "<i>2</i>", "text": evil * 2}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    diagnose(smollm, load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=2, out=tmp_path / "runs" / "evil")
    at = open_app(tmp_path / "runs", "layers")
    assert calm(at) == []
    made = html(at)
    assert set(re.findall(r"</?(\w+)", made)) == {"div", "span"}
    shown = "".join(re.findall(r">([^<]*)<", made))
    for character in ("&lt;", "&gt;", "&amp;"):
        assert character in shown
    import html as entities

    assert f"{evil} and more of it" in entities.unescape(shown)
    assert any(ODD in literal(caption.value) and ODD not in caption.value for caption in at.caption)
    assert "<script" not in json.dumps(figure(at, 2))
    # The names of prompts in the title of a figure as well.
    assert "<b>" not in figure(at, 2)["layout"]["title"]["text"]


def test_the_logit_lens_moves_along_the_reference(library, run, open_app):
    at = open_app(library, "layers")
    prompt_id = at.selectbox(key="one_prompt").value
    lens = run.lens[run.lens["prompt_id"] == prompt_id]
    positions = sorted(lens["position"].unique())
    same(numbers(figure(at, 2)["data"][0]["z"]), _grid(lens, positions[:12]))
    at.selectbox(key="one_prompt").select(at.selectbox(key="one_prompt").options[1]).run()
    assert calm(at) == []


def _grid(lens, positions):
    rows = lens[lens["position"].isin(positions)]
    return rows.pivot(index="layer", columns="position", values="lens_probability").to_numpy()


def test_a_long_reference_has_a_slider_for_the_logit_lens(tmp_path, open_app):
    write_prompts(tmp_path / "p.jsonl", n_prompts=2, n_tokens=20)
    out = tmp_path / "runs" / "long"
    long = diagnose(tiny_model("llama"), load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=20, out=out)
    at = open_app(tmp_path / "runs", "layers")
    lens = long.lens[long.lens["prompt_id"] == at.selectbox(key="one_prompt").value]
    positions = sorted(lens["position"].unique())
    assert len(positions) > 12
    slider = at.slider(key="from_position")
    assert (slider.min, slider.max) == (0, len(positions) - 12)
    slider.set_value(len(positions) - 12).run()
    same(numbers(figure(at, 2)["data"][0]["z"]), _grid(lens, positions[-12:]))
    assert calm(at) == []


def test_long_prompts_are_shown_in_pages(copy, open_app):
    folder = copy("tiny")
    n = 5000

    def longer(tokens):
        whole = tokens[tokens["prompt_id"] == "p0"]
        row = whole[whole["segment"] == "prompt"].iloc[[0]]
        many = pd.concat([row] * n, ignore_index=True).assign(position=range(n), text=[f" t{i:04d}" for i in range(n)])
        return pd.concat([many, tokens[tokens["prompt_id"] != "p0"]])

    edit_table(folder, "tokens", longer)
    at = open_app(folder.parent, "layers")
    assert "t0000" in html(at)
    assert "t4999" not in html(at)
    last = at.slider(key="from_token").max
    at.slider(key="from_token").set_value(last).run()
    assert "t4999" in html(at), "the last tokens can be reached"
    assert "t0000" not in html(at)


def test_a_run_without_details_says_so(library, open_app):
    at = open_app(library, "layers", run="plain")
    assert calm(at) == []
    assert "--detail-prompts" in at.info[0].value
    assert len(at.get("plotly_chart")) == 2
    assert not at.html


def test_prompts_without_details_say_so(library, run, open_app):
    at = open_app(library, "layers")
    at.multiselect(key="prompts").set_value([run.prompts["prompt_id"].iloc[-1]]).run()
    assert "--detail-prompts" in at.info[0].value
    assert calm(at) == []


def test_the_measures_are_explained(library, run, open_app):
    at = open_app(library, "layers")
    said = [literal(markdown.value) for markdown in at.expander[0].markdown]
    for name, meaning in run.manifest["columns"].items():
        assert f"**{name}**: {' '.join(meaning.split())}" in [" ".join(line.split()) for line in said]


# --- Cutoff ---


def shown_at(at, run, rec, k, n_prompt=8192):
    """Compare the metrics of the page with the evidence at a cutoff."""
    found, expected = metrics(at), rec.evidence[k - 1]
    kept = retention_at(run, k)
    (savings,) = predict_savings(run.manifest["shape"], k, anchors=1, lengths=[n_prompt])
    assert found == {
        "KL from full depth": f"{expected['kl']:.3f}",
        "Same top token": f"{expected['top1_agreement']:.1%}",
        "NLL increase": f"{expected['nll_increase']:+.3f}",
        "Attention kept": f"{kept['mass_prompt']:.1%}",
        "Contribution kept": f"{kept['prompt_contribution']:.1%}",
        "TTFT": f"{savings.ttft_ratio:.3f}",
        "TPOT": f"{savings.tpot_ratio:.3f}",
        "KV cache": f"{savings.kv_bytes / 2**20:,.1f} MiB",
    }
    captions = [literal(caption.value) for caption in at.caption]
    assert f"bound {expected['kl_bound']:.3f} nats per token" in captions
    assert f"bound {expected['nll_increase_bound']:+.3f} nats per token" in captions
    assert bool(at.success) == expected["admissible"] != bool(at.warning)
    assert f"Cutoff {k} " in (at.success or at.warning)[0].value


def cutoff_slider(at):
    (slider,) = [s for s in at.slider if s.label.startswith("Cutoff")]
    return slider


def tolerance(at):
    """The slider of the one goal chosen."""
    (slider,) = [s for s in at.slider if " most: " in s.label or " least: " in s.label]
    return slider


def goals(at):
    (box,) = [s for s in at.multiselect if s.label == "Goals"]
    return box


def test_the_page_begins_at_the_recommended_cutoff(library, run, open_app):
    at = open_app(library, "cutoff")
    assert calm(at) == []
    rec = recommend(run, max_kl=0.3)
    assert cutoff_slider(at).value == rec.cutoff
    assert (cutoff_slider(at).min, cutoff_slider(at).max) == (1, 30)
    assert tolerance(at).value == pytest.approx(0.3)
    assert at.button(key="follow").proto.disabled
    shown_at(at, run, rec, rec.cutoff)
    loss, kept = figure(at), figure(at, 1)
    kl = np.array([row["kl"] for row in rec.evidence])
    drawn = curve(loss, "KL from full depth")
    there = np.isfinite(drawn)
    assert there.sum() >= 29 - (kl[:-1] <= 1e-6).sum()
    same(drawn[there], kl[there])
    mass = per_layer(run, "mass_prompt")
    same(curve(kept, "attention mass"), (np.cumsum(mass, 1) / mass.sum(1, keepdims=True)).mean(0))


def test_moving_the_cutoff_shows_its_evidence_and_the_button_goes_back(library, run, open_app):
    at = open_app(library, "cutoff")
    rec = recommend(run, max_kl=0.3)
    for k in (1, 12, 30):
        cutoff_slider(at).set_value(k).run()
        shown_at(at, run, rec, k)
        assert f"cutoff={k})" in at.code[0].value
        losses = table(at).set_index("category").iloc[:, 0].to_dict()
        assert losses == pytest.approx(loss_by_category(run, k))
        lines = {shape["x0"] for shape in figure(at)["layout"]["shapes"] if shape["x0"] == shape["x1"]}
        assert lines == {rec.cutoff, k}
    at.button(key="follow").click().run()
    assert cutoff_slider(at).value == rec.cutoff
    shown_at(at, run, rec, rec.cutoff)
    assert calm(at) == []


def test_the_tolerance_recomputes_the_recommendation(library, run, open_app):
    at = open_app(library, "cutoff")
    seen = set()
    for limit in (0.01, 0.1, 1.0):
        tolerance(at).set_value(limit).run()
        rec = recommend(run, max_kl=limit)
        assert cutoff_slider(at).value == rec.cutoff
        shown_at(at, run, rec, rec.cutoff)
        texts = [a["text"] for a in figure(at)["layout"]["annotations"]]
        assert f"tolerance {limit:g}" in texts
        seen.add(rec.cutoff)
    assert len(seen) > 1
    # A cutoff of the reader's own stays where it is.
    cutoff_slider(at).set_value(20).run()
    tolerance(at).set_value(0.05).run()
    assert cutoff_slider(at).value == 20
    shown_at(at, run, recommend(run, max_kl=0.05), 20)


@pytest.mark.parametrize(
    ("name", "limit"), [("max_nll_increase", 0.2), ("min_agreement", 0.8), ("kv_budget", 0.5), ("kv_budget", 0.05)]
)
def test_every_goal_recommends_as_the_package_does(library, run, open_app, name, limit):
    at = open_app(library, "cutoff")
    goals(at).set_value([name]).run()
    assert calm(at) == []
    tolerance(at).set_value(limit).run()
    rec = recommend(run, **{name: limit})
    assert calm(at) == []
    assert cutoff_slider(at).value == rec.cutoff
    shown_at(at, run, rec, rec.cutoff)


def test_a_budget_below_one_layer_is_one_line(library, open_app):
    at = open_app(library, "cutoff", run="tiny")
    goals(at).set_value(["kv_budget"]).run()
    tolerance(at).set_value(0.05).run()
    (said,) = calm(at)
    assert "give at least 0.200" in said
    tolerance(at).set_value(0.5).run()
    assert calm(at) == []
    assert cutoff_slider(at).value == 2


def test_an_own_cutoff_survives_other_pages_and_belongs_to_its_run(library, run, open_app):
    at = open_app(library, "cutoff")
    cutoff_slider(at).set_value(7).run()
    go(at, "layers")
    go(at, "cutoff")
    assert cutoff_slider(at).value == 7
    at.sidebar.selectbox[0].select("tiny").run()
    assert cutoff_slider(at).value == recommend(load_run(library / "tiny")).cutoff
    assert cutoff_slider(at).max == 5
    at.sidebar.selectbox[0].select("real").run()
    assert cutoff_slider(at).value == 7
    assert calm(at) == []


def test_the_context_length_changes_the_prediction(library, run, open_app):
    at = open_app(library, "cutoff")
    rec = recommend(run, max_kl=0.3)
    for n_prompt in (512, 131072):
        at.select_slider(key="length").set_value(n_prompt).run()
        shown_at(at, run, rec, rec.cutoff, n_prompt)
        ratios = [predict_savings(run.manifest["shape"], k, lengths=[n_prompt])[0].ttft_ratio for k in range(1, 31)]
        same(curve(figure(at), "TTFT, predicted"), ratios)
    assert any("more than the model has positions" in literal(caption.value) for caption in at.caption)


def test_the_snippet_is_python_that_names_model_and_cutoff(copy, open_app):
    folder = copy("tiny")
    name = "it's \"a\" \\model\\\nof 'mine'"
    edit_manifest(folder, model=name)
    manifest = read_json(folder / MANIFEST)
    edit_manifest(folder, identity=manifest["identity"] | {"anchors": 2})
    at = open_app(folder.parent, "cutoff")
    cutoff_slider(at).set_value(4).run()
    calls = [node for node in ast.walk(ast.parse(at.code[0].value)) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if getattr(call.func, "id", "") == "load_model"]
    (policy,) = [call for call in calls if getattr(call.func, "id", "") == "SpeedPolicy"]
    assert ast.literal_eval(load.args[0]) == name
    settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in policy.keywords}
    assert SpeedPolicy(**settings) == SpeedPolicy(cutoff=4, anchors=2)


def test_the_snippet_runs_and_generates_under_the_policy(library, smollm, monkeypatch, open_app):
    at = open_app(library, "cutoff")
    cutoff_slider(at).set_value(20).run()
    monkeypatch.setattr("diagnostics.load_model", lambda name: smollm, raising=True)
    names = {}
    code = at.code[0].value.replace("max_new_tokens=64", "max_new_tokens=4").replace('"..."', '"The sea is"')
    exec(compile(code, "snippet", "exec"), names)
    ids = names["inputs"]["input_ids"]
    expected = generate(smollm, ids, policy=SpeedPolicy(20), max_new_tokens=4).token_ids[0].tolist()
    assert names["tokens"][0, ids.shape[1] :].tolist() == expected


def test_the_download_is_the_recommendation_of_the_goal(library, run, monkeypatch, open_app):
    kept = {}
    load = MemoryMediaFileStorage.load_and_get_id

    def spy(self, data, mimetype, kind, filename=None):
        kept[filename] = data
        return load(self, data, mimetype, kind, filename)

    monkeypatch.setattr(MemoryMediaFileStorage, "load_and_get_id", spy)
    at = open_app(library, "cutoff")
    goals(at).set_value(["min_agreement"]).run()
    tolerance(at).set_value(0.75).run()
    assert {button.label for button in at.download_button} == {RECOMMENDATION, "loss.html", "retention.html"}
    data = kept[RECOMMENDATION]
    expected = recommend(run, min_agreement=0.75)
    assert json.loads(data) == json.loads(expected.to_json())


def test_saving_writes_what_the_command_would(copy, run, open_app):
    folder = copy("real")
    at = open_app(folder.parent, "cutoff")
    tolerance(at).set_value(0.9).run()
    cutoff_slider(at).set_value(11).run()
    at.button(key="save").click().run()
    assert calm(at) == []
    expected = recommend(run, max_kl=0.9)
    assert read_json(folder / RECOMMENDATION) == json.loads(expected.to_json())
    assert str(expected.cutoff) in at.toast[0].value
    assert SpeedPolicy.from_recommendation(folder / RECOMMENDATION).cutoff == expected.cutoff
    # The other pages see it at once.
    assert metrics(go(at, "overview"))["Cutoff"] == f"{expected.cutoff} / 30"
    assert cutoff_slider(go(at, "cutoff")).value == 11


def test_a_folder_that_cannot_be_written_is_one_line(copy, monkeypatch, open_app):
    folder = copy("tiny")
    at = open_app(folder.parent, "cutoff")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("diagnostics.support.files.tempfile.mkdtemp", refuse)
    at.button(key="save").click().run()
    assert "Permission denied" in calm(at)[0]
    assert not (folder / RECOMMENDATION).exists()


# --- Benchmark ---


def test_the_benchmark_is_its_summary(library, open_app):
    at = open_app(library, "benchmark")
    assert calm(at) == []
    summary = load_benchmark(library / "bench").summary()
    shown = table(at)
    assert len(shown) == len(summary) == 6
    expected = {
        "prompt tokens": summary["n_prompt"],
        "policy": summary["spec"],
        "TTFT, s": summary["ttft_s"],
        "of full": summary["ttft_s_ratio"],
        "limit": summary["ttft_limit"],
        "TPOT, ms": 1000 * summary["tpot_s"],
        "of full ": summary["tpot_s_ratio"],
        "limit ": summary["tpot_limit"],
        "KV, MiB": summary["kv_bytes"] / 2**20,
        "of full  ": summary["kv_bytes_ratio"],
        "repeats": summary["repeats"],
    }
    for name, column in expected.items():
        if column.dtype == object or name == "policy":
            assert list(shown[name]) == list(column)
        else:
            np.testing.assert_allclose(shown[name].astype(float), column, atol=6e-4)
    drawn = figure(at)
    assert {t["name"] for t in drawn["data"] if t.get("showlegend")} == {"speed:3", "speed:2"}
    (ttft, *_) = [t for t in drawn["data"] if t["name"] == "speed:2"]
    rows = summary[summary["spec"] == "speed:2"]
    same(numbers(ttft["x"]), rows["n_prompt"])
    same(numbers(ttft["y"]), rows["ttft_s_ratio"])
    assert any("tiny-llama" in literal(caption.value) for caption in at.caption)


def test_a_benchmark_in_a_run_folder_is_found(copy, library, open_app):
    folder = copy("tiny")
    for file in (library / "bench").iterdir():
        shutil.copy(file, folder)
    at = open_app(folder.parent, "benchmark")
    assert calm(at) == []
    assert len(table(at)) == 6
    assert table(go(at, "overview"))["status"].tolist() == ["complete"]


def bench_without(column):
    return lambda f: edit_table(f, "benchmark", lambda t: t.drop(columns=column))


def bench_manifest(text):
    return lambda f: (f / BENCHMARK_MANIFEST).write_text(text)


BENCH_DAMAGE = {
    "no manifest": lambda f: (f / BENCHMARK_MANIFEST).unlink(),
    "manifest no JSON": bench_manifest("{"),
    "no parquet": lambda f: (f / BENCH).write_bytes(b"PAR1"),
    "no column ttft_s": bench_without("ttft_s"),
    "no column kv_limit": bench_without("kv_limit"),
    "no column spec": bench_without("spec"),
    "text for seconds": lambda f: edit_table(f, "benchmark", lambda t: t.assign(ttft_s="fast")),
    "text for peaks": lambda f: edit_table(f, "benchmark", lambda t: t.assign(peak_bytes="much")),
}


@pytest.mark.parametrize("damage", BENCH_DAMAGE)
def test_a_damaged_benchmark_is_one_line(copy, open_app, damage):
    check_benchmark(copy, open_app, BENCH_DAMAGE[damage])


def check_benchmark(copy, open_app, change):
    folder = copy("bench")
    change(folder)
    (said,) = calm(open_app(folder.parent, "benchmark"))
    assert "bench" in said


def test_without_a_benchmark_the_page_says_how_to_make_one(copy, open_app):
    at = open_app(copy("tiny").parent, "benchmark")
    assert calm(at) == []
    assert "There is no benchmark" in at.info[0].value
    assert "speed-diagnostics bench" in at.code[0].value


# --- Compare ---


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


# --- Playground ---


@pytest.fixture
def playground(library, open_app):
    """The playground with the embedded model loaded."""
    at = open_app(library, "playground")
    assert "Load the model" in at.info[0].value
    assert at.text_input(key="play_model").value == "smollm2-135m-instruct"
    at.button(key="load").click().run()
    assert calm(at) == []
    return at


def play_cutoff(at):
    (slider,) = [s for s in at.slider if s.label == "Cutoff"]
    return slider


def ask(at, text, new_tokens=10, **more):
    at.text_area(key="prompt").set_value(text)
    at.number_input(key="new_tokens").set_value(new_tokens)
    for key, value in more.items():
        at.number_input(key=key).set_value(value)
    return at.button(key="generate").click().run()


def expected_tokens(lm, text, policy, new_tokens=10, chat=True, **more):
    ids = encode_input(lm, text, chat=chat, max_new_tokens=new_tokens)
    return generate(lm, ids, policy=policy, max_new_tokens=new_tokens, **more).token_ids[0].tolist()


PROMPT = "Write one sentence about the sea and the ships on it."


def test_full_depth_and_the_policy_generate_what_the_package_does(playground, library, run, smollm):
    at = playground
    rec = recommend(run, max_kl=0.3)
    assert play_cutoff(at).value == rec.cutoff
    play_cutoff(at).set_value(3).run()
    ask(at, PROMPT)
    assert calm(at) == []
    n_prompt, (full, other) = at.session_state["played"]
    assert n_prompt == encode_input(smollm, PROMPT, chat=True, max_new_tokens=10).shape[1]
    assert full.token_ids == expected_tokens(smollm, PROMPT, FullPolicy())
    assert other.token_ids == expected_tokens(smollm, PROMPT, SpeedPolicy(3))
    assert full.token_ids != other.token_ids
    shown = [element.value for element in at.html]
    visible = [re.sub(r"<[^>]*>", "", text) for text in shown]
    for text, one in zip(visible, (full, other), strict=True):
        assert text.strip() == _escaped(smollm.tokenizer.decode(one.token_ids, skip_special_tokens=True)).strip()
    common = next(i for i, (a, b) in enumerate(zip(full.token_ids, other.token_ids, strict=False)) if a != b)
    assert f"the same for {common} tokens, then different" in [caption.value for caption in at.caption]
    assert all("background" in text for text in shown)
    lines = table(at).set_index("policy")
    assert list(lines.index) == ["full", "speed:3"]
    assert lines.loc["speed:3", "of full  "] == pytest.approx(other.kv_bytes / full.kv_bytes, abs=6e-4)
    assert list(lines["tokens"]) == [len(full.token_ids), len(other.token_ids)]
    # The results stay while the reader looks elsewhere.
    go(at, "cutoff")
    go(at, "playground")
    assert calm(at) == []
    assert [element.value for element in at.html] == shown


def _escaped(text):
    import html as entities

    return entities.escape(text)


def test_at_full_depth_the_tokens_are_the_same_and_nothing_is_marked(playground, smollm):
    at = playground
    play_cutoff(at).set_value(30).run()
    ask(at, PROMPT)
    assert calm(at) == []
    assert "the same tokens" in [caption.value for caption in at.caption]
    assert "background" not in html(at)
    _, (full, other) = at.session_state["played"]
    assert full.token_ids == other.token_ids == expected_tokens(smollm, PROMPT, FullPolicy())


def test_several_policies_without_template_and_with_sampling(playground, smollm):
    import torch

    at = playground
    at.pills(key="kinds").set_value([])
    at.text_input(key="more_policies").set_value("projected:20, fastkv:retention_rate=0.1,speed:20:anchors=0").run()
    assert calm(at) == []
    at.toggle(key="chat").set_value(False)
    ask(at, PROMPT, 6, temperature=0.8, seed=3, top_p=0.9)
    assert calm(at) == []
    _, played = at.session_state["played"]
    assert [one.spec.split(":")[0] for one in played] == ["full", "projected", "fastkv", "speed"]
    expected = expected_tokens(
        smollm,
        PROMPT,
        FullPolicy(),
        6,
        chat=False,
        temperature=0.8,
        top_p=0.9,
        generator=torch.Generator().manual_seed(3),
    )
    assert played[0].token_ids == expected
    assert len(table(at)) == len(at.html) == 4


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_an_empty_prompt_is_one_line(playground, text):
    ask(playground, text)
    assert calm(playground) == ["the prompt is empty"]


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ("nonsense", "is not one of: fastkv, full"),
        ("speed", "needs a cutoff"),
        ("speed:many", "must be a number"),
        ("speed:99", "99"),
        ("speed:0", "0"),
        ("speed:5:what=1", "has no 'what'"),
        ("speed:nan", "nan"),
        ("fastkv:retention_rate=7", "7"),
        ("speed:1, speed:2, speed:3", "choose 3 at most"),
        ("*<b>bold</b>*", "policy '*<b>bold</b>*' is not one of"),
    ],
)
def test_a_policy_that_makes_no_sense_is_one_line(playground, specs, said):
    playground.text_input(key="more_policies").set_value(specs).run()
    (line,) = calm(playground)
    assert said in line


def test_prompts_that_cannot_be_taken_are_one_line(playground):
    ask(playground, "word " * 9000, 4)
    (line,) = calm(playground)
    assert "8192" in line
    ask(playground, "The sea", 2)
    assert calm(playground) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("play_model", "/no/such/model", "there is no model folder"),
        ("play_model", "", ""),
        ("play_model", "nobody/nothing-*here*", "nobody/nothing-*here*"),
        ("play_device", "toaster", "toaster"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(library, open_app, field, value, said):
    at = open_app(library, "playground")
    at.text_input(key=field).set_value(value)
    at.button(key="load").click().run()
    (line,) = calm(at)
    assert said in line


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_fill_in_takes_a_prompt_of_the_length_asked_for(playground, smollm, kind):
    at = playground
    box = at.selectbox(key="example")
    box.select(box.options[kind])
    at.select_slider(key="example_length").set_value(512)
    at.button(key="fill").click().run()
    assert calm(at) == []
    text = at.text_area(key="prompt").value
    tokens = encode_input(smollm, text, chat=True, max_new_tokens=1).shape[1]
    assert 0.85 * 512 <= tokens <= 512
    assert "<|im_start|>" not in text


def test_a_model_without_a_chat_template_plays_too(library, tmp_path, open_app):
    save_tiny(tmp_path / "model")
    at = open_app(library, "playground", run="plain")
    at.text_input(key="play_model").set_value(str(tmp_path / "model"))
    at.button(key="load").click().run()
    assert calm(at) == []
    assert at.toggle(key="chat").proto.disabled
    at.button(key="fill").click().run()
    assert calm(at) == []
    ask(at, "w5 w6 w7 w8 w9", 3)
    assert calm(at) == []
    assert len(at.session_state["played"][1][0].token_ids) <= 3


# --- New diagnosis ---


class FakeCommand:
    """Stands for the command: a process that waits, with a log of what was asked for."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self):
        self.commands, self.processes = [], []

    def Popen(self, command, *, stdout, **options):
        self.commands.append(command)
        self.options = options
        waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.processes.append(subprocess.Popen(waiting, stdout=stdout, stderr=stdout, stdin=subprocess.DEVNULL))
        return self.processes[-1]

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def command(monkeypatch):
    fake = FakeCommand()
    monkeypatch.setattr(jobs, "subprocess", types.SimpleNamespace(Popen=fake.Popen, DEVNULL=subprocess.DEVNULL))
    yield fake
    fake.end()


def start(at, **values):
    for key, value in values.items():
        field = at.text_input if isinstance(value, str) else at.number_input
        field(key=key).set_value(value)
    (button,) = [b for b in at.button if b.label == "Start"]
    return button.click().run()


def states(at):
    found = [literal(markdown.value) for markdown in at.markdown if ":material/" in markdown.value]
    return [line.rpartition(": ")[2] for line in found]


def job_buttons(at):
    return {button.label: button for button in at.button if button.label not in ("Start",)}


def test_the_form_starts_the_command(tmp_path, command, open_app):
    at = open_app(tmp_path / "runs", "diagnosis")
    assert calm(at) == []
    assert at.text_input(key="model").value == "smollm2-135m-instruct"
    at.file_uploader(key="prompt_file").upload("mine.jsonl", b'{"text": "hello"}\n')
    at.selectbox(key="dtype").select("bfloat16")
    start(at, model=" org/model ", context=512, max_prompts=3, decode=9, anchors=2, goal=0.25, detail=1, device="cpu")
    assert calm(at) == []
    (line,) = command.commands
    assert line[:4] == [sys.executable, "-m", "diagnostics.cli", "recommend"]
    assert "org/model" in line
    options = dict(word.split("=", 1) for word in line if word.startswith("--") and "=" in word)
    prompts = options.pop("--prompts")
    assert options == {
        "--context-length": "512",
        "--max-prompts": "3",
        "--decode-tokens": "9",
        "--anchors": "2",
        "--max-kl": "0.25",
        "--detail-prompts": "1",
        "--device": "cpu",
        "--dtype": "bfloat16",
        "--backend": "hooks",
    }
    assert Path(prompts).read_bytes() == b'{"text": "hello"}\n'
    out = Path(line[line.index("--out") + 1])
    assert out.parent == tmp_path / "runs"
    assert "--resume" not in line
    assert command.options["start_new_session"]
    assert states(at) == ["running"]
    # The command understands all of it.
    from typer.main import get_command

    from diagnostics.cli import app as cli

    get_command(cli).commands["recommend"].make_context("recommend", line[4:])


def test_a_job_from_start_to_end(library, tmp_path, command, open_app):
    runs = tmp_path / "runs"
    at = open_app(runs, "diagnosis")
    start(at, model="some/model")
    assert states(at) == ["running"]
    assert at.get("progress")[0].text == "loading the model, first prompt"
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    shutil.copytree(library / "interrupted", out)
    at.run()
    assert at.get("progress")[0].text == "2 of 6 prompts"
    assert at.get("progress")[0].value == 33
    # One at a time.
    start(at, model="other/model")
    assert "a diagnosis is running" in calm(at)[0]
    assert len(command.commands) == 1
    command.end()
    (runs / ".jobs" / f"{out.name}.log").write_text("error: the *dog* ate <it>\n")
    at.run()
    assert states(at) == ["failed"]
    assert calm(at) == ["the *dog* ate <it>"]
    assert any("2 of 6 prompts are finished and kept" in literal(caption.value) for caption in at.caption)
    assert "Resume" in job_buttons(at)
    shutil.rmtree(out)
    shutil.copytree(library / "real", out)
    at.run()
    assert states(at) == ["complete"]
    assert calm(at) == []
    assert set(job_buttons(at)) == {"Show", "Remove"}


def test_a_job_that_ended_without_a_word(tmp_path, command, open_app):
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model="some/model")
    command.end()
    at.run()
    assert states(at) == ["failed"]
    assert calm(at) == ["it ended without a word"]
    assert "Try again" in job_buttons(at)


def test_a_job_is_cancelled_resumed_and_taken_off_the_list(library, tmp_path, command, monkeypatch, open_app):
    # Streamlit's test runs the whole page where a browser runs the fragment alone.
    rerun = jobs_page_rerun(monkeypatch)
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model="some/model")
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    shutil.copytree(library / "interrupted", out)
    at.run()
    job_buttons(at)["Cancel"].click().run()
    assert rerun
    assert command.processes[0].poll() is not None
    assert states(at) == ["cancelled"]
    assert calm(at) == []
    job_buttons(at)["Resume"].click().run()
    assert states(at) == ["running"]
    assert len(command.commands) == 2
    assert command.commands[1] == [*command.commands[0], "--resume"]
    command.end()
    at.run()
    job_buttons(at)["Remove"].click().run()
    assert states(at) == []
    assert out.is_dir()
    assert calm(at) == []


def jobs_page_rerun(monkeypatch):
    import streamlit as st

    asked = []
    real = st.rerun

    def rerun(*, scope="app"):
        asked.append(scope)
        real()

    monkeypatch.setattr(st, "rerun", rerun)
    return asked


@pytest.mark.parametrize("model", ["-x", "--help", " --out=/tmp ", "", "   "])
def test_what_is_no_model_starts_nothing(tmp_path, command, open_app, model):
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model=model)
    assert calm(at) == ["name a model"]
    assert command.commands == []
    assert not (tmp_path / "runs").exists()


def test_names_of_models_stay_text_and_inside_the_folder(tmp_path, command, open_app):
    runs = tmp_path / "runs"
    at = open_app(runs, "diagnosis")
    start(at, model=f"../../{ODD}")
    assert calm(at) == []
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    assert out.resolve().parent == runs
    said = [markdown.value for markdown in at.markdown if ":material/" in markdown.value]
    assert f"../../{ODD}" in literal(said[0])
    assert ODD not in said[0]
    assert "<b>" not in said[0].replace("\\<b\\>", "")


def test_jobs_that_are_not_ours_are_passed_over(copy, open_app):
    folder = copy("tiny").parent
    (folder / ".jobs").mkdir()
    for number, text in enumerate(["", "{", "[]", "5", '{"name": "x"}', "null"]):
        (folder / ".jobs" / f"{number}.json").write_text(text)
    at = open_app(folder, "diagnosis")
    assert calm(at) == []
    assert states(at) == []


def test_a_real_diagnosis_of_a_tiny_model_and_one_that_cannot_start(tmp_path, open_app):
    save_tiny(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.jsonl", n_prompts=2, n_tokens=20).read_bytes()
    at = open_app(tmp_path / "runs", "diagnosis")
    for model in ("model", "missing"):
        at.file_uploader(key="prompt_file").upload("p.jsonl", prompts)
        start(at, model=str(tmp_path / model), context=64, max_prompts=2, decode=3, anchors=1, detail=1)
        for job in jobs.list_jobs(tmp_path / "runs"):
            if job.running:
                jobs._process(job).wait(100)
    at.run()
    assert states(at) == ["failed", "complete"]
    (said,) = calm(at)
    assert "there is no model folder" in said
    go(at, "overview")
    assert table(at)["status"].tolist() == ["complete"]
    assert literal(at.subheader[0].value).startswith(str(tmp_path / "model"))
    assert load_run(next((tmp_path / "runs").glob("[!.]*"))).manifest["identity"]["detail_prompts"] == 1


# --- Runs that were tampered with ---


def without(name, column):
    return lambda f: edit_table(f, name, lambda t: t.drop(columns=column))


def with_column(name, column, value):
    def change(t):
        return t.assign(**{column: value(t[column]) if callable(value) else value})

    return lambda f: edit_table(f, name, change)


def rows(name, choose):
    return lambda f: edit_table(f, name, choose)


def manifest_with(**changes):
    return lambda f: edit_manifest(f, **changes)


def nested(f, field, **changes):
    manifest = read_json(f / MANIFEST)
    edit_manifest(f, **{field: {k: v for k, v in (manifest[field] | changes).items() if v != "gone"}})


def identity(**changes):
    return lambda f: nested(f, "identity", **changes)


def shape(**changes):
    return lambda f: nested(f, "shape", **changes)


def written(name, text):
    return lambda f: (f / name).write_text(text)


def attention(make):
    def change(tokens):
        return tokens.assign(attention=[None if w is None else make(w) for w in tokens["attention"]])

    return lambda f: edit_table(f, "tokens", change)


# What is done to a run folder; the pages that cannot be shown any more.
ALL = "overview layers cutoff compare"
DAMAGE = {
    "cutoffs: no column kl": (without("cutoffs", "kl"), ALL),
    "layers: no column selectivity": (without("layers", "selectivity"), ALL),
    "prompts: no column category": (without("prompts", "category"), ALL),
    "lens: no column lens_text": (without("lens", "lens_text"), ALL),
    "cutoffs: one row short": (rows("cutoffs", lambda t: t.iloc[:-1]), ALL),
    "heads: twice": (rows("heads", lambda t: pd.concat([t, t])), ALL),
    "cutoffs: one twice, one missing": (with_column("cutoffs", "cutoff", lambda c: c.replace(2, 1)), ALL),
    "cutoffs: another prompt's": (with_column("cutoffs", "prompt_id", lambda c: c.replace("p1", "p9")), ALL),
    "cutoffs: text": (with_column("cutoffs", "kl", "much"), ALL),
    "cutoffs: numbers as text": (with_column("cutoffs", "kl", lambda c: c.astype(str)), None),
    "cutoffs: not a number": (with_column("cutoffs", "kl", np.nan), ALL),
    "cutoffs: infinite": (with_column("cutoffs", "nll", np.inf), ALL),
    "layers: selectivity text": (with_column("layers", "selectivity", "much"), ALL),
    "layers: all not a number": (with_column("layers", "drift_prompt_centred", np.nan), None),
    "heads: text": (with_column("heads", "selectivity", "much"), ALL),
    "prompts: no category": (with_column("prompts", "category", None), None),
    "prompts: numbers for names": (with_column("prompts", "prompt_id", range(6)), ALL),
    "tokens: attention too short": (attention(lambda w: w[:2]), None),
    "tokens: attention empty": (attention(lambda w: w[:0]), None),
    "tokens: attention of text": (attention(lambda w: ["much"] * len(w)), None),
    "tokens: attention a number": (attention(lambda w: 1.0), None),
    "tokens: none": (rows("tokens", lambda t: t.iloc[:0]), None),
    "tokens: positions twice": (with_column("tokens", "position", 40), None),
    "lens: half": (rows("lens", lambda t: t.iloc[: len(t) // 2 - 3]), None),
    "lens: layers all the same": (with_column("lens", "layer", 0), None),
    "kl is no parquet": (written("cutoffs.parquet", "hello"), ALL),
    "n_layers text": (manifest_with(n_layers="5"), "list"),
    "n_layers too few": (manifest_with(n_layers=3), "list"),
    "n_prompts none": (manifest_with(n_prompts=0), "list"),
    "n_heads none": (manifest_with(n_heads=0), ALL),
    "identity empty": (manifest_with(identity={}), None),
    "no anchors": (identity(anchors="gone"), None),
    "anchors text": (identity(anchors="many"), None),
    "anchors negative": (identity(anchors=-3), None),
    "context a list": (identity(context_length=[1, {}]), None),
    "shape empty": (manifest_with(shape={}), None),
    "shape of other layers": (shape(layer_parameters=[1, 2]), None),
    "shape of no layers": (shape(layer_parameters=[], layer_types=[]), None),
    "shape of text": (shape(layer_parameters="many"), None),
    "no positions": (manifest_with(max_positions=None), None),
    "notes of other things": (manifest_with(notes=[1, {"a": 2}, None]), None),
    "meanings of other things": (manifest_with(columns={"a": 1, "b": None}), None),
    "huge number": (written(MANIFEST, '{"schema_version": ' + "9" * 5000 + "}"), "list"),
    "goals no JSON": (written(RECOMMENDATION, "{"), ""),
    "goals unknown": (written(RECOMMENDATION, '{"criterion": {"speed": 3}}'), ""),
    "goals are arguments": (written(RECOMMENDATION, '{"criterion": {"rules": 1, "seed": 1.5}}'), ""),
    "goals are lengths": (written(RECOMMENDATION, '{"criterion": {"lengths": 4}}'), ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_was_tampered_with_is_one_line_at_most(copy, open_app, damage):
    check_run(copy, open_app, *DAMAGE[damage])


def check_run(copy, open_app, change, broken):
    folder = copy("tiny")
    change(folder)
    at = open_app(folder.parent)
    troubles = {}
    # Compare shows what the others show; once is enough where they show it.
    for page in RESULT_PAGES if broken == ALL else RESULT_PAGES[:3]:
        if page != "overview":
            go(at, page)
        said = calm(at)
        assert len(said) <= 1, page
        troubles[page] = said
        assert said or at.get("plotly_chart") or at.dataframe or at.info, page
        if said:
            assert "tiny" in said[0], "it names the run"
    if broken == "list":
        assert not any(troubles.values())
        at = go(at, "overview")
        assert table(at)["status"].tolist() in (["not a run"], ["complete"])
    elif broken is not None:
        assert {page for page, said in troubles.items() if said} == set(broken.split())


def test_one_damaged_run_leaves_the_others_alone(copy, open_app):
    folder = copy("tiny")
    DAMAGE["cutoffs: no column kl"][0](copy("plain"))
    at = open_app(folder.parent, run="tiny")
    assert calm(at) == []
    lines = table(at).set_index("run")
    assert lines.loc["plain", "status"] == "damaged"
    assert "no column kl" in lines.loc["plain", "problem"]
    assert lines.loc["tiny", "status"] == "complete"
    for page in ("layers", "cutoff"):
        assert calm(go(at, page)) == []


def test_odd_names_are_shown_as_they_are(copy, open_app):
    folder = copy("tiny", into="*ru<b>n</b>*")
    edit_manifest(folder, model=ODD, prompt_set=ODD, notes=[ODD])
    with_column("prompts", "category", ODD)(folder)
    at = open_app(folder.parent)
    seen = 0
    for page in (*RESULT_PAGES, "playground"):
        if page != "overview":
            go(at, page)
        assert calm(at) == []
        for element in (*at.markdown, *at.caption, *at.subheader, *at.info):
            for part in ("*b*", "<b>", "[e](f)", "$g$", ":red[", "`i`", "_j_"):
                assert part not in element.value, (page, element.value)
            seen += ODD in literal(element.value)
    assert seen >= 4


# Below: tests that fail today, each for a mistake in the app or in diagnostics.

FOUND = {
    "prompts: categories of two kinds": (with_column("prompts", "category", lambda c: pd.Series([[1], [2]] * 3)), None),
    "tokens: text missing": (with_column("tokens", "text", None), None),
    "tokens: text numbers": (with_column("tokens", "text", 5), None),
    "lens: none": (rows("lens", lambda t: t.iloc[:0]), None),
    "lens: gone": (lambda f: (f / "lens.parquet").unlink(), None),
    "lens: text missing": (with_column("lens", "lens_text", None), None),
    "lens: text numbers": (with_column("lens", "lens_text", 7), None),
    "shape of zeros": (shape(layer_parameters=[0] * 5, head_parameters=0, n_heads=0, n_kv_heads=0), None),
    "deep manifest": (written(MANIFEST, "[" * 100_000), "list"),
    "goals deep": (written(RECOMMENDATION, "[" * 100_000), ""),
}


@pytest.mark.parametrize("damage", FOUND)
def test_found_tampered_run(copy, open_app, damage):
    check_run(copy, open_app, *FOUND[damage])


BENCH_FOUND = {
    "manifest a list": bench_manifest("[]"),
    "manifest a number": bench_manifest("1"),
    "manifest empty": bench_manifest("{}"),
    "manifest notes": bench_manifest('{"model": "m", "hardware": "h", "notes": 5}'),
    "no rows": lambda f: edit_table(f, "benchmark", lambda t: t.iloc[:0]),
    "text for lengths": lambda f: edit_table(f, "benchmark", lambda t: t.assign(n_prompt="long")),
    "text for limits": lambda f: edit_table(f, "benchmark", lambda t: t.assign(tpot_limit="low")),
}


@pytest.mark.parametrize("damage", BENCH_FOUND)
def test_found_damaged_benchmark(copy, open_app, damage):
    check_benchmark(copy, open_app, BENCH_FOUND[damage])


def test_found_show_opens_the_run_of_a_finished_diagnosis(library, copy, command, open_app):
    runs = copy("real").parent
    at = open_app(runs, "diagnosis")
    start(at, model="some/model")
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    command.end()
    shutil.copytree(library / "tiny", out)
    recommend(load_run(out)).save(out / RECOMMENDATION)
    at.run()
    assert at.sidebar.selectbox[0].value == "real"
    job_buttons(at)["Show"].click().run()
    assert calm(at) == []
    assert literal(at.subheader[0].value).startswith("tiny-llama")
    assert at.sidebar.selectbox[0].value == out.name


@pytest.mark.parametrize(
    "goals",
    [
        {"max_kl": 0.3, "min_agreement": 0.999},
        {"max_kl": 3.0},
        {"min_agreement": 0.3},
    ],
)
def test_found_the_cutoff_page_begins_at_the_saved_recommendation(copy, open_app, goals):
    folder = copy("real")
    rec = recommend(load_run(folder), **goals)
    rec.save(folder / RECOMMENDATION)
    at = open_app(folder.parent)
    assert metrics(at)["Cutoff"].startswith(f"{rec.cutoff} /")
    go(at, "cutoff")
    assert cutoff_slider(at).value == rec.cutoff


def test_found_a_mistake_in_a_policy_keeps_the_prompt(playground):
    at = playground
    at.text_area(key="prompt").set_value(PROMPT).run()
    at.number_input(key="new_tokens").set_value(7).run()
    at.text_input(key="more_policies").set_value("speed:").run()
    assert len(calm(at)) == 1
    at.text_input(key="more_policies").set_value("speed:4").run()
    assert at.text_area(key="prompt").value == PROMPT
    assert at.number_input(key="new_tokens").value == 7


def test_found_the_prompt_survives_another_page(playground):
    at = playground
    at.text_area(key="prompt").set_value(PROMPT).run()
    go(at, "cutoff")
    go(at, "playground")
    assert at.text_area(key="prompt").value == PROMPT


def test_found_results_of_a_model_of_ones_own_survive_another_page(library, tmp_path, open_app):
    save_tiny(tmp_path / "model")
    at = open_app(library, "playground")
    at.text_input(key="play_model").set_value(str(tmp_path / "model"))
    at.button(key="load").click().run()
    ask(at, "w5 w6 w7 w8 w9", 3)
    shown = html(at)
    assert shown
    go(at, "cutoff")
    go(at, "playground")
    assert html(at) == shown


def test_found_results_belong_to_the_model_that_made_them(playground, tmp_path):
    at = playground
    ask(at, PROMPT, 6)
    before = html(at)
    save_tiny(tmp_path / "model")
    at.text_input(key="play_model").set_value(str(tmp_path / "model"))
    at.button(key="load").click().run()
    assert calm(at) == []
    # Not the ids of one model as the words of another.
    assert html(at) in ("", before)


def test_found_names_in_figures_are_shown_as_they_are(copy, library, open_app):
    folder = copy("tiny", into="<b>run</b>")
    edit_manifest(folder, model=ODD)
    for file in (library / "bench").iterdir():
        shutil.copy(file, folder)
    (folder / BENCHMARK_MANIFEST).write_text(json.dumps(read_json(folder / BENCHMARK_MANIFEST) | {"model": ODD}))
    at = open_app(folder.parent)
    for page in ("layers", "cutoff", "compare", "benchmark"):
        go(at, page)
        for number in range(len(at.get("plotly_chart"))):
            drawn = figure(at, number)
            # Plotly reads a subset of HTML in titles and in names of curves.
            names = [drawn["layout"]["title"]["text"], *(t.get("name", "") for t in drawn["data"])]
            assert not [name for name in names if "<b>" in name], page


def test_found_the_folder_in_the_sidebar_is_text(copy, open_app):
    folder = copy("tiny")
    odd = folder.parent.rename(folder.parent.with_name("*my* runs"))
    at = open_app(odd)
    assert "*my*" not in at.sidebar.selectbox[0].proto.help
