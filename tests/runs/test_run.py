"""The run folder: its contents, and what is left of it when the process dies."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from diagnostics import UserError, diagnose, load_model, load_prompts, load_run, recommend
from diagnostics.runs import parts
from diagnostics.runs import run as results
from diagnostics.runs.schema import TABLES
from diagnostics.runs.writer import RunWriter
from diagnostics.support import files
from diagnostics.support.files import SCRATCH, read_json
from tests.support.runs import DECODE_TOKENS, contents, make_run, save_tiny, write_prompts
from tests.support.tiny import N_LAYERS

# The contract; written down here once more, so that a column does not go unnoticed.
COLUMNS = {
    "prompts": "prompt_id category n_prompt n_decode",
    "layers": "prompt_id layer mass_anchor mass_prompt mass_decode prompt_contribution selectivity prompt_entropy "
    "drift_prompt drift_decode drift_prompt_centred lens_kl lens_top1 lens_rank lens_kl_translated saliency_overlap",
    "heads": "prompt_id layer head mass_anchor mass_prompt mass_decode selectivity",
    "cutoffs": "prompt_id cutoff kl top1_agreement nll nll_full",
}
MANIFEST_NAMES = "model revision n_layers n_heads seed versions arguments timings schema_version created status columns"
IDENTITY_NAMES = "weight_hash dtype device backend anchors decode_tokens prompts"
DETAIL = {
    "tokens": "prompt_id position token_id text segment evidence attention selectivity",
    "lens": "prompt_id position layer lens_token lens_text lens_probability",
    "head_tokens": "prompt_id layer head position attention",
}
FILES = {"manifest.json", *(f"{name}.parquet" for name in COLUMNS | DETAIL)}

N_PROMPTS = 6


class Killed(BaseException):
    """Ends the process in the middle of things; no handler of the product may take it."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model and prompts, as a function that diagnoses them, and as the arguments of the command."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder / "model")
    prompts = write_prompts(folder / "prompts.jsonl", N_PROMPTS)
    lm = load_model(model)

    def run(out=None, source=prompts, **options):
        return diagnose(lm, load_prompts(source), out=out, **{"decode_tokens": DECODE_TOKENS} | options)

    run.folder, run.model, run.lm = folder, model, lm
    return run


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    tiny(out)
    return out


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def assert_same_tables(one, other):
    assert set(one.tables) == set(other.tables)
    for name in one.tables:
        pd.testing.assert_frame_equal(one.tables[name], other.tables[name], check_exact=True)


def kill_at(monkeypatch, module, name, condition):
    """Make a function of a module kill the process when the condition on its arguments holds."""
    original = getattr(module, name)

    def deadly(*args, **kwargs):
        if condition(*args):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, deadly)


def stop_after(n_prompts):
    def progress(done, total, prompt_id):
        if done == n_prompts:
            raise Killed

    return progress


@pytest.fixture
def interrupted(tiny, tmp_path):
    """A run folder with two finished prompts."""
    out = tmp_path / "interrupted"
    with pytest.raises(Killed):
        tiny(out, progress=stop_after(2))
    return out


# --- Contents ---


def test_a_finished_run_has_exactly_its_files_and_columns(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    run = load_run(finished)
    assert run.complete
    for name, columns in (COLUMNS | DETAIL).items():
        assert set(columns.split()) <= set(run.tables[name].columns)
    rows = {"prompts": N_PROMPTS, "layers": N_PROMPTS * N_LAYERS, "heads": N_PROMPTS * N_LAYERS * 4}
    assert {name: len(run.tables[name]) for name in TABLES} == rows | {"cutoffs": N_PROMPTS * N_LAYERS}
    assert list(run.prompts["prompt_id"]) == [f"p{i}" for i in range(N_PROMPTS)]
    assert list(run.cutoffs["cutoff"][:N_LAYERS]) == list(range(1, N_LAYERS + 1))
    assert list(run.layers["layer"][:N_LAYERS]) == list(range(N_LAYERS))
    assert not run.cutoffs.isna().any(axis=None)


def test_manifest_says_what_was_run(finished, tiny):
    text = (finished / "manifest.json").read_text()
    manifest = json.loads(text, parse_constant=pytest.fail)
    assert set(MANIFEST_NAMES.split()) <= set(manifest)
    assert set(IDENTITY_NAMES.split()) <= set(manifest["identity"])
    assert (manifest["model"], manifest["n_layers"], manifest["n_heads"]) == (str(tiny.model), N_LAYERS, 4)
    assert manifest["identity"]["weight_hash"] == tiny.lm.weight_hash
    assert {"torch", "transformers", "python"} <= set(manifest["versions"])
    # Every measured column is explained.
    run = load_run(finished)
    keys = {"prompt_id", "layer", "head", "cutoff"}
    for name in ("layers", "heads", "cutoffs"):
        assert set(run.tables[name].columns) - keys <= set(manifest["columns"])


def test_a_run_in_memory_has_the_same_tables(finished, tiny):
    run = tiny()
    assert run.complete
    assert run.path is None
    assert_same_tables(run, load_run(finished))


# --- Interruption ---


def test_nothing_appears_before_the_first_prompt_is_finished(tiny, tmp_path):
    with pytest.raises(Killed):
        tiny(tmp_path / "a" / "run", progress=stop_after(0))
    assert contents(tmp_path) == {}
    # So the same command can be given again, with and without --resume.
    assert tiny(tmp_path / "a" / "run", resume=True).complete


def test_an_interrupted_run_shows_what_is_finished(interrupted, finished):
    run = load_run(interrupted)
    assert not run.complete
    assert list(run.prompts["prompt_id"]) == ["p0", "p1"]
    whole = load_run(finished)
    for name in TABLES:
        expected = whole.tables[name].query("prompt_id in ['p0', 'p1']").reset_index(drop=True)
        pd.testing.assert_frame_equal(run.tables[name], expected, check_exact=True)
    notes = recommend(run).data["notes"]
    assert any(f"not complete: 2 of {N_PROMPTS} prompts" in note for note in notes)


def test_a_resumed_run_does_only_what_is_left(tiny, interrupted, finished):
    seen = []
    run = tiny(interrupted, resume=True, progress=lambda done, total, prompt_id: seen.append((done, prompt_id)))
    assert seen == [(i, f"p{i}") for i in range(2, N_PROMPTS)] + [(N_PROMPTS, "")]
    assert {path.name for path in interrupted.iterdir()} == FILES
    assert_same_tables(run, load_run(finished))


def test_a_finished_run_is_not_run_again(tiny, run_folder):
    before = contents(run_folder)
    run = tiny(run_folder, resume=True, progress=lambda done, total, prompt_id: prompt_id and pytest.fail(prompt_id))
    assert run.complete
    assert contents(run_folder) == before


@pytest.mark.parametrize("merged", [0, 2, 4])
def test_killed_while_the_tables_are_merged(tiny, interrupted, finished, monkeypatch, merged):
    done = []

    def enough(scratch_parent):
        if scratch_parent == interrupted:
            done.append(scratch_parent)
        return len(done) > merged

    with monkeypatch.context() as patched:
        kill_at(patched, files, "scratch_folder", enough)
        with pytest.raises(Killed):
            tiny(interrupted, resume=True)
    assert len(list(interrupted.glob("*.parquet"))) == merged
    manifest = read_json(interrupted / "manifest.json")
    assert manifest["status"] == "running"
    assert_same_tables(load_run(interrupted), load_run(finished))  # from the parts
    assert_same_tables(tiny(interrupted, resume=True), load_run(finished))
    assert {path.name for path in interrupted.iterdir()} == FILES


def test_killed_after_completion_before_the_parts_are_gone(tiny, interrupted, finished, monkeypatch):
    with monkeypatch.context() as patched:
        kill_at(patched, shutil, "rmtree", lambda path: path == interrupted / "parts")
        with pytest.raises(Killed):
            tiny(interrupted, resume=True)
    assert (interrupted / "parts").is_dir()
    assert_same_tables(load_run(interrupted), load_run(finished))
    tiny(interrupted, resume=True)
    assert {path.name for path in interrupted.iterdir()} == FILES


def test_what_a_kill_left_half_written_is_ignored_and_cleaned_up(tiny, interrupted, finished):
    for parent in (interrupted, interrupted / "parts"):
        (parent / f"{SCRATCH}abc").mkdir()
        (parent / f"{SCRATCH}abc" / "layers.parquet").write_bytes(b"PAR1 half")
    assert list(load_run(interrupted).prompts["prompt_id"]) == ["p0", "p1"]
    assert_same_tables(tiny(interrupted, resume=True), load_run(finished))
    assert {path.name for path in interrupted.iterdir()} == FILES


def test_killed_before_the_manifest_was_written(tiny, tmp_path, finished):
    out = tmp_path / "run"
    (out / f"{SCRATCH}abc").mkdir(parents=True)
    assert_same_tables(tiny(out, resume=True), load_run(finished))


def part_names(run):
    return sorted(path.name for path in (run / "parts").iterdir())


def test_prompts_are_joined_and_end_with_the_same_numbers(tiny, tmp_path, finished, monkeypatch):
    """A run of thousands of prompts would otherwise be tens of thousands of little files."""
    monkeypatch.setattr(parts, "BATCH", 2)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tiny(out, progress=stop_after(5))
    assert part_names(out) == ["000000-000001", "000002-000003", "000004"]
    run = load_run(out)
    assert list(run.prompts["prompt_id"]) == [f"p{i}" for i in range(5)]
    assert parts.count_finished(part_names(out)) == 5
    assert_same_tables(tiny(out, resume=True), load_run(finished))
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.parametrize("gone", [0, 1])
def test_killed_while_prompts_are_joined(tiny, tmp_path, finished, monkeypatch, gone):
    """Once the joined folder is there it counts, whatever is left of the single ones."""
    monkeypatch.setattr(parts, "BATCH", 2)
    out = tmp_path / "run"
    removed = []

    def enough(path):
        removed.append(path)
        return path.name.isdigit() and len([r for r in removed if r.name.isdigit()]) > gone

    with monkeypatch.context() as patched:
        kill_at(patched, shutil, "rmtree", lambda path, **_: enough(path))
        with pytest.raises(Killed):
            tiny(out)
    assert part_names(out) == (["000000", "000000-000001", "000001"] if gone == 0 else ["000000-000001", "000001"])
    assert list(load_run(out).prompts["prompt_id"]) == ["p0", "p1"]
    seen = []
    run = tiny(out, resume=True, progress=lambda done, total, prompt_id: seen.append(prompt_id))
    assert seen == [f"p{i}" for i in range(2, N_PROMPTS)] + [""]
    assert_same_tables(run, load_run(finished))


def test_a_run_is_read_while_its_prompts_are_joined(tiny, interrupted, monkeypatch):
    """What was listed may be gone when it is read."""
    original = results.read_tables

    def join_first(folder):
        if folder.name == "000001":
            monkeypatch.setattr(results, "read_tables", original)
            monkeypatch.setattr(parts, "BATCH", 2)
            parts.Parts(interrupted)._join(0)
        return original(folder)

    monkeypatch.setattr(results, "read_tables", join_first)
    assert list(load_run(interrupted).prompts["prompt_id"]) == ["p0", "p1"]
    assert part_names(interrupted) == ["000000-000001"]


def command(*arguments, **options):
    """Start the real command in a process of its own, with as many threads as this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "diagnostics.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for_parts(process, out, n_parts):
    """Wait until so many prompts are finished, while the process is alive."""
    deadline = time.monotonic() + 60
    while len(list((out / "parts").glob("[0-9]*"))) < n_parts:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_and_resume_ends_with_the_same_numbers(tiny, tmp_path):
    """SIGKILL in the middle of a real run, twice; many long prompts, so that there is a middle."""
    prompts = write_prompts(tmp_path / "many.jsonl", n_prompts=40, n_tokens=440)
    out = tmp_path / "run"
    arguments = ("diagnose", tiny.model, "--prompts", prompts, "--decode-tokens", 32, "--out", out)
    for n_parts, more in ((2, ()), (12, ("--resume",))):
        process = command(*arguments, *more)
        wait_for_parts(process, out, n_parts)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        run = load_run(out)
        assert not run.complete
        assert n_parts <= len(run.prompts) < 40
        assert list(run.prompts["prompt_id"]) == [f"p{i}" for i in range(len(run.prompts))]
    resumed = tiny(out, source=prompts, decode_tokens=32, resume=True)
    assert {path.name for path in out.iterdir()} == FILES
    undisturbed = tiny(tmp_path / "undisturbed", source=prompts, decode_tokens=32)
    assert_same_tables(load_run(out), undisturbed)
    assert_same_tables(resumed, undisturbed)


def test_interrupt_is_one_line_that_says_how_to_go_on(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "many.jsonl", n_prompts=60, n_tokens=440)
    out = tmp_path / "run"
    process = command(
        *("recommend", tiny.model, "--prompts", prompts, "--decode-tokens", 32, "--out", out),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    wait_for_parts(process, out, 1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    *_, last = stderr.splitlines()
    assert last.startswith("error: interrupted")
    assert last.endswith(f"continue with --out {out} --resume")
    assert stderr.count("error") == 1
    assert len(load_run(out).prompts) >= 1


@pytest.mark.slow
def test_sigterm_leaves_what_is_finished_and_nothing_else(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "many.jsonl", n_prompts=60, n_tokens=440)
    out = tmp_path / "runs" / "run"
    process = command("diagnose", tiny.model, "--prompts", prompts, "--decode-tokens", 32, "--out", out, "--quiet")
    wait_for_parts(process, out, 1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (143, "")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]  # no lock
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert len(load_run(out).prompts) >= 1


@pytest.mark.slow
def test_a_second_process_with_the_same_folder_is_told_so(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "many.jsonl", n_prompts=60, n_tokens=440)
    out = tmp_path / "run"
    arguments = ("diagnose", tiny.model, "--prompts", prompts, "--decode-tokens", 32, "--out", out)
    first = command(*arguments)
    try:
        wait_for_parts(first, out, 1)
        for more in ((), ("--resume",)):
            second = command(*arguments, *more)
            stdout, stderr = second.communicate(timeout=60)
            assert (second.returncode, stdout, stderr.count("\n")) == (2, "", 1)
            assert f"another process (pid {first.pid} on " in stderr
    finally:
        first.kill()
        first.communicate()


# --- A full disk ---


@contextmanager
def full_disk(size):
    """Limit the size of files that this process writes, as a full disk would; no longer than the block, or
    pytest's own report could not be written either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_in_a_part(tiny, tmp_path, finished):
    out = tmp_path / "run"
    # A manifest fits, the layers of a prompt do not.
    with full_disk(15000), pytest.raises(UserError, match=r"cannot write run folder .*continue with `resume=True`"):
        tiny(out)
    assert not list((out / "parts").iterdir())
    assert_same_tables(tiny(out, resume=True), load_run(finished))


def test_full_disk_at_the_very_start(tiny, tmp_path):
    with full_disk(100), pytest.raises(UserError, match=r"cannot write run folder .*File too large"):
        tiny(tmp_path / "run")
    assert tiny(tmp_path / "run", resume=True).complete


def test_full_disk_while_the_recommendation_is_written(run_folder):
    before = contents(run_folder)
    recommendation = recommend(load_run(run_folder))
    with full_disk(100), pytest.raises(UserError, match=r"cannot write .*recommendation.json"):
        recommendation.save(run_folder / "recommendation.json")
    assert contents(run_folder) == before


@pytest.mark.slow
def test_full_disk_in_a_real_process(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", N_PROMPTS)
    out = tmp_path / "run"
    process = command(
        *("diagnose", tiny.model, "--prompts", prompts, "--decode-tokens", DECODE_TOKENS, "--out", out, "--quiet"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000)),
    )
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith(f"error: cannot write run folder '{out}': ")


# --- Folders that are not what they should be ---


def damage(folder, table, change):
    path = folder / f"{table}.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(read_json(path) | changes))


def cut_lists(name):
    return lambda table: table.assign(**{name: [None if a is None else a[:-1] for a in table[name]]})


DAMAGES = {
    "manifest cut": (lambda f: (f / "manifest.json").write_text('{"schema_version": 1, '), "damaged: manifest.json"),
    "manifest empty": (lambda f: (f / "manifest.json").write_text(""), "damaged: manifest.json"),
    "manifest binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "damaged: manifest.json"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "damaged: manifest.json"),
    "manifest a folder": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
        "damaged: manifest.json",
    ),
    "other version": (lambda f: edit_manifest(f, schema_version=99), r"another version \(schema 99, this is 1\)"),
    "status": (lambda f: edit_manifest(f, status="lost"), "field status"),
    "no identity": (lambda f: edit_manifest(f, identity=None), "field identity"),
    "layers not a number": (lambda f: edit_manifest(f, n_layers="five"), "field n_layers"),
    "wrong depth": (lambda f: edit_manifest(f, n_layers=N_LAYERS + 1), "field shape.layer_parameters"),
    "anchors not a number": (
        lambda f: edit_manifest(f, identity={"weight_hash": "0", "anchors": "1"}),
        "identity.anchors",
    ),
    "no shape": (lambda f: edit_manifest(f, shape={}), "field shape.n_heads"),
    "positions not a number": (lambda f: edit_manifest(f, max_positions="many"), "field max_positions"),
    "table cut": (lambda f: os.truncate(f / "layers.parquet", 1000), "layers.parquet cannot be read"),
    "table empty": (lambda f: os.truncate(f / "cutoffs.parquet", 0), "cutoffs.parquet cannot be read"),
    "table gone": (lambda f: (f / "heads.parquet").unlink(), "heads.parquet is missing"),
    "table not parquet": (lambda f: (f / "prompts.parquet").write_text("id,n\n"), "prompts.parquet cannot be read"),
    "column gone": (lambda f: damage(f, "cutoffs", lambda t: t.drop(columns="kl")), "cutoffs has no column kl"),
    "row gone": (lambda f: damage(f, "cutoffs", lambda t: t[:-1]), "cutoffs has 29 rows instead of 30"),
    "row twice": (
        lambda f: damage(f, "layers", lambda t: t.assign(layer=0)),
        "layers has rows of other prompts, or rows",
    ),
    "prompt twice": (lambda f: damage(f, "prompts", lambda t: t.assign(prompt_id="p0")), "prompts has rows of other"),
    "another prompt": (
        lambda f: damage(f, "lens", lambda t: t.assign(prompt_id="p9")),
        "lens has rows of other prompts",
    ),
    "cutoff 0": (
        lambda f: damage(f, "cutoffs", lambda t: t.assign(cutoff=t["cutoff"] - 1)),
        "cutoff of table cutoffs is",
    ),
    "words for numbers": (
        lambda f: damage(f, "layers", lambda t: t.assign(lens_kl="low")),
        "lens_kl of table layers is not",
    ),
    "attention cut": (
        lambda f: damage(f, "tokens", cut_lists("attention")),
        "attention of table tokens has not one number per",
    ),
    "selectivity cut": (
        lambda f: damage(f, "tokens", cut_lists("selectivity")),
        "selectivity of table tokens has not one number per",
    ),
    "a head that is not there": (
        lambda f: damage(f, "head_tokens", lambda t: t.assign(head=t["head"] + 1)),
        "head of table head_tokens is out of its range",
    ),
    "prompt gone": (lambda f: damage(f, "prompts", lambda t: t[:-1]), "prompts has 5 rows instead of 6"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_runs_are_refused(run_folder, name):
    change, said = DAMAGES[name]
    change(run_folder)
    with pytest.raises(UserError, match=said) as caught:
        load_run(run_folder)
    assert "\n" not in str(caught.value)
    assert str(run_folder) in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "prompts.parquet", "layers.parquet", "cutoffs.parquet"])
def test_a_single_bit_is_found(run_folder, name):
    """Also one that changes a number and nothing else."""
    data = bytearray((run_folder / name).read_bytes())
    data[len(data) // 3] ^= 1
    (run_folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged.*{name}|{name}.*damaged"):
        load_run(run_folder)


def test_runs_of_earlier_versions_are_read(run_folder, finished):
    """Their files have no seals."""
    edit_manifest(run_folder)
    for name in COLUMNS | DETAIL:
        pd.read_parquet(run_folder / f"{name}.parquet").to_parquet(run_folder / f"{name}.parquet", index=False)
        assert files.MARK.encode() not in (run_folder / f"{name}.parquet").read_bytes()
    assert_same_tables(load_run(run_folder), load_run(finished))


def test_runs_from_before_the_tables_of_heads_are_read_but_not_continued(run_folder, interrupted, tiny):
    (run_folder / "head_tokens.parquet").unlink()
    damage(run_folder, "tokens", lambda t: t.drop(columns="selectivity"))
    run = load_run(run_folder)
    assert list(run.head_tokens) == DETAIL["head_tokens"].split()
    assert run.head_tokens.empty
    assert "selectivity" not in run.tokens
    identity = read_json(interrupted / "manifest.json")["identity"]
    del identity["tables"]
    edit_manifest(interrupted, identity=identity)
    with pytest.raises(UserError, match="an earlier version began it"):
        tiny(interrupted, resume=True)


def test_damaged_part_is_refused(interrupted):
    os.truncate(interrupted / "parts" / "000001" / "layers.parquet", 100)
    with pytest.raises(UserError, match=r"000001' is damaged: layers.parquet cannot be read"):
        load_run(interrupted)


def test_folders_that_are_no_runs(tmp_path, run_folder):
    with pytest.raises(UserError, match="no run folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        load_run(run_folder / "manifest.json")
    with pytest.raises(UserError, match="is not a run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="no run folder"):
        load_run("x" * 5000)
    shutil.rmtree(run_folder / "parts", ignore_errors=True)
    edit_manifest(run_folder, status="running")
    with pytest.raises(UserError, match="no finished prompt yet"):
        load_run(run_folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anchors": 2}, "anchors is 1, not 2"),
        ({"decode_tokens": 5}, "decode_tokens is 4, not 5"),
        ({"n_prompts": 5}, "prompts is "),
        ({"seed": 1}, "weight_hash is "),
    ],
)
def test_only_the_same_diagnosis_is_continued(tiny, run_folder, tmp_path, changes, said):
    before = contents(run_folder)
    options = {"decode_tokens": DECODE_TOKENS}
    lm, n_prompts = tiny.lm, changes.pop("n_prompts", N_PROMPTS)
    if "seed" in changes:
        lm = load_model(save_tiny(tmp_path / "other", seed=changes.pop("seed")))
    prompts = load_prompts(write_prompts(tmp_path / "p.jsonl", n_prompts))
    with pytest.raises(UserError, match=f"another run .*{said}"):
        diagnose(lm, prompts, out=run_folder, resume=True, **options | changes)
    assert contents(run_folder) == before


def test_where_a_run_cannot_go(tmp_path, run_folder):
    file = tmp_path / "file"
    file.write_text("")
    full = tmp_path / "full"
    (full / "sub").mkdir(parents=True)
    for place, said in (
        (run_folder, "give `resume=True` to continue"),
        (file, "is not a run folder"),
        (full, "not a run folder"),
        (file / "run", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        before = contents(tmp_path)
        with pytest.raises(UserError, match=said):
            RunWriter.open(place, make_run([[0.0]]).manifest, resume=False)
        assert contents(tmp_path) == before


def test_arrays_have_an_axis_for_prompts_layers_and_heads():
    run = make_run(np.random.default_rng(0).random((4, 6)))
    order = run.prompts["prompt_id"].tolist()
    assert order != sorted(order)
    shuffled = {name: table.sample(frac=1, random_state=1) for name, table in run.tables.items() if name != "prompts"}
    run = results.Run(run.manifest, {"prompts": run.prompts} | shuffled)
    assert run.array("kl").shape == (4, 6)
    assert run.array("drift_prompt").shape == (4, 6)
    heads = run.array("mass_prompt")
    assert heads.shape == (4, 6, run.manifest["n_heads"])
    for i, prompt in enumerate(order):
        rows = run.cutoffs[run.cutoffs["prompt_id"] == prompt].sort_values("cutoff")
        np.testing.assert_array_equal(run.array("kl")[i], rows["kl"])
        layer = run.heads.query("prompt_id == @prompt and layer == 2").sort_values("head")
        np.testing.assert_array_equal(heads[i, 2], layer["mass_prompt"])
    with pytest.raises(UserError, match="no column 'mass'; there are: drift_decode"):
        run.array("mass")
