"""What long commands say while they work: plain lines in a log, a bar on a terminal, nothing if asked."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from diagnostics import UserError
from diagnostics.support import signs_of_life
from diagnostics.support.progress import readable_duration
from diagnostics.support.signs_of_life import progress
from tests.support.paths import ROOT
from tests.support.runs import LONG_COMMANDS, run_command, save_tiny, write_prompts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        seconds = 0.0

    monkeypatch.setattr(signs_of_life.time, "monotonic", lambda: Clock.seconds)
    return Clock


def lines(capfd):
    return capfd.readouterr().err.splitlines()


def test_a_line_for_each_of_few_pieces_with_the_time_left(capfd, clock):
    with progress("measuring", first="preparing") as advance:
        for done in range(4):
            clock.seconds = 100.0 * done
            advance(done, 4, f"p{done}")
        clock.seconds = 400.0
        advance(4, 4, "")
    assert lines(capfd) == [
        "preparing",
        "measuring: 1 of 4, p0",
        "measuring: 2 of 4, p1; 2 min so far, about 5 min left",
        "measuring: 3 of 4, p2; 3 min so far, about 3 min left",
        "measuring: 4 of 4, p3; 5 min so far, about 2 min left",
        "measuring: all 4 done; took 7 min",
    ]


def test_of_many_pieces_every_tenth_has_a_line_and_after_the_first_an_estimate(capfd, clock):
    with progress("answering") as advance:
        for done in range(201):
            clock.seconds = float(done)
            advance(done, 200, "")
    said = lines(capfd)
    assert [line.split()[1] for line in said] == [*map(str, [1, 2, *range(21, 200, 20)]), "all"]
    assert said[1] == "answering: 2 of 200; 1 s so far, about 3 min left"


def test_no_silence_of_minutes(capfd, clock):
    with progress("answering") as advance:
        for done in range(10):
            clock.seconds = 40.0 * done
            advance(done, 1000, "")
    assert [int(line.split()[1]) for line in lines(capfd)] == [1, 2, 4, 6, 8, 10]


def test_a_part_that_counts_anew_has_its_own_estimate(capfd, clock):
    with progress("fine-tuning") as advance:
        for seconds, call in [(0, (0, 2, "a")), (10, (1, 2, "a")), (20, (2, 2, "a")), (50, (0, 9, "b"))]:
            clock.seconds = float(seconds)
            advance(*call)
        clock.seconds = 60.0
        advance(1, 9, "b")
    assert lines(capfd)[-2:] == ["fine-tuning: 1 of 9, b", "fine-tuning: 2 of 9, b; 10 s so far, about 80 s left"]


def test_what_was_finished_before_is_not_in_the_estimate(capfd, clock):
    with progress("measuring") as advance:
        advance(8, 10, "p8")
        clock.seconds = 30.0
        advance(9, 10, "p9")
    assert lines(capfd)[-1] == "measuring: 10 of 10, p9; 30 s so far, about 30 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (89, "89 s"), (91, "2 min"), (3570, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert readable_duration(seconds) == text


# --- The commands ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_tiny(root / "tiny")
    write_prompts(root / "prompts.jsonl", n_prompts=3)
    write_prompts(root / "data.jsonl", n_prompts=5, n_tokens=20, seed=1)
    items = [{"query": "w5 w6 w7", "continuations": [" w5", " w6"], "gold": 0, "id": f"i{i}"} for i in range(3)]
    (root / "tasks.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return root


MEASURING = ("--prompts", "prompts.jsonl", "--decode-tokens", 3)
ARGUMENTS = {
    "diagnose": MEASURING,
    "recommend": MEASURING,
    "generate": ("--prompt", "w5 w6 w7", "--max-new-tokens", 3),
    "bench": ("--lengths", 16, "--repeats", 1, "--new-tokens", 2, "--policies", "speed:2"),
    "evaluate": ("--tasks", "tasks.jsonl", "--policies", "speed:2"),
    "finetune": (
        *("--cutoff", 2, "--data", "data.jsonl", "--held-out", "prompts.jsonl", "--rank", 2, "--steps", 2),
        *("--answer-tokens", 3, "--decode-tokens", 3),
    ),
}


def test_every_long_command_is_here():
    assert set(ARGUMENTS) == set(LONG_COMMANDS)


@pytest.fixture
def command(world, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(world)

    def run(name, *more, signs=True):
        out = () if name == "generate" else ("--out", tmp_path / "out")
        return run_command(monkeypatch, capfd, name, "tiny", *ARGUMENTS[name], *out, *more, signs=signs)

    return run


@pytest.mark.parametrize("name", LONG_COMMANDS)
def test_in_a_log_there_are_plain_lines(command, monkeypatch, tmp_path, name):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on some machines for continuous integration
    status, _, err = command(name)
    assert status == 0
    assert re.search(r"[^\n -~]", err) is None, "control characters"
    said = err.splitlines()
    assert "loading tiny" in said[:2]
    if name == "generate":
        assert "Generating at most 3 tokens after 3 under full." in said[:2]
    else:
        assert said[0].endswith(f"; results go to {tmp_path / 'out'}.")
        assert len([line for line in said if re.search(r": \d+ of \d+", line)]) >= 3
        assert any(re.search(r"so far, about \d+ s left$", line) for line in said)


def test_a_fine_tuning_says_which_of_its_stages_it_is_in(command):
    _, _, err = command("finetune")
    said = err.splitlines()
    assert "fine-tuning: 1 of 3, measuring before training (stage 2 of 5), p0" in said
    stages = [int(number) for number in re.findall(r"\(stage (\d) of 5\)", err)]
    assert stages == sorted(stages)
    assert set(stages) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
@pytest.mark.parametrize("name", LONG_COMMANDS)
def test_quiet_leaves_the_result_alone(command, name, flag):
    status, out, err = command(name, flag)
    assert status == 0
    assert out
    assert [line for line in err.splitlines() if not line.startswith("[full: ")] == []


def test_the_first_use_of_the_embedded_model_says_that_it_is_converted(monkeypatch, capfd, tmp_path):
    def stop(*_, **__):
        raise UserError("far enough")

    monkeypatch.setattr("diagnostics.models.loading.load_model", stop)
    monkeypatch.setattr("diagnostics.models.embedded.find_embedded_model", lambda: None)
    _, _, err = run_command(monkeypatch, capfd, "generate", "--prompt", "w5", signs=True)
    assert err.splitlines()[0].startswith("loading smollm2-135m-instruct; at its first use it is converted")
    monkeypatch.setattr("diagnostics.models.embedded.find_embedded_model", lambda: tmp_path)
    _, _, err = run_command(monkeypatch, capfd, "generate", "--prompt", "w5", signs=True)
    assert err.splitlines() == ["loading smollm2-135m-instruct", "error: far enough"]


def test_an_error_after_the_first_signs_is_the_last_line(command):
    status, _, err = command("diagnose", "--decode-tokens", 5000)
    assert status == 2
    *signs, last = err.splitlines()
    assert last.startswith("error: 5000 decode tokens")
    assert not any(line.startswith("error") for line in signs)


def test_on_a_terminal_a_bar_says_the_stage(world, tmp_path):
    ours, theirs = pty.openpty()
    arguments = map(str, ("diagnose", "tiny", *MEASURING, "--out", tmp_path / "out", "--json"))
    with subprocess.Popen(
        [sys.executable, "-m", "diagnostics.cli", *arguments],
        cwd=world,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # of a terminal whose other side has closed
                break
        out = process.stdout.read()
    os.close(ours)
    assert json.loads(out)["status"] == "complete"
    text = shown.decode()
    assert "results go to" in text
    assert text.index("loading tiny") < text.index("preparing the model") < text.index("measuring")
    assert "\x1b[" in text
