"""The page *Layers*: its curves, heads, tokens and logit lens are those of the run."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from diagnostics import diagnose, load_prompts, recommend
from diagnostics.figures.layers import PANELS
from diagnostics.figures.style import per_layer
from diagnostics.support.finite import finite_mean
from tests.support.pages import ODD, calm, curve, edit_table, figure, figure_title, html, literal, numbers, same
from tests.support.runs import write_prompts
from tests.support.tiny import tiny_model


def test_layer_curves_are_the_means_over_all_prompts(library, run, open_app):
    at = open_app(library, "layers")
    assert calm(at) == []
    drawn = figure(at)
    for panel in PANELS.values():
        for column, name in panel.curves:
            same(curve(drawn, name), finite_mean(per_layer(run, column), axis=0))
    names = {trace.get("name") for trace in drawn["data"]}
    rec = recommend(run, max_kl=0.3)
    assert f"cutoff {rec.cutoff}" in names
    assert ("selection region" in names) == (rec.selection_region is not None)
    at.toggle(key="regions").set_value(False).run()
    assert not {t.get("name") for t in figure(at)["data"]} & {f"cutoff {rec.cutoff}", "selection region"}


def test_categories_and_prompts_filter_curves_and_heads(library, run, open_app):
    at = open_app(library, "layers")
    name = "selectivity"
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
    assert "2 prompts" in figure_title(at)
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


def test_the_logit_lens_moves_along_the_reference(library, run, open_app):
    at = open_app(library, "layers")
    prompt_id = at.selectbox(key="one_prompt").value
    lens = run.lens[run.lens["prompt_id"] == prompt_id]
    positions = sorted(lens["position"].unique())
    same(numbers(figure(at, 2)["data"][0]["z"]), _grid(lens, positions[:8]))
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
    assert len(positions) > 8
    slider = at.slider(key="from_position")
    assert (slider.min, slider.max) == (0, len(positions) - 8)
    slider.set_value(len(positions) - 8).run()
    same(numbers(figure(at, 2)["data"][0]["z"]), _grid(lens, positions[-8:]))
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
