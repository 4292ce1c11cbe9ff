"""The command as a user meets it: what it prints, what it leaves behind, and what it says to bad input."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from diagnostics import cli, load_run
from diagnostics.diagnosis import diagnosis as DIAGNOSE
from diagnostics.support.files import read_json
from tests.support.runs import DECODE_TOKENS, contents, run_command, save_tiny, write_prompts
from tests.support.tiny import VOCAB

TABLES = ("prompts", "layers", "heads", "cutoffs", "tokens", "lens", "head_tokens")
FILES = {"manifest.json", *(f"{name}.parquet" for name in TABLES)}
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}


def save_weights(folder, kind, auto, **settings):
    auto.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models, prompts and runs, good and bad; no test may change anything in it."""
    root = tmp_path_factory.mktemp("world")
    tiny = save_tiny(root / "tiny")
    w = SimpleNamespace(root=root, tiny=tiny, prompts=write_prompts(root / "prompts.jsonl"))
    w.other = save_tiny(root / "other", seed=1)
    w.bert = save_weights(root / "bert", "bert", AutoModel, **SMALL, num_attention_heads=2, intermediate_size=16)
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    w.t5 = save_weights(root / "t5", "t5", AutoModelForSeq2SeqLM, **sizes)
    w.mamba = save_weights(root / "mamba", "mamba", AutoModelForCausalLM, **SMALL, state_size=4)

    w.no_config = root / "no-config"
    w.no_config.mkdir()
    w.pickled = shutil.copytree(tiny, root / "pickled")
    (w.pickled / "model.safetensors").rename(w.pickled / "pytorch_model.bin")
    w.truncated = shutil.copytree(tiny, root / "truncated")
    os.truncate(w.truncated / "model.safetensors", 20_000)
    w.deeper = shutil.copytree(tiny, root / "deeper")
    config = json.loads((w.deeper / "config.json").read_text())
    (w.deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    w.gguf = root / "garbage.gguf"
    w.gguf.write_bytes(b"no gguf " * 1000)

    def jsonl(name, *lines):
        (root / name).write_text("\n".join(lines) + "\n")
        return root / name

    w.corrupt = jsonl("corrupt.jsonl", '{"text": "w5 w6"}', '{"text": ')
    w.unknown_field = jsonl("unknown.jsonl", '{"txt": "w5"}')
    w.empty = jsonl("empty.jsonl", "", "")
    w.no_evidence = jsonl("evidence.jsonl", json.dumps({"text": "w5 w6", "evidence": ["w7"]}))
    w.long = jsonl("long.jsonl", json.dumps({"text": "w5 " * 600}))
    w.binary = root / "binary.jsonl"
    w.binary.write_bytes(b"\xff\xfe\x00")

    w.run = root / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["x", "diagnose", str(tiny), "--prompts", str(w.prompts), "--decode-tokens", "4", "--out", str(w.run)],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    w.bad_manifest = shutil.copytree(w.run, root / "bad-manifest")
    (w.bad_manifest / "manifest.json").write_text('{"schema_version": 1,')
    w.bad_table = shutil.copytree(w.run, root / "bad-table")
    os.truncate(w.bad_table / "layers.parquet", 3000)
    w.old = shutil.copytree(w.run, root / "old")
    manifest = read_json(w.old / "manifest.json")
    (w.old / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 0}))
    return w


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **more: run_command(monkeypatch, capfd, *arguments, **more)


# Every case: what is asked for, and what the line must say. New runs would go to "out" in an empty folder.
def case(arguments, *said):
    return arguments, said


def with_option(*option):
    return lambda w: (
        "recommend",
        w.tiny,
        "--prompts",
        w.prompts,
        "--decode-tokens",
        DECODE_TOKENS,
        "--out",
        "out",
        *option,
    )


def with_prompts(name, *option):
    return lambda w: ("recommend", w.tiny, "--prompts", getattr(w, name, name), "--out", "out", *option)


def with_model(name):
    return lambda w: ("recommend", getattr(w, name, name), "--prompts", w.prompts, "--out", "out")


def into(name, *option, model="tiny"):
    return lambda w: (
        *("diagnose", getattr(w, model), "--prompts", w.prompts, "--decode-tokens", DECODE_TOKENS),
        *("--out", getattr(w, name, name), *option),
    )


BAD_INPUT = {
    # the model
    "missing folder": case(with_model("/nowhere/model"), "no model folder '/nowhere/model'"),
    "missing gguf": case(with_model("nowhere.gguf"), "no GGUF file 'nowhere.gguf'"),
    "hub model without network": case(
        with_model("some/model"), "model 'some/model' cannot be loaded", "offline (HF_HUB_OFFLINE=1)"
    ),
    "no name at all": case(with_model("x" * 5000), "cannot be loaded"),
    "encoder": case(with_model("bert"), "(bert)", "it is an encoder"),
    "encoder-decoder": case(with_model("t5"), "(t5)", "encoder-decoder"),
    "state space": case(with_model("mamba"), "(mamba)", "not attention"),
    "no config.json": case(with_model("no_config"), "holds no model", "no config.json"),
    "pickled weights": case(with_model("pickled"), "pickled weights only", "safetensors"),
    "truncated safetensors": case(with_model("truncated"), "truncated' cannot be loaded", "header"),
    "weights missing": case(with_model("deeper"), "9 of its weights are missing"),
    "garbage gguf": case(with_model("gguf"), "garbage.gguf' cannot be loaded"),
    "a file as model": case(with_model("prompts"), "neither a model folder nor a .gguf file"),
    # the prompts
    "missing prompts": case(with_prompts("nowhere.jsonl"), "no such prompt file: nowhere.jsonl"),
    "name of two lines": case(with_prompts("no\nwhere.jsonl"), "no such prompt file: no where.jsonl"),
    "unknown prompt set": case(with_prompts("nonsense"), "no prompt set 'nonsense'"),
    "folder as prompts": case(with_prompts("tiny"), "cannot read prompts", "directory"),
    "corrupt prompts": case(with_prompts("corrupt"), "corrupt.jsonl:2: not valid JSON"),
    "binary prompts": case(with_prompts("binary"), "binary.jsonl is not a UTF-8 text file"),
    "unknown field": case(with_prompts("unknown_field"), "unknown.jsonl:1", '"txt"'),
    "empty prompts": case(with_prompts("empty"), "empty.jsonl has no prompts"),
    "evidence not there": case(with_prompts("no_evidence"), "evidence.jsonl:1", '"w7" does not occur'),
    "prompt too long": case(with_prompts("long"), "600 tokens", "465 fit"),
    "context length too small": case(with_option("--context-length", 3), "context_length is 3", "at least 16"),
    "prompts over the context length": case(with_option("--context-length", 20), "40 tokens", "20 fit"),
    "no prompts wanted": case(with_option("--max-prompts", 0), "max_prompts is 0"),
    "built-in prompts too long": case(
        lambda w: ("recommend", w.tiny, "--context-length", 16, "--max-prompts", 2, "--out", "out"), "but 16 fit"
    ),
    # the folder
    "out below a file": case(into("/dev/null/run"), "cannot write run folder '/dev/null/run'", "Not a directory"),
    "out in /proc": case(into("/proc/nowhere/run"), "cannot write run folder '/proc/nowhere/run'"),
    "out is a file": case(into("prompts"), "prompts.jsonl' exists and is not a run folder"),
    "out is a full folder": case(into("tiny"), "tiny' exists and is not a run folder"),
    "out is too long": case(into("x" * 300), "cannot write run folder", "File name too long"),
    "run exists": case(into("run"), "run' holds a run already", "give --resume"),
    "resume without out": case(
        lambda w: ("diagnose", w.tiny, "--prompts", w.prompts, "--resume"), "--resume needs --out"
    ),
    "resume another model": case(into("run", "--resume", model="other"), "another run", "weight_hash"),
    "resume other prompts": case(into("run", "--resume", "--max-prompts", 3), "another run (prompts is"),
    "resume other anchors": case(into("run", "--resume", "--anchors", 2), "anchors is 1, not 2"),
    "resume damaged manifest": case(into("bad_manifest", "--resume"), "bad-manifest' is damaged: manifest.json"),
    "resume damaged table": case(into("bad_table", "--resume"), "layers.parquet cannot be read"),
    "resume old run": case(into("old", "--resume"), "another version (schema 0"),
    "damaged manifest": case(lambda w: ("recommend", w.bad_manifest), "bad-manifest' is damaged: manifest.json"),
    "damaged table": case(lambda w: ("recommend", w.bad_table), "bad-table' is damaged: layers.parquet cannot be read"),
    "old run": case(lambda w: ("recommend", w.old), "another version (schema 0, this is 1)"),
    # the goals
    "negative max_kl": case(with_option("--max-kl", -1), "max_kl is -1.0"),
    "max_kl not a number": case(with_option("--max-kl", "nan"), "max_kl is nan"),
    "max_kl infinite": case(with_option("--max-kl", "inf"), "max_kl is inf"),
    "max_kl a word": case(with_option("--max-kl", "low"), "--max-kl"),
    "agreement over one": case(with_option("--min-agreement", 1.5), "min_agreement is 1.5", "from 0 to 1"),
    "budget and loss": case(with_option("--kv-budget", 0.5, "--max-kl", 0.1), "kv_budget", "without a loss goal"),
    "budget of a run too small": case(lambda w: ("recommend", w.run, "--kv-budget", 0.1), "less than one of 5 layers"),
    "certain confidence": case(with_option("--confidence", 1), "confidence is 1.0"),
    "unknown rule": case(with_option("--rules", "all,ash"), "there is no rule 'ash'"),
    "loss without the sweep": case(
        with_option("--without-sweep", "--min-agreement", 0.9),
        "--min-agreement needs the measured loss, which a run with --without-sweep does not have",
    ),
    "unknown region rule": case(with_option("--region-rule", "depth=2"), "region rule 'depth'", "max_drift"),
    "rule a word": case(with_option("--region-rule", "max_gap=wide"), "region rule max_gap must be a number"),
    "rule without value": case(with_option("--region-rule", "max_gap"), "region rule max_gap must be a number"),
    "rule not a number": case(with_option("--region-rule", "uptake_share=nan"), "region rule uptake_share is nan"),
    "rule out of range": case(with_option("--region-rule", "uptake_share=2"), "region rule uptake_share is 2"),
    # the rest
    "unknown backend": case(with_option("--backend", "magic"), "backend 'magic' is not one of: hooks"),
    "unknown dtype": case(with_option("--dtype", "int8"), "dtype 'int8' is not one of"),
    "unknown device": case(with_option("--device", "tpu9"), "device 'tpu9' cannot be used here"),
    "device without numbers": case(with_option("--device", "meta"), "device 'meta' cannot be used here"),
    "no decode tokens": case(with_option("--decode-tokens", 0), "decode tokens is 0"),
    "too many decode tokens": case(with_option("--decode-tokens", 5000), "5000 decode tokens", "512 positions"),
    "half a decode token": case(with_option("--decode-tokens", 1.5), "--decode-tokens"),
    "negative anchors": case(with_option("--anchors", -1), "anchors is -1"),
    "negative seed": case(with_option("--seed", -1), "--seed"),
    "unknown option": case(with_option("--nonsense"), "No such option", "--nonsense"),
    "unknown command": case(lambda w: ("frobnicate",), "No such command", "frobnicate"),
    "two models": case(with_option("another"), "unexpected extra argument"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(world, command, tmp_path, name):
    arguments, said = BAD_INPUT[name]
    before = contents(world.root)
    status, out, err = command(*arguments(world))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for part in said:
        assert part in err
    assert contents(tmp_path) == {}
    assert contents(world.root) == before


# --- In a process of its own ---


def real(*arguments, **options):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr


MODULE = (sys.executable, "-m", "diagnostics.cli")


@pytest.mark.parametrize("name", ["missing folder", "hub model without network", "corrupt prompts", "unknown option"])
def test_bad_input_to_a_real_process(world, tmp_path, name):
    arguments, said = BAD_INPUT[name]
    status, out, err = real(*MODULE, *arguments(world), cwd=tmp_path)
    assert (status, out) == (2, "")
    *signs, last = err.splitlines()
    assert last.startswith("error: ")
    assert all(part in last for part in said)
    assert not [line for line in signs if not line.startswith(("Measuring ", "loading "))]
    assert contents(tmp_path) == {}


def test_the_installed_command_on_a_terminal_without_unicode(world, tmp_path):
    script = Path(sys.executable).parent / "speed-diagnostics"
    assert script.is_file(), "the package is not installed"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [script, "recommend", shutil.copytree(world.run, tmp_path / "run"), "--quiet"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Recommended cutoff: " in done.stdout.replace(b"\n", b" ")


def test_full_disk_below_the_output(world, tmp_path):
    shutil.copytree(world.run, tmp_path / "run")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MODULE, "recommend", tmp_path / "run", "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_full_disk_below_the_run(world, command, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15000, hard))
    try:
        status, out, err = command(*into("out")(world))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "cannot write run folder 'out': " in err
    assert "--resume" in err
    status, _, _ = command(*into("out", "--resume")(world))
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


# --- Good input ---


def test_recommend(world, command, tmp_path):
    status, out, err = command(*with_option()(world))
    assert (status, err) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"recommendation.json"}
    assert contents(tmp_path)["out"] is None
    data = json.loads((tmp_path / "out" / "recommendation.json").read_text(), parse_constant=pytest.fail)
    assert f"Recommended cutoff: {data['cutoff']} of 5 layers" in out
    assert "Run folder: out" in out
    assert "…" not in out
    assert load_run(tmp_path / "out").manifest["arguments"]["decode_tokens"] == DECODE_TOKENS


def test_json_stands_alone_on_stdout(world, command, tmp_path):
    status, out, err = command(*with_option("--json", "--kv-budget", 0.6)(world), signs=True)
    assert status == 0
    assert json.loads(out) == read_json(tmp_path / "out" / "recommendation.json")
    assert json.loads(out)["cutoff"] == 3
    assert "measuring: 1 of 6, p0" in err


def test_without_the_sweep_the_cutoff_is_by_the_rule(world, command, tmp_path):
    status, out, err = command(*with_option("--without-sweep", "--rules", "none")(world))
    assert (status, err) == (0, "")
    data = json.loads((tmp_path / "out" / "recommendation.json").read_text(), parse_constant=pytest.fail)
    assert (data["measured"], data["cutoff"]) == (False, data["agreement"]["cutoff_by_selection"])
    assert "not measured" in " ".join(out.split())
    run = load_run(tmp_path / "out")
    assert not run.has_sweep
    assert run.cutoffs["kl"].isna().all()
    assert not any(column in run.layers for column in ("angular_to_last", "lazy_share"))
    for goal in (("--max-kl", 0.3), ("--kv-budget", 0.5), ()):
        status, again, err = command("recommend", "out", *goal)
        assert (status, err) == (0, "")
        assert "ot measured" in " ".join(again.split())
    status, _, err = command("recommend", "out", "--max-nll-increase", 0.1)
    assert status == 2
    assert err.startswith("error: --max-nll-increase needs the measured loss")


def test_rules_are_measured_along(world, command, tmp_path):
    options = ("--rules", "cka,llm-drop")
    assert command("diagnose", *with_option(*options)(world)[1:])[0] == 0
    run = load_run(tmp_path / "out")
    assert {"cka_to_final", "attention_cosine"} <= set(run.layers)
    assert "angular_to_last" not in run.layers
    assert run.has_sweep


@pytest.mark.parametrize(
    "option", [("--anchors", 0), ("--prompts", "x.jsonl"), ("--rules", "none"), ("--without-sweep",)]
)
def test_options_of_a_measurement_are_refused_with_a_run(world, command, option):
    status, out, err = command("recommend", world.run, *option)
    assert (status, out) == (2, "")
    assert err == f"error: {option[0]} has no effect on a run that exists: leave it out, or give the model\n"


def test_recommend_on_a_run_needs_no_model(world, command, tmp_path, monkeypatch):
    _, first, _ = command(*with_option("--json")(world))
    before = contents(tmp_path)
    monkeypatch.setattr("diagnostics.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    status, again, err = command("recommend", "out", "--json")
    assert (status, err) == (0, "")
    assert again == first
    assert contents(tmp_path) == before
    # Another goal changes the recommendation and nothing else.
    status, _, _ = command("recommend", "out", "--max-kl", 1000, "--region-rule", "min_uptake=0.5")
    after = contents(tmp_path)
    assert status == 0
    assert json.loads(after["out/recommendation.json"])["cutoff"] == 1
    assert json.loads(after["out/recommendation.json"])["region_rules"]["min_uptake"] == 0.5
    assert {name for name in after if after[name] != before[name]} == {"out/recommendation.json"}


@pytest.mark.parametrize("json_only", [False, True])
def test_recommend_on_a_run_that_cannot_be_written_says_what_it_found(world, command, tmp_path, monkeypatch, json_only):
    """Such as one of a colleague, or on a medium that is read-only."""
    from diagnostics.support import files

    shutil.copytree(world.run, tmp_path / "run")
    more = ("--max-kl", 0.3, *(("--json",) if json_only else ()))
    wanted = command("recommend", tmp_path / "run", *more)[1]
    (tmp_path / "run" / "recommendation.json").unlink()
    before = contents(tmp_path)

    def refuse(prefix, dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    status, out, err = command("recommend", tmp_path / "run", *more)
    assert (status, out) == (0, wanted)
    assert err.startswith("warning: cannot write ")
    assert "Read-only file system" in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_budget_below_one_layer_keeps_what_was_measured(world, command, tmp_path):
    status, out, err = command(*with_option("--kv-budget", 0.1)(world))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "what was measured is in 'out'" in err
    assert load_run(tmp_path / "out").complete


def test_diagnose(world, command, tmp_path):
    status, out, err = command(*into("text")(world))
    assert (status, err) == (0, "")
    assert {path.name for path in (tmp_path / "text").iterdir()} == FILES
    assert "attention on prompt" in out
    assert "Recommended" not in out
    assert "Run folder: text" in out
    status, out, err = command(*into("json", "--json")(world))
    assert (status, err) == (0, "")
    assert json.loads(out) == read_json(tmp_path / "json" / "manifest.json")


def test_runs_without_out_go_to_a_folder_named_after_the_model_and_the_time(world, command, tmp_path):
    arguments = ("diagnose", world.tiny, "--prompts", world.prompts, "--decode-tokens", 2, "--max-prompts", 1)
    status, out, _ = command(*arguments)
    assert status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tiny_20")
    assert f"Run folder: runs/{folder.name}" in out


def test_resume_of_a_finished_run(world, command, tmp_path):
    shutil.copytree(world.run, tmp_path / "run")
    before = contents(tmp_path)
    status, _, err = command(*into(str(tmp_path / "run"), "--resume")(world))
    assert (status, err) == (0, "")
    assert contents(tmp_path) == before


def test_a_folder_in_the_way_is_found_before_the_model_is_loaded(world, command, monkeypatch):
    monkeypatch.setattr("diagnostics.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    status, _, err = command(*into("run")(world))
    assert status == 2
    assert "give --resume" in err


def test_out_of_device_memory_is_one_line(world, command, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", exhausted)
    status, out, err = command(*into("out")(world))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "out of device memory" in err


def test_interrupt_while_the_model_loads(world, command, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("diagnostics.models.loading.load_model", interrupt)
    assert command(*into("out")(world)) == (130, "", "error: interrupted\n")
    assert contents(tmp_path) == {}


def test_a_model_refused_at_its_first_prompt_leaves_nothing(world, command, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise cli.UserError("its attention is not understood")

    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", refuse)
    status, _, err = command(*into("a/b/out")(world))
    assert (status, err) == (2, "error: its attention is not understood\n")
    assert contents(tmp_path) == {}


def test_a_mistake_of_the_program_is_not_hidden(world, command, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(DIAGNOSE, "_diagnose_prompt", broken)
    with pytest.raises(ZeroDivisionError):
        command(*into("out")(world))


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(command, arguments):
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert "recommend" in out
    assert "diagnose" in out


def test_help_of_a_command_lists_its_options(command):
    status, out, _ = command("recommend", "--help")
    assert status == 0
    options = (
        "--prompts --max-prompts --context-length --decode-tokens --max-kl --anchors --backend --device --dtype --out"
    )
    for option in [*options.split(), "--resume", "--json", "--max-nll-increase", "--min-agreement", "--kv-budget"]:
        assert option in out


def test_an_argument_that_is_not_utf8_is_refused_before_any_work(monkeypatch, capfd, tmp_path):
    name = str(tmp_path / "run-\udcff")
    status, out, err = run_command(monkeypatch, capfd, "recommend", "no/such/model", "--out", name)
    assert (status, out) == (2, "")
    assert err.startswith("error: argument ")
    assert "is not UTF-8" in err
    assert err.count("\n") == 1
