import gzip
import json
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.prompts.inserts import Insert, place_inserts
from diagnostics.prompts.load import load_prompts
from diagnostics.prompts.prompt import Prompt, PromptSet
from diagnostics.support.errors import UserError

USER = [{"role": "user", "content": "Hello"}]


def written(tmp_path: Path, *records: object, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- Files ---


def test_a_file_with_every_field(tmp_path):
    path = written(
        tmp_path,
        {"id": "a/b: c", "text": "The sky is blue.", "evidence": [[4, 7], "blue"], "category": "facts"},
        {"messages": [{"role": "system", "content": "Be brief."}, *USER], "reference": "Hi!"},
        {"text": "Read {document} {now}", "document": "a {brace} text", "evidence": ["{brace}"]},
    )
    first, second, third = load_prompts(path, context_length=64)
    assert (first.id, first.category, first.evidence) == ("a/b: c", "facts", ((4, 7), "blue"))
    assert second.id == "line-2"
    assert second.messages == ({"role": "system", "content": "Be brief."}, *USER)
    assert (second.reference, second.category, second.text) == ("Hi!", "default", None)
    assert third.fill(third.document) == "Read a {brace} text {now}"


def test_byte_order_mark_blank_lines_line_ends_and_nulls(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one", "id": null}\r\n\r\n  \n{"text": "two\xe2\x80\xa8lines"}\r\n')
    assert [(p.id, p.text) for p in load_prompts(path)] == [("line-1", "one"), ("line-4", "two\u2028lines")]


def test_max_prompts_takes_the_first_and_reads_no_further(tmp_path):
    path = written(tmp_path, {"text": "one"}, {"text": "two"}, "not json")
    assert [p.text for p in load_prompts(path, max_prompts=2)] == ["one", "two"]
    with pytest.raises(UserError, match=r":3: not valid JSON \(Expecting value at column 1\)"):
        load_prompts(path, max_prompts=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "must be a JSON object, not a list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": 1' + "0" * 5000 + "}", "not valid JSON"),
        ({}, 'field "text": is missing, and so is "messages"'),
        ({"text": "x", "messages": USER}, 'field "text": is given beside "messages"'),
        ({"text": 3}, 'field "text": must be text, not a number'),
        ({"text": ""}, 'field "text": is empty'),
        ('{"text": "\\ud800"}', 'field "text": holds half of a surrogate pair'),
        ({"text": "x", "prompt": "y"}, 'unknown field "prompt"; the fields are id, messages, text,'),
        ('{"text": "x", "\\ud800": 1}', 'unknown field "\\ud800"'),
        ({"text": "x", "id": 7}, 'field "id": must be text, not a number'),
        ({"text": "x", "id": ""}, 'field "id": is empty'),
        ({"text": "x", "id": "i" * 201}, 'field "id": has 201 characters'),
        ({"text": "x", "category": []}, 'field "category": must be text, not a list'),
        ({"text": "x", "reference": ""}, 'field "reference": is empty'),
        ({"messages": []}, 'field "messages": must be a list of at least one'),
        ({"messages": "hello"}, 'field "messages": must be a list'),
        ({"messages": ["hello"]}, 'field "messages": every message has exactly "role" and "content"'),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, 'exactly "role" and "content"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'role "tool" is none of system, user, assistant'),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 'field "messages": must be text, not a list'),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "the last must be from the user"),
        ({"text": "x {document}"}, 'field "document": is missing, but the prompt has a {document} mark'),
        ({"text": "x", "document": "y"}, "one {document} mark, but the prompt has none"),
        ({"text": "{document}{document}", "document": "y"}, "one {document} mark, but the prompt has 2"),
        ({"text": "x {document}", "document": 0}, 'field "document": must be text, not a number'),
        ({"text": "x", "evidence": "x"}, 'field "evidence": must be a list'),
        ({"text": "x", "evidence": ["y"]}, 'field "evidence": "y" does not occur in the prompt'),
        ({"text": "x", "evidence": [""]}, "does not occur"),
        ({"text": "x", "evidence": [[0, 2]]}, "[0, 2] is no part of the text's 1 characters"),
        ({"text": "x", "evidence": [[1, 1]]}, "[1, 1] is no part"),
        ({"text": "x", "evidence": [[-1, 1]]}, "[-1, 1] is no part"),
        ({"text": "x", "evidence": [[False, True]]}, "[false, true] is neither a string nor"),
        ({"text": "x", "evidence": [[0, 1, 2]]}, "is neither a string nor a [start, end] pair"),
        ({"messages": USER, "evidence": [[0, 1]]}, '[start, end] is only for "text" without a document'),
        ({"text": "{document}", "document": "ab", "evidence": [[0, 1]]}, '[start, end] is only for "text"'),
    ],
)
def test_a_wrong_line_is_refused_by_file_line_and_field(tmp_path, line, message):
    path = written(tmp_path, {"text": "good"}, "", line)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_ids_are_unique_given_or_not(tmp_path):
    path = written(tmp_path, {"id": "line-2", "text": "x"}, {"text": "y"})
    with pytest.raises(UserError, match=r':2: field "id": "line-2" is already the id'):
        load_prompts(path)


def test_sources_that_are_no_prompt_file(tmp_path):
    binary = tmp_path / "model.bin"
    binary.write_bytes(bytes(range(256)))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for source, message in [
        ("foo", "no prompt set 'foo': use 'builtin' or the path of a .jsonl file"),
        ("foo.jsonl", "no such prompt file: foo.jsonl"),
        (tmp_path / "missing", "no such prompt file: "),
        (tmp_path, "cannot read prompts .*: Is a directory"),
        (binary, "is not a UTF-8 text file"),
        (tmp_path / "empty.jsonl", "has no prompts"),
    ]:
        with pytest.raises(UserError, match=message):
            load_prompts(source)


@pytest.mark.parametrize("arguments", [{"max_prompts": 0}, {"context_length": 15}, {"context_length": 2**20 + 1}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(UserError, match=f"{next(iter(arguments))} is {next(iter(arguments.values()))}: "):
        load_prompts("builtin", **arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "first", "text": "second"}', 'field "text": is given twice'),
        ('{"messages": [{"role": "user", "role": "system", "content": "x"}]}', 'field "role": is given twice'),
        ('{"text": "a", "evidence": [NaN]}', "NaN is no JSON number"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ('{"text": "a\\ud800"}', "surrogate"),
    ],
)
def test_lines_of_which_json_would_take_a_part_are_refused(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=f"^{path}:1: .*{message}"):
        load_prompts(path)


def test_compressed_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert [prompt.text for prompt in load_prompts(path)] == ["a", "b"]
    assert len(load_prompts(path, max_prompts=1)) == 1


def test_devices_pipes_and_endless_lines_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe"):
        with pytest.raises(UserError, match="it is a device or a pipe"):
            load_prompts(path)
    for name in ("x\0y", "x\0y.jsonl"):
        with pytest.raises(UserError, match=r"no such prompt file|no prompt set"):
            load_prompts(name)
    monkeypatch.setattr("diagnostics.support.jsonl.MAX_LINE", 100)
    (tmp_path / "long.jsonl").write_text('{"text": "' + "a" * 100)
    with pytest.raises(UserError, match=r"long\.jsonl:1: the line has 100 characters or more"):
        load_prompts(tmp_path / "long.jsonl")


# --- Sets ---


def test_a_set_is_an_immutable_sequence(tmp_path):
    path = written(tmp_path, *({"text": text} for text in "abc"))
    prompts = load_prompts(path, context_length=99, seed=5)
    assert (prompts.name, prompts.context_length, prompts.seed) == ("prompts.jsonl", 99, None)
    assert [p.text for p in prompts] == [prompts[0].text, prompts[1].text, prompts[-1].text] == ["a", "b", "c"]
    tail = prompts[1:]
    assert isinstance(tail, PromptSet)
    assert (len(tail), tail.context_length) == (2, 99)
    with pytest.raises(FrozenInstanceError):
        prompts.name = "x"
    with pytest.raises(FrozenInstanceError):
        prompts[0].text = "x"


def test_the_fingerprint_is_of_content_not_of_place(tmp_path):
    record = {"messages": USER, "id": "a"}
    here = load_prompts(written(tmp_path, record, name="one.jsonl"))
    there = load_prompts(written(tmp_path, "", record, name="two.jsonl"))
    assert here.fingerprint == there.fingerprint
    assert len(here.fingerprint) == 64
    assert here.fingerprint != load_prompts(tmp_path / "one.jsonl", context_length=64).fingerprint


def test_every_field_changes_the_fingerprint():
    prompt = Prompt("a", text="Read {document}", document="a b c")
    changes = {
        "id": "b",
        "text": "See {document}",
        "document": "a b d",
        "inserts": (Insert(0.5, "x"),),
        "reference": "r",
        "evidence": ("b",),
        "category": "c",
        "cut": "line",
    }
    variants = [prompt, *(replace(prompt, **{field: value}) for field, value in changes.items())]
    assert len({PromptSet((variant,), "set").fingerprint for variant in variants}) == len(variants)
    two = Prompt("b", text="y")
    assert PromptSet((prompt, two), "set").fingerprint != PromptSet((two, prompt), "set").fingerprint


# --- Inserts ---

PROSE = "One is first. Two is second. Three is third.\n\nFour begins\na paragraph. Five ends it."


def test_an_insert_goes_between_sentences():
    assert place_inserts("First one. Second one.", [Insert(0.4, "New.")]) == "First one. New. Second one."
    assert place_inserts("First one.\nSecond one.", [Insert(0.4, "New.")]) == "First one.\nNew.\nSecond one."
    assert place_inserts("One.\n\nTwo.", [Insert(0.5, "New.")]) == "One.\n\nNew.\n\nTwo."
    assert place_inserts("One. Two.", [Insert(0, "New.")]) == "New.\n\nOne. Two."
    assert place_inserts("One. Two.", [Insert(1, "New.")]) == "One. Two.\n\nNew."
    assert place_inserts("", [Insert(0.9, "b"), Insert(0.1, "a")]) == "a\n\nb"
    assert place_inserts("abcdefgh", [Insert(0.5, "X")]) == "abcd X efgh"


def test_paragraphs_that_end_far_away_are_better_than_the_end_of_the_document():
    document = "One.\n\nTwo." + "\n\n    indented" * 500 + "\n\nThree." + "\n\n    indented" * 700
    for depth, follows in ((0.1, "Two."), (0.4, "Three."), (0.6, "Three.")):
        found = place_inserts(document, [Insert(depth, "New\nlines.")])
        assert found == document.replace(f"\n\n{follows}", f"\n\nNew\nlines.\n\n{follows}")


def test_a_block_goes_between_unindented_paragraphs():
    code = "def f():\n    a = 1\n\n    return a\n\n\ndef g():\n    pass"
    block = "def new():\n    pass"
    placed = place_inserts(code, [Insert(0.5, block)])
    assert placed == "def f():\n    a = 1\n\n    return a\n\n\ndef new():\n    pass\n\n\ndef g():\n    pass"
    assert place_inserts("  a\n\n  b\n\n  c", [Insert(0.6, block)]) == f"  a\n\n  b\n\n  c\n\n{block}"


depths = st.floats(0, 1)
texts = st.text(alphabet="ab .\n'A", max_size=60)


@given(texts, st.lists(st.tuples(depths, st.booleans()), max_size=4))
def test_inserts_keep_their_order_and_the_document(document, placed):
    inserts = [Insert(depth, f"#{n}\n{n}#" if block else f"#{n}#") for n, (depth, block) in enumerate(placed)]
    result = place_inserts(document, inserts)
    ordered = sorted(inserts, key=lambda insert: insert.depth)
    positions = [result.index(insert.text) for insert in ordered]
    assert positions == sorted(positions)
    for insert in inserts:
        assert result.count(insert.text) == 1
        result = result.replace(insert.text, "")
    assert "".join(result.split()) == "".join(document.split())


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_an_insert_stands_near_its_depth(depth):
    document = "This is a sentence. " * 500
    position = place_inserts(document, [Insert(depth, "Here!")]).index("Here!")
    assert abs(position / len(document) - depth) < 0.01


def test_wrong_inserts_are_refused():
    with pytest.raises(UserError, match=r"depth 1\.5 is not between 0 and 1"):
        Insert(1.5, "x")
    with pytest.raises(UserError, match="no document"):
        Prompt("a", text="x", inserts=(Insert(0.5, "x"),))
