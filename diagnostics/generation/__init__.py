"""Generation under a policy, and its time and memory."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.generation.benchmark_folder import Benchmark, load_benchmark
    from diagnostics.generation.benchmarks import benchmark
    from diagnostics.generation.generation import Generation, decode, generate, prefill
    from diagnostics.generation.inputs import encode_input

_HOMES = {
    "benchmark_folder": ("Benchmark", "load_benchmark"),
    "benchmarks": ("benchmark",),
    "generation": (
        "Generation",
        "decode",
        "generate",
        "prefill",
    ),
    "inputs": ("encode_input",),
}

__all__ = [
    "Benchmark",
    "Generation",
    "benchmark",
    "decode",
    "encode_input",
    "generate",
    "load_benchmark",
    "prefill",
]

find_on_demand(__name__, _HOMES)
