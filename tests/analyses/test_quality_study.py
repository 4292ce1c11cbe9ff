"""The quality study writes its tables, and goes on where it stopped."""

import json
import sys

import pandas as pd
import pytest

import study_quality
from diagnostics.evaluate import ChoiceItem, Context, GenerationItem, Task, evaluation
from tests.support.tiny import tiny_model


def test_the_tables_are_those_of_the_evaluations(monkeypatch, tmp_path, capsys):
    choices = [ChoiceItem(str(i), (Context(f"w5 w{i + 7} w9 w{i}"),) * 2, (" w5", " w6"), i % 2) for i in range(6)]
    texts = [GenerationItem(str(i), Context(f"w5 w{i + 7} w9"), ("w12",)) for i in range(4)]
    made = {
        "one": Task("one", tuple(choices), "acc"),
        "two": Task("two", tuple(texts), "contains", max_new_tokens=3),
    }
    monkeypatch.setattr(study_quality, "load_model", lambda _: tiny_model("llama"))
    monkeypatch.setattr(study_quality, "load_task", lambda name, *_, **__: made[name])
    monkeypatch.setattr(study_quality, "TABLES", {"choice": (("one",), 5), "needle": (("two",), 3)})
    monkeypatch.setattr(study_quality, "POLICIES", ("speed:2", "speed:3:anchors=0"))
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["study_quality.py", "--out", str(tmp_path / "out"), "--results", str(results)])
    study_quality.main()
    assert len(json.loads(capsys.readouterr().out)) == 5
    first = {path.name: path.read_bytes() for path in results.glob("*.[cm]*")}
    assert set(first) == {"choice.csv", "choice.md", "needle.csv", "needle.md"}
    table = pd.read_csv(results / "choice.csv").set_index(["policy", "task"])
    assert set(table.index.get_level_values("policy")) == {"full", "speed:2", "speed:3:anchors=0"}
    assert set(table["n"]) == {5}
    monkeypatch.setattr(evaluation, "answer", lambda *_, **__: pytest.fail("answered before"))
    study_quality.main()
    assert {path.name: path.read_bytes() for path in results.glob("*.[cm]*")} == first
