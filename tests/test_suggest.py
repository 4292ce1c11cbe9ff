"""What errors suggest in place of a name that is not there."""

import pytest

from diagnostics import UserError, load_prompts, load_run
from diagnostics.evaluate.tasks import load_task
from diagnostics.support.suggest import did_you_mean, whats_there


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("buildin", ["builtin"], "; did you mean 'builtin'?"),
        (" SPEED ", ["full", "speed"], "; did you mean 'speed'?"),
        ("speed", ["Speed"], "; did you mean 'Speed'?"),
        ("nothing like it", ["speed", "full"], ""),
        ("", ["speed"], ""),
    ],
)
def test_a_name_like_it(name, known, said):
    assert did_you_mean(name, known) == said


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("first", "second", ".hidden"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").write_text("{}")
    (tmp_path / "runs" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("runs/frist", "; did you mean 'runs/first'?"),
        ("frist", "; did you mean 'runs/first'?"),
        ("runs/other", "; runs there: first, second"),
        ("other", ""),
        ("runs/empti", "; runs there: first, second"),
        ("rums/first", "; 'rums' is not there either"),
        ("a\0b", ""),
        ("x" * 5000, ""),
    ],
)
def test_a_path_like_it_or_what_else_is_there(folders, missing, said):
    assert whats_there(missing, lambda entry: (entry / "manifest.json").is_file(), "runs") == said


def test_a_folder_of_many_is_not_listed_whole(tmp_path):
    for number in range(9):
        (tmp_path / f"run-{number}").mkdir()
    said = whats_there(str(tmp_path / "zzz"), lambda entry: entry.is_dir(), "runs")
    assert said == "; runs there: run-0, run-1, run-2, run-3, run-4, run-5, ... (9 in all)"


def test_runs_prompts_and_tasks_are_suggested(folders, tmp_path):
    with pytest.raises(UserError, match=r"no run folder 'runs/secnd'; did you mean 'runs/second'\?"):
        load_run("runs/secnd")
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no such prompt file: main.jsonl; did you mean 'mine.jsonl'\?"):
        load_prompts("main.jsonl")
    with pytest.raises(UserError, match=r"did you mean 'builtin'\?"):
        load_prompts("buildin")
    with pytest.raises(UserError, match=r"did you mean 'arc_easy'\?"):
        load_task("arc-easy", None)
