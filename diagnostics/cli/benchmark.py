"""``bench``: what policies cost and save, compared with full depth and the limit."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from rich.console import Console

from diagnostics.cli.common import announce, claim, load, new_folder, plain, progress
from diagnostics.cli.options import (
    RESULTS,
    Device,
    Dtype,
    Model,
    Quiet,
    RemoteCode,
    Revision,
    SkipSelfTest,
    option,
    seed_option,
)
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support import defaults
from diagnostics.support.errors import UserError
from diagnostics.support.sizes import parse_length

BENCHMARK = "Benchmark"  # heading of its options
# Default depth: that of the paper, 24 of 32 layers.
DEPTH_SHARE = 0.75
MAX_LENGTH = 2**30  # tokens of a prompt


def bench(
    model: Model = EMBEDDED_MODEL,
    lengths: Annotated[str, option(BENCHMARK, help="prompt tokens, such as 1K,4K,32768")] = "512,2K",
    policies: Annotated[
        str | None,
        option(BENCHMARK, help="such as full,speed:24,fastkv  [full, and the others at 3/4 of the layers]"),
    ] = None,
    repeats: Annotated[int, option(BENCHMARK, help="measurements of each case, after a warm-up")] = defaults.REPEATS,
    new_tokens: Annotated[int, option(BENCHMARK, help="tokens to generate, 2 or more")] = defaults.NEW_TOKENS,
    batch_size: Annotated[int, option(BENCHMARK, help="prompts at a time")] = 1,
    chunk_size: Annotated[int | None, option(BENCHMARK, help="prompt tokens per forward pass; bounds memory")] = None,
    seed: Annotated[int, seed_option(BENCHMARK, "seed of the random prompts")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    skip_self_test: SkipSelfTest = False,
    out: Annotated[Path | None, option(RESULTS, help="new folder, or a run folder  [runs/MODEL-bench_TIME]")] = None,
    quiet: Quiet = False,
    json: Annotated[bool, option(RESULTS, "--json", help="print the summary alone, as JSON")] = False,
) -> None:
    """Measure TTFT, TPOT, KV bytes and peak memory of policies against full depth and the counted limit."""
    arguments = dict(locals())
    sizes = read_lengths(lengths)
    out = out or new_folder(model, "-bench")
    from diagnostics.generation.benchmark_folder import BENCHMARK_FOLDER
    from diagnostics.generation.benchmarks import benchmark
    from diagnostics.policies.registry import parse_policy, policies_at

    claim(out)
    BENCHMARK_FOLDER.require_free(out)
    chosen = None if policies is None else [parse_policy(text) for text in policies.split(",")]
    announce(f"Measuring the time and memory of policies with {model}; results go to {out}.", quiet=quiet)
    lm = load(arguments, chosen or ())
    if chosen is None:
        cutoff = max(1, round(DEPTH_SHARE * lm.anatomy.n_layers))
        chosen = []
        for policy in policies_at(cutoff):
            with suppress(UserError):  # leaves out a policy that does not serve this model
                policy.check(lm.anatomy)
                chosen.append(policy)
    with progress("benchmarking", quiet=quiet) as advance:
        result = benchmark(
            lm,
            chosen,
            lengths=sizes,
            repeats=repeats,
            new_tokens=new_tokens,
            batch_size=batch_size,
            chunk_size=chunk_size,
            seed=seed,
            out=out,
            progress=advance,
            arguments=plain(arguments),
        )
    if json:
        print(result.summary().to_json(orient="records", indent=1))
        return
    from diagnostics.terminal.benchmark import show_benchmark

    show_benchmark(result, Console(highlight=False))
    print(f"Benchmark folder: {result.path}")


def read_lengths(text: str) -> list[int]:
    """Read ``1024,4K``: numbers of tokens, K for 1024; raise UserError for anything else."""
    return list(dict.fromkeys(parse_length(part, most=MAX_LENGTH) for part in text.split(",")))
