"""Tasks in files: their settings, and the small pack of real ones beside this file (see NOTICE)."""

import gzip
import json

import pytest

from diagnostics import SpeedPolicy, UserError
from diagnostics.evaluate.answer_metrics import last_number
from diagnostics.evaluate.evaluation import evaluate
from diagnostics.evaluate.items import Context, GenerationItem, read_jsonl
from diagnostics.evaluate.tasks import load_task
from tests.support.paths import TASKS

PACK = TASKS
COUNTS = {"common_knowledge": 40, "pattern": 20, "csqa": 15, "gsm8k": 6, "humaneval": 6}
METRICS = {"gsm8k": "number", "humaneval": "passes"}

CHOICE = {"query": "q", "continuations": ["a", "b"], "gold": 0}
WRITTEN = {"query": "1 + 1 =", "answers": ["2"]}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- Settings ---


def test_the_first_line_sets_the_task(tmp_path):
    settings = {"metric": "number", "max_new_tokens": 7, "stop": ["\n\n", "Q:"], "chat": True}
    told = {"source": "us", "licence": "MIT"}
    task = read_jsonl(write(tmp_path / "sums.jsonl", {"task": settings | told}, WRITTEN))
    assert (task.name, task.metric, task.max_new_tokens, task.stop) == ("sums", "number", 7, ("\n\n", "Q:"))
    assert (task.chat, task.source, task.licence) == (True, "us", "MIT")
    assert task.items == (GenerationItem("line-2", Context("1 + 1 ="), ("2",)),)


def test_what_is_not_set_stays_as_it_is(tmp_path):
    path = write(tmp_path / "sums.jsonl", {"task": {"stop": [], "metric": None, "chat": None}}, WRITTEN)
    task = read_jsonl(path)
    assert (task.metric, task.max_new_tokens, task.stop, task.chat) == ("exact_match", 32, (), False)
    assert (task.source, task.licence) == (str(path), "")
    assert read_jsonl(write(tmp_path / "choice.jsonl", {"task": {}}, CHOICE)).metric == "acc"


def test_settings_from_python_go_first(tmp_path):
    path = write(tmp_path / "a.jsonl", {"task": {"metric": "f1", "max_new_tokens": 7, "licence": "MIT"}}, WRITTEN)
    task = read_jsonl(path, metric="number", max_new_tokens=9)
    assert (task.metric, task.max_new_tokens, task.licence) == ("number", 9, "MIT")


@pytest.mark.parametrize(
    ("settings", "item", "said"),
    [
        (["f1"], WRITTEN, '1: field "task": must be an object, not a list'),
        ({"name": "x"}, WRITTEN, "1: unknown field 'name' of the task; the fields are metric, max_new_tokens, stop"),
        ({"metric": "bleu"}, WRITTEN, '1: field "metric": must be one of: acc, acc_per_char'),
        ({"metric": ["f1"]}, WRITTEN, '1: field "metric": must be one of'),
        ({"metric": "acc"}, WRITTEN, '1: field "metric": must be one of exact_match, .* for items with answers'),
        ({"metric": "f1"}, CHOICE, '1: field "metric": must be one of acc, .* for items with continuations'),
        ({"stop": ["\n"]}, CHOICE, '1: field "stop": is for items with answers; these have continuations'),
        ({"max_new_tokens": 0}, WRITTEN, '1: field "max_new_tokens": must be a number of tokens from 1 to 1048576'),
        ({"max_new_tokens": 2**20 + 1}, WRITTEN, "must be a number of tokens"),
        ({"max_new_tokens": True}, WRITTEN, "must be a number of tokens"),
        ({"max_new_tokens": 5.0}, WRITTEN, "must be a number of tokens"),
        ({"stop": "\n"}, WRITTEN, '1: field "stop": must be a list of texts, not text'),
        ({"stop": [""]}, WRITTEN, '1: field "stop": is empty'),
        ({"stop": [1]}, WRITTEN, '1: field "stop": must be text, not a number'),
        ({"chat": 1}, WRITTEN, '1: field "chat": must be true or false, not a number'),
        ({"source": 1}, WRITTEN, '1: field "source": must be text'),
        ({"licence": "x" * 201}, WRITTEN, '1: field "licence": has 201 characters'),
        ({"metric": "passes"}, WRITTEN | {"answers": ["a", "b"]}, "needs one answer: the source of its tests"),
    ],
)
def test_bad_settings_are_refused_with_their_line(tmp_path, settings, item, said):
    with pytest.raises(UserError, match=said) as caught:
        read_jsonl(write(tmp_path / "bad.jsonl", {"task": settings}, item))
    assert "\n" not in str(caught.value)


def test_settings_stand_first_once_and_alone(tmp_path):
    path = tmp_path / "bad.jsonl"
    for records, said in (
        ([WRITTEN, {"task": {}}], 'bad.jsonl:2: only the first line may have "task"'),
        ([{"task": {}}, {"task": {}}, WRITTEN], 'bad.jsonl:2: only the first line may have "task"'),
        ([{"task": {}} | WRITTEN], 'bad.jsonl:1: a line with "task" has no other fields'),
        ([{"task": {}}], "bad.jsonl has no items"),
    ):
        with pytest.raises(UserError, match=said):
            read_jsonl(write(path, *records))


# --- Compressed files ---


def test_compressed_files_are_read_by_name(tmp_path):
    path = tmp_path / "sums.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(WRITTEN).encode()))
    task = load_task(str(path), None)
    assert (task.name, len(task.items)) == ("sums", 1)


@pytest.mark.parametrize(
    "data",
    [json.dumps(WRITTEN).encode(), gzip.compress(json.dumps(WRITTEN).encode() * 99)[:40], b""],
    ids=["plain", "cut", "empty"],
)
def test_damaged_compressed_files_are_refused(tmp_path, data):
    path = tmp_path / "sums.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read tasks|has no items"):
        read_jsonl(path)
    path.write_bytes(gzip.compress(b"\xff\xfe"))
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read_jsonl(path)


def test_damage_inside_is_refused(tmp_path):
    data = bytearray(gzip.compress(json.dumps(WRITTEN).encode() * 99))
    data[12:30] = bytes(18)
    path = tmp_path / "sums.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot read tasks"):
        read_jsonl(path)


# --- The pack ---


def test_the_pack_is_whole_and_small():
    files = sorted(PACK.iterdir())
    assert [file.name for file in files] == sorted(f"{name}.jsonl" for name in COUNTS)
    assert sum(file.stat().st_size for file in files) < 120_000
    notice = (PACK.parent.parent / "NOTICE").read_text()
    for name, count in COUNTS.items():
        task = read_jsonl(PACK / f"{name}.jsonl")
        assert (task.name, len(task.items)) == (name, count)
        assert task.metric == METRICS.get(name, "acc_per_char")
        assert task.licence in ("MIT", "Apache-2.0")
        assert f"{name}.jsonl" in notice
    for item in read_jsonl(PACK / "gsm8k.jsonl").items:
        assert last_number(item.answers[0]) is not None


def test_the_embedded_model_knows_what_a_shallow_prompt_hides(smollm):
    task = read_jsonl(PACK / "common_knowledge.jsonl")
    scores = evaluate(smollm, [task], [SpeedPolicy(10)], limit=10).items.groupby("policy")["score"].mean()
    chance = sum(1 / len(item.continuations) for item in task.items) / len(task.items)
    assert scores["full"] > 2 * chance
    assert scores["speed:10"] < scores["full"] - 0.25
