"""Diagnoses in processes of their own: real ones with a tiny model, and stand-ins where only the process matters."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dashboard import jobs
from dashboard.jobs import JOBS, cancel_job, forget_job, list_jobs, resume_job, save_prompts, start_job
from diagnostics import UserError, diagnose, load_model, load_prompts, load_run
from diagnostics.support.files import read_json
from tests.support.runs import contents, save_tiny, write_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

REAL_PYTHON = sys.executable
LONG = ("--decode-tokens=32", "--detail-prompts=1")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A test run in the background ignores it, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model, a few short prompts, and many long ones, so that there is a middle."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model")
    write_prompts(folder / "short.jsonl", 6)
    write_prompts(folder / "long.jsonl", n_prompts=60, n_tokens=440)
    return folder


@pytest.fixture
def runs(tmp_path):
    """A folder of runs; whatever was started for it ends with the test."""
    before = psutil.Process().children(recursive=True)
    yield tmp_path / "runs"
    for process in set(psutil.Process().children(recursive=True)) - set(before):
        with suppress(psutil.Error):  # it may have ended
            process.kill()
            process.wait(10)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Let a shell script do the work of the command; the arguments are in "$@"."""

    def install(script):
        place = tmp_path / "stand-in"
        place.write_text(f"#!/bin/sh\n{script}\n")
        place.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(place))

    return install


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def ended(job):
    return wait_until(lambda: not job.running)


def job_file(runs, name="run"):
    return runs / JOBS / f"{name}.json"


def rewrite(runs, name="run", **values):
    """Change fields of a job's file."""
    place = job_file(runs, name)
    place.write_text(json.dumps(json.loads(place.read_text()) | values))
    (job,) = [job for job in list_jobs(runs) if job.name == name]
    return job


def assert_same_tables(one, other):
    assert set(one.tables) == set(other.tables)
    for name in one.tables:
        pd.testing.assert_frame_equal(one.tables[name], other.tables[name], check_exact=True)


# --- Real diagnoses ---


def test_from_start_to_recommendation(tiny, runs):
    arguments = [str(tiny / "model"), f"--prompts={tiny / 'long.jsonl'}", "--max-prompts=25", "--max-kl=5", *LONG]
    job = start_job(runs, "run", arguments)
    assert (job.state, job.progress, job.running) == ("running", None, True)
    with pytest.raises(UserError, match="a diagnosis is running"):
        start_job(runs, "other", arguments)
    seen = []
    while job.running:
        if (progress := job.progress) is not None:
            assert job.state in ("running", "complete")
            seen.append(progress)
        time.sleep(0.002)
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {25}
    assert len({done for done, _ in seen}) > 5
    assert (job.state, job.progress) == ("complete", (25, 25)), job.message
    assert read_json(job.out / "recommendation.json")["criterion"]["max_kl"] == 5
    assert load_run(job.out).complete
    # Nothing of the refused one; no scratch folder.
    assert {p.name for p in runs.iterdir()} == {"run", JOBS}
    assert {p.name for p in (runs / JOBS).iterdir()} == {"run.json", "run.log"}
    # Complete stays complete, also when asked to end, and when asked for again.
    before = contents(job.out)
    cancel_job(job)
    assert list_jobs(runs)[0].state == "complete"
    assert contents(job.out) == before


@pytest.mark.slow
def test_killed_cancelled_and_resumed_it_ends_as_if_undisturbed(tiny, runs, tmp_path):
    arguments = [str(tiny / "model"), f"--prompts={tiny / 'long.jsonl'}", *LONG]
    job = start_job(runs, "run", arguments)
    wait_until(lambda: job.progress and job.progress[0] >= 2)
    os.kill(job.pid, signal.SIGKILL)
    ended(job)
    assert job.state == "failed"
    finished, total = job.progress
    assert 2 <= finished < total == 60
    assert list(load_run(job.out).prompts["prompt_id"]) == [f"p{i}" for i in range(finished)]

    kept = {name: data for name, data in contents(job.out / "parts").items() if not name.startswith(".")}
    job = resume_job(job)
    assert job.state == "running"
    assert len(list_jobs(runs)) == 1
    wait_until(lambda: job.progress and job.progress[0] >= finished + 2)
    # Another dashboard, started by now, knows of it.
    found = elsewhere(runs, "print(job.state, job.pid, *job.progress)").split()
    assert (found[:2], found[3]) == (["running", str(job.pid)], "60")
    cancel_job(job)
    assert not job.running
    (job,) = list_jobs(runs)
    assert job.state == "cancelled"
    assert job.message.startswith("interrupted; what is finished is kept")
    cancelled, _ = job.progress
    assert finished + 2 <= cancelled < 60
    assert kept.items() <= contents(job.out / "parts").items()
    assert list(load_run(job.out).prompts["prompt_id"]) == [f"p{i}" for i in range(cancelled)]

    job = resume_job(job)
    ended(job)
    assert (job.state, job.progress) == ("complete", (60, 60)), job.message
    prompts = load_prompts(tiny / "long.jsonl")
    undisturbed = diagnose(
        load_model(tiny / "model"), prompts, out=tmp_path / "undisturbed", decode_tokens=32, detail_prompts=1
    )
    assert_same_tables(load_run(job.out), undisturbed)
    assert not [name for name in contents(runs) if ".writing-" in name]


def test_a_failed_job_says_what_the_command_said(tiny, runs):
    missing = tiny / "missing.jsonl"
    job = start_job(runs, "run", [str(tiny / "model"), f"--prompts={missing}"])
    ended(job)
    assert (job.state, job.progress, job.out.exists()) == ("failed", None, False)
    command = [sys.executable, "-m", "diagnostics.cli", "recommend", str(tiny / "model"), f"--prompts={missing}"]
    own = subprocess.run([*command, "--out", str(runs / "run")], capture_output=True, text=True, check=False)
    assert f"error: {job.message}\n" == own.stderr
    assert str(missing) in job.message


def elsewhere(runs, code, executable=None):
    """Run code in a new process, which knows of nothing but the folder; `job` is the only one in it."""
    start = (
        "import sys; sys.path.insert(0, 'app'); from pathlib import Path; from dashboard.jobs import *; "
        "(job,) = list_jobs(Path(sys.argv[1]));"
    )
    done = subprocess.run(
        [executable or sys.executable, "-c", start + code, runs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Processes ---


def test_the_command_and_its_place(runs, stand_in):
    stand_in('for word in "$@"; do echo "[$word]"; done; ps -o sid= -p $$; cat; exit 3')
    job = start_job(runs, "run", ["a model; rm -rf /", "--max-kl=0.1"])
    ended(job)
    *words, session = job.log.read_text().split("\n")[:-1]
    expected = ["-m", "diagnostics.cli", "recommend", "a model; rm -rf /", "--max-kl=0.1", "--out", str(runs / "run")]
    assert words == [f"[{word}]" for word in expected]
    assert int(session) == job.pid  # a session of its own
    (runs / "run").mkdir()
    (runs / "run" / "manifest.json").write_text("{}")
    job = resume_job(job)
    ended(job)
    assert job.log.read_text().splitlines()[:-1] == [f"[{word}]" for word in [*expected, "--resume"]]


def test_a_relative_folder_is_the_same_one(tmp_path, runs, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in('echo "$@"')
    job = start_job(Path("runs"), "run", ["m"])
    ended(job)
    assert f"--out {runs / 'run'}" in job.log.read_text()
    assert save_prompts(Path("runs"), "run", b"x") == runs / JOBS / "run.jsonl"


def test_one_at_a_time(runs, stand_in, tmp_path):
    stand_in("exec sleep 60")
    job = start_job(runs, "one", ["m"])
    before = contents(runs)
    for name in ("one", "two"):
        with pytest.raises(UserError, match="a diagnosis is running"):
            start_job(runs, name, ["m"])
    with pytest.raises(UserError, match="a diagnosis is running"):
        resume_job(job)
    assert contents(runs) == before
    os.kill(job.pid, signal.SIGKILL)
    ended(job)
    two = start_job(runs, "two", ["m"])
    assert {j.name: j.state for j in list_jobs(runs)} == {"one": "failed", "two": "running"}
    assert start_job(tmp_path / "elsewhere", "one", ["m"]).running  # another folder is another matter
    cancel_job(two)


def test_cancelling_is_patient_but_not_forever(runs, stand_in, monkeypatch):
    stand_in("trap 'sleep 0.3; echo error: gave up; exit 1' INT; echo ready; while :; do sleep 0.05; done")
    monkeypatch.setattr(jobs, "PATIENCE", 5.0)
    job = start_job(runs, "polite", ["m"])
    wait_until(lambda: job.message == "ready")
    cancel_job(job)
    assert (job.running, job.message) == (False, "gave up")
    stand_in("trap '' INT TERM; echo ready; while :; do sleep 0.05; done")
    monkeypatch.setattr(jobs, "PATIENCE", 0.3)
    job = start_job(runs, "stubborn", ["m"])
    wait_until(lambda: job.message == "ready")
    start = time.monotonic()
    cancel_job(job)
    assert 0.3 <= time.monotonic() - start < 5
    assert {j.name: j.state for j in list_jobs(runs)} == {"polite": "cancelled", "stubborn": "cancelled"}


def test_cancelling_what_has_ended(runs, stand_in):
    stand_in("echo error: no such model")
    job = start_job(runs, "run", ["m"])
    ended(job)
    assert (job.state, job.message) == ("failed", "no such model")
    cancel_job(job)
    assert not list_jobs(runs)[0].running


def test_a_job_outlives_who_started_it(runs, stand_in, tmp_path):
    stand_in("exec sleep 60")
    script = (
        "import sys; sys.path.insert(0, 'app'); from pathlib import Path; from dashboard.jobs import *; "
        "real, sys.executable = sys.executable, sys.argv[2]; start_job(Path(sys.argv[1]), 'run', ['m', '--x=1'])"
    )
    subprocess.run([REAL_PYTHON, "-c", script, runs, sys.executable], check=True)
    (job,) = list_jobs(runs)
    assert (job.state, job.arguments, job.name) == ("running", ["m", "--x=1"], "run")
    cancel_job(job)
    (job,) = list_jobs(runs)
    assert job.state == "cancelled"
    assert not psutil.pid_exists(job.pid) or psutil.Process(job.pid).status() == psutil.STATUS_ZOMBIE


def test_another_process_with_the_number_is_not_the_job(runs, stand_in):
    stand_in("exec sleep 60")
    job = start_job(runs, "run", ["m"])
    for change in (-1000.0, 1000.0, 5.0, -job.process_started):
        forged = rewrite(runs, process_started=job.process_started + change, cancelled=False)
        assert (forged.running, forged.state) == (False, "failed")
        cancel_job(forged)
        assert psutil.Process(job.pid).status() != psutil.STATUS_ZOMBIE
        assert list_jobs(runs)[0].state == "cancelled"
    assert job.running
    assert rewrite(runs, process_started=job.process_started, cancelled=False).running
    # Nor does it keep the next from starting.
    rewrite(runs, process_started=1.0)
    next_one = start_job(runs, "next", ["m"])
    assert next_one.running
    cancel_job(next_one)


def test_a_number_that_nobody_has(runs, stand_in):
    stand_in("exit 0")
    job = start_job(runs, "run", ["m"])
    ended(job)
    for pid in (job.pid, 2**22 + 1, 2**31 - 1):
        forged = rewrite(runs, pid=pid)
        assert not forged.running
        cancel_job(forged)


def test_no_zombie_is_left(runs, stand_in):
    stand_in("exit 1")
    job = start_job(runs, "run", ["m"])
    ended(job)
    assert job.state == "failed"
    assert not psutil.pid_exists(job.pid)


# --- What a job says ---


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"loading\nerror: no such model\n", "no such model"),
        (b"error: first\nerror: second\nafterwards\n", "second"),
        (b"Traceback\n  File\nKeyError: 'x'\n", "KeyError: 'x'"),
        (b"\xff\xfe error\n", "\ufffd\ufffd error"),
        ("error: modèle ☃\n".encode(), "modèle ☃"),
    ],
)
def test_message(runs, stand_in, log, message):
    stand_in("exit 2")
    job = start_job(runs, "run", ["m"])
    ended(job)
    job.log.write_bytes(log)
    assert job.message == message
    job.log.unlink()
    assert job.message == ""


def test_state_and_progress_of_a_damaged_run_folder(runs, stand_in):
    stand_in("exit 0")
    job = start_job(runs, "run", ["m"])
    ended(job)
    job.out.mkdir()
    (job.out / "recommendation.json").write_text("{}")
    for text in ("", "{", "[]", '{"schema_version": 1, "status": "complete"}', "\0"):
        (job.out / "manifest.json").write_text(text)
        assert (job.state, job.progress) == ("failed", None)
    (job.out / "manifest.json").unlink()
    (job.out / "manifest.json").mkdir()
    assert (job.state, job.progress) == ("failed", None)


# --- Files ---


def test_what_is_no_job_is_ignored(runs, stand_in):
    assert list_jobs(runs) == []
    stand_in("exit 0")
    job = start_job(runs, "run", ["m"])
    ended(job)
    good = json.loads(job_file(runs).read_text())
    assert good == asdict(job)
    texts = ["", "{", "[]", "null", '"text"', "12", "{}", '{"name": "x"}', "\0\0", json.dumps(good | {"more": 1})]
    texts.append(json.dumps({k: v for k, v in good.items() if k != "pid"}))
    for i, text in enumerate(texts):
        job_file(runs, f"bad{i}").write_text(text)
    job_file(runs, "latin").write_bytes(b"\xff\xfe{}")
    job_file(runs, "folder").mkdir()
    job_file(runs, "link").symlink_to(runs / "nowhere")
    (runs / JOBS / "notes.txt").write_text("x")
    assert list_jobs(runs) == [job]
    assert start_job(runs, "next", ["m"]).name == "next"


def test_jobs_is_not_a_folder(tmp_path, runs, stand_in):
    stand_in("exit 0")
    runs.mkdir()
    (runs / JOBS).write_text("a file")
    assert list_jobs(runs) == []
    for place in (runs, tmp_path / "stand-in", tmp_path / "stand-in" / "deeper"):
        before = contents(tmp_path)
        with pytest.raises(UserError, match="cannot start a diagnosis"):
            start_job(place, "run", ["m"])
        with pytest.raises(UserError, match="cannot write"):
            save_prompts(place, "run", b"x")
        assert contents(tmp_path) == before


def test_a_command_that_cannot_be_started(runs, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(runs / "no-python"))
    with pytest.raises(UserError, match="cannot start a diagnosis"):
        start_job(runs, "run", ["m"])
    assert list_jobs(runs) == []


def test_newest_first(runs, stand_in):
    stand_in("exit 0")
    for name, started in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2025-12-31")):
        ended(start_job(runs, name, ["m"]))
        rewrite(runs, name, started=f"{started}T00:00:00+00:00")
    assert [job.name for job in list_jobs(runs)] == ["a", "b", "c"]


def test_a_folder_that_was_moved_takes_its_jobs_along(runs, stand_in, tmp_path):
    stand_in("exit 0")
    ended(start_job(runs, "run", ["m"]))
    moved = runs.rename(tmp_path / "moved")
    (job,) = list_jobs(moved)
    assert job.out == moved / "run"
    forget_job(job)
    assert contents(moved) == {JOBS: None}


def test_forgetting_removes_the_jobs_own_files_alone(runs, stand_in):
    stand_in("exit 0")
    for name in ("run", "run-2", "run.json"):
        save_prompts(runs, name, name.encode())
        ended(start_job(runs, name, ["m"]))
        (runs / name).mkdir()
        (runs / name / "layers.parquet").write_bytes(b"rows")
    before = contents(runs)
    (job,) = [job for job in list_jobs(runs) if job.name == "run"]
    forget_job(job)
    own = {f"{JOBS}/run.{kind}" for kind in ("json", "log", "jsonl")}
    assert contents(runs) == {name: data for name, data in before.items() if name not in own}
    assert own <= set(before)
    forget_job(job)  # twice, from two pages
    assert {job.name for job in list_jobs(runs)} == {"run-2", "run.json"}


ODD = ["a b", "läuft ☃", "-x", "--help", "a'b\"c", "$HOME", "*", "a.b.json", "%s", "x" * 200]


@pytest.mark.parametrize("name", ODD)
def test_odd_names(runs, stand_in, name):
    stand_in('echo "error: $@"; exit 2')
    assert save_prompts(runs, name, b"{}").read_bytes() == b"{}"
    job = start_job(runs, name, ["m"])
    ended(job)
    assert list_jobs(runs) == [job]
    assert job.message.endswith(f" --out {runs / name}")
    assert job.state == "failed"
    cancel_job(job)
    assert list_jobs(runs) == [replace(job, cancelled=True)]
    forget_job(job)
    assert contents(runs) == {JOBS: None}


# --- Odd values and other dashboards ---


@pytest.mark.parametrize(
    "values",
    [
        {"pid": "12"},
        {"pid": None},
        {"pid": -1},
        {"pid": 10**30},
        {"process_started": "yesterday"},
        {"process_started": None},
        {"name": 5},
        {"name": ""},
        {"name": "../../beside"},
        {"name": "other"},
        {"started": 5},
        {"arguments": None},
        {"arguments": []},
        {"arguments": [1]},
        {"cancelled": "no"},
    ],
    ids=str,
)
def test_a_job_file_with_values_of_another_kind_is_ignored(runs, stand_in, values):
    """`list_jobs` checks the names of the fields alone: what follows is an exception on every page, each second,
    or, with the name of another place, files removed there."""
    stand_in("exit 0")
    job = start_job(runs, "run", ["m"])
    ended(job)
    job_file(runs, "foreign").write_text(json.dumps(asdict(job) | {"name": "foreign", "pid": os.getpid()} | values))
    found = list_jobs(runs)
    for one in found:
        assert (one.running, one.progress, one.message) == (False, None, "")
        assert one.state in ("failed", "cancelled")
    assert found == [job]


def test_a_job_file_nested_too_deep_is_ignored(runs, stand_in):
    """RecursionError of the JSON parser."""
    stand_in("exit 0")
    job = start_job(runs, "run", ["m"])
    ended(job)
    job_file(runs, "deep").write_text("[" * 100_000)
    assert list_jobs(runs) == [job]


@pytest.mark.parametrize("size", [252, 256, 300, 5000])
def test_a_name_too_long(runs, stand_in, size):
    """OSError 'File name too long' of `(out / MANIFEST).exists()`, outside of the `try`; names come from models'."""
    stand_in("exit 0")
    runs.mkdir()
    with pytest.raises(UserError, match="cannot start a diagnosis"):
        start_job(runs, "x" * size, ["m"])


def test_the_run_of_a_hidden_model_is_not_hidden(runs, stand_in):
    """A folder of runs does not list names that begin with a dot; `new_folder` keeps the dot of the model's name."""
    from diagnostics.cli.common import new_folder

    assert not new_folder(".my-model", parent=runs).name.startswith(".")


def test_cancelling_the_job_of_another_dashboard(runs, stand_in):
    """It ends at once, but stays a zombie until its parent looks: psutil.TimeoutExpired of the second `wait`."""
    stand_in("exec sleep 60")
    start_job(runs, "run", ["m"])
    elsewhere(runs, "cancel_job(job)", executable=REAL_PYTHON)
    (job,) = list_jobs(runs)
    assert (job.running, job.state) == (False, "cancelled")
