"""The page *Playground*: it generates what the package generates, and refuses in one line."""

import re

import pytest
from streamlit.runtime.scriptrunner import StopException

from dashboard import playing
from diagnostics import FullPolicy, SpeedPolicy, recommend
from diagnostics.generation.generation import generate
from diagnostics.generation.inputs import encode_input
from tests.support.pages import calm, go, html, table, texts
from tests.support.runs import save_tiny


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """A process in which no page has loaded a model yet."""
    monkeypatch.setattr(playing, "LOADED", [])
    playing.playground_model.clear()


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
    shown = texts(at)
    visible = [re.sub(r"<[^>]*>", "", text) for text in shown]
    for text, one in zip(visible, (full, other), strict=True):
        assert text.strip() == _escaped(smollm.tokenizer.decode(one.token_ids, skip_special_tokens=True)).strip()
    common = next(i for i, (a, b) in enumerate(zip(full.token_ids, other.token_ids, strict=False)) if a != b)
    assert f"the same for {common} tokens, then different" in [caption.value for caption in at.caption]
    assert all("background" in text for text in shown)
    lines = table(at).set_index("policy")
    assert list(lines.index) == ["full", "speed:3"]
    assert lines.loc["speed:3", "kv_ratio"] == pytest.approx(other.kv_bytes / full.kv_bytes, abs=6e-4)
    assert list(lines["tokens"]) == [len(full.token_ids), len(other.token_ids)]
    # The results stay while the reader looks elsewhere.
    go(at, "cutoff")
    go(at, "playground")
    assert calm(at) == []
    assert texts(at) == shown


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
    assert len(table(at)) == len(texts(at)) == 4


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


def test_a_mistake_in_a_policy_keeps_the_prompt(playground):
    at = playground
    at.text_area(key="prompt").set_value(PROMPT).run()
    at.number_input(key="new_tokens").set_value(7).run()
    at.text_input(key="more_policies").set_value("speed:").run()
    assert len(calm(at)) == 1
    at.text_input(key="more_policies").set_value("speed:4").run()
    assert at.text_area(key="prompt").value == PROMPT
    assert at.number_input(key="new_tokens").value == 7


def test_the_prompt_survives_another_page(playground):
    at = playground
    at.text_area(key="prompt").set_value(PROMPT).run()
    go(at, "cutoff")
    go(at, "playground")
    assert at.text_area(key="prompt").value == PROMPT


def test_results_of_a_model_of_ones_own_survive_another_page(library, tmp_path, open_app):
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


def test_results_belong_to_the_model_that_made_them(playground, tmp_path):
    at = playground
    ask(at, PROMPT, 6)
    before = html(at)
    save_tiny(tmp_path / "model")
    at.text_input(key="play_model").set_value(str(tmp_path / "model"))
    at.button(key="load").click().run()
    assert calm(at) == []
    # Not the ids of one model as the words of another.
    assert html(at) in ("", before)


# --- What was chosen comes back ---


def test_a_reload_finds_the_model_and_the_prompt(playground, library, open_app):
    at = playground
    at.text_area(key="prompt").set_value(PROMPT).run()
    at.number_input(key="new_tokens").set_value(9).run()
    play_cutoff(at).set_value(7).run()
    query = {name: at.query_params[name] for name in at.query_params}
    again = open_app(library, "playground", **query)
    assert calm(again) == []
    assert not again.info, "the process still has the model"
    assert again.text_area(key="prompt").value == PROMPT
    assert again.number_input(key="new_tokens").value == 9
    assert play_cutoff(again).value == 7


def test_an_address_alone_loads_no_model(library, open_app):
    at = open_app(library, "playground", model="somebody/else", run="real")
    assert at.text_input(key="play_model").value == "somebody/else"
    assert "Load the model" in at.info[0].value
    assert playing.LOADED == []


def test_what_is_stopped_says_so_and_frees_the_model(playground, monkeypatch):
    at = playground

    def stop(self, ids):
        at.session_state["stopped"] = True
        raise StopException

    monkeypatch.setattr(playing._Painter, "put", stop)
    ask(at, PROMPT)
    assert calm(at) == []
    assert not playing.BUSY.locked()
    assert "played" not in at.session_state
    monkeypatch.undo()
    at.run()
    assert "Stopped." in [caption.value for caption in at.caption]
    ask(at, PROMPT, 3)
    assert calm(at) == []
    assert len(at.session_state["played"][1]) == 2
