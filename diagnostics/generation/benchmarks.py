"""Time to first token, time per output token, KV bytes and peak memory of policies, against full depth and the limit.

One row per policy, length and repeat. Within a repeat the policies take turns, so that a ratio to full depth compares
neighbours in time: on a shared machine absolute times drift, ratios do not. The limit is counted, not measured:
floating-point operations of the prefill for TTFT, bytes of weights and cache read for TPOT, bytes held for KV.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from diagnostics.cutoffs.savings import Held, decode_bytes, kv_bytes, prefill_flops
from diagnostics.generation.benchmark_folder import BENCHMARK_FOLDER, Benchmark, BenchmarkManifest, write_benchmark
from diagnostics.generation.generation import generate
from diagnostics.models.loading import LoadedModel
from diagnostics.models.rope import rope_lengths
from diagnostics.policies import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.registry import as_policies
from diagnostics.self_test import looked_up_once
from diagnostics.support.defaults import NEW_TOKENS, REPEATS
from diagnostics.support.errors import UserError
from diagnostics.support.folders import manifest_head
from diagnostics.support.locks import one_writer
from diagnostics.support.memory import peak_memory
from diagnostics.support.progress import Progress, reporter

WARM_UP_TOKENS = 2


@one_writer
@looked_up_once()
def benchmark(
    lm: LoadedModel,
    policies: Sequence[Policy | str] | Policy | str,
    *,
    lengths: Sequence[int] | int,
    repeats: int = REPEATS,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 1,
    chunk_size: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | bool = True,
    arguments: dict[str, Any] | None = None,
) -> Benchmark:
    """Measure policies at several prompt lengths.

    Parameters
    ----------
    lm
        The model; its weights do not matter for times, so a random one serves.
    policies
        Policies to compare, as objects or as texts such as ``speed:24``; full depth is added in front if it is missing.
    lengths
        Prompt lengths in tokens, one or several. Prompts are random tokens, the same for all policies.
    repeats
        Measurements of each, after one warm-up.
    new_tokens
        Tokens to generate, 2 or more; the first belongs to TTFT.
    batch_size, chunk_size
        Rows per prompt, and tokens per forward pass of the prefill.
    seed
        Seed of the tokens.
    out
        Folder for ``benchmark.parquet`` and ``benchmark.json``, which may be a run folder; written after each length.
    progress
        A bar on stderr by default, False for none, or a function that is called as ``progress(done, total, what)``.
    arguments
        What the user asked for; the manifest keeps it unchanged.

    Raises
    ------
    UserError
        If a number is out of range, a length exceeds the model's positions, or a policy does not fit the model.
    """
    lm, policies, report = LoadedModel.of(lm), as_policies(policies), reporter(progress, "benchmarking")
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
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
    compared = list(dict.fromkeys([FullPolicy(), *policies]))
    for policy in compared:
        policy.check(lm.anatomy)
        if policy.anchors > min(lengths):
            raise UserError(f"{policy}: the prompt has {min(lengths)} tokens, fewer than the anchors")
    folder = None if out is None else Path(out)
    if folder is not None:
        BENCHMARK_FOLDER.require_free(folder)
    manifest = _manifest(lm, compared, new_tokens, chunk_size, seed, arguments)
    rows: list[dict[str, Any]] = []
    total = len(lengths) * len(compared) * (repeats + 1)
    done = 0
    for length in lengths:
        ids = _token_ids(lm, batch_size, length, seed)
        out_of_memory: set[Policy] = set()
        for repeat in range(-1, repeats):  # -1 warms up
            for policy in compared:
                report(done, total, f"{policy.spec} at {length}")
                done += 1
                if policy in out_of_memory:
                    continue
                tokens = new_tokens if repeat >= 0 else WARM_UP_TOKENS
                try:
                    row = _measure(lm, policy, ids, tokens, chunk_size)
                except torch.OutOfMemoryError:
                    out_of_memory.add(policy)
                    manifest["notes"].append(f"{policy.spec} at {length} tokens does not fit the device's memory")
                    torch.cuda.empty_cache()
                    continue
                if repeat >= 0:
                    rows.append(row | {"repeat": repeat})
        if folder is not None and rows:
            write_benchmark(folder, manifest, pd.DataFrame(rows))
    report(total, total, "")
    if not rows:
        raise UserError(f"nothing could be measured: {'; '.join(manifest['notes'])}")
    return Benchmark(manifest, pd.DataFrame(rows), folder)


def _measure(
    lm: LoadedModel, policy: Policy, ids: torch.Tensor, new_tokens: int, chunk_size: int | None
) -> dict[str, Any]:
    """Measure one prompt and its continuation under one policy, and return the row."""
    batch, length = ids.shape
    shape, n_layers = lm.anatomy.shape, lm.anatomy.n_layers
    with peak_memory(lm.device) as peak:
        generation = generate(
            lm,
            ids,
            policy=policy,
            max_new_tokens=new_tokens,
            chunk_size=chunk_size if policy.chunked else None,
            eos_token_id=(),
        )
        ttft, tpot, held_bytes = generation.ttft_s, generation.tpot_s, generation.kv_bytes
    work, full = policy.workload(length, n_layers), FullPolicy().workload(length, n_layers)
    flops = prefill_flops(shape, work.run, work.projected)
    # The average step reads the prompt and half of the new tokens.
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


def _manifest(
    lm: LoadedModel,
    policies: Sequence[Policy],
    new_tokens: int,
    chunk_size: int | None,
    seed: int,
    arguments: dict[str, Any] | None,
) -> BenchmarkManifest:
    head = manifest_head(lm, arguments)
    about = {
        "weight_hash": head["identity"]["weight_hash"],
        "shape": lm.anatomy.shape,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "threads": torch.get_num_threads(),
        "attention": lm.model.config._attn_implementation,
        "policies": [policy.spec for policy in policies],
        "new_tokens": new_tokens,
        "chunk_size": chunk_size,
        "seed": seed,
    }
    return cast(BenchmarkManifest, head | about)


def _token_ids(lm: LoadedModel, batch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocab = lm.model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocab, (batch, length), generator=generator).to(lm.device)
