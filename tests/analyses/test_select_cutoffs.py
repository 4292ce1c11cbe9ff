"""Cutoffs of many models on many prompt sets: one config, one table, whatever happens on the way."""

import gc
import html
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import select_cutoffs
from cutoff_selection import runs
from diagnostics import UserError, load_run, recommend
from diagnostics.diagnosis import diagnosis as DIAGNOSE
from diagnostics.support.files import read_json
from tests.support.examples import mostly_slow
from tests.support.runs import contents, save_tiny, write_prompts

TABLES = {"recommendations.csv", "recommendations.parquet", "recommendations.html"}
MEASURED = DIAGNOSE._diagnose_prompt
LOAD = runs.load_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOML = """
lengths = [1024, 300]
goal.max_kl = 0.2
defaults.decode_tokens = 4
models = ["a", {name = "b", label = "other b", anchors = 2}]
prompts = [{source = "one.jsonl", seed = 5}, {source = "two.jsonl", max_prompts = 2}]
"""
YAML = """
lengths: [1024, 300]
goal: {max_kl: 0.2}
defaults: {decode_tokens: 4}
models: [a, {name: b, label: other b, anchors: 2}]
prompts: [{source: one.jsonl, seed: 5}, {source: two.jsonl, max_prompts: 2}]
"""
N_PROMPTS = (5, 2)  # of which the second are too few for a bound


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_tiny(root / "a")
    save_tiny(root / "b", family="qwen2", seed=1)
    write_prompts(root / "one.jsonl", n_prompts=5)
    write_prompts(root / "two.jsonl", seed=1, n_tokens=30)
    return root


@pytest.fixture
def world(inputs, tmp_path, monkeypatch, capfd):
    """A folder with models, prompts and configs; and the command, which runs in this process and counts its work."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.toml").write_text(TOML)
    (tmp_path / "config.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    w = SimpleNamespace(root=tmp_path, loaded=[], measured=[], out=tmp_path / "out")

    def load(name, **options):
        w.loaded.append(os.path.basename(name))
        return LOAD(name, **options)

    def measure(lm, prompt, *arguments, **options):
        w.measured.append((os.path.basename(lm.name), prompt.prompt_id))
        return MEASURED(lm, prompt, *arguments, **options)

    monkeypatch.setattr(runs, "load_model", load)
    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", measure)

    def run(config="config.toml", *options, out="out"):
        w.loaded.clear()
        w.measured.clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            select_cutoffs.main([str(config), *(("--out", str(out)) if out else ()), *options])
        out, err = capfd.readouterr()
        w.progress, rest = split_progress(err)
        return end.value.code, out, rest

    w.run = run
    w.write = lambda text, name="config.toml": (tmp_path / name).write_text(text)
    w.table = lambda out="out": pd.read_parquet(tmp_path / out / "recommendations.parquet")
    return w


def split_progress(err):
    """The signs of life in what was printed on stderr, and the rest."""
    lines = err.splitlines(keepends=True)
    signs = [line for line in lines if line.startswith("pair ")]
    return "".join(signs), "".join(line for line in lines if line not in signs)


def lasting(table):
    """What must not depend on how often a run was interrupted."""
    return table.drop(columns="seconds")


def forbid(monkeypatch):
    monkeypatch.setattr(runs, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))


def test_the_table_is_what_recommend_says_of_each_run(world):
    status, out, err = world.run()
    assert (status, err) == (0, "")
    assert world.loaded == ["a", "b"]
    table = world.table()
    assert table[["model", "prompts"]].to_numpy().tolist() == [
        [model, prompts] for model in ("a", "other b") for prompts in ("one.jsonl", "two.jsonl")
    ]
    assert set(table["status"]) == {"ok"}
    assert table["n_prompts"].tolist() == [*N_PROMPTS] * 2
    assert table["run_folder"].nunique() == 4
    assert {path.name for path in world.out.iterdir()} == TABLES | {"runs"}
    for _, row in table.iterrows():
        run = load_run(world.out / row["run_folder"])
        anchors, seed = {"a": 1, "other b": 2}[row["model"]], {"one.jsonl": 5, "two.jsonl": 0}[row["prompts"]]
        assert run.complete
        assert (run.manifest["identity"]["anchors"], run.manifest["identity"]["decode_tokens"]) == (anchors, 4)
        found = recommend(run, max_kl=0.2, lengths=[300, 1024], seed=seed)
        at = found.evidence[found.cutoff - 1]
        assert (row["cutoff"], row["n_layers"], row["max_positions"]) == (found.cutoff, 5, 512)
        assert row["depth_fraction"] == found.cutoff / 5
        for name in ("kl", "top1_agreement", "nll_increase"):
            assert row[name] == at[name]
        assert row["kl_bound"] == at["kl_bound"] if run.manifest["n_prompts"] == 5 else pd.isna(row["kl_bound"])
        for name, region in (("selection", found.selection_region), ("stabilization", found.stabilization_region)):
            expected = region and f"{region.first}..{region.last}"
            assert row[f"{name}_region"] == expected if region else pd.isna(row[f"{name}_region"])
        for savings in found.data["predicted"]:
            for name in ("ttft", "tpot", "kv"):
                assert row[f"{name}_ratio_{savings['n_prompt']}"] == savings[f"{name}_ratio"]
        assert (row["device"], row["dtype"]) == ("cpu", "float32")
        assert row["seconds"] == run.manifest["timings"]["seconds_last_session"]
        assert ("too few prompts" in str(row["notes"])) == (run.manifest["n_prompts"] == 2)
        saved = read_json(run.path / "recommendation.json")
        assert {k: v for k, v in saved.items() if k != "predicted"} == {
            k: v for k, v in json.loads(found.to_json()).items() if k != "predicted"
        }
        assert f"{found.cutoff} of 5" in out
    assert table["cutoff"].nunique() > 1, "one cutoff for all would hide a mix-up of rows"
    assert not [name for name in table if name.startswith("ttft") and name not in ("ttft_ratio_1024", "ttft_ratio_300")]
    assert "…" not in out


def test_the_three_files_and_json_say_the_same(world):
    status, out, err = world.run("config.toml", "--json")
    assert (status, err) == (0, "")
    table = world.table()
    read = pd.read_csv(world.out / "recommendations.csv")
    assert list(read) == list(table)
    rows = json.loads(out)
    (body,) = re.findall(r"<tbody>(.*)</tbody>", (world.out / "recommendations.html").read_text(), re.DOTALL)
    shown = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in body.strip().splitlines()]
    assert len(read) == len(rows) == len(shown) == 4
    for number, (_, row) in enumerate(table.iterrows()):
        for place, name in enumerate(table):
            text, there = shown[number][place], rows[number][name]
            if pd.isna(row[name]):
                assert (there, text) == (None, "")
                assert pd.isna(read.loc[number, name])
            else:
                assert there == row[name] == read.loc[number, name]
                assert text == (f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]))


def test_yaml_and_toml_give_the_same(world, monkeypatch):
    assert world.run("config.toml")[0] == 0
    first = contents(world.out)
    forbid(monkeypatch)
    assert world.run("config.yaml")[0] == 0
    again = contents(world.out)
    page = "recommendations.html"
    assert again.pop(page).replace(b"config.yaml", b"config.toml") == first.pop(page)
    assert again == first


def test_defaults_may_be_left_out(world, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "diagnose", lambda lm, prompts, **o: asked.append((prompts, o)) or stop())

    def stop():
        raise UserError("enough")

    world.write("models = ['a']")
    assert world.run()[0] == 1
    ((prompts, options),) = asked
    assert (prompts.name, prompts.context_length, len(prompts)) == ("builtin", 1024, 28)
    expected = {"decode_tokens": 48, "anchors": 1, "lens_positions": 4, "backend": "hooks"}
    assert {name: options[name] for name in expected} == expected


def test_out_of_the_config_is_beside_it_and_paths_do_not_depend_on_where_one_stands(world, monkeypatch):
    (world.root / "elsewhere").mkdir()
    world.write('out = "results"\n' + TOML)
    assert world.run(out=None)[0] == 0
    before = contents(world.root / "results")
    forbid(monkeypatch)
    monkeypatch.chdir(world.root / "elsewhere")
    assert world.run("../config.toml", out=None)[0] == 0
    assert contents(world.root / "results") == before
    assert contents(world.root / "elsewhere") == {}


# --- Failures ---


def test_what_fails_does_not_stop_the_rest_and_is_retried(world):
    (world.root / "b").rename(world.root / "gone")
    world.write(TOML.replace('"a", ', '"./nowhere", "a", ').replace('name = "b"', 'name = "./b"'))
    status, out, err = world.run()
    assert (status, err) == (1, "")
    table = world.table()
    assert table["status"].tolist() == [*["failed"] * 2, *["ok"] * 2, *["failed"] * 2]
    assert table["cutoff"].notna().tolist() == [False, False, True, True, False, False]
    assert [error.partition(";")[0] for error in table["error"].fillna("").tolist()[::2]] == [
        "there is no model folder './nowhere'",
        "",
        "there is no model folder './b'",
    ]
    assert "there is no model folder './nowhere'" in out
    assert pd.read_csv(world.out / "recommendations.csv")["cutoff"].notna().sum() == 2
    (world.root / "gone").rename(world.root / "b")
    assert world.run()[0] == 1
    assert world.loaded == ["nowhere", "b"]
    assert world.table()["status"].tolist() == [*["failed"] * 2, *["ok"] * 4]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of device memory"),
        pytest.param(
            UserError("its attention is not understood"), "its attention is not understood", marks=pytest.mark.slow
        ),
        pytest.param(
            ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero", marks=pytest.mark.slow
        ),
    ],
)
def test_one_pair_that_fails_leaves_the_other_pairs_of_its_model(world, monkeypatch, error, said):
    counted = DIAGNOSE._diagnose_prompt

    def measure(lm, prompt, *arguments, **options):
        # In the middle of the first set of the first model.
        if (os.path.basename(lm.name), len(world.measured)) == ("a", 2):
            world.measured.append("failed")
            raise error
        return counted(lm, prompt, *arguments, **options)

    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", measure)
    status, out, err = world.run()
    assert (status, err) == (1, "")
    assert world.loaded == ["a", "b"]
    table = world.table()
    assert table["status"].tolist() == ["failed", "ok", "ok", "ok"]
    assert table["error"][0].startswith(said)
    assert "\n" not in table["error"][0]
    assert load_run(world.out / table["run_folder"][0]).prompts["prompt_id"].tolist() == ["p0", "p1"]
    assert said in out.replace("\n", " ")
    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", counted)
    assert world.run()[0] == 0
    assert world.measured == [("a", f"p{i}") for i in range(2, 5)], "what had finished was measured again"


def test_a_goal_that_one_model_cannot_meet_is_its_own_failure(world, monkeypatch):
    world.run()
    forbid(monkeypatch)
    world.write(TOML.replace("max_kl = 0.2", "kv_budget = 0.1"))
    status, _, _ = world.run()
    assert status == 1
    assert all("less than one of 5 layers" in error for error in world.table()["error"])


@pytest.mark.slow
def test_there_is_never_a_second_model_in_memory(world, monkeypatch):
    alive = []

    def load(name, **options):
        # No collection here: the script itself must see to it.
        assert not [model for model in alive if model() is not None], "the model before is still there"
        lm = LOAD(name, **options)
        lm.model.circle = SimpleNamespace(model=lm.model)  # as wrappers and hooks make them
        alive.append(weakref.ref(lm.model))
        return lm

    def fail(*_, **__):
        raise RuntimeError("its traceback holds the model")

    monkeypatch.setattr(runs, "load_model", load)
    gc.disable()
    try:
        assert world.run()[0] == 0
        assert len(alive) == 2
        alive.clear()
        monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", fail)
        assert world.run(out="again")[0] == 1
        assert len(alive) == 2
    finally:
        gc.enable()
    assert set(world.table("again")["error"]) == {"RuntimeError: its traceback holds the model"}


# --- Interrupted, and run again ---


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(1, marks=pytest.mark.slow),
        N_PROMPTS[0] + 1,
        pytest.param(sum(N_PROMPTS) + 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(world, monkeypatch, after):
    assert world.run(out="whole")[0] == 0
    counted, total = DIAGNOSE._diagnose_prompt, len(world.measured)

    def measure(*arguments, **options):
        if len(world.measured) == after:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", measure)
    status, out, err = world.run()
    assert (status, out, err.count("\n")) == (130, "", 1)
    assert "run the same command again" in err
    done = sum(after >= size for size in (5, 7, 12, 14))
    if done:
        pd.testing.assert_frame_equal(lasting(world.table()), lasting(world.table("whole"))[:done])
    else:
        assert not TABLES & {path.name for path in world.out.iterdir()}
    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", counted)
    assert world.run()[0] == 0
    assert len(world.measured) == total - after
    pd.testing.assert_frame_equal(lasting(world.table()), lasting(world.table("whole")))
    left, right = contents(world.out), contents(world.root / "whole")
    assert set(left) == set(right)
    for name in left:
        if name.startswith("runs/") and name.endswith(("cutoffs.parquet", "layers.parquet", "recommendation.json")):
            assert left[name] == right[name], name


def test_the_table_can_be_read_at_any_time(world, monkeypatch):
    counted, seen = DIAGNOSE._diagnose_prompt, []

    def measure(*arguments, **options):
        there = {path.name for path in world.out.iterdir()} if world.out.exists() else set()
        seen.append(len(world.table()) if there & TABLES else 0)
        assert there & TABLES in (set(), TABLES)
        return counted(*arguments, **options)

    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", measure)
    assert world.run()[0] == 0
    assert seen == [0] * 5 + [1] * 2 + [2] * 5 + [3] * 2


def test_a_second_call_loads_no_model_and_changes_nothing(world, monkeypatch):
    world.run()
    before = contents(world.root)
    forbid(monkeypatch)
    assert world.run()[0] == 0
    assert contents(world.root) == before


def test_another_goal_needs_no_model(world, monkeypatch):
    world.run()
    before = world.table()
    forbid(monkeypatch)
    world.write(TOML.replace("max_kl = 0.2", "max_kl = 900"))
    assert world.run()[0] == 0
    table = world.table()
    assert table["cutoff"].tolist() == [1] * 4 != before["cutoff"].tolist()
    assert table["run_folder"].tolist() == before["run_folder"].tolist()
    for folder in table["run_folder"]:
        saved = read_json(world.out / folder / "recommendation.json")
        assert (saved["cutoff"], saved["criterion"]["max_kl"]) == (1, 900)


CHANGES = {
    "decode tokens": ("decode_tokens = 4", "decode_tokens = 3", 14),
    "dtype of one model": ("anchors = 2", 'anchors = 2, dtype = "bfloat16"', 7),
    "fewer prompts": ("max_prompts = 2", "max_prompts = 1", 2),
    "context length": ("max_prompts = 2", "max_prompts = 2, context_length = 100", 4),
}


@pytest.mark.parametrize("name", mostly_slow(CHANGES, "dtype of one model"))
def test_a_changed_setting_is_measured_beside_the_old_runs(world, name):
    old, new, n_measured = CHANGES[name]
    world.run()
    first = world.table()
    kept = {path: data for path, data in contents(world.out).items() if path.startswith("runs")}
    assert TOML.count(old) == 1
    world.write(TOML.replace(old, new))
    assert world.run()[0] == 0
    assert len(world.measured) == n_measured
    again = contents(world.out)
    assert {path: again[path] for path in kept} == kept
    assert set(world.table()["run_folder"]) != set(first["run_folder"])
    world.write(TOML)
    assert world.run()[0] == 0
    assert world.loaded == []
    pd.testing.assert_frame_equal(world.table(), first)


def test_changed_prompts_under_the_same_name_are_measured(world):
    world.run()
    write_prompts(world.root / "one.jsonl", n_prompts=5, seed=7)
    assert world.run()[0] == 0
    assert len(world.measured) == 10


def test_changed_weights_under_the_same_name_are_measured(world):
    world.run()
    first = world.table()
    save_tiny(world.root / "a", seed=3)
    assert world.run()[0] == 0
    assert {model for model, _ in world.measured} == {"a"}
    assert len(world.measured) == 7
    table = world.table()
    assert (table["kl"][:2] != first["kl"][:2]).all()
    assert table["run_folder"].nunique() == 4
    assert not set(table["run_folder"][:2]) & set(first["run_folder"])


@pytest.mark.slow
def test_touched_files_are_loaded_once_and_not_measured(world):
    world.run()
    first = world.table()
    os.utime(world.root / "a" / "model.safetensors", ns=(1, 1))
    assert world.run()[0] == 0
    assert (world.loaded, world.measured) == (["a"], [])
    pd.testing.assert_frame_equal(world.table(), first)
    assert world.run()[0] == 0
    assert world.loaded == []


def test_a_damaged_run_is_a_failed_row(world, monkeypatch):
    world.run()
    folder = world.out / world.table()["run_folder"][1]
    os.truncate(folder / "layers.parquet", 3000)
    status, _, err = world.run()
    assert (status, err) == (1, "")
    assert world.table()["status"].tolist() == ["ok", "failed", "ok", "ok"]
    shutil.rmtree(folder)
    assert world.run()[0] == 0
    assert world.loaded == ["a"]


# --- What is shown ---


def test_names_are_escaped(world):
    name = "<script>alert('&')</script> [/bold] {x}"
    world.write(TOML.replace("other b", name))
    status, out, _ = world.run()
    assert status == 0
    assert "pair 4 of 4" in world.progress
    page = (world.out / "recommendations.html").read_text()
    assert page.count(html.escape(name)) == 2
    assert "<script" not in page
    assert world.table()["model"].tolist()[2:] == [name] * 2
    assert "[/bold]" in out


def test_the_page_needs_nothing_else_and_fits_light_and_dark(world):
    world.run()
    page = (world.out / "recommendations.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert '<meta name="color-scheme" content="light dark">' in page
    assert "KL at most 0.2" in page


# --- Bad input ---

BAD_CONFIGS = {
    "unknown key": ('modles = ["a"]', "unknown key 'modles'", "out, goal, lengths, defaults, models, prompts"),
    "no models": ("", "there are no models"),
    "empty models": ("models = []", "there are no models"),
    "models a text": ('models = "a"', "models must be a list, not 'a'"),
    "a model that is a number": ("models = [3]", "models, entry 1 must be a table", "not 3"),
    "a model without name": ('models = [{label = "x"}]', "models, entry 1: 'name' is missing"),
    "empty name": ('models = ["a", " "]', "models, entry 2: name must be text, not ' '"),
    "unknown key of a model": ('models = [{name = "a", dtpye = "auto"}]', "'dtpye'", "name, label, revision"),
    "key of prompts at a model": ('models = [{name = "a", max_prompts = 3}]', "unknown key 'max_prompts'"),
    "unknown dtype": ('models = [{name = "a", dtype = "int8"}]', "dtype must be one of auto, float32", "'int8'"),
    "switch a text": ('models = [{name = "a", trust_remote_code = "no"}]', "must be true or false, not 'no'"),
    "two models of a name": ('models = ["a", "a"]', "models, entry 2: there is another 'a'", "'label'"),
    "two labels": ('models = [{name = "a", label = "x"}, {name = "b", label = "x"}]', "there is another 'x'"),
    "two prompts of a name": ('models = ["a"]\nprompts = ["one.jsonl", "one.jsonl"]', "prompts, entry 2: there is"),
    "no prompts": ('models = ["a"]\nprompts = []', "there are no prompts"),
    "missing prompts": ('models = ["a"]\nprompts = ["no.jsonl"]', "prompts, entry 1: no such prompt file"),
    "bad prompts": ('models = ["a"]\nprompts = ["bad.jsonl"]', "bad.jsonl:1: not valid JSON"),
    "unknown key of prompts": (
        'models = ["a"]\nprompts = [{source = "builtin", dtype = "auto"}]',
        "unknown key 'dtype'",
    ),
    "text of a control character": ('models = ["a"]\nprompts = ["a\\u0000b"]', "source must be text"),
    "context length too small": ('models = ["a"]\ndefaults.context_length = 3', "whole number from 16 to", "not 3"),
    "context length too large": ('models = ["a"]\ndefaults.context_length = 9999999', "go up to 1048576 tokens"),
    "half a token": ('models = ["a"]\ndefaults.decode_tokens = 1.5', "defaults: decode_tokens must be", "not 1.5"),
    "a switch as a number": ('models = ["a"]\ndefaults.anchors = true', "anchors must be a whole number", "not True"),
    "unknown backend": ('models = ["a"]\ndefaults.backend = "magic"', "backend must be one of hooks"),
    "unknown default": ('models = ["a"]\ndefaults.revision = "x"', "defaults: unknown key 'revision'"),
    "defaults a list": ('models = ["a"]\ndefaults = []', "defaults must be a table"),
    "unknown goal": ('models = ["a"]\ngoal.kl = 1', "goal: unknown key 'kl'", "max_kl, max_nll_increase"),
    "goal a text": ('models = ["a"]\ngoal.max_kl = "low"', "goal: max_kl must be a number, not 'low'"),
    "goal nan": ('models = ["a"]\ngoal.max_kl = nan', "max_kl is nan"),
    "goal negative": ('models = ["a"]\ngoal.max_kl = -1', "max_kl is -1"),
    "budget and loss": ('models = ["a"]\ngoal = {max_kl = 1, kv_budget = 0.5}', "without a loss goal"),
    "certain": ('models = ["a"]\ngoal.confidence = 1', "confidence is 1"),
    "no lengths": ('models = ["a"]\nlengths = []', "lengths is empty"),
    "length zero": ('models = ["a"]\nlengths = [0]', "lengths: an entry must be a whole number from 1"),
    "out a number": ('models = ["a"]\nout = 3', "out must be text, not 3"),
    "number too long to be shown": ('models = ["a"]\nlengths = [0x' + "f" * 9000 + "]", "config.toml: "),
    "not TOML": ("models = [", "config.toml is not valid: "),
    "key twice": ('models = ["a"]\nmodels = ["b"]', "config.toml is not valid: "),
}
BAD_YAML = {
    "empty": ("", "the config must be a table of keys, not None"),
    "a list": ("[a]", "the config must be a table of keys, not ['a']"),
    "not YAML": ("models: [a\nb: ]:", "config.yaml is not valid: "),
    "key twice": ("models: [a]\nmodels: [b]", "config.yaml is not valid: key 'models' is there twice"),
    "key twice inside": ("models: [{name: a, name: b}]", "key 'name' is there twice"),
    "key a number": ("models: [a]\n3: x", "unknown key 3"),
    "a date": ("models: [2024-01-01]", "entry 1 must be a table", "date"),
    "no such date": ("models: [2024-99-99]", "config.yaml is not valid: "),
    "a Python object": ("models: [!!python/object/apply:os.getcwd []]", "config.yaml is not valid: "),
    "an empty number": ("models: [!!int '']", "config.yaml is not valid: "),
    "itself": ("models: &a [*a]", "config.yaml is not valid: "),
    "null": ("models: [a]\ngoal:", "goal must be a table of keys, not None"),
    "exponent": ("models: [a]\ngoal: {max_kl: 1e-1}", "max_kl must be a number, not '1e-1'"),
}
CASES = {f"{name} (TOML)": ("config.toml", *case) for name, case in BAD_CONFIGS.items()}
CASES |= {f"{name} (YAML)": ("config.yaml", *case) for name, case in BAD_YAML.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_config_is_one_line_and_changes_nothing(world, name):
    file, text, *said = CASES[name]
    (world.root / "bad.jsonl").write_text("{\n")
    world.write(text, file)
    refused(world, said, file)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.toml"], "cannot read config 'missing.toml': No such file"),
        (["one.jsonl"], "must be a .toml, .yaml or .yml file"),
        (["folder.toml"], "cannot read config 'folder.toml': Is a directory"),
        (["binary.yaml"], "cannot read config 'binary.yaml': "),
        (["config.toml", "--out", "one.jsonl"], "one.jsonl"),
        (["config.toml", "--out", "/proc/nowhere"], "/proc"),
        (["config.toml", "--out", "run"], "'run' is a run folder"),
        (["config.toml", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "required: config"),
    ],
)
def test_bad_arguments_are_one_line_and_change_nothing(world, arguments, said):
    (world.root / "folder.toml").mkdir()
    (world.root / "run").mkdir()
    (world.root / "run" / "manifest.json").write_text("{}")
    (world.root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(world, [said], *arguments)


def refused(world, said, *arguments):
    before = contents(world.root)
    out = None if "--out" in arguments or not arguments else "out"
    status, stdout, err = world.run(*arguments, out=out) if arguments else world.run("--json", out=None)
    assert (status, stdout, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    for part in said:
        assert part in err
    assert contents(world.root) == before
    assert world.loaded == []


@pytest.mark.slow
def test_in_a_process_of_its_own(world):
    world.write('models = ["a"]\nprompts = ["one.jsonl"]\ndefaults.decode_tokens = 2')

    def real(*arguments):
        command = [sys.executable, select_cutoffs.__file__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout, done.stderr

    assert real("missing.toml") == (2, "", "error: cannot read config 'missing.toml': No such file or directory\n")
    status, out, err = real("config.toml")
    assert (status, split_progress(err)[1]) == (0, "")
    assert f"{world.table('runs/config')['cutoff'][0]} of 5" in out
    assert "Tables: runs/config/recommendations.csv" in out


def test_the_example_is_a_good_config():
    plan = select_cutoffs.read_config(select_cutoffs.Path(select_cutoffs.__file__).with_suffix(".toml"))
    assert [prompts["set"].context_length for prompts in plan.prompts] == [512, 1024]
    assert plan.out.resolve().name == "select_cutoffs"
