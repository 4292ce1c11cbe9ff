"""The page *Cutoff*: evidence at every cutoff, goals, the snippet, and saving the recommendation."""

import ast
import io
import json

import numpy as np
import pandas as pd
import pytest

from diagnostics import SpeedPolicy, load_run, recommend
from diagnostics.cutoffs.losses import loss_by_category
from diagnostics.cutoffs.recommendation import retention_at
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.figures.style import per_layer
from diagnostics.generation.generation import generate
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from diagnostics.support.files import read_json
from tests.support.pages import calm, curve, downloads, edit_manifest, figure, go, literal, metrics, same, table


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
        "KV cache": f"{savings.kv_ratio:.3f}",
    }
    assert [*found][:4] == ["KL from full depth", "Same top token", "TTFT", "KV cache"]
    assert all(metric.help for metric in at.metric)
    captions = [literal(caption.value) for caption in at.caption]
    assert f"nats per token, bound {expected['kl_bound']:.3f}" in captions
    assert f"nats per token, bound {expected['nll_increase_bound']:+.3f}" in captions
    kept_bytes, full = (f"{size / 2**20:,.1f}" for size in (savings.kv_bytes, savings.kv_bytes_full))
    assert f"of full: {kept_bytes} of {full} MiB" in captions
    assert bool(at.success) == expected["admissible"] != bool(at.warning)
    assert f"Cutoff {k} " in (at.success or at.warning)[0].value


def cutoff_slider(at):
    (slider,) = [s for s in at.slider if s.label.startswith("Cutoff")]
    return slider


def tolerance(at):
    """The slider of the one goal chosen."""
    (slider,) = [s for s in at.slider if " most, " in s.label or " least, " in s.label]
    return slider


def goals(at):
    (box,) = [s for s in at.multiselect if s.label == "What is limited"]
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
        losses = table(at).set_index("kind of prompt").iloc[:, 0].to_dict()
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


def test_the_snippet_runs_as_pasted_and_generates_under_the_policy(library, smollm, monkeypatch, capsys, open_app):
    at = open_app(library, "cutoff")
    cutoff_slider(at).set_value(20).run()
    monkeypatch.setattr("diagnostics.load_model", lambda name: smollm, raising=True)
    names = {}
    assert recommend(load_run(library / "real")).cutoff != 20
    assert "SpeedPolicy(cutoff=20)" in at.code[0].value
    exec(compile(at.code[0].value, "snippet", "exec"), names)  # as pasted
    ids = names["inputs"]["input_ids"]
    expected = generate(smollm, ids, policy=SpeedPolicy(20), max_new_tokens=64).token_ids[0].tolist()
    assert names["tokens"][0, ids.shape[1] :].tolist() == expected
    assert smollm.tokenizer.decode(expected[:8], skip_special_tokens=True) in capsys.readouterr().out


def test_the_download_is_the_recommendation_of_the_goal(library, run, monkeypatch, open_app):
    kept = downloads(monkeypatch)
    at = open_app(library, "cutoff")
    goals(at).set_value(["min_agreement"]).run()
    tolerance(at).set_value(0.75).run()
    labels = {button.label for button in at.download_button}
    assert labels == {"Recommendation", "Figure of the loss", "Figure of the retention", "CSV"}
    data = kept["real-recommendation.json"]
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


def test_saving_asks_before_it_replaces_another(copy, open_app):
    with_one, without = (
        open_app(copy("real").parent, "cutoff", run="real"),
        open_app(copy("tiny").parent, "cutoff", run="tiny"),
    )
    assert with_one.button(key="save").label.startswith("Replace it: cutoff ")
    assert any("has a recommendation.json already" in literal(text.value) for text in with_one.markdown)
    assert without.button(key="save").label == "Save in the run folder"


def test_the_csv_is_the_data_drawn(library, run, monkeypatch, open_app):
    kept = downloads(monkeypatch)
    at = open_app(library, "cutoff")
    rec = recommend(run, max_kl=0.3)
    loss = pd.read_csv(io.BytesIO(kept["real-loss.csv"])).set_index("curve")
    axis = "cutoff: layers that prompt tokens run through"
    same(loss.loc["KL from full depth", "y"], curve(figure(at), "KL from full depth"))
    assert loss.loc["KL from full depth", axis].tolist() == list(range(1, 31))
    ratios = [predict_savings(run.manifest["shape"], k, lengths=[8192])[0].ttft_ratio for k in range(1, 31)]
    same(loss.loc["TTFT, predicted", "y"], ratios)
    bounds = loss.loc["KL, upper bound", "y"]
    there = bounds.notna().to_numpy()
    same(bounds[there], np.array([row["kl_bound"] for row in rec.evidence])[there])
    retained = pd.read_csv(io.BytesIO(kept["real-retention.csv"])).set_index("curve")
    same(retained.loc["contribution", "share below the cutoff"], curve(figure(at, 1), "contribution"))


def test_curves_that_coincide_are_told_apart_and_axes_line_up(library, open_app):
    at = open_app(library, "cutoff")
    loss, kept = figure(at), figure(at, 1)
    looks = {
        t["name"]: (t["line"].get("width"), t["mode"], t.get("opacity")) for t in loss["data"] if t["xaxis"] == "x2"
    }
    assert looks["KV, predicted"] != looks["TTFT, predicted"]
    assert [t["name"] for t in loss["data"]].index("KV, predicted") < [t["name"] for t in loss["data"]].index(
        "TTFT, predicted"
    ), "the broad line lies below"
    for name in ("range", "dtick", "tick0"):
        assert loss["layout"]["xaxis2"][name] == kept["layout"]["xaxis"][name]
    assert loss["layout"]["margin"]["l"] == kept["layout"]["margin"]["l"]
    assert {t["legend"] for t in loss["data"]} == {"legend", "legend2"}, "each panel has its own"


def test_the_address_brings_back_cutoff_goal_and_length(library, run, open_app):
    at = open_app(library, "cutoff")
    cutoff_slider(at).set_value(20)
    at.select_slider(key="length").set_value(32768)
    goals(at).set_value(["min_agreement"]).run()
    tolerance(at).set_value(0.75).run()
    asked = {name: at.query_params[name] for name in ("run", "cutoff", "length", "goals", "min_agreement")}
    assert asked == {
        "run": "real",
        "cutoff": "20",
        "length": "32768",
        "goals": "min_agreement",
        "min_agreement": "0.75",
    }
    again = open_app(library, "cutoff", **asked)
    assert calm(again) == []
    shown_at(again, run, recommend(run, min_agreement=0.75), 20, 32768)


def test_a_cutoff_that_the_model_does_not_have_is_one_line(library, open_app):
    at = open_app(library, "cutoff", run="tiny", cutoff="25")
    assert "cutoff is a whole number from 1 to 5" in literal(at.warning[0].value)
    assert cutoff_slider(at).value == recommend(load_run(library / "tiny")).cutoff


def test_every_kind_of_prompt_can_be_asked_to_meet_the_goal(library, run, open_app):
    at = open_app(library, "cutoff")
    at.toggle(key="each").set_value(True).run()
    rec = recommend(run, max_kl=0.3, every_category=True)
    shown_at(at, run, rec, rec.cutoff)
    assert at.query_params["every_category"] == "yes"


def test_a_folder_that_cannot_be_written_is_one_line(copy, monkeypatch, open_app):
    folder = copy("tiny")
    at = open_app(folder.parent, "cutoff")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("diagnostics.support.files.tempfile.mkdtemp", refuse)
    at.button(key="save").click().run()
    assert "Permission denied" in calm(at)[0]
    assert not (folder / RECOMMENDATION).exists()


@pytest.mark.parametrize(
    "goals",
    [
        {"max_kl": 0.3, "min_agreement": 0.999},
        {"max_kl": 3.0},
        {"min_agreement": 0.3},
    ],
)
def test_the_cutoff_page_begins_at_the_saved_recommendation(copy, open_app, goals):
    folder = copy("real")
    rec = recommend(load_run(folder), **goals)
    rec.save(folder / RECOMMENDATION)
    at = open_app(folder.parent)
    assert metrics(at)["Cutoff"].startswith(f"{rec.cutoff} /")
    go(at, "cutoff")
    assert cutoff_slider(at).value == rec.cutoff
