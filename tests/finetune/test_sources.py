"""What a fine-tuning learns from and is measured on: kept apart, told apart, and known again."""

import gzip
import json
from dataclasses import replace

import pytest

from diagnostics import UserError, load_prompts
from diagnostics.finetune import Conversation, Source, encode_examples, load_data, load_held_out, sources
from diagnostics.prompts.prompt import PromptSet
from diagnostics.support import defaults
from tests.support.runs import write_prompts
from tests.support.tiny import random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "<s> {% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def lm():
    made = tiny_model("llama")
    made.tokenizer.chat_template = TEMPLATE
    return made


def words(n, seed):
    return " ".join(f"w{token}" for token in random_ids(n + 1, seed)[1:])


def talk(n, *, answer=True, length=10, category="default"):
    messages = [{"role": "user", "content": words(length + n % 3, n)}]
    if answer:
        messages.append({"role": "assistant", "content": words(4, n + 1000)})
    return {"id": f"t{n}", "messages": messages, "category": category}


def written(path, records):
    text = "\n".join(map(json.dumps, records))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def texts(prompts):
    """What is asked and about what, without names."""
    return {json.dumps([prompt.messages, prompt.text, prompt.document, str(prompt.inserts)]) for prompt in prompts}


# --- The built-in prompts ---


def test_built_in_prompts_are_kept_apart():
    """None that is trained on is measured, and few are in two seeds."""
    kinds = sources.HELD_OUT
    sets = [load_data("builtin", examples=60, seed=seed, without=kinds) for seed in (0, 1, 2)]
    found, measured = [texts(one) for one in sets], texts(load_held_out(n_prompts=60, only=kinds))
    assert len(measured) == 60
    assert not measured & set.union(*found)
    assert len(set.union(*found)) > 175
    assert all(len({prompt.id for prompt in one}) == 60 for one in sets)


def test_built_in_prompts_are_the_same_again():
    first, again = (load_data("builtin", examples=20, context_length=128, seed=3) for _ in range(2))
    assert first == again
    more = load_data("builtin", examples=40, context_length=128, seed=3)
    assert more.prompts[:20] == first.prompts


def test_what_is_measured_begins_as_the_diagnosis_does():
    held_out = load_held_out(context_length=128, n_prompts=5)
    assert texts(held_out) == texts(load_prompts(context_length=128, max_prompts=5))


def test_categories():
    kinds = ("question", "code")
    held_out = load_held_out(only=kinds, context_length=128, n_prompts=9)
    data = load_data("builtin", examples=70, without=kinds, context_length=128)
    assert {prompt.category for prompt in held_out} == set(kinds)
    assert len(held_out) == 9
    assert len(data) == 70
    assert not {prompt.category for prompt in data} & set(kinds)
    assert len(load_data("builtin", context_length=128)) == defaults.EXAMPLES
    assert len(load_held_out(context_length=128)) == defaults.HELD_OUT_PROMPTS


def test_categories_that_are_not_there(tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl")
    for only in (["x"], ["a", "x"]):
        with pytest.raises(UserError, match=r"no prompt of prompts.jsonl is of category 'x': there are a, b"):
            load_held_out(path, only=only)
        with pytest.raises(UserError, match=r"of category '[ax]': there are .*question"):
            load_held_out(only=only)
    with pytest.raises(UserError, match=r"left of prompts.jsonl: all of its categories are held out"):
        load_data(path, without=["a", "b"])
    talks = written(tmp_path / "talks.jsonl", [talk(1, category="a")])
    with pytest.raises(UserError, match=r"left of talks.jsonl"):
        load_data(talks, without=["a"])


# --- Files ---


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.jsonl.gz"])
def test_conversations(tmp_path, name):
    path = written(tmp_path / name, [talk(n, category="ab"[n % 2], answer=n != 3) for n in range(5)])
    data = load_data(path)
    assert [type(one) for one in data] == [Conversation] * 5
    assert [one.id for one in data] == ["t0", "t1", "t2", "t3", "t4"]
    assert len(data[3].messages) == 1
    assert [one.id for one in load_data(path, without=["a"])] == ["t1", "t3"]
    assert [one.id for one in load_data(path, without=["a"], examples=1)] == ["t1"]


def test_prompts(tmp_path):
    asked = [{"role": "user", "content": "w5 w6"}]
    for field in ({"reference": "w7"}, {"evidence": ["w5"]}):
        path = written(tmp_path / "prompts.jsonl", [{"messages": asked}, {"messages": asked} | field])
        data = load_data(path, context_length=40)
        assert isinstance(data, PromptSet)
        assert data.context_length == 40
        assert len(data) == 2
    plain = write_prompts(tmp_path / "plain.jsonl")
    assert len(load_data(plain)) == 6
    assert {prompt.category for prompt in load_data(plain, without=["a"])} == {"b"}
    assert len(load_data(plain, examples=2)) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no conversations"),
        ("{", "JSON"),
        ('{"messages": 3}', "messages"),
        ('{"x": 1}', "unknown field"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, said):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        load_data(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_numbers_that_make_no_sense(tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="examples is 0"):
        load_data(path, examples=0)
    with pytest.raises(UserError, match="held-out prompts is 0"):
        load_held_out(path, n_prompts=0)
    with pytest.raises(UserError, match="prompts, not answers"):
        Source(load_data(path), "prompts.jsonl", own_answers=False)
    for numbers in ({"answer_tokens": 0}, {"max_length": 0}):
        with pytest.raises(UserError, match="at least one token"):
            Source(load_data(path), "prompts.jsonl", **numbers)
    assert len(load_held_out(path, n_prompts=2, only=["a"])) == 2


# --- Rows ---


def rows_of(source, lm):
    made = [source.make(lm, part) for part in range(source.n_parts)]
    counts = [counts for _, counts in made]
    return [row for rows, _ in made for row in rows], sum(counts[1:], counts[0])


@pytest.mark.parametrize("own_answers", [True, False])
def test_rows_do_not_depend_on_parts(lm, monkeypatch, own_answers):
    talks = [Conversation(**talk(n)) for n in range(5)]
    found = []
    for part in (1, 2, 4, 5, 16):
        monkeypatch.setattr(sources, "PART", part)
        source = Source(talks, "talks", own_answers=own_answers, answer_tokens=4)
        assert source.n_parts == -(-5 // part)
        assert source.make(lm, source.n_parts)[0] == []
        found.append(rows_of(source, lm))
    rows, counts = found[0]
    assert [row["id"] for row in rows] == ["t0", "t1", "t2", "t3", "t4"]
    assert counts.kept == counts.loaded == 5
    assert all(other == found[0] for other in found)
    if not own_answers:
        assert rows == encode_examples(talks, lm.tokenizer, 512)[0]


@pytest.mark.parametrize("own_answers", [True, False])
def test_rows_are_no_longer_than_asked(lm, own_answers):
    talks = [Conversation(**talk(n, length=6 * n + 4)) for n in range(5)]
    source = Source(talks, "talks", own_answers=own_answers, answer_tokens=4, max_length=22)
    rows, counts = rows_of(source, lm)
    assert 0 < len(rows) < 5
    assert all(len(row["input_ids"]) <= 22 for row in rows)
    assert (counts.loaded, counts.kept, counts.dropped_too_long) == (5, len(rows), 5 - len(rows))


def test_conversations_without_answers_have_nothing_to_learn(lm):
    rows, counts = rows_of(Source([Conversation(**talk(1, answer=False))], "talks", own_answers=False), lm)
    assert (rows, counts.dropped_without_target) == ([], 1)


# --- Known again ---


def test_the_fingerprint_is_that_of_what_decides_the_rows(tmp_path):
    talks = tuple(Conversation(**talk(n)) for n in range(3))
    prompts = load_data(write_prompts(tmp_path / "prompts.jsonl"))
    source, given, asked = Source(talks, "a"), Source(talks, "a", own_answers=False), Source(prompts, "a")
    other = Conversation("t0", ({"role": "user", "content": "w5"}, talks[0].messages[1]))
    changed = [
        replace(source, answer_tokens=65),
        replace(source, max_length=100),
        replace(source, data=talks[:2]),
        replace(source, data=talks[::-1]),
        replace(source, data=(other, *talks[1:])),
        replace(source, data=(replace(talks[0], id="x"), *talks[1:])),
        replace(asked, answer_tokens=65),
        replace(asked, data=replace(prompts, context_length=30)),
        replace(asked, data=prompts[:2]),
        replace(given, max_length=100),
        replace(given, data=(replace(talks[0], messages=talks[1].messages), *talks[1:])),
        source,
        given,
        asked,
    ]
    assert len({one.fingerprint for one in changed}) == len(changed)
    for one in (source, given, asked):
        assert replace(one, name="b").fingerprint == one.fingerprint
    assert replace(source, data=list(talks)).fingerprint == source.fingerprint
    assert replace(source, data=[replace(one, category="x") for one in talks]).fingerprint == source.fingerprint
    assert replace(given, answer_tokens=65).fingerprint == given.fingerprint
