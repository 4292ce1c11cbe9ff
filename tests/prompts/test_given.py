"""Prompts as people give them: texts, conversations, files, or the wrong thing."""

import pytest

from diagnostics import Prompt, UserError, diagnose, load_prompts
from diagnostics.prompts import as_prompts
from tests.support.runs import write_prompts
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "w5 w6 w7 w8 w9"
CHAT = [{"role": "system", "content": "Be {document}."}, {"role": "user", "content": "Hello"}]


def test_texts_conversations_and_prompts_become_a_set():
    mine = Prompt("mine", text="w9")
    made = as_prompts([TEXT, CHAT, mine])
    assert [prompt.id for prompt in made] == ["prompt-1", "prompt-2", "mine"]
    assert made[0].text == TEXT
    assert [message["content"] for message in made[1].messages] == ["Be {{document}}.", "Hello"]
    assert made[2] is mine
    assert (made.name, made.context_length, made.seed) == ("given", None, None)


def test_one_text_one_prompt_and_one_conversation_are_a_set_of_one():
    for given in (TEXT, Prompt("mine", text="w9"), CHAT, tuple(CHAT)):
        assert len(as_prompts(given)) == 1
    assert as_prompts(text for text in (TEXT, TEXT))[1].text == TEXT
    assert as_prompts("a text with a {document}")[0].text == "a text with a {{document}}"


def test_names_of_sets_are_loaded_and_sets_stay(tmp_path):
    file = write_prompts(tmp_path / "prompts.jsonl", 2)
    loaded = load_prompts(file)
    assert as_prompts(loaded) is loaded
    assert as_prompts(str(file)).fingerprint == as_prompts(file).fingerprint == loaded.fingerprint
    assert as_prompts("builtin").name == "builtin"
    with pytest.raises(UserError, match="no such prompt file"):
        as_prompts("nowhere.jsonl")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "prompts are a number: give load_prompts"),
        (None, "prompts are null: give load_prompts"),
        ({"text": "hello"}, "prompts are an object"),
        ([], "there are no prompts"),
        ([TEXT, 5], "prompt-2 is a number"),
        ([[]], "prompt-1 is a list"),
        ([{"content": "no role"}], "every message has exactly"),
        ([Prompt("a", text="w5"), Prompt("a", text="w6")], "two prompts are called 'a'"),
    ],
)
def test_anything_else_is_told_how(given, said):
    with pytest.raises(UserError, match=said):
        as_prompts(given)


def test_diagnose_measures_texts_as_it_does_those_of_a_file(tmp_path):
    lm = tiny_model("llama")
    file = tmp_path / "one.jsonl"
    file.write_text('{"text": "w5 w6 w7 w8 w9"}\n')
    expected = diagnose(lm, load_prompts(file), decode_tokens=4)
    for given in (TEXT, [TEXT]):
        run = diagnose(lm, given, decode_tokens=4, progress=False)
        assert run.cutoffs["kl"].tolist() == expected.cutoffs["kl"].tolist()
