"""TTFT, TPOT, KV bytes and peak memory on a Llama-3.1-8B-shaped random model, by the protocol of the SPEED paper.

Latency does not depend on the weights, so they are random: no download. Prompts of 1K to 128K tokens, cutoffs 32 (full
depth), 28, 24, 20, 16 of 32 layers, FastKV and Projected, five repeats in turn. On CUDA each policy's decode step is
also measured without launch overhead: captured once as a CUDA graph at its final length and replayed.

    python analyses/bench_policies.py --out analyses/results/bench_policies_NAME      # on a GPU: bfloat16, 8B
    python analyses/bench_policies.py --small --lengths 1024 2048 --out /tmp/small    # the same code, a toy, anywhere
"""

import argparse
import math
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from diagnostics import LoadedModel, Policy, UserError, decode, generate, parse_policy
from diagnostics.generation.benchmarks import benchmark
from diagnostics.support.files import write_table

LENGTHS = [1024, 4096, 8192, 32768, 65536, 131072]
POLICIES = ["full", "speed:28", "speed:24", "speed:20", "speed:16", "fastkv", "projected:24"]
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 132096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMALL = LLAMA_8B | {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 8, "vocab_size": 1000}
GRAPH_REPLAYS = 20


def random_model(small: bool) -> LoadedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(**(SMALL if small else LLAMA_8B))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return LoadedModel.wrap(model, None, "random, Llama-3.1-8B-shaped" + (" in small" if small else ""))


def graph_tpot(lm: LoadedModel, policy: Policy, length: int, chunk_size: int | None) -> float:
    """Return the seconds of one decode step at this prompt length, replayed as a CUDA graph: no Python, no launches."""
    ids = torch.randint(lm.model.config.vocab_size, (1, length), device=lm.device)
    generation = generate(
        lm,
        ids,
        policy=policy,
        max_new_tokens=8,
        eos_token_id=(),
        chunk_size=chunk_size if policy.chunked else None,
    )
    token, graph = generation.token_ids[:, -1:], torch.cuda.CUDAGraph()
    # Every replay writes into the slot after the last one, so it reads the same bytes each time.
    with torch.cuda.graph(graph):
        decode(lm, token, generation.cache)
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(GRAPH_REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / GRAPH_REPLAYS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--small", action="store_true", help="a toy of the same depth, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lm = random_model(options.small)
    policies = [parse_policy(text) for text in options.policies]
    result = benchmark(
        lm,
        policies,
        lengths=options.lengths,
        repeats=options.repeats,
        new_tokens=options.new_tokens,
        chunk_size=options.chunk_size,
        out=options.out,
        arguments={k: str(v) for k, v in vars(options).items()},
        progress=lambda done, total, what: print(f"\r{done}/{total} {what:<40}", end="", flush=True),
    )
    print()
    print(result.summary().to_string(index=False))
    if lm.device.type != "cuda":
        print("No CUDA here: decode steps as CUDA graphs are left out.")
        return
    rows = []
    for length in options.lengths:
        for policy in policies:
            try:
                seconds = graph_tpot(lm, policy, length, options.chunk_size)
            except (torch.OutOfMemoryError, UserError) as error:
                print(f"{policy} at {length}: {error}")
                seconds = math.nan
            rows.append({"n_prompt": length, "spec": policy.spec, "tpot_graph_s": seconds})
            torch.cuda.empty_cache()
    table = pd.DataFrame(rows)
    write_table(options.out / "decode_graph.parquet", table)
    table.to_csv(options.out / "decode_graph.csv", index=False)
    result.summary().to_csv(options.out / "summary.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
