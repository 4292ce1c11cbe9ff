"""The page *Overview* and the choice of a run: every folder listed with its state, the headline, the sidebar."""

import shutil

import numpy as np
import pytest

from diagnostics import load_run, recommend
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.runs.places import MANIFEST
from tests.support.pages import RESULT_PAGES, calm, figure_title, go, literal, metrics, table


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
    assert "damaged: manifest.json" in lines.loc["broken", "problem"]
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
        assert "tiny-llama" in figure_title(go(at, page))
    assert literal(go(at, "overview").subheader[0].value).startswith("tiny-llama")
    assert calm(at) == []


def test_the_address_chooses_the_run(library, open_app):
    at = open_app(library, run="plain")
    assert literal(at.subheader[0].value).startswith("tiny-gpt2")
    assert calm(at) == []


@pytest.mark.parametrize(
    ("asked", "told"), [("gone", "There is no run gone in"), ("broken", "The run broken cannot be shown: ")]
)
def test_a_link_to_a_run_that_is_not_there_says_so_and_shows_no_other(library, open_app, asked, told):
    at = open_app(library, run=asked)
    for page in ("overview", "layers", "cutoff"):
        go(at, page)
        (said,) = calm(at)
        assert said.startswith(told)
        assert asked == "broken" or "Runs here: real, tiny, plain, interrupted." in said
        assert not at.metric
        assert not at.get("plotly_chart")
        assert at.sidebar.selectbox[0].value is None
        assert at.query_params["run"] == asked
    at.sidebar.selectbox[0].select("tiny").run()
    assert calm(at) == []
    assert "tiny-llama" in figure_title(at)


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


def test_a_run_that_was_deleted_meanwhile_is_not_replaced_by_another(copy, open_app):
    at = open_app(copy("tiny").parent, "layers")
    copy("plain")
    shutil.rmtree(copy("tiny", into="again").parent / "tiny")
    at.run()
    (said,) = calm(at)
    assert said.startswith("There is no run tiny in")
    assert "again" in said
    assert not at.get("plotly_chart")


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
