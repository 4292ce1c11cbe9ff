"""The page *Layers*: its curves, heads, tokens and logit lens are those of the run."""

import json
import re
import types

import numpy as np
import pandas as pd
import pytest

from diagnostics import diagnose, load_prompts, recommend
from diagnostics.figures.layers import PANELS, layer_sentences
from diagnostics.figures.style import per_layer
from diagnostics.support.finite import finite_mean
from tests.support.pages import ODD, calm, curve, edit_table, figure, html, literal, numbers, same
from tests.support.runs import write_prompts
from tests.support.tiny import tiny_model


def section(at, name):
    return at.segmented_control(key="section").set_value(name).run()


def test_layer_curves_are_the_means_over_all_prompts(library, run, open_app):
    at = open_app(library, "layers")
    assert calm(at) == []
    rec = recommend(run, max_kl=0.3)
    said = [markdown.value for markdown in at.markdown]
    for number, (name, panel) in enumerate(PANELS.items()):
        drawn = figure(at, number)
        for column, title in panel.curves:
            same(curve(drawn, title), finite_mean(per_layer(run, column), axis=0))
        names = {trace.get("name") for trace in drawn["data"]}
        assert f"cutoff {rec.cutoff}" in names
        assert ("selection region" in names) == (rec.selection_region is not None)
        assert f"##### {panel.question}" in [literal(text) for text in said]
        assert layer_sentences(run, rec)[name] in said
    at.toggle(key="regions").set_value(False).run()
    assert not {t.get("name") for t in figure(at)["data"]} & {f"cutoff {rec.cutoff}", "selection region"}
    assert layer_sentences(run)["uptake"] in [markdown.value for markdown in at.markdown]


def test_categories_and_prompts_filter_curves_and_heads(library, run, open_app):
    at = open_app(library, "layers")
    everything = curve(figure(at, 1), "selectivity")
    category = run.prompts["category"].iloc[3]
    at.multiselect(key="categories").set_value([category]).run()
    ids = list(run.prompts.loc[run.prompts["category"] == category, "prompt_id"])
    assert at.multiselect(key="prompts").options == ids
    same(curve(figure(at, 1), "selectivity"), finite_mean(per_layer(run.select(ids), "selectivity"), axis=0))
    section(at, "Heads")
    same(numbers(figure(at)["data"][0]["z"]), run.select(ids).array("selectivity").mean(0))
    section(at, "Curves")
    at.multiselect(key="categories").set_value([]).run()
    two = list(run.prompts["prompt_id"][[1, 4]])
    at.multiselect(key="prompts").set_value(two).run()
    chosen = curve(figure(at, 1), "selectivity")
    same(chosen, finite_mean(per_layer(run.select(two), "selectivity"), axis=0))
    assert not np.allclose(chosen, everything)
    assert any("mean over 2 prompts" in caption.value for caption in at.caption)
    # The regions stay those of the whole run.
    assert f"cutoff {recommend(run, max_kl=0.3).cutoff}" in {trace.get("name") for trace in figure(at)["data"]}
    assert calm(at) == []


def test_only_the_chosen_section_is_there_and_the_address_says_it(library, open_app):
    at = open_app(library, "layers")
    charts = {}
    for name in ("Curves", "Heads", "One prompt", "Logit lens", "Definitions"):
        section(at, name)
        assert calm(at) == []
        charts[name] = len(at.get("plotly_chart"))
    assert charts == {"Curves": 4, "Heads": 1, "One prompt": 0, "Logit lens": 1, "Definitions": 0}
    assert at.query_params["section"] in ("Definitions", ["Definitions"])
    again = open_app(library, "layers", run="real", section="Heads", measure="mass_prompt", layer="3", head="2")
    assert again.segmented_control(key="section").value == "Heads"
    assert again.selectbox(key="head_measure").value == "mass_prompt"
    assert (again.selectbox(key="head_layer").value, again.selectbox(key="head").value) == (3, 2)


def test_every_head_measure_is_drawn(library, run, open_app):
    at = section(open_app(library, "layers"), "Heads")
    assert at.selectbox(key="head_measure").value == "selectivity"
    for measure in ("mass_prompt", "mass_anchor", "prompt_entropy", "prompt_top5"):
        at.selectbox(key="head_measure").select(measure).run()
        shown = numbers(figure(at)["data"][0]["z"])
        assert shown.shape == (30, 9)
        same(shown, np.nanmean(run.array(measure), axis=0))
    assert calm(at) == []


def test_a_head_shows_what_it_attends_to(library, run, open_app):
    at = section(open_app(library, "layers"), "Heads")
    mean = run.array("selectivity").mean(axis=0)
    most = np.unravel_index(mean.argmax(), mean.shape)
    assert (at.selectbox(key="head_layer").value, at.selectbox(key="head").value) == most
    prompt_id = at.selectbox(key="one_prompt").value
    for layer, head in (most, (4, 7)):
        at.selectbox(key="head_layer").select(layer)
        at.selectbox(key="head").select(head).run()
        assert calm(at) == []
        (frame,) = figure(at)["layout"]["shapes"]
        assert (frame["y0"], frame["x0"]) == (layer - 0.5, head - 0.5)
        of_prompt = run.head_tokens[run.head_tokens["prompt_id"] == prompt_id]
        rows = of_prompt[(of_prompt["layer"] == layer) & (of_prompt["head"] == head)]
        notes = re.findall(r'title="token (\d+), prompt, attention ([^"]*)"', html(at))
        assert dict(notes) == {str(r.position): f"{r.attention:.2g}" for r in rows.itertuples()}
        (said,) = [literal(m.value) for m in at.markdown if "all attention that this head gives" in m.value]
        top = rows.nlargest(5, "attention")
        assert f"{top['attention'].sum():.0%} of all attention" in said
        text = run.tokens[run.tokens["prompt_id"] == prompt_id].set_index("position")["text"]
        shown = text[top["position"].iloc[0]].replace(" ", "·").replace("\n", "↵")
        assert said.startswith(f"Most attention goes to **{shown}**")


def test_a_click_on_a_cell_chooses_the_head(library, run, open_app, monkeypatch):
    import streamlit

    chart, asked = streamlit.plotly_chart, {}

    def note(*arguments, on_select, **options):
        asked[options["key"]] = on_select
        return chart(*arguments, on_select="ignore", **options)

    monkeypatch.setattr(streamlit, "plotly_chart", note)
    at = section(open_app(library, "layers"), "Heads")
    at.session_state["figure heads"] = {"selection": {"points": [{"x": 5, "y": 12}]}}
    choose = asked["figure heads"]
    assert choose != "ignore"
    clicked = {}
    monkeypatch.setitem(choose.__globals__, "keep", lambda name, value, *, of: clicked.update({name: (value, of)}))
    monkeypatch.setitem(choose.__globals__, "st", types.SimpleNamespace(session_state=at.session_state))
    choose()
    assert clicked == {"layer": (12, "real"), "head": (5, "real")}


def spans(at):
    found = re.findall(r'<span title="token (\d+), (\w+)([^"]*)" style="([^"]*)">', html(at))
    return {int(position): (segment, note, style) for position, segment, note, style in found}


def opacity(style):
    return float(re.search(r"rgba\(.*,([\d.]+)\)", style)[1])


@pytest.mark.parametrize("colour", ["selectivity", "attention"])
def test_one_prompt_has_its_tokens_in_the_colour_of_a_measure(library, run, open_app, colour):
    at = section(open_app(library, "layers"), "One prompt")
    kept = list(dict.fromkeys(run.tokens["prompt_id"]))
    assert at.selectbox(key="one_prompt").options == kept
    assert len(kept) == 2
    at.selectbox(key="one_prompt").select(kept[1]).run()
    assert at.segmented_control(key="colour").value == "selectivity"
    at.segmented_control(key="colour").set_value(colour).run()
    tokens = run.tokens[run.tokens["prompt_id"] == kept[1]].reset_index(drop=True)
    inside = tokens[tokens["segment"] == "prompt"]
    for layer in (None, 0, 17):
        if layer is not None:
            at.select_slider(key="layer").set_value(layer).run()
        weights = np.array([w.mean() if layer is None else w[layer] for w in inside[colour]])
        shown = spans(at)
        assert all(shown[p][0] == s for p, s in zip(tokens["position"], tokens["segment"], strict=True) if p in shown)
        for position, weight in zip(inside["position"], weights, strict=True):
            if position in shown:
                assert shown[position][1] == f", {colour} {weight:.2g}"
                assert opacity(shown[position][2]) == pytest.approx(
                    0.85 * min(1, weight / np.quantile(weights, 0.99)), abs=0.006
                )
    coloured = spans(at)
    at.segmented_control(key="colour").set_value("segment").run()
    assert at.select_slider(key="layer").proto.disabled
    plain = {style for segment, _, style in spans(at).values() if segment == "prompt" and "border" not in style}
    assert len(plain) == 1
    assert coloured != spans(at)
    row = run.prompts.set_index("prompt_id").loc[kept[1]]
    assert any(literal(c.value).startswith(f"{row['n_prompt']} prompt tokens, 8 of") for c in at.caption)
    assert calm(at) == []


def test_an_older_run_says_why_its_text_is_coloured_by_attention(copy, open_app):
    folder = copy("tiny")
    edit_table(folder, "tokens", lambda tokens: tokens.drop(columns="selectivity"))
    (folder / "head_tokens.parquet").unlink()
    at = section(open_app(folder.parent, "layers"), "One prompt")
    assert calm(at) == []
    assert at.segmented_control(key="colour").options == ["attention", "segment"]
    assert at.segmented_control(key="colour").value == "attention"
    assert any("made before selectivity was kept by token" in caption.value for caption in at.caption)
    section(at, "Heads")
    assert calm(at) == []
    assert "made before the tokens of every head were kept" in at.info[0].value


def test_what_a_prompt_says_is_text(smollm, tmp_path, open_app):
    evil = "<script>alert('x')</script> & <img src=x onerror=y> \"quoted\" **bold** $x$ [a](javascript:b)"
    lines = [{"id": ODD, "text": f"{evil} and more of it", "category": ODD}, {"id": "<i>2</i>", "text": evil * 2}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    diagnose(smollm, load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=2, out=tmp_path / "runs" / "evil")
    at = section(open_app(tmp_path / "runs", "layers"), "One prompt")
    assert calm(at) == []
    made = html(at)
    assert set(re.findall(r"</?(\w+)", made)) == {"div", "span"}
    shown = "".join(re.findall(r">([^<]*)<", made))
    for character in ("&lt;", "&gt;", "&amp;"):
        assert character in shown
    import html as entities

    assert f"{evil} and more of it" in entities.unescape(shown)
    assert any(ODD in literal(caption.value) and ODD not in caption.value for caption in at.caption)
    for name in ("Heads", "Logit lens"):
        section(at, name)
        assert calm(at) == []
        assert "<script" not in json.dumps(figure(at))
        for markdown in at.markdown:  # tokens and the names of prompts as well
            assert not any(part in markdown.value for part in ("<b>", "<script", "[a](", "$x$"))


def test_the_logit_lens_moves_along_the_reference(library, run, open_app):
    at = section(open_app(library, "layers"), "Logit lens")
    prompt_id = at.selectbox(key="one_prompt").value
    lens = run.lens[run.lens["prompt_id"] == prompt_id]
    positions = sorted(lens["position"].unique())
    same(numbers(figure(at)["data"][0]["z"]), _grid(lens, positions[:8]))
    at.selectbox(key="one_prompt").select(at.selectbox(key="one_prompt").options[1]).run()
    assert calm(at) == []


def _grid(lens, positions):
    rows = lens[lens["position"].isin(positions)]
    return rows.pivot(index="layer", columns="position", values="lens_probability").to_numpy()


def test_a_long_reference_has_a_slider_for_the_logit_lens(tmp_path, open_app):
    write_prompts(tmp_path / "p.jsonl", n_prompts=2, n_tokens=20)
    out = tmp_path / "runs" / "long"
    long = diagnose(tiny_model("llama"), load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=20, out=out)
    at = section(open_app(tmp_path / "runs", "layers"), "Logit lens")
    lens = long.lens[long.lens["prompt_id"] == at.selectbox(key="one_prompt").value]
    positions = sorted(lens["position"].unique())
    assert len(positions) > 8
    slider = at.slider(key="from_position")
    assert (slider.min, slider.max) == (0, len(positions) - 8)
    slider.set_value(len(positions) - 8).run()
    same(numbers(figure(at)["data"][0]["z"]), _grid(lens, positions[-8:]))
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
    at = section(open_app(folder.parent, "layers"), "One prompt")
    assert "t0000" in html(at)
    assert "t4999" not in html(at)
    last = at.slider(key="from_token").max
    at.slider(key="from_token").set_value(last).run()
    assert "t4999" in html(at), "the last tokens can be reached"
    assert "t0000" not in html(at)


@pytest.mark.parametrize("name", ["Heads", "One prompt", "Logit lens"])
def test_a_run_without_details_says_so(library, open_app, name):
    at = section(open_app(library, "layers", run="plain"), name)
    assert calm(at) == []
    assert "--detail-prompts" in at.info[0].value
    assert len(at.get("plotly_chart")) == (name == "Heads")
    assert "token 0" not in html(at)


def test_the_measures_are_explained_by_what_they_answer(library, run, open_app):
    at = section(open_app(library, "layers"), "Definitions")
    said = {}
    for table in at.table:
        said |= {literal(column): literal(meaning) for column, meaning in table.value["Meaning"].items()}
    assert said == {name: " ".join(meaning.split()) for name, meaning in run.manifest["columns"].items()}
    headings = [literal(markdown.value) for markdown in at.markdown if markdown.value.startswith("#####")]
    assert headings[:4] == [f"##### {panel.question}" for panel in PANELS.values()]
    assert len(headings) == len(at.table) == 7  # none is left over


def test_no_definition_needs_the_one_before_it(run):
    for name, meaning in run.manifest["columns"].items():
        assert not re.match(r"(the same|its|their|as above)\b", meaning), name
