"""``bench`` and what is behind it: the rows, their summary, the counted limits, peak memory, and refusals."""

import ctypes
import io
import itertools
import json
import os
import random
import resource
import statistics
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from diagnostics import FastKVPolicy, FullPolicy, ProjectedPolicy, SpeedPolicy, UserError, load_model, load_run
from diagnostics.generation import benchmarks as BENCHMARK
from diagnostics.generation.benchmark_folder import Benchmark, load_benchmark
from diagnostics.generation.benchmarks import benchmark
from diagnostics.support.files import read_json
from diagnostics.support.memory import peak_memory, resident
from diagnostics.terminal.benchmark import show_benchmark
from tests.support.runs import contents, run_command, save_tiny, write_prompts
from tests.support.tiny import N_LAYERS, SLIDING_TYPES, SLIDING_WINDOW, VOCAB, tiny_model

FILES = {"benchmark.parquet", "benchmark.json"}
COLUMNS = [
    *("policy", "spec", "cutoff", "n_prompt", "batch_size", "ttft_s", "tpot_s", "kv_bytes", "kv_bytes_formula"),
    *("peak_bytes", "prefill_tflops", "decode_gb_s", "ttft_limit", "tpot_limit", "kv_limit", "repeat"),
]
MEASURES = ("ttft_s", "tpot_s", "kv_bytes", "peak_bytes")
FASTKV = FastKVPolicy(1, tsp_rate=0.5, retention_rate=0.4, window=4)
POLICIES = [FullPolicy(), SpeedPolicy(3), SpeedPolicy(2, anchors=4, boundary=3), ProjectedPolicy(3), FASTKV]
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 32
POSITION_BYTES = 2 * KV_HEADS * HEAD_DIM * 4  # keys and values, float32
MIB = 2**20

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def sliding():
    return tiny_model("gemma2")


@pytest.fixture
def calls(monkeypatch):
    """Give every generation made-up times, and record them: (spec, ids, options)."""
    rng, made, generate = random.Random(0), [], BENCHMARK.generate

    def timed(lm, ids, **options):
        made.append((options["policy"].spec, ids, options))
        done = generate(lm, ids, **options)
        return replace(done, ttft_s=rng.uniform(0.5, 2), tpot_s=rng.uniform(0.01, 0.05))

    monkeypatch.setattr(BENCHMARK, "generate", timed)
    return made


# --- Rows ---


def test_one_row_per_length_policy_and_repeat(lm, calls):
    result = benchmark(lm, POLICIES, lengths=[40, 24], repeats=3, new_tokens=4, batch_size=2)
    specs = [policy.spec for policy in POLICIES]
    rows = result.rows
    assert list(rows.columns) == COLUMNS
    # In the order in which they were measured: within a repeat the policies take turns.
    measured = [(n, repeat, spec) for n in (40, 24) for repeat in range(3) for spec in specs]
    assert list(zip(rows["n_prompt"], rows["repeat"], rows["spec"], strict=True)) == measured
    assert list(rows["policy"][:5]) == ["full", "speed", "speed", "projected", "fastkv"]
    assert list(rows["cutoff"][:5]) == [5, 3, 2, 3, 2]
    assert set(rows["batch_size"]) == {2}
    assert result.path is None


def test_each_policy_warms_up_at_each_length_and_reads_the_same_prompt(lm, calls):
    benchmark(lm, POLICIES, lengths=[40, 24], repeats=2, new_tokens=4, batch_size=2, chunk_size=16, seed=3)
    specs = [policy.spec for policy in POLICIES]
    assert [spec for spec, _, _ in calls] == specs * 6
    assert [options["max_new_tokens"] for _, _, options in calls] == ([2] * 5 + [4] * 10) * 2
    for length, part in ((40, calls[:15]), (24, calls[15:])):
        ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(3))
        assert all(torch.equal(given, ids) for _, given, _ in part)
    for spec, _, options in calls:
        assert options["eos_token_id"] == ()
        assert options["chunk_size"] == (None if spec.startswith("fastkv") else 16)


def test_full_depth_is_added_and_no_policy_measured_twice(lm):
    policies = [SpeedPolicy(3), SpeedPolicy(3, anchors=1), FullPolicy(), ProjectedPolicy(3)]
    rows = benchmark(lm, policies, lengths=[16], repeats=1, new_tokens=2).rows
    assert list(rows["spec"]) == ["full", "speed:3", "projected:3"]


def test_progress_counts_every_generation(lm):
    steps = []
    benchmark(lm, [SpeedPolicy(3)], lengths=[9, 8], repeats=2, new_tokens=2, progress=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps] == list(range(13))
    assert {total for _, total, _ in steps} == {12}
    assert [what for _, _, what in steps] == ["full at 9", "speed:3 at 9"] * 3 + ["full at 8", "speed:3 at 8"] * 3 + [
        ""
    ]


# --- What is counted, counted again ---


def work(policy, n):
    """Per layer: positions that run, pairs of query and key, positions projected, positions held, after the prompt."""
    every = n * (n + 1) // 2  # query i sees i + 1 keys
    layers = []
    for layer in range(N_LAYERS):
        match policy:
            case SpeedPolicy() if layer >= policy.cutoff:
                deep = policy.anchors + policy.boundary
                layers.append((deep, deep * (deep + 1) // 2, 0, deep))
            case ProjectedPolicy() if layer >= policy.cutoff:
                layers.append((1, n, n - 1, n))  # the last token looks at all projected keys
            case FastKVPolicy() if layer > policy.tsp_layer:
                above = n // 2
                layers.append((above, above * (above + 1) // 2, 0, int(n * 0.4)))
            case FastKVPolicy():
                layers.append((n, every, 0, int(n * 0.4)))
            case _:
                layers.append((n, every, 0, n))
    return layers


def counted(lm, policy, n, new, batch):
    """Operations of one row's prefill, bytes that a decode step reads, bytes held at the end."""
    weights = [sum(p.numel() for p in layer.parameters()) for layer in lm.model.model.layers]
    head = lm.model.lm_head.weight.numel()
    flops = 2 * head
    for (run, pairs, projections, _), size in zip(work(policy, n), weights, strict=True):
        # Of a pair: its product of query and key, and its weighted value.
        flops += 2 * size * run + 2 * 2 * HEADS * HEAD_DIM * pairs
        flops += 2 * 2 * WIDTH * KV_HEADS * HEAD_DIM * projections
    held = [layer[3] for layer in work(policy, n)]
    steps = [sum(position + step for position in held) for step in range(1, new)]
    reads = 4 * (sum(weights) + head) + batch * POSITION_BYTES * statistics.mean(steps)
    return flops, reads, batch * POSITION_BYTES * sum(position + new - 1 for position in held)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_bytes_held_and_limits_are_those_counted_by_hand(lm, calls, policy, batch):
    n, new = 80, 6
    rows = benchmark(lm, [policy], lengths=[n], repeats=1, new_tokens=new, batch_size=batch).rows
    row, full = rows.iloc[-1], rows.iloc[0]
    flops, reads, held = counted(lm, policy, n, new, batch)
    full_flops, full_reads, full_held = counted(lm, FullPolicy(), n, new, batch)
    assert (row["spec"], full["spec"]) == (policy.spec, "full")
    assert row["kv_bytes"] == row["kv_bytes_formula"] == held
    assert full["kv_bytes"] == full["kv_bytes_formula"] == full_held
    assert row["kv_limit"] == pytest.approx(held / full_held, rel=1e-12)
    assert row["tpot_limit"] == pytest.approx(reads / full_reads, rel=1e-12)
    # Attention of the one token that looks at projected keys is left out: n pairs per layer, of n²/2.
    rel = 1e-2 if isinstance(policy, ProjectedPolicy) else 1e-12
    assert row["ttft_limit"] == pytest.approx(flops / full_flops, rel=rel)
    assert row["prefill_tflops"] == pytest.approx(batch * flops / row["ttft_s"] / 1e12, rel=rel)
    assert row["decode_gb_s"] == pytest.approx(reads / row["tpot_s"] / 1e9, rel=1e-12)


@pytest.mark.parametrize("cutoff", range(1, N_LAYERS + 1))
def test_the_limit_of_speed_is_its_share_of_the_layers(lm, calls, cutoff):
    row = benchmark(lm, [SpeedPolicy(cutoff)], lengths=[500], repeats=1, new_tokens=2).rows.iloc[-1]
    share = cutoff / N_LAYERS
    assert row["kv_limit"] == pytest.approx(share, abs=0.01)
    assert row["ttft_limit"] == pytest.approx(share, abs=0.01)
    if cutoff == N_LAYERS:
        assert row["kv_limit"] == row["ttft_limit"] == row["tpot_limit"] == 1


def test_the_type_of_numbers_decides_the_bytes():
    half = tiny_model("llama", dtype=torch.bfloat16)
    result = benchmark(half, [SpeedPolicy(3)], lengths=[40], repeats=1, new_tokens=3)
    assert list(result.rows["kv_bytes"]) == [POSITION_BYTES // 2 * 5 * 42, POSITION_BYTES // 2 * (3 * 42 + 2 * 4)]
    assert list(result.rows["kv_bytes"]) == list(result.rows["kv_bytes_formula"])
    assert result.manifest["dtype"] == "bfloat16"


@pytest.mark.parametrize("new", [3, 20])
@pytest.mark.parametrize("policy", [FullPolicy(), ProjectedPolicy(3)], ids=str)
def test_sliding_layers_hold_a_window(sliding, policy, new):
    n = 40
    row = benchmark(sliding, [policy], lengths=[n], repeats=1, new_tokens=new).rows.iloc[-1]
    held = [SLIDING_WINDOW - 1 if kind == "sliding_attention" else n + new - 1 for kind in SLIDING_TYPES]
    assert row["kv_bytes"] == row["kv_bytes_formula"] == POSITION_BYTES * sum(held)


@pytest.mark.parametrize("new", [3, 20])
def test_sliding_layers_forget_the_anchors(sliding, new):
    """Above the cutoff too: the anchor of a prompt that is longer than the window is out of sight."""
    n = 40
    row = benchmark(sliding, [SpeedPolicy(3)], lengths=[n], repeats=1, new_tokens=new).rows.iloc[-1]
    window = SLIDING_WINDOW - 1
    held = [window, n + new - 1, window, min(window, 1 + new - 1), 2 + new - 1]
    assert row["kv_bytes"] == POSITION_BYTES * sum(held)
    assert row["kv_bytes_formula"] == row["kv_bytes"]


# --- The summary ---


def test_the_summary_is_what_pandas_makes_of_the_rows(lm, calls):
    result = benchmark(lm, POLICIES, lengths=[40, 24], repeats=4, new_tokens=4)
    rows = result.rows
    rows["peak_bytes"] = np.random.default_rng(0).uniform(1e6, 2e6, len(rows))  # a tiny model's may be 0
    summary = result.summary()
    keys = list(itertools.product((40, 24), [policy.spec for policy in POLICIES]))
    assert list(zip(summary["n_prompt"], summary["spec"], strict=True)) == keys
    for found, (length, spec) in zip(summary.to_dict("records"), keys, strict=True):
        own = rows[(rows["n_prompt"] == length) & (rows["spec"] == spec)].sort_values("repeat")
        full = rows[(rows["n_prompt"] == length) & (rows["spec"] == "full")].sort_values("repeat")
        for name in MEASURES:
            values = own[name].astype(float).tolist()
            ratios = [a / b for a, b in zip(values, full[name], strict=True)]
            assert found[name] == pytest.approx(statistics.median(values), rel=1e-12)
            assert found[f"{name}_mean"] == pytest.approx(statistics.fmean(values), rel=1e-12)
            assert found[f"{name}_std"] == pytest.approx(statistics.stdev(values), rel=1e-9)
            assert found[f"{name}_ratio"] == pytest.approx(statistics.median(ratios), rel=1e-12)
        for name in ("prefill_tflops", "decode_gb_s"):
            assert found[name] == pytest.approx(own[name].median(), rel=1e-12)
        for name in ("policy", "cutoff", "batch_size", "kv_bytes_formula", "ttft_limit", "tpot_limit", "kv_limit"):
            assert set(own[name]) == {found[name]}
        assert found["repeats"] == 4


def made_benchmark(times, *, n_prompt=2048, notes=(), model="made"):
    """A benchmark of made-up times, {spec: [(TTFT s, TPOT s) of each repeat]}, and plain figures."""
    rows = [
        {
            **{"policy": spec.split(":")[0], "spec": spec, "cutoff": 24, "n_prompt": n_prompt, "batch_size": 1},
            **{"ttft_s": ttft, "tpot_s": tpot, "kv_bytes": 300 * MIB, "kv_bytes_formula": 300 * MIB},
            **{"peak_bytes": 1.5 * 1024 * MIB, "prefill_tflops": 123.456, "decode_gb_s": 1234.5},
            **{"ttft_limit": 0.756, "tpot_limit": 0.987, "kv_limit": 0.75, "repeat": repeat},
        }
        for spec, pairs in times.items()
        for repeat, (ttft, tpot) in enumerate(pairs)
    ]
    manifest = {"model": model, "hardware": "a processor", "dtype": "float32", "new_tokens": 32, "notes": list(notes)}
    return Benchmark(manifest, pd.DataFrame(rows))


def shown(result, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show_benchmark(result, console)
    return console.file.getvalue()


def squeezed(text):
    """The lines, with one space wherever there are some."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_ratio_compares_neighbours_in_time():
    """The machine slows down from repeat to repeat; the policy always takes half."""
    full = [(1.0, 0.1), (3.0, 0.3), (9.0, 0.9)]
    half = [(ttft / 2, tpot / 4) for ttft, tpot in full]
    summary = made_benchmark({"full": full, "speed:24": half}).summary().set_index("spec")
    assert summary.loc["speed:24", "ttft_s_ratio"] == pytest.approx(0.5)
    assert summary.loc["speed:24", "tpot_s_ratio"] == pytest.approx(0.25)
    assert summary.loc["speed:24", "ttft_s_std"] == pytest.approx(statistics.stdev([0.5, 1.5, 4.5]))


# --- The tables on the screen ---


def test_the_tables_show_the_summary():
    times = {"full": [(10.0, 0.1), (12.0, 0.12)], "speed:24": [(5.0, 0.09), (9.0, 0.06)]}
    text = shown(made_benchmark(times, notes=["fastkv at 2048 tokens does not fit the device's memory"]), width=120)
    lines = squeezed(text)
    assert "made on a processor, float32, 32 new tokens" in text
    assert "2,048 prompt tokens, batch 1, 2 repeats (mean ± std)" in text
    assert "policy TTFT, s x limit TPOT, ms x limit" in lines
    assert "full 11.000 ± 1.414 1.000 0.756 110.0 ± 14.1 1.000 0.987" in lines
    assert "speed:24 7.000 ± 2.828 0.625 0.756 75.0 ± 21.2 0.700 0.987" in lines
    assert "policy KV x limit peak TFLOP/s GB/s" in lines
    assert "speed:24 300 MiB 1.000 0.750 1.5 GiB 123 1.23e+03" in lines
    assert "Note: fastkv at 2048 tokens does not fit the device's memory." in text


def test_one_repeat_has_no_spread_and_unknown_memory_a_dash():
    result = made_benchmark({"full": [(10.0, 0.1)], "speed:24": [(5.0, 0.05)]})
    result.rows["peak_bytes"] = np.nan
    lines = squeezed(shown(result, width=120))
    assert "speed:24 5.000 0.500 0.756 50.0 0.500 0.987" in lines
    assert "speed:24 300 MiB 1.000 0.750 - 123 1.23e+03" in lines


@pytest.mark.parametrize("spec", ["projected:24", "fastkv:11:tsp_rate=0.25:retention_rate=0.15"])
def test_no_figure_is_cut_off_where_the_screen_is_narrow(spec):
    """80 columns is also what a pipe or a file gets."""
    text = shown(made_benchmark({"full": [(12.0, 0.12), (14.0, 0.15)], spec: [(5.0, 0.05), (6.0, 0.06)]}))
    assert "…" not in text
    assert "13.000 ± 1.414" in text
    assert "55.0 ± 7.1" in text


def test_names_are_shown_as_they_are():
    text = shown(made_benchmark({"full": [(1.0, 0.1)]}, model="models/llama[v2]"))
    assert "models/llama[v2] on a processor" in text


# --- Out of memory ---


@pytest.fixture
def exhausted(monkeypatch):
    """Have some policies find no memory at prompts of 40 tokens and more."""

    def by(*names):
        generate = BENCHMARK.generate

        def limited(lm, ids, **options):
            if options["policy"].name in names and ids.shape[1] >= 40:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
            return generate(lm, ids, **options)

        monkeypatch.setattr(BENCHMARK, "generate", limited)

    return by


def test_a_policy_that_does_not_fit_memory_is_left_out_with_a_note(lm, exhausted):
    exhausted("speed")
    steps = []
    options = {"lengths": [24, 40], "repeats": 2, "new_tokens": 2, "progress": lambda *step: steps.append(step[0])}
    result = benchmark(lm, [SpeedPolicy(3), ProjectedPolicy(3)], **options)
    found = result.rows.groupby(["n_prompt", "spec"]).size().to_dict()
    assert found == {
        (24, "full"): 2,
        (24, "projected:3"): 2,
        (24, "speed:3"): 2,
        (40, "full"): 2,
        (40, "projected:3"): 2,
    }
    assert result.manifest["notes"] == ["speed:3 at 40 tokens does not fit the device's memory"]
    assert steps == list(range(19))
    assert len(result.summary()) == 5


def test_without_full_depth_there_are_no_ratios(lm, exhausted):
    exhausted("full")
    summary = benchmark(lm, [SpeedPolicy(3)], lengths=[40], repeats=2, new_tokens=2).summary()
    assert list(summary["spec"]) == ["speed:3"]
    assert summary["ttft_s"].notna().all()
    assert summary["ttft_s_ratio"].isna().all()


def test_nothing_fits_memory(lm, exhausted, tmp_path):
    exhausted("full", "speed")
    with pytest.raises(UserError, match=r"nothing could be measured: full at 40 .*; speed:3 at 40 tokens does not fit"):
        benchmark(lm, [SpeedPolicy(3)], lengths=[40], repeats=2, new_tokens=2, out=tmp_path / "out")
    assert contents(tmp_path) == {}


# --- Peak memory ---

linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="peak memory of a processor is told on Linux only",
)
CPU = torch.device("cpu")


@linux
@pytest.mark.parametrize("size", [32, 96])
def test_peak_of_what_is_gone_when_the_block_ends(size):
    before = torch.ones(256, MIB // 4)  # 256 MiB: a peak of before the block must not count
    del before
    held = torch.ones(64, MIB // 4)  # nor does what was there already
    with peak_memory(CPU) as peak:
        assert peak.bytes is None
        inside = torch.ones(size, MIB // 4)
        total = float(inside.sum() + held.sum())
        del inside
    assert total == (size + 64) * MIB // 4
    assert peak.bytes == pytest.approx(size * MIB, abs=4 * MIB)


@linux
def test_peak_of_next_to_nothing():
    with peak_memory(CPU) as peak:
        pass
    assert 0 <= peak.bytes < 4 * MIB


@linux
def test_resident_memory_is_in_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert resident("VmRSS") == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.05)
    assert resident("VmHWM") >= resident("VmRSS") > 10 * MIB


def test_peak_is_unknown_on_other_devices_and_systems(monkeypatch):
    with peak_memory(torch.device("mps")) as peak:
        pass
    assert peak.bytes is None
    monkeypatch.setattr(sys, "platform", "darwin")
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None


def test_peak_is_unknown_where_linux_does_not_forget_the_old_one(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None


def test_a_benchmark_without_peak_memory(lm, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    result = benchmark(lm, [SpeedPolicy(3)], lengths=[16], repeats=2, new_tokens=2, out=tmp_path / "out")
    assert result.rows["peak_bytes"].isna().all()
    summary = load_benchmark(tmp_path / "out").summary()
    assert summary["peak_bytes_ratio"].isna().all()
    assert summary["ttft_s_ratio"].notna().all()


@linux
def test_peak_of_a_longer_prompt_is_higher(lm):
    """Keys, values and hidden states of 64 rows of 500 tokens are 60 MiB and more."""
    rows = benchmark(lm, [], lengths=[16, 500], repeats=1, new_tokens=2, batch_size=64).rows
    low, high = rows["peak_bytes"]
    assert high > rows["kv_bytes"].iloc[1] > 10 * MIB
    assert low < high / 4


# --- The folder ---


def test_a_benchmark_can_be_read_again(lm, calls, tmp_path):
    options = {"lengths": [24, 16], "repeats": 2, "new_tokens": 3, "chunk_size": 8, "seed": 5}
    place = tmp_path / "a" / "b"
    result = benchmark(lm, [SpeedPolicy(3)], **options, out=place, arguments={"lengths": "24,16"})
    again = load_benchmark(str(place))
    assert {path.name for path in place.iterdir()} == FILES
    assert again.path == result.path == place
    assert again.manifest == result.manifest
    pd.testing.assert_frame_equal(again.rows, result.rows)
    pd.testing.assert_frame_equal(again.summary(), result.summary())
    manifest = again.manifest
    assert (manifest["model"], manifest["weight_hash"]) == ("tiny-llama", lm.weight_hash)
    assert (manifest["n_layers"], manifest["shape"]) == (N_LAYERS, lm.anatomy.shape)
    assert (manifest["policies"], manifest["new_tokens"], manifest["seed"]) == (["full", "speed:3"], 3, 5)
    assert (manifest["dtype"], manifest["device"], manifest["threads"]) == ("float32", "cpu", torch.get_num_threads())
    assert (manifest["chunk_size"], manifest["arguments"], manifest["notes"]) == (8, {"lengths": "24,16"}, [])
    assert manifest["versions"]["torch"] == torch.__version__


def test_lengths_that_are_done_are_kept(lm, monkeypatch, tmp_path):
    generate = BENCHMARK.generate

    def until_interrupted(lm, ids, **options):
        if ids.shape[1] == 16:
            raise KeyboardInterrupt
        return generate(lm, ids, **options)

    monkeypatch.setattr(BENCHMARK, "generate", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(lm, [SpeedPolicy(3)], lengths=[24, 16], repeats=2, new_tokens=2, out=tmp_path / "out")
    assert list(load_benchmark(tmp_path / "out").rows["n_prompt"]) == [24] * 4


@pytest.mark.parametrize("damage", ["no folder", "no table", "cut table", "no JSON", "half JSON"])
def test_folders_that_hold_no_benchmark(lm, tmp_path, damage):
    place = tmp_path / "out"
    if damage != "no folder":
        benchmark(lm, [], lengths=[16], repeats=1, new_tokens=2, out=place)
    match damage:
        case "no table":
            (place / "benchmark.parquet").unlink()
        case "cut table":
            os.truncate(place / "benchmark.parquet", 1000)
        case "no JSON":
            (place / "benchmark.json").unlink()
        case "half JSON":
            (place / "benchmark.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"benchmark folder '.*out'|out' is damaged|out' is not a benchmark") as caught:
        load_benchmark(place)
    assert "\n" not in str(caught.value)


# --- The command ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models and what may stand in the way; no test may change anything in it."""
    root = tmp_path_factory.mktemp("world")
    w = SimpleNamespace(root=root, tiny=save_tiny(root / "tiny"), sliding=save_tiny(root / "sliding", "gemma2"))
    w.prompts = write_prompts(root / "prompts.jsonl", n_prompts=2)
    w.done, w.empty = root / "done", root / "empty"
    benchmark(load_model(w.tiny), [], lengths=[16], repeats=1, new_tokens=2, out=w.done)
    w.empty.mkdir()
    return w


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run the command in this process, in an empty folder, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments, **more: run_command(monkeypatch, capfd, *arguments, **more)


SMALL = ("--lengths", "24,40", "--repeats", 2, "--new-tokens", 3)


def test_the_command_shows_and_keeps_what_it_measured(world, command, calls, tmp_path):
    given = "full,speed:3,projected:3,fastkv:1:tsp_rate=0.5:retention_rate=0.4:window=4"
    status, out, err = command("bench", world.tiny, *SMALL, "--policies", given, "--batch-size", 2, "--out", "out")
    assert (status, err) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    rows, manifest = pd.read_parquet("out/benchmark.parquet"), read_json(Path("out/benchmark.json"))
    assert list(rows.columns) == COLUMNS
    assert rows.groupby(["n_prompt", "spec"]).size().to_dict() == {
        (n, spec): 2 for n in (24, 40) for spec in given.split(",")
    }
    assert (rows["kv_bytes"] == rows["kv_bytes_formula"]).all()
    assert manifest["arguments"]["policies"] == given
    assert manifest["policies"] == given.split(",")
    # The tables, from the raw repeats.
    lines = [line.split() for line in out.splitlines()]
    full = rows[rows["spec"] == "full"].set_index(["n_prompt", "repeat"])
    for (n, spec), own in rows.groupby(["n_prompt", "spec"]):
        assert f"{n} prompt tokens, batch 2, 2 repeats (mean ± std)" in out
        base, cells = full.loc[n], [spec]
        for name, factor, digits in (("ttft_s", 1, 3), ("tpot_s", 1000, 1)):
            values = own.set_index("repeat")[name]
            cells += [f"{factor * values.mean():.{digits}f}", "±", f"{factor * values.std():.{digits}f}"]
            cells += [f"{(values / base[name]).median():.3f}", f"{own[f'{name[:4]}_limit'].iloc[0]:.3f}"]
        assert cells in lines
        size = own["kv_bytes"].iloc[0]
        ratio = f"{size / base['kv_bytes'].iloc[0]:.3f}"
        assert [spec, f"{size / 1024:.0f}", "KiB", ratio, ratio] in [line[:5] for line in lines]
    assert out.endswith("Benchmark folder: out\n")


def test_json_stands_alone_on_stdout(world, command, calls):
    arguments = ("bench", world.tiny, *SMALL, "--policies", "speed:3", "--json", "--out", "out")
    status, out, err = command(*arguments, signs=True)
    found = json.loads(out, parse_constant=pytest.fail)
    expected = load_benchmark("out").summary()
    assert status == 0
    assert "benchmarking" in err
    assert [(row["n_prompt"], row["spec"]) for row in found] == [(n, s) for n in (24, 40) for s in ("full", "speed:3")]
    for row, wanted in zip(found, expected.to_dict("records"), strict=True):
        assert set(row) == set(wanted)
        for name, value in wanted.items():
            missing = isinstance(value, float) and np.isnan(value)  # 0 / 0, of the peak of a tiny model
            assert row[name] == (None if missing else pytest.approx(value, abs=1e-9))


def test_json_of_one_repeat_has_no_spread(world, command):
    arguments = ("bench", world.tiny, "--lengths", "16", "--repeats", 1, "--new-tokens", 2, "--policies", "full")
    _, out, err = command(*arguments, "--json", "--out", "out")
    (row,) = json.loads(out, parse_constant=pytest.fail)
    assert err == ""
    assert (row["repeats"], row["ttft_s_std"], row["ttft_s_ratio"], row["kv_bytes_ratio"]) == (1, None, 1, 1)


@pytest.mark.parametrize(
    ("model", "policies"),
    [("tiny", ["full", "speed:4", "projected:4", "fastkv"]), ("sliding", ["full", "speed:4", "projected:4"])],
)
def test_policies_and_folder_that_nobody_named(world, command, tmp_path, model, policies):
    status, out, err = command("bench", getattr(world, model), "--lengths", 16, "--repeats", 1, "--new-tokens", 2)
    assert (status, err) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{model}-bench_20")
    assert f"Benchmark folder: runs/{folder.name}" in out
    assert load_benchmark(folder).manifest["policies"] == policies


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("16", [16]), ("24,16", [24, 16]), (" 24 , 16 ", [24, 16]), ("16,16", [16]), ("1k,2K", [1024, 2048])],
)
def test_lengths(text, lengths):
    assert import_module("diagnostics.cli.benchmark").read_lengths(text) == lengths


def test_a_benchmark_may_lie_in_a_run_folder(world, command, tmp_path):
    measuring = ("--prompts", world.prompts, "--decode-tokens", 2, "--out", "run")
    assert command("diagnose", world.tiny, *measuring)[0] == 0
    before = contents(tmp_path)
    assert command("bench", world.tiny, *SMALL, "--policies", "full", "--out", "run")[0] == 0
    after = contents(tmp_path)
    assert {name for name in after if before.get(name) != after[name]} == {f"run/{name}" for name in FILES}
    assert load_run("run").complete
    assert command("recommend", "run")[0] == 0
    assert len(load_benchmark("run").rows) == 4


def test_an_empty_folder_may_be_given(world, command, tmp_path):
    (tmp_path / "there").mkdir()
    assert command("bench", world.tiny, *SMALL, "--policies", "full", "--out", "there")[0] == 0
    assert {path.name for path in (tmp_path / "there").iterdir()} == FILES


def test_the_seed_and_chunks_reach_the_prompts(world, command, calls):
    status, _, _ = command("bench", world.tiny, *SMALL, "--policies", "full", "--seed", 4, "--chunk-size", 9)
    assert status == 0
    expected = torch.randint(VOCAB, (1, 24), generator=torch.Generator().manual_seed(4))
    _, ids, options = calls[0]
    assert torch.equal(ids, expected)
    assert options["chunk_size"] == 9


def test_the_embedded_model(smollm, command, monkeypatch):
    """By default it is the model; 30 layers of 3 KV heads of 64 numbers."""
    monkeypatch.setattr("diagnostics.models.loading.load_model", lambda name, **_: smollm)
    status, out, err = command("bench", "--lengths", 48, "--repeats", 1, "--new-tokens", 2, "--out", "out")
    rows = load_benchmark("out").rows.set_index("spec")
    assert (status, err) == (0, "")
    assert list(rows.index) == ["full", "speed:22", "projected:22", "fastkv"]
    assert rows["kv_bytes"].to_dict() == {
        "full": 2 * 3 * 64 * 4 * 30 * 49,
        "speed:22": 2 * 3 * 64 * 4 * (22 * 49 + 8 * 3),
        "projected:22": 2 * 3 * 64 * 4 * 30 * 49,
        # A tenth of 48, and half of the 9 that run on, are fewer than the window of 8: all are kept.
        "fastkv": 2 * 3 * 64 * 4 * (15 * 49 + 15 * 10),
    }
    assert (rows["kv_bytes"] == rows["kv_bytes_formula"]).all()
    assert rows.loc["speed:22", "ttft_limit"] == pytest.approx((22 + 8 * 2 / 48) / 30, abs=0.03)
    assert "speed:22" in out


# --- Bad input ---


def case(*arguments, said, model="tiny"):
    return model, arguments, said


BAD_INPUT = {
    # the lengths
    "no lengths": case("--lengths", "", said=["length '' is not a number of tokens, such as 2048 or 4K"]),
    "length zero": case("--lengths", "16,0", said=["length '0' is not a number"]),
    "no thousands": case("--lengths", "0K", said=["length '0K' is not a number"]),
    "negative length": case("--lengths", "-16", said=["length '-16' is not a number"]),
    "a word": case("--lengths", "16,long", said=["length 'long' is not a number"]),
    "half a token": case("--lengths", "1.5", said=["length '1.5' is not a number"]),
    "half a list": case("--lengths", "16,", said=["length '' is not a number"]),
    "K alone": case("--lengths", "K", said=["length 'K' is not a number"]),
    "two K": case("--lengths", "1KK", said=["length '1KK' is not a number"]),
    "foreign digits": case("--lengths", "１６", said=["is not a number of tokens"]),
    "5000 digits": case("--lengths", "9" * 5000, said=["length"]),
    "beyond the positions": case("--lengths", "16,512", said=["512 prompt tokens and 2 new ones exceed the 512"]),
    "beyond with the new": case("--lengths", "16", "--new-tokens", 498, said=["16 prompt tokens and 498 new ones"]),
    # the policies
    "no policies": case("--policies", "", said=["policy '' is not one of: fastkv, full, projected, speed"]),
    "unknown policy": case("--policies", "full,magic", said=["'magic' is not one of"]),
    "bad parameter": case("--policies", "speed:3:depth=1", said=["has no 'depth'; it has: cutoff, anchors, boundary"]),
    "parameter a word": case("--policies", "speed:many", said=["cutoff of policy 'speed' must be a number"]),
    "cutoff missing": case("--policies", "speed", said=["needs a cutoff: write speed:CUTOFF"]),
    "cutoff zero": case("--policies", "speed:0", said=["cutoff is 0: give 1 or more"]),
    "cutoff above the model": case("--policies", "speed:3,speed:6", said=["speed:6 does not fit", "5 layers"]),
    "TSP layer above the model": case("--policies", "fastkv:5", said=["fastkv:5 does not fit", "5 layers"]),
    "fastkv on sliding layers": case("--policies", "fastkv", model="sliding", said=["fastkv", "sliding-window"]),
    "anchors above a prompt": case(
        *("--policies", "speed:3:anchors=4", "--lengths", "3"), said=["3 tokens, fewer than the anchors"]
    ),
    "anchors above the second prompt": case(
        *("--policies", "speed:3:anchors=4", "--lengths", "16,3"), said=["3 tokens, fewer than the anchors"]
    ),
    # numbers
    "no repeats": case("--repeats", 0, said=["repeats is 0: give 1 or more"]),
    "half a repeat": case("--repeats", 1.5, said=["--repeats"]),
    "one new token": case("--new-tokens", 1, said=["new tokens is 1: give 2 or more"]),
    "no rows": case("--batch-size", 0, said=["batch size is 0: give 1 or more"]),
    "chunks of nothing": case("--chunk-size", 0, said=["chunk size is 0: give 1 or more"]),
    "negative seed": case("--seed", -1, said=["--seed"]),
    "seed of 65 bits": case("--seed", 2**64, said=["seed"]),
    # the folder
    "out is a file": case(
        "--out",
        "{root}/prompts.jsonl",
        said=["prompts.jsonl' exists and is not a benchmark folder: give"],
    ),
    "out is a full folder": case("--out", "{root}/tiny", said=["tiny' exists and is not a benchmark folder: give"]),
    "benchmark exists": case("--out", "{root}/done", said=["done' holds a benchmark already: give another --out"]),
    "out below a file": case("--out", "/dev/null/x", said=["cannot write benchmark folder '/dev/null/x'"]),
    "out in /proc": case("--out", "/proc/nowhere/x", said=["cannot write benchmark folder '/proc/nowhere/x'"]),
    "out is too long": case("--out", "x" * 300, said=["File name too long"]),
    # the model
    "missing model": case(model="/nowhere/model", said=["no model folder '/nowhere/model'"]),
    "hub model without network": case(model="some/model", said=["model 'some/model' cannot be loaded"]),
    "a file as model": case(model="prompts", said=["neither a model folder nor a .gguf file"]),
    "unknown dtype": case("--dtype", "int8", said=["dtype 'int8' is not one of"]),
    "unknown device": case("--device", "tpu9", said=["device 'tpu9' cannot be used here"]),
    "unknown option": case("--nonsense", said=["No such option", "--nonsense"]),
}
DEFAULTS = {"--lengths": "16", "--repeats": "1", "--new-tokens": "2", "--policies": "speed:3", "--out": "out"}


def asked(world, name):
    model, arguments, _ = BAD_INPUT[name]
    arguments = [str(argument).replace("{root}", str(world.root)) for argument in arguments]
    defaults = itertools.chain(*(pair for pair in DEFAULTS.items() if pair[0] not in arguments))
    return "bench", getattr(world, model, model), *defaults, *arguments


def test_the_arguments_around_bad_input_are_good(world, command):
    assert command("bench", world.tiny, *itertools.chain(*DEFAULTS.items()))[0] == 0


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(world, command, tmp_path, name):
    before = contents(world.root)
    status, out, err = command(*asked(world, name))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    for part in BAD_INPUT[name][2]:
        assert part in err
    assert contents(tmp_path) == {}
    assert contents(world.root) == before


@pytest.mark.parametrize(
    "name", ["length zero", "unknown policy", "cutoff zero", "benchmark exists", "out is a file", "out below a file"]
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(world, command, monkeypatch, name):
    """Nor measured: a folder that cannot be written would lose it all."""
    monkeypatch.setattr("diagnostics.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert command(*asked(world, name))[0] == 2


def test_no_lengths_at_all(lm):
    with pytest.raises(UserError, match="length"):
        benchmark(lm, [], lengths=[])


def test_a_full_disk_below_the_folder(world, command, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        status, out, err = command("bench", world.tiny, *itertools.chain(*DEFAULTS.items()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: cannot write benchmark folder 'out': ")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_help_lists_the_options(command):
    status, out, _ = command("bench", "--help")
    assert status == 0
    options = "--lengths --policies --repeats --new-tokens --batch-size --chunk-size --seed"
    for option in [*options.split(), "--device", "--dtype", "--out", "--json"]:
        assert option in out
