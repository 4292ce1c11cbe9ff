import os
import shutil

import pytest
from streamlit.testing.v1 import AppTest

from diagnostics import SpeedPolicy, diagnose, load_prompts, load_run, recommend
from diagnostics.generation.benchmarks import benchmark
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from tests.support.pages import MAIN, go
from tests.support.runs import write_prompts
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def library(smollm, tmp_path_factory):
    """A folder of runs: of the embedded model, of tiny ones, an interrupted one, a benchmark, and three broken ones."""
    folder = tmp_path_factory.mktemp("library")
    runs = folder / "runs"
    run = diagnose(
        smollm,
        load_prompts("builtin", context_length=256, max_prompts=6),
        decode_tokens=8,
        detail_prompts=2,
        out=runs / "real",
    )
    recommend(run, max_kl=0.3).save(runs / "real" / RECOMMENDATION)
    prompts = load_prompts(str(write_prompts(folder / "p.jsonl")))
    llama = tiny_model("llama")
    diagnose(llama, prompts, decode_tokens=4, out=runs / "tiny")
    diagnose(tiny_model("gpt2"), prompts, decode_tokens=4, detail_prompts=0, out=runs / "plain")

    def stop(done, total, prompt_id):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(llama, prompts, decode_tokens=4, progress=stop, out=runs / "interrupted")
    benchmark(llama, [SpeedPolicy(3), SpeedPolicy(2)], lengths=[16, 32], repeats=2, new_tokens=3, out=runs / "bench")
    for name in ("broken", "foreign", "older"):
        (runs / name).mkdir()
    (runs / "broken" / MANIFEST).write_text("{")
    (runs / "foreign" / "thesis.txt").write_text("hello")
    (runs / "older" / MANIFEST).write_text('{"schema_version": 0}')
    for age, name in enumerate(("real", "tiny", "plain", "interrupted", "bench", "broken", "foreign", "older")):
        for file in (runs / name).rglob("*"):
            os.utime(file, (1.8e9 - 100 * age, 1.8e9 - 100 * age))
    return runs


@pytest.fixture(scope="session")
def run(library):
    return load_run(library / "real")


@pytest.fixture
def copy(library, tmp_path):
    """Copy one entry of the library to a folder of its own: ``copy("tiny")``; other names with ``into``."""

    def copied(name, into=None):
        folder = tmp_path / "runs" / (into or name)
        shutil.copytree(library / name, folder)
        return folder

    return copied


@pytest.fixture
def open_app(monkeypatch):
    """``open_app(folder, "layers", run="real")``: the dashboard over a folder, at a page."""

    def open_at(folder, page="overview", /, **query):
        monkeypatch.setenv("SPEED_DIAGNOSTICS_RUNS", str(folder))
        at = AppTest.from_file(str(MAIN), default_timeout=60)
        for name, value in query.items():
            at.query_params[name] = value
        at.run()
        return at if page == "overview" else go(at, page)

    return open_at
