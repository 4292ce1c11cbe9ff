"""The page *Overview* and the choice of a run: every folder listed with its state, the headline, the sidebar."""

import dataclasses
import shutil

import numpy as np
import pytest

from diagnostics import load_run, recommend
from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.runs.example import example_folder
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from tests.support.pages import RESULT_PAGES, calm, curve, figure, figure_title, go, html, literal, metrics, table


def answered(at):
    """The sentence below the title."""
    (sentence,) = [markdown.value for markdown in at.markdown if markdown.value.startswith("#### ")]
    return literal(sentence.removeprefix("#### "))


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
    assert not lines["problem"].str.contains(str(library), regex=False, na=False).any(), "the reason comes first"
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
    measured = "smollm2-135m-instruct, measured on 6 prompts. Goal: KL at most 0.3, with 95% confidence."
    assert measured in captions
    assert f"nats per token, at most {at_cutoff['kl_bound']:.3f} by its bound" in captions
    assert answered(at) == answer(rec, 8192)
    drawn = curve(figure(at), "KL from full depth")
    assert drawn[rec.cutoff - 1] == pytest.approx(at_cutoff["kl"])
    texts = " ".join(literal(markdown.value) for markdown in at.markdown)
    if rec.selection_region is not None:
        assert f"Layers {rec.selection_region.first} to {rec.selection_region.last} select from the prompt" in texts


def test_the_answer_is_that_of_the_chosen_length(library, run, open_app):
    at = open_app(library)
    rec = recommend(run, max_kl=0.3)
    at.select_slider(key="length").set_value(512).run()
    (savings,) = predict_savings(run.manifest["shape"], rec.cutoff, lengths=[512])
    told = answer(dataclasses.replace(rec, data=rec.data | {"predicted": [savings.to_dict()]}), 512)
    assert answered(at) == told
    assert "at 512 tokens" in told
    assert at.query_params["length"] == "512"
    assert metrics(at)["TTFT"] == f"{savings.ttft_ratio:.2f}"
    # The page Cutoff predicts for the same length.
    assert go(at, "cutoff").select_slider(key="length").value == 512


def test_the_headline_has_no_internals_and_defines_every_number(library, open_app):
    at = open_app(library)
    texts = [literal(e.value) for e in (*at.markdown, *at.caption, *at.subheader, *at.title)]
    for internal in ("max_kl", "max kl", "every_category", "--", "confidence 0", "builtin"):
        assert not [text for text in texts if internal in text], internal
    assert all(metric.help for metric in at.metric)
    assert "data:image/svg" in html(at)


@pytest.mark.parametrize(("key", "title"), [("layers", "each layer"), ("cutoff", "Which cutoff?")])
def test_the_headline_leads_on(library, open_app, key, title):
    at = open_app(library)
    at.button(key=f"to {key}").click().run()
    assert title in at.title[0].value


def test_a_damaged_recommendation_is_said(copy, open_app):
    folder = copy("tiny")
    (folder / RECOMMENDATION).write_text("{")
    at = open_app(folder.parent)
    for page in ("overview", "cutoff"):
        go(at, page)
        (said,) = [literal(warning.value) for warning in at.warning if "damaged" in warning.value]
        assert "recommendation.json of tiny is damaged" in said


def test_another_run_in_the_sidebar_is_followed_by_all_pages_and_the_address(library, open_app):
    at = open_app(library)
    assert at.sidebar.selectbox[0].options == ["real", "tiny", "plain", "interrupted"]
    assert at.query_params["run"] in ("real", ["real"])
    at.sidebar.selectbox[0].select("tiny").run()
    rec = recommend(load_run(library / "tiny"))
    assert answered(at) == answer(rec, 8192)
    assert at.query_params["run"] in ("tiny", ["tiny"])
    for page in ("layers", "cutoff", "overview"):
        go(at, page)
        texts = [*at.markdown, *at.caption]
        assert any("tiny-llama" in literal(text.value) for text in texts)
        assert not any("smollm2" in literal(text.value) for text in texts)
    assert calm(at) == []


def test_the_address_chooses_the_run(library, open_app):
    at = open_app(library, run="plain")
    assert "tiny-gpt2" in figure_title(at)
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
    assert any("measured on 2 prompts" in c for c in captions)
    notes = [literal(markdown.value) for markdown in at.markdown]
    assert any("the run is not complete: 2 of 6 prompts" in c for c in notes)
    assert any("too few prompts for a confidence bound" in c for c in notes)
    for page in RESULT_PAGES:
        assert calm(go(at, page)) == []
        assert at.get("plotly_chart")


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
        assert at.title
        assert not at.metric
        assert not at.get("plotly_chart")
    for page in ("playground", "diagnosis"):
        assert calm(go(at, page)) == []


def test_without_runs_the_example_is_a_click_away_and_leads_back(tmp_path, open_app):
    at = open_app(tmp_path)
    assert "data:image/svg" in html(at)
    at.button(key="example").click().run()
    assert at.query_params["folder"] == "example"
    assert "You are looking at the example" in at.info[0].value
    assert at.metric
    go(at, "cutoff")
    assert at.button(key="save").proto.disabled
    assert "You are looking at the example" in at.info[0].value
    at.button(key="leave").click().run()
    assert "folder" not in at.query_params
    assert "There is no run" in literal(at.info[0].value)


def test_the_example_can_be_linked_to(tmp_path, open_app):
    at = open_app(tmp_path, folder="example")
    assert "You are looking at the example" in at.info[0].value
    at = open_app(tmp_path, folder="/etc")
    assert "The address asks for folder=/etc, but folder is one of example." in literal(at.warning[0].value)
    assert "folder" not in at.query_params


def test_the_folder_of_the_example_is_for_reading_only(open_app):
    at = open_app(example_folder(), "cutoff")
    assert "You are looking at the example" in at.info[0].value
    assert at.button(key="save").proto.disabled
    assert "leave" not in {button.key for button in at.button}


def test_a_new_diagnosis_is_a_click_away(tmp_path, open_app):
    at = open_app(tmp_path)
    at.button(key="new").click().run()
    assert at.title[0].value == "Diagnose a model"


@pytest.mark.parametrize("page", ["benchmark", "quality", "finetuning", "compare"])
def test_the_run_is_chosen_where_it_matters(library, open_app, page):
    assert not open_app(library, page).sidebar.selectbox
    assert open_app(library, "layers").sidebar.selectbox


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
