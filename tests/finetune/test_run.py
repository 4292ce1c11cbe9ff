"""A whole fine-tuning: what it leaves behind, that it goes on after any stop, and the command."""

import json
import re
import resource
import shutil
from importlib import import_module
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from diagnostics import UserError, load_model, load_run
from diagnostics.finetune import (
    Settings,
    Source,
    compare_cutoffs,
    finetune,
    load_data,
    load_finetuning,
    load_held_out,
    sources,
    training,
)
from diagnostics.finetune.watch import Watch
from diagnostics.prompts.encoding import encode_for_diagnosis
from diagnostics.support.files import SUMS, read_json
from tests.support.examples import mostly_slow
from tests.support.runs import run_command, save_tiny, write_prompts
from tests.support.tiny import N_LAYERS, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "cutoff": 2,
    "rank": 2,
    "steps": 6,
    "accumulate": 2,
    "decode_tokens": 4,
    "checkpoint_every": 2,
    "sweep_every": 3,
    "learning_rate": 1e-2,
}
TABLES = ("steps.parquet", "sweeps.parquet", "examples.parquet")
FILES = {
    *TABLES,
    "finetuning.json",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    SUMS,
    "before",
    "after",
    "recommendation.json",
}
IDS = torch.tensor([random_ids(24)])


class Stop(Exception):
    """What a kill looks like from inside."""


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART", 2)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its data, and an undisturbed fine-tuning with its progress; no test may change anything in it."""
    root = tmp_path_factory.mktemp("world")
    w = SimpleNamespace(root=root, tiny=save_tiny(root / "tiny"), calls=[])
    # An odd number, so that training ends within a round of the data.
    w.data = write_prompts(root / "data.jsonl", n_prompts=7, n_tokens=20, seed=1)
    w.held_out = write_prompts(root / "held-out.jsonl", n_prompts=3, n_tokens=20)
    w.out = root / "out"
    w.lm = load_model(w.tiny)
    w.made = run(w, w.out, lm=w.lm, progress=lambda *call: w.calls.append(call))
    return w


def run(w, out, *, lm=None, source=None, progress=None, resume=False, goals=None, **changes):
    return finetune(
        lm or load_model(w.tiny),
        source or Source(load_data(w.data), "data.jsonl", answer_tokens=5),
        load_held_out(w.held_out),
        Settings(**SETTINGS | changes),
        out=out,
        resume=resume,
        progress=progress,
        goals=goals,
    )


def stop_at(place):
    """A progress callback that raises at one call."""
    calls = []

    def progress(*call):
        calls.append(call)
        if len(calls) > place:
            raise Stop

    return progress


def assert_same(found, wanted):
    """The same numbers and the same weights, bit for bit."""
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    for name in TABLES:
        pd.testing.assert_frame_equal(pd.read_parquet(found / name), pd.read_parquet(wanted / name), check_exact=True)
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (found, wanted))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    recommendations = [read_json(folder / "recommendation.json") for folder in (found, wanted)]
    assert recommendations[0] | {"model": ""} == recommendations[1] | {"model": ""}
    assert load_run(found / "after").cutoffs.equals(load_run(wanted / "after").cutoffs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- What it leaves behind ---


def test_the_block_of_the_model_card_runs_as_pasted(world, monkeypatch):
    monkeypatch.chdir(world.out)
    (block,) = re.findall(r"```python\n(.*?)```", (world.out / "README.md").read_text(), re.S)
    names = {}
    exec(block, names)
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_folder(world):
    assert {path.name for path in world.out.iterdir()} == FILES
    assert world.made.complete
    assert world.made.manifest["status"] == "complete"
    assert world.made.manifest["data"]["kept"] == 7
    assert load_finetuning(world.out).steps.equals(world.made.steps)
    after = load_run(world.out / "after")
    recommendation = read_json(world.out / "recommendation.json")
    assert recommendation == read_json(world.out / "after" / "recommendation.json")
    assert recommendation["weight_hash"] == after.manifest["identity"]["weight_hash"]
    assert recommendation["weight_hash"] != load_run(world.out / "before").manifest["identity"]["weight_hash"]


def test_the_curve_of_the_loss(world):
    steps = world.made.steps
    assert list(steps["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(steps["cutoff"]) == [2, 2, 2, 2, N_LAYERS, 2]
    assert (steps["loss"] > 0).all()
    shallow = steps["loss"][steps["cutoff"] == 2]
    assert shallow[3:].mean() < shallow[:3].mean()
    assert steps["learning_rate"].max() <= 1e-2


def test_sweeps_are_the_diagnoses(world):
    """Step 0 is the diagnosis before, the last step that after; distances are from the model before."""
    sweeps = world.made.sweeps
    assert sorted(sweeps["step"].unique()) == [0, 3, 6]
    assert sorted(sweeps["cutoff"].unique()) == list(range(1, N_LAYERS + 1))
    for step, name in ((0, "before"), (6, "after")):
        table = load_run(world.out / name).cutoffs.sort_values(["prompt_id", "cutoff"])
        found = sweeps[sweeps["step"] == step].sort_values(["prompt_id", "cutoff"])
        for column in ("kl", "top1_agreement", "nll", "nll_full"):
            assert found[column].to_numpy() == pytest.approx(table[column].to_numpy(), abs=1e-4), (name, column)
    compared = compare_cutoffs(world.made).set_index("cutoff")
    assert compared.loc[2, "kl_before"] == pytest.approx(sweeps.query("step == 0 and cutoff == 2")["kl"].mean())
    assert compared.loc[2, "kl_after"] == pytest.approx(sweeps.query("step == 6 and cutoff == 2")["kl"].mean())
    assert compared.loc[N_LAYERS, "kl_before"] == pytest.approx(0, abs=1e-6)
    assert compared.loc[N_LAYERS, "kl_after"] > 1e-4


def test_prompts_it_is_measured_on_are_not_trained_on(world, tmp_path, monkeypatch):
    """Rows of the data whose prompt is held out are dropped and counted, whatever file they stand in."""
    mixed = tmp_path / "mixed.jsonl"
    held_out, data = (path.read_text().splitlines(keepends=True) for path in (world.held_out, world.data))
    rows = [json.loads(line) for line in [held_out[0], *data, held_out[2]]]
    mixed.write_text("".join(json.dumps(row | {"id": f"row {i}"}) + "\n" for i, row in enumerate(rows)))
    trained = []

    def watched(lm, examples, *_):
        trained.extend(examples)
        raise Stop

    monkeypatch.setattr(training, "_train", watched)
    lm = load_model(world.tiny)
    with pytest.raises(Stop):
        run(world, tmp_path / "out", lm=lm, source=Source(load_data(mixed), "mixed.jsonl", answer_tokens=5))
    encoded = encode_for_diagnosis(load_held_out(world.held_out), lm.tokenizer, lm.anatomy.max_positions, 4)
    prompts = {prompt.token_ids for prompt in encoded}
    assert len(trained) == len(data)
    for row in trained:
        assert not any(tuple(row["input_ids"][: len(ids)]) == ids for ids in prompts)
    assert json.loads((tmp_path / "out" / "finetuning.json").read_text())["held_out_dropped"] == 2
    assert json.loads((world.out / "finetuning.json").read_text())["held_out_dropped"] == 0


def test_the_adapter_is_scaled_by_two(world):
    config = json.loads((world.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (SETTINGS["rank"], 2 * SETTINGS["rank"], False)


def test_the_model_is_left_with_merged_weights(world):
    assert not any(isinstance(module, BaseTunerLayer) for module in world.lm.model.modules())
    assert not world.lm.model.training
    assert not torch.allclose(logits(world.lm.model), logits(load_model(world.tiny).model), atol=1e-3)


def test_the_adapter_is_loaded_as_it_was_trained(world):
    loaded = load_model(world.out)
    assert torch.equal(logits(loaded.model), logits(world.lm.model))
    assert loaded.weight_hash == read_json(world.out / "recommendation.json")["weight_hash"]


def test_all_weights(world, tmp_path):
    lm = load_model(world.tiny)
    settings = {"method": "full", "rank": None, "steps": 2, "learning_rate": 1e-3}
    made = run(world, tmp_path / "out", lm=lm, **settings)
    loaded = load_model(tmp_path / "out")
    assert torch.equal(logits(loaded.model), logits(lm.model))
    assert loaded.weight_hash == read_json(tmp_path / "out" / "recommendation.json")["weight_hash"]
    assert made.curve(2)[2] != made.curve(0)[2]
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(lm.model.state_dict()[embedding], load_model(world.tiny).model.state_dict()[embedding])


def test_against_itself(world, tmp_path):
    made = run(world, tmp_path / "out", against="itself", steps=2)
    last = made.sweeps[made.sweeps["step"] == 2]
    assert last[last["cutoff"] == N_LAYERS]["kl"].max() == pytest.approx(0, abs=1e-6)
    table = load_run(tmp_path / "out" / "after").cutoffs
    assert table[table["cutoff"] == N_LAYERS]["kl"].max() == pytest.approx(0, abs=1e-6)
    assert not [note for note in load_run(tmp_path / "out" / "after").manifest["notes"] if "compared" in note]


# --- Stop and go on ---


def places(calls):
    """One call of each kind of work, and of training every step."""
    found = {}
    for place, (done, _, what) in enumerate(calls):
        kind = what.split(" ")[0]
        found.setdefault(f"{kind}-{done}" if kind in ("training", "answers") else kind, place)
    after = max(place for place, (_, _, what) in enumerate(calls) if what.startswith("after"))
    return found | {"after-end": after}


KINDS = [
    *("answers-0", "answers-1", "before", "teacher", "training-1", "training-2", "training-3", "training-5"),
    *("training-6", "after", "after-end"),
]


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "teacher", "training-3", "after"))
def test_stopped_and_continued_it_is_the_same(world, tmp_path, kind):
    with pytest.raises(Stop):
        run(world, tmp_path / "out", progress=stop_at(places(world.calls)[kind]))
    manifest = read_json(tmp_path / "out" / "finetuning.json")
    assert manifest["status"] == "running"
    steps = []
    run(world, tmp_path / "out", resume=True, progress=lambda done, _, what: what == "training" and steps.append(done))
    # What the last checkpoint has is not trained again.
    reached = {"training-3": 2, "training-5": 4, "training-6": 4, "after": 6, "after-end": 6}.get(kind, 0)
    assert steps == list(range(reached + 1, 7))
    assert_same(tmp_path / "out", world.out)


@pytest.mark.slow
def test_stopped_again_and_again(world, tmp_path):
    calls = places(world.calls)
    for place in (calls["answers-1"], calls["training-5"]):
        with pytest.raises(Stop):
            run(world, tmp_path / "out", resume=True, progress=stop_at(place))

    def stop_after(_, __, what):
        if what == "after p1":
            raise Stop

    with pytest.raises(Stop):
        run(world, tmp_path / "out", resume=True, progress=stop_after)
    run(world, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", world.out)


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_a_checkpoint_that_is_half_written_is_not_used(world, tmp_path, damage):
    with pytest.raises(Stop):
        run(world, tmp_path / "out", progress=stop_at(places(world.calls)["training-5"]))
    last = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    state = last / "trainer_state.json"
    (state.unlink if damage == "missing" else lambda: state.write_text(state.read_text()[:100]))()
    (last / "optimizer.pt").write_bytes(b"")
    steps = []
    run(world, tmp_path / "out", resume=True, progress=lambda done, _, what: what == "training" and steps.append(done))
    assert steps == [3, 4, 5, 6]
    assert_same(tmp_path / "out", world.out)


@pytest.mark.parametrize(
    "name", mostly_slow(["adapter_model.safetensors", "optimizer.pt", "scheduler.pt"], "optimizer.pt")
)
def test_a_damaged_checkpoint_is_refused_by_the_file(world, tmp_path, name):
    """Going on from it would end with other numbers."""
    with pytest.raises(Stop):
        run(world, tmp_path / "out", progress=stop_at(places(world.calls)["training-5"]))
    damaged = tmp_path / "out" / "checkpoints" / "checkpoint-4" / name
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=f"checkpoint-4/{name}' is damaged"):
        run(world, tmp_path / "out", resume=True)
    shutil.rmtree(damaged.parent)
    run(world, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", world.out)


def test_damaged_weights_are_refused_by_the_file(world, tmp_path):
    shutil.copytree(world.out, tmp_path / "out")
    damaged = tmp_path / "out" / "adapter_model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors' is damaged"):
        load_model(tmp_path / "out")
    (tmp_path / "out" / SUMS).unlink()
    load_model(tmp_path / "out")


@pytest.mark.parametrize("size", mostly_slow([1500, 4000, 9000, 20000], 4000))
def test_full_disk(world, tmp_path, size):
    """Whatever is being written: rows, a diagnosis, a table, a checkpoint, the adapter."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*continue with `resume=True`") as caught:
            run(world, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    run(world, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", world.out)


def test_a_stop_between_measurement_and_checkpoint(world, tmp_path, monkeypatch):
    """The measurement of step 6 is there, its checkpoint is not."""
    with monkeypatch.context() as patch:
        plain = Watch._sweep

        def sweep(watch, step):
            plain(watch, step)
            if step == 6:
                raise Stop

        patch.setattr(Watch, "_sweep", sweep)
        with pytest.raises(Stop):
            run(world, tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out" / "sweeps.parquet")["step"].max() == 6
    run(world, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", world.out)


def test_all_weights_stopped_and_continued(world, tmp_path):
    settings = {"method": "full", "rank": None, "steps": 4, "learning_rate": 1e-3}
    run(world, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        run(world, tmp_path / "out", progress=stop_at(places(world.calls)["training-3"]), **settings)
    run(world, tmp_path / "out", resume=True, **settings)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_a_finished_one_is_read_and_nothing_is_done(world, tmp_path):
    out = shutil.copytree(world.out, tmp_path / "out")
    lm = load_model(world.tiny)
    before = logits(lm.model)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    calls = []
    made = run(world, out, lm=lm, resume=True, progress=lambda *call: calls.append(call))
    assert made.complete
    assert made.steps.equals(world.made.steps)
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert torch.equal(logits(lm.model), before)


# --- What is refused ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cutoff": 3}, "cutoff"),
        ({"seed": 1}, "seed"),
        ({"rank": 4}, "rank"),
        ({"steps": 7}, "steps"),
        ({"decode_tokens": 5}, "decode_tokens"),
        ({"learning_rate": 1e-3}, "learning_rate"),
    ],
)
def test_another_one_is_not_continued(world, changes, said):
    with pytest.raises(UserError, match=rf"another fine-tuning \({said} is "):
        run(world, world.out, resume=True, **changes)


def test_other_data_or_model_is_not_continued(world, tmp_path):
    other = write_prompts(tmp_path / "other.jsonl", n_prompts=7, n_tokens=20, seed=7)
    with pytest.raises(UserError, match=r"\(data is "):
        run(world, world.out, resume=True, source=Source(load_data(other), "data.jsonl", answer_tokens=5))
    with pytest.raises(UserError, match=r"\(data is "):
        run(world, world.out, resume=True, source=Source(load_data(world.data), "data.jsonl", answer_tokens=6))
    with pytest.raises(UserError, match=r"\(weight_hash is "):
        run(world, world.out, resume=True, lm=load_model(save_tiny(tmp_path / "model", seed=1)))
    world = SimpleNamespace(**vars(world) | {"held_out": other})
    with pytest.raises(UserError, match=r"\(held-out prompts is "):
        run(world, world.out, resume=True)


def test_a_folder_in_the_way(world, tmp_path):
    with pytest.raises(UserError, match="give `resume=True` to continue it, or another"):
        run(world, world.out)
    (tmp_path / "note.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="exists and is not a fine-tuning folder"):
            run(world, tmp_path, resume=resume)
        with pytest.raises(UserError, match="exists and is not a fine-tuning folder"):
            run(world, tmp_path / "note.txt", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_loss_that_is_no_number(world, tmp_path, monkeypatch):
    lm = load_model(world.tiny)
    plain = training.SpeedTrainer.compute_loss

    def broken(trainer, *args, **kwargs):
        return plain(trainer, *args, **kwargs) * (float("inf") if trainer.state.global_step == 2 else 1)

    monkeypatch.setattr(training.SpeedTrainer, "compute_loss", broken)
    with pytest.raises(UserError, match=r"the loss is (inf|nan) at step 3: lower the learning rate"):
        run(world, tmp_path / "out", lm=lm)
    assert list(load_finetuning(tmp_path / "out").steps["step"]) == [1, 2]


def test_goals_that_make_no_sense_are_said_before_any_work(world, tmp_path):
    with pytest.raises(UserError, match="max_kl"):
        run(world, tmp_path / "out", goals={"max_kl": -1.0})
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_an_adapter_is_refused_before_any_work(world, tmp_path):
    with pytest.raises(UserError, match="adapter"):
        run(world, tmp_path / "out", lm=load_model(world.out))
    assert not list(tmp_path.iterdir())


def test_without_peft_it_is_said_before_any_work(world, tmp_path, monkeypatch):
    lm = import_module("diagnostics.finetune.lora")
    monkeypatch.setattr(lm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs peft"):
        run(world, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_that_are_all_too_long(world, tmp_path):
    source = Source(load_data(world.data), "data.jsonl", answer_tokens=5, max_length=12)
    with pytest.raises(UserError, match=r"nothing to train on is left of data.jsonl: allow longer rows"):
        run(world, tmp_path / "out", source=source)
    assert not list(tmp_path.iterdir())


# --- The command ---


@pytest.fixture
def command(world, monkeypatch, capfd):
    """Run ``finetune`` on the tiny model with few steps; the second of two options of a name counts."""

    def call(*arguments, without=()):
        options = {
            "--cutoff": 2,
            "--data": world.data,
            "--held-out": world.held_out,
            "--rank": 2,
            "--steps": 2,
            "--accumulate": 2,
            "--answer-tokens": 4,
            "--decode-tokens": 4,
        }
        given = [part for name, value in options.items() if name not in without for part in (name, value)]
        return run_command(monkeypatch, capfd, "finetune", world.tiny, *given, *arguments)

    return call


def test_the_command(world, tmp_path, command):
    status, out, err = command("--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "Goal of 0.1 nats per token: cutoff" in out
    assert str(tmp_path / "out") in out.replace("\n", "")
    assert "{'loss'" not in out
    status, again, err = command("--out", tmp_path / "out", "--resume")
    assert (status, again, err) == (0, out, "")
    status, out, err = command("--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert "holds a fine-tuning already: give --resume" in err


def test_all_weights_are_not_trained_in_half_precision(tmp_path, command):
    """A step of a few millionths is lost where a weight has 8 bits."""
    given = ("--method", "full", "--out", tmp_path / "out", "--dtype")
    status, _, err = command(*given, "bfloat16", without=["--rank"])
    assert status == 2
    assert "bfloat16" in err
    assert "--dtype float32" in err
    assert not list(tmp_path.iterdir())
    status, out, _ = command(*given, "float32", without=["--rank"])
    assert status == 0
    assert "Goal of" in out


def test_the_table_alone(world, tmp_path, command):
    status, out, err = command("--out", tmp_path / "out", "--json", "--supervised", "0", "--start-cutoff", "4")
    assert (status, err) == (0, "")
    rows = json.loads(out)
    assert [row["cutoff"] for row in rows] == list(range(1, N_LAYERS + 1))
    assert rows == json.loads(compare_cutoffs(load_finetuning(tmp_path / "out")).to_json(orient="records"))
    assert read_json(tmp_path / "out" / "finetuning.json")["arguments"]["start_cutoff"] == 4


def bad_file(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cutoff", 0], "cutoff"),
        (["--cutoff", 6], "5"),
        (["--cutoff", 5], "nothing to learn"),
        (["--cutoff", "half"], "integer"),
        (["--start-cutoff", 1], "cannot go from 1 to 2"),
        (["--supervised", 2, "--own-answers"], "give 0 to 1"),
        (["--supervised", 0.5, "--no-own-answers"], "has prompts, not answers"),
        (["--no-own-answers"], "has prompts, not answers"),
        (["--max-kl", -1], "max_kl"),
        (["--method", "full", "--rank", 2], "rank"),
        (["--method", "qlora"], "qlora"),
        (["--steps", 0], "steps is 0"),
        (["--examples", 0], "examples is 0"),
        (["--answer-tokens", 0], "at least one token"),
        (["--answer-tokens", 600], "600"),
        (["--decode-tokens", 600], "600"),
        (["--held-out-prompts", 0], "held-out prompts is 0"),
        (["--held-out-categories", "x"], "x"),
        (["--held-out-categories", "a,x"], "x"),
        (["--held-out-categories", "a,b"], "nothing"),
        (["--held-out", "builtin", "--held-out-categories", "x"], "x"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--held-out", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--learning-rate", 5], "learning rate"),
        (["--seed", -1], "seed"),
    ],
)
def test_bad_input(tmp_path, command, arguments, said):
    status, out, err = command(*arguments, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"x": 1}', "[1]"])
def test_bad_data(tmp_path, command, text):
    data = bad_file(tmp_path, "data.jsonl", text)
    status, out, err = command("--data", data, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert str(data) in err
    assert not (tmp_path / "out").exists()


def test_what_it_learns_is_not_what_it_is_measured_on(world, tmp_path, command, monkeypatch):
    monkeypatch.chdir(world.root)
    for name in (world.held_out, "held-out.jsonl", "./held-out.jsonl"):
        status, _, err = command("--data", name, "--out", tmp_path / "out")
        assert status == 2
        assert "would be measured on what it learns" in err
    assert not (tmp_path / "out").exists()


def test_a_cutoff_and_a_folder_are_needed(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(without=["--cutoff"])
    assert status == 2
    assert "--cutoff" in err
    status, _, err = command("--resume")
    assert status == 2
    assert "--resume needs --out" in err
    assert not list(tmp_path.iterdir())


def test_interrupted(world, tmp_path, command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.SpeedTrainer, "training_step", interrupt)
        status, out, err = command("--out", tmp_path / "out")
    assert (status, out) == (130, "")
    assert err.endswith(f"continue with --out {tmp_path / 'out'} --resume\n")
    assert err.count("\n") == 1
    status, out, err = command("--out", tmp_path / "out", "--resume")
    assert (status, err) == (0, "")
    assert load_finetuning(tmp_path / "out").complete
