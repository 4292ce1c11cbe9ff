"""The page *New diagnosis*: the command it starts, and a job from start to end."""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dashboard import jobs, settings_check
from diagnostics import load_run, recommend
from diagnostics.models.outline import ModelOutline
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from diagnostics.support.files import read_json
from tests.support.pages import ODD, calm, edit_manifest, go, literal, table
from tests.support.runs import save_tiny, write_prompts


class FakeCommand:
    """Stands for the command: a process that waits, with a log of what was asked for."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self):
        self.commands, self.processes = [], []

    def Popen(self, command, *, stdout, **options):
        self.commands.append(command)
        self.options = options
        waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.processes.append(subprocess.Popen(waiting, stdout=stdout, stderr=stdout, stdin=subprocess.DEVNULL))
        return self.processes[-1]

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def command(monkeypatch):
    """The command in place of its process; its models, which are made up, pass every check."""
    fake = FakeCommand()
    monkeypatch.setattr(settings_check, "check_model", lambda model, **_: ModelOutline(model, "cpu", "float32"))
    monkeypatch.setattr(jobs, "subprocess", types.SimpleNamespace(Popen=fake.Popen, DEVNULL=subprocess.DEVNULL))
    yield fake
    fake.end()


def start(at, **values):
    for key, value in values.items():
        field = at.text_input if isinstance(value, str) else at.number_input
        field(key=key).set_value(value)
    (button,) = [b for b in at.button if b.label == "Start"]
    return button.click().run()


def states(at):
    found = [literal(markdown.value) for markdown in at.markdown if ":material/" in markdown.value]
    return [line.rpartition(": ")[2] for line in found]


def job_buttons(at):
    return {button.label: button for button in at.button if button.label not in ("Start",)}


def test_the_form_starts_the_command(tmp_path, command, open_app):
    at = open_app(tmp_path / "runs", "diagnosis")
    assert calm(at) == []
    assert at.text_input(key="model").value == "smollm2-135m-instruct"
    at.file_uploader(key="prompt_file").upload("mine.jsonl", b'{"text": "hello"}\n')
    at.selectbox(key="dtype").select("bfloat16")
    at.selectbox(key="rules").select("all,leave-one-out")
    start(at, model=" org/model ", context=512, max_prompts=3, decode=9, anchors=2, goal=0.25, detail=1, device="cpu")
    assert calm(at) == []
    (line,) = command.commands
    assert line[:4] == [sys.executable, "-m", "diagnostics.cli", "recommend"]
    assert "org/model" in line
    options = dict(word.split("=", 1) for word in line if word.startswith("--") and "=" in word)
    prompts = options.pop("--prompts")
    assert options == {
        "--context-length": "512",
        "--max-prompts": "3",
        "--decode-tokens": "9",
        "--anchors": "2",
        "--max-kl": "0.25",
        "--detail-prompts": "1",
        "--device": "cpu",
        "--dtype": "bfloat16",
        "--backend": "hooks",
        "--rules": "all,leave-one-out",
    }
    assert Path(prompts).read_bytes() == b'{"text": "hello"}\n'
    out = Path(line[line.index("--out") + 1])
    assert out.parent == tmp_path / "runs"
    assert "--resume" not in line
    assert command.options["start_new_session"]
    assert states(at) == ["running"]
    # The command understands all of it.
    from typer.main import get_command

    from diagnostics.cli import app as cli

    get_command(cli).commands["recommend"].make_context("recommend", line[4:])


def test_a_job_from_start_to_end(library, tmp_path, command, open_app):
    runs = tmp_path / "runs"
    at = open_app(runs, "diagnosis")
    start(at, model="some/model")
    assert states(at) == ["running"]
    assert at.get("progress")[0].text == "loading the model, first prompt"
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    shutil.copytree(library / "interrupted", out)
    at.run()
    assert at.get("progress")[0].text == "2 of 6 prompts"
    assert at.get("progress")[0].value == 33
    # One at a time.
    start(at, model="other/model")
    assert "a diagnosis is running" in calm(at)[0]
    assert len(command.commands) == 1
    command.end()
    (runs / ".jobs" / f"{out.name}.log").write_text("error: the *dog* ate <it>\n")
    at.run()
    assert states(at) == ["failed"]
    assert calm(at) == ["the *dog* ate <it>"]
    assert any("2 of 6 prompts are finished and kept" in literal(caption.value) for caption in at.caption)
    assert "Resume" in job_buttons(at)
    shutil.rmtree(out)
    shutil.copytree(library / "real", out)
    at.run()
    assert states(at) == ["complete"]
    assert calm(at) == []
    assert set(job_buttons(at)) == {"Show", "Remove"}


def test_a_job_that_ended_without_a_word(tmp_path, command, open_app):
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model="some/model")
    command.end()
    at.run()
    assert states(at) == ["failed"]
    assert calm(at) == ["it ended without a word"]
    assert "Try again" in job_buttons(at)
    assert at.code[0].value == "nothing yet"


def test_a_failed_job_leads_back_to_the_form_with_its_settings(tmp_path, command, monkeypatch, open_app):
    rerun = jobs_page_rerun(monkeypatch)
    at = open_app(tmp_path / "runs", "diagnosis")
    at.file_uploader(key="prompt_file").upload("mine.jsonl", b'{"text": "hello"}\n')
    at.selectbox(key="dtype").select("float16")
    start(at, model="some/model", context=700, max_prompts=3, goal=0.25)
    (job,) = jobs.list_jobs(tmp_path / "runs")
    command.end()
    job.log.write_text("recommend: reads the model\nerror: out of memory\n")
    again = open_app(tmp_path / "runs", "diagnosis")  # as after a reload, of an address without settings
    assert again.number_input(key="context").value == 1024
    job_buttons(again)["Try again"].click().run()
    assert rerun
    assert calm(again) == ["out of memory"]
    assert "recommend: reads the model" in again.code[0].value
    assert again.text_input(key="model").value == "some/model"
    assert [again.number_input(key=key).value for key in ("context", "max_prompts", "goal")] == [700, 3, 0.25]
    assert again.selectbox(key="dtype").value == "float16"
    start(again, context=900)
    first, second = command.commands
    assert "--context-length=900" in second
    assert [word for word in second if word.startswith(("--max", "--dtype"))] == [
        word for word in first if word.startswith(("--max", "--dtype"))
    ]
    prompts = [next(w for w in line if w.startswith("--prompts=")).partition("=")[2] for line in command.commands]
    assert Path(prompts[1]).read_bytes() == b'{"text": "hello"}\n'


def test_the_form_survives_a_reload(tmp_path, command, open_app):
    at = open_app(tmp_path / "runs", "diagnosis")
    at.number_input(key="context").set_value(333)
    at.text_input(key="device").set_value("cpu").run()
    query = {name: at.query_params[name] for name in at.query_params}
    again = open_app(tmp_path / "runs", "diagnosis", **query)
    assert again.number_input(key="context").value == 333
    assert again.text_input(key="device").value == "cpu"


def test_an_estimate_comes_from_a_finished_run_of_the_model(copy, command, open_app):
    folder = copy("tiny")
    seconds, identity = 60.0, read_json(folder / MANIFEST)["identity"]
    edit_manifest(folder, timings={"seconds_last_session": seconds}, n_prompts=6)
    edit_manifest(folder, identity=identity | {"context_length": 152, "decode_tokens": 48})
    at = open_app(folder.parent, "diagnosis")
    at.text_input(key="model").set_value("tiny-llama")
    at.number_input(key="context").set_value(1952).run()  # ten times as many tokens, 28 prompts in place of 6
    assert calm(at) == []
    assert any("About 47 min, from the time that tiny took" in literal(caption.value) for caption in at.caption)
    at.text_input(key="model").set_value("other").run()
    assert any("an estimate comes after the first prompt" in caption.value for caption in at.caption)


def test_a_running_job_says_how_long_it_will_take(library, tmp_path, command, open_app):
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model="some/model")
    (job,) = jobs.list_jobs(tmp_path / "runs")
    job.log.write_text("recommend: 3 of 28, needle-1; 40 s so far, about 6 min left\n")
    at.run()
    assert "about 6 min left" in " ".join(literal(caption.value) for caption in at.caption)
    assert "about 6 min left" in at.code[0].value


def test_a_job_is_cancelled_resumed_and_taken_off_the_list(library, tmp_path, command, monkeypatch, open_app):
    # Streamlit's test runs the whole page where a browser runs the fragment alone.
    rerun = jobs_page_rerun(monkeypatch)
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model="some/model")
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    shutil.copytree(library / "interrupted", out)
    at.run()
    job_buttons(at)["Cancel"].click().run()
    assert rerun
    assert command.processes[0].poll() is not None
    assert states(at) == ["cancelled"]
    assert calm(at) == []
    job_buttons(at)["Resume"].click().run()
    assert states(at) == ["running"]
    assert len(command.commands) == 2
    assert command.commands[1] == [*command.commands[0], "--resume"]
    command.end()
    at.run()
    job_buttons(at)["Remove"].click().run()
    assert states(at) == []
    assert out.is_dir()
    assert calm(at) == []


def jobs_page_rerun(monkeypatch):
    import streamlit as st

    asked = []
    real = st.rerun

    def rerun(*, scope="app"):
        asked.append(scope)
        real()

    monkeypatch.setattr(st, "rerun", rerun)
    return asked


@pytest.mark.parametrize("model", ["-x", "--help", " --out=/tmp ", "", "   "])
def test_what_is_no_model_starts_nothing(tmp_path, command, open_app, model):
    at = open_app(tmp_path / "runs", "diagnosis")
    start(at, model=model)
    assert calm(at) == ["name a model"]
    assert command.commands == []
    assert not (tmp_path / "runs").exists()


def test_names_of_models_stay_text_and_inside_the_folder(tmp_path, command, open_app):
    runs = tmp_path / "runs"
    at = open_app(runs, "diagnosis")
    start(at, model=f"../../{ODD}")
    assert calm(at) == []
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    assert out.resolve().parent == runs
    said = [markdown.value for markdown in at.markdown if ":material/" in markdown.value]
    assert f"../../{ODD}" in literal(said[0])
    assert ODD not in said[0]
    assert "<b>" not in said[0].replace("\\<b\\>", "")


def test_jobs_that_are_not_ours_are_passed_over(copy, open_app):
    folder = copy("tiny").parent
    (folder / ".jobs").mkdir()
    for number, text in enumerate(["", "{", "[]", "5", '{"name": "x"}', "null"]):
        (folder / ".jobs" / f"{number}.json").write_text(text)
    at = open_app(folder, "diagnosis")
    assert calm(at) == []
    assert states(at) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "MODEL/missing"}, "there is no model folder"),
        ({"device": "toaster"}, "toaster"),
        ({"context": 16}, "has 40 tokens, but 16 fit: ask for a context length of at least 40"),
        ({"decode": 4000}, "leave no room in the"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_said_before_a_model_is_loaded(tmp_path, monkeypatch, open_app, settings, said):
    fake = FakeCommand()
    monkeypatch.setattr(jobs, "subprocess", types.SimpleNamespace(Popen=fake.Popen, DEVNULL=subprocess.DEVNULL))
    model = save_tiny(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.jsonl", n_prompts=2, n_tokens=40).read_bytes()
    values = {"model": str(model), "context": 64, "max_prompts": 1, "decode": 3}
    values |= {key: value.replace("MODEL", str(model)) if key == "model" else value for key, value in settings.items()}
    at = open_app(tmp_path / "runs", "diagnosis")
    at.file_uploader(key="prompt_file").upload("p.jsonl", prompts)
    start(at, **values)
    (line,) = calm(at)
    assert said in line
    assert fake.commands == []
    assert not list((tmp_path / "runs").rglob("*.json*"))
    assert {key: at.session_state[key] for key in values} == values, "what was typed is still there"


def test_a_real_diagnosis_of_a_tiny_model(tmp_path, open_app):
    save_tiny(tmp_path / "model")
    prompts = write_prompts(tmp_path / "p.jsonl", n_prompts=2, n_tokens=20).read_bytes()
    at = open_app(tmp_path / "runs", "diagnosis")
    at.file_uploader(key="prompt_file").upload("p.jsonl", prompts)
    start(at, model=str(tmp_path / "model"), context=64, max_prompts=2, decode=3, anchors=1, detail=1)
    for job in jobs.list_jobs(tmp_path / "runs"):
        if job.running:
            jobs._process(job).wait(100)
    at.run()
    assert states(at) == ["complete"]
    assert calm(at) == []
    go(at, "overview")
    assert table(at)["status"].tolist() == ["complete"]
    assert literal(at.caption[0].value).startswith(str(tmp_path / "model"))
    assert load_run(next((tmp_path / "runs").glob("[!.]*"))).manifest["identity"]["detail_prompts"] == 1


def test_show_opens_the_run_of_a_finished_diagnosis(library, copy, command, open_app):
    runs = copy("real").parent
    at = open_app(runs, "diagnosis")
    start(at, model="some/model")
    out = Path(command.commands[0][command.commands[0].index("--out") + 1])
    command.end()
    shutil.copytree(library / "tiny", out)
    recommend(load_run(out)).save(out / RECOMMENDATION)
    at.run()
    job_buttons(at)["Show"].click().run()
    assert calm(at) == []
    assert literal(at.caption[0].value).startswith("tiny-llama")
    assert at.sidebar.selectbox[0].value == out.name
