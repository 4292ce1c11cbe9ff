"""Time to first token, time per output token, KV bytes and peak memory of policies, beside full depth and the limit.

One row per policy, length and repeat. Within a repeat the policies take turns, so that a ratio to full depth compares
neighbours in time: on a shared machine absolute times drift, ratios do not. The limit is counted, not measured:
floating-point operations of the prefill for TTFT, bytes of weights and cache read for TPOT, bytes held for KV.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.cutoffs.savings import Held, decode_bytes, kv_bytes, prefill_flops
from diagnostics.generation.generation import generate
from diagnostics.models.loading import LoadedModel
from diagnostics.models.rope import rope_lengths
from diagnostics.policies.base import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.runs.run import BENCHMARK, MANIFEST, is_unused, require_writable
from diagnostics.support.errors import UserError
from diagnostics.support.files import read_json, read_table, remove_scratch, write_sealed, write_table
from diagnostics.support.locks import one_writer
from diagnostics.support.memory import peak_memory
from diagnostics.support.versions import hardware, versions

BENCHMARK_MANIFEST = "benchmark.json"
WARM_UP_TOKENS = 2
# Columns without which nothing can be said.
NUMBERS = (
    *("cutoff", "n_prompt", "batch_size", "repeat", "ttft_s", "tpot_s", "kv_bytes", "kv_bytes_formula", "peak_bytes"),
    *("prefill_tflops", "decode_gb_s", "ttft_limit", "tpot_limit", "kv_limit"),
)
MEASURED = ("ttft_s", "tpot_s", "kv_bytes", "peak_bytes")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Measurements of one model.

    ``rows``: one per policy, length and repeat, with columns policy, spec, cutoff (layers that all prompt tokens run
    through), n_prompt, batch_size, repeat, ttft_s, tpot_s (seconds), kv_bytes (measured from the tensors after the last
    token), kv_bytes_formula, peak_bytes (above the loaded model; NaN where it cannot be told), prefill_tflops and
    decode_gb_s (achieved), ttft_limit, tpot_limit, kv_limit (ratio to full depth, counted).
    """

    manifest: dict[str, Any]
    rows: pd.DataFrame = field(repr=False)
    path: Path | None = None

    def summary(self) -> pd.DataFrame:
        """One row per length and policy: mean, std, median of each measure, and ratios to full depth.

        A ratio is the median over repeats of the ratio within the repeat.
        """
        keys = ["n_prompt", "spec"]
        full = self.rows[self.rows["policy"] == FullPolicy.name].set_index(["n_prompt", "repeat"])
        rows = self.rows.join(full[list(MEASURED)].add_suffix("_full"), on=["n_prompt", "repeat"])
        for name in MEASURED:
            rows[f"{name}_ratio"] = rows[name] / rows[f"{name}_full"]
        grouped = rows.groupby(keys, sort=False)
        table = grouped[
            ["policy", "cutoff", "batch_size", "kv_bytes_formula", "ttft_limit", "tpot_limit", "kv_limit"]
        ].first()
        for name in MEASURED:
            table[f"{name}_mean"], table[f"{name}_std"] = grouped[name].mean(), grouped[name].std()
            table[name], table[f"{name}_ratio"] = grouped[name].median(), grouped[f"{name}_ratio"].median()
        table["prefill_tflops"], table["decode_gb_s"] = (
            grouped["prefill_tflops"].median(),
            grouped["decode_gb_s"].median(),
        )
        table["repeats"] = grouped.size()
        return table.reset_index()


@one_writer
def benchmark(
    lm: LoadedModel,
    policies: Sequence[Policy],
    *,
    lengths: Sequence[int],
    repeats: int = 5,
    new_tokens: int = 32,
    batch_size: int = 1,
    chunk_size: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
    arguments: dict[str, Any] | None = None,
) -> Benchmark:
    """Measure policies at several prompt lengths.

    Parameters
    ----------
    lm
        The model; its weights do not matter for times, so a random one serves.
    policies
        What to compare; full depth is added in front if it is missing.
    lengths
        Prompt lengths in tokens. Prompts are random tokens, the same for all policies.
    repeats
        Measurements of each, after one warm-up.
    new_tokens
        Tokens to generate, 2 or more; the first belongs to TTFT.
    batch_size, chunk_size
        Rows per prompt, and tokens per forward pass of the prefill.
    seed
        Of the tokens.
    out
        Folder for ``benchmark.parquet`` and ``benchmark.json``, which may be a run folder; written after each length.
    progress
        Called as ``progress(done, total, what)``.
    arguments
        What the user asked for, kept in the manifest as it is.

    Raises
    ------
    UserError
        If a number is out of range, a length exceeds the model's positions, or a policy does not fit the model.
    """
    for name, value, least in (
        ("repeats", repeats, 1),
        ("new tokens", new_tokens, 2),
        ("batch size", batch_size, 1),
        ("length", min(lengths, default=0), 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: give {least} or more")
    room = lm.anatomy.room(new_tokens)
    if room is not None and max(lengths) > room:
        raise UserError(
            f"{max(lengths)} prompt tokens and {new_tokens} new ones exceed the {lm.anatomy.max_positions} positions "
            f"of {lm.name!r}"
        )
    rope = rope_lengths(lm.anatomy.stack)
    for length in lengths:
        if rope.mixes(length, length + new_tokens - 1):
            raise UserError(
                f"{rope.reason}: {length} prompt tokens and {new_tokens} new ones are on both sides of that"
            )
    policies = list(dict.fromkeys([FullPolicy(), *policies]))
    for policy in policies:
        policy.check(lm.anatomy)
        if policy.anchors > min(lengths):
            raise UserError(f"{policy}: the prompt has {min(lengths)} tokens, fewer than the anchors")
    place = None if out is None else require_benchmark_place(out)
    identity = lm.identity()
    manifest = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": lm.name,
        "weight_hash": identity.weights,
        "configuration": identity.configuration,
        "identity": identity.entries(),
        "n_layers": lm.anatomy.n_layers,
        "shape": lm.anatomy.shape,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "hardware": hardware(lm.device),
        "threads": torch.get_num_threads(),
        "attention": lm.model.config._attn_implementation,
        "policies": [policy.spec for policy in policies],
        "new_tokens": new_tokens,
        "chunk_size": chunk_size,
        "seed": seed,
        "versions": versions(),
        "arguments": arguments or {},
        "notes": identity.notes,
    }
    rows: list[dict[str, Any]] = []
    total = len(lengths) * len(policies) * (repeats + 1)
    done = 0
    for length in lengths:
        ids = _token_ids(lm, batch_size, length, seed)
        broken: set[Policy] = set()
        for repeat in range(-1, repeats):  # -1 warms up
            for policy in policies:
                if progress:
                    progress(done, total, f"{policy.spec} at {length}")
                done += 1
                if policy in broken:
                    continue
                tokens = new_tokens if repeat >= 0 else WARM_UP_TOKENS
                try:
                    row = _measure(lm, policy, ids, tokens, chunk_size)
                except torch.OutOfMemoryError:
                    broken.add(policy)
                    manifest["notes"].append(f"{policy.spec} at {length} tokens does not fit the device's memory")
                    torch.cuda.empty_cache()
                    continue
                if repeat >= 0:
                    rows.append(row | {"repeat": repeat})
        if place is not None and rows:
            _write(place, manifest, pd.DataFrame(rows))
    if progress:
        progress(total, total, "")
    if not rows:
        raise UserError(f"nothing could be measured: {'; '.join(manifest['notes'])}")
    return Benchmark(manifest, pd.DataFrame(rows), place)


def load_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark from its folder; raise UserError where there is none."""
    folder = Path(path)
    name = BENCHMARK_MANIFEST
    try:
        manifest = read_json(folder / name)
        name = BENCHMARK
        rows = read_table(folder / name)
    except (OSError, ValueError) as error:
        raise UserError(f"no benchmark can be read in {str(path)!r}: {name}: {error}") from None
    if problem := _problem(manifest, rows):
        raise UserError(f"the benchmark in {str(path)!r} is damaged: {problem}")
    return Benchmark(manifest, rows, folder)


def _problem(manifest: Any, rows: pd.DataFrame) -> str | None:
    """Say what keeps a benchmark from being shown; None if nothing does."""
    names = ("model", "hardware")
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name), str) for name in names):
        return f"{BENCHMARK_MANIFEST} does not say which model on which hardware"
    if not isinstance(manifest.get("notes"), list):
        return f"{BENCHMARK_MANIFEST} has no notes"
    for name in ("policy", "spec", *NUMBERS):
        if name not in rows:
            return f"it has no column {name}"
        if name in NUMBERS and not pd.api.types.is_numeric_dtype(rows[name]):
            return f"column {name} is not numbers"
    return None if len(rows) else "it has no rows"


def require_benchmark_place(out: str | Path) -> Path:
    """Return the folder of a benchmark to be; raise UserError if something else, or another benchmark, is there."""
    place = Path(out)
    if (place / BENCHMARK).exists():
        raise UserError(f"{str(out)!r} holds a benchmark already: choose another --out")
    if place.exists() and not place.is_dir():
        raise UserError(f"{str(out)!r} is not a folder: choose another --out")
    if place.is_dir() and not is_unused(place) and not (place / MANIFEST).is_file():
        raise UserError(f"folder {str(out)!r} is not empty and not a run: choose another --out")
    try:
        require_writable(place)
    except OSError as error:
        raise UserError(f"cannot write the benchmark to {str(out)!r}: {error.strerror or error}") from None
    return place


def _measure(
    lm: LoadedModel, policy: Policy, ids: torch.Tensor, new_tokens: int, chunk_size: int | None
) -> dict[str, Any]:
    """One prompt and its continuation under one policy: a row."""
    batch, length = ids.shape
    shape, n_layers = lm.anatomy.shape, lm.anatomy.n_layers
    with peak_memory(lm.device) as peak:
        made = generate(
            lm,
            ids,
            policy=policy,
            max_new_tokens=new_tokens,
            chunk_size=chunk_size if policy.chunked else None,
            eos_token_id=(),
        )
        ttft, tpot, held_bytes = made.ttft_s, made.tpot_s, made.kv_bytes
    work, full = policy.workload(length, n_layers), FullPolicy().workload(length, n_layers)
    flops = prefill_flops(shape, work.run, work.projected)
    # On average a step reads what half of the new tokens have added.
    halfway, finished = new_tokens // 2, new_tokens - 1
    reads, full_reads = (
        decode_bytes(shape, Held.after(length, halfway, held, policy.anchors), batch) for held in (work.held, full.held)
    )
    end, full_end = (
        batch * kv_bytes(shape, Held.after(length, finished, held, policy.anchors)) for held in (work.held, full.held)
    )
    return {
        "policy": policy.name,
        "spec": policy.spec,
        "cutoff": policy.depth(n_layers),
        "n_prompt": length,
        "batch_size": batch,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "kv_bytes": held_bytes,
        "kv_bytes_formula": end,
        "peak_bytes": np.nan if peak.bytes is None else float(peak.bytes),
        "prefill_tflops": batch * flops / ttft / 1e12,
        "decode_gb_s": reads / tpot / 1e9,
        "ttft_limit": flops / prefill_flops(shape, full.run),
        "tpot_limit": reads / full_reads,
        "kv_limit": end / full_end,
    }


def _token_ids(lm: LoadedModel, batch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocab = lm.model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocab, (batch, length), generator=generator).to(lm.device)


def _write(place: Path, manifest: dict[str, Any], rows: pd.DataFrame) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        remove_scratch(place)
        write_table(place / BENCHMARK, rows)
        write_sealed(place / BENCHMARK_MANIFEST, manifest)
    except OSError as error:
        raise UserError(f"cannot write the benchmark to {str(place)!r}: {error.strerror or error}") from None
