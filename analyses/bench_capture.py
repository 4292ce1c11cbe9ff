"""Cost of a diagnosis relative to a bare forward pass of the same tokens.

Interleaves the bare forward (stock attention, no cache, logits of the decode positions only) and, through each backend,
the probes, and the probes with the all-cutoff sweep; prints and writes medians of the ratios inside each repeat. Peak
memory is measured in a separate process per variant and length.

    python analyses/bench_capture.py [--lengths 512 1024 2048 4096 8192] [--repeats 3] [--out FILE.json]
    python analyses/bench_capture.py --backends hooks transformer-lens nnsight --lengths 512 1024 2048 4096
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from diagnostics.diagnosis.capture import BACKENDS, HOOKS, make_capture
from diagnostics.diagnosis.observers import Capture
from diagnostics.diagnosis.probes import chosen_probes
from diagnostics.diagnosis.probes.probe import PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.models.loading import LoadedModel, load_model
from diagnostics.policies.segments import Layout
from diagnostics.support.memory import peak_memory
from diagnostics.support.versions import hardware, versions

N_DECODE = 64
BARE = "bare"
OBSERVED = ("probes", "probes+sweep")


def token_ids(lm: LoadedModel, length: int) -> list[int]:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return lm.tokenizer(text[: length * 8])["input_ids"][:length]


def run(lm: LoadedModel, variant: str, ids: list[int], captures: dict[str, Capture]) -> None:
    if variant == BARE:
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=lm.device)
            lm.model(inputs, use_cache=False, logits_to_keep=N_DECODE)
        return
    backend, observed = variant.split()
    n_prompt = len(ids) - N_DECODE + 1
    context = PromptContext(Layout(1, n_prompt), lm.anatomy.n_layers, Readout(lm.anatomy), lm.name)
    observers = [probe(context) for probe in chosen_probes("all", sweep=observed == "probes+sweep").values()]
    # The last reference token is predicted, never an input: any id will do.
    reference = [*ids[n_prompt:], ids[0]]
    captures[backend].run(ids[:n_prompt], reference, observers, n_decode=N_DECODE, n_anchors=1)


def seconds(lm: LoadedModel, variant: str, ids: list[int], captures: dict[str, Capture]) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(lm, variant, ids, captures)
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib(variant: str, length: int) -> float:
    """Peak memory above the loaded model, from a process that does nothing else."""
    command = [sys.executable, __file__, "--measure-memory", variant, "--lengths", str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(variant: str, length: int) -> None:
    lm = load_model()
    ids = token_ids(lm, length)
    captures = {} if variant == BARE else {variant.split()[0]: make_capture(variant.split()[0], lm)}
    run(lm, BARE, ids[:128], captures)  # libraries allocate on first use, which does not belong to the variant
    with peak_memory(lm.device) as peak:
        run(lm, variant, ids, captures)
    print((peak.bytes or 0) / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--backends", nargs="+", default=[HOOKS], choices=BACKENDS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        return measure_memory(options.measure_memory, options.lengths[0])

    lm = load_model()
    captures = {backend: make_capture(backend, lm) for backend in options.backends}
    variants = [BARE, *(f"{backend} {observed}" for backend in captures for observed in OBSERVED)]
    rows = []
    for length in options.lengths:
        ids = token_ids(lm, length)
        for variant in variants:
            run(lm, variant, ids, captures)
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(options.repeats):
            for variant in variants:
                times[variant].append(seconds(lm, variant, ids, captures))
        for variant in variants:
            ratios = [t / bare for t, bare in zip(times[variant], times[BARE], strict=True)]
            row = {
                "tokens": length,
                "variant": variant,
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "seconds": round(statistics.median(times[variant]), 3),
            }
            if not options.no_memory:
                row["peak_gib"] = round(peak_gib(variant, length), 3)
            rows.append(row)
            print(row, flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": lm.name,
        "dtype": str(lm.dtype),
        "device": hardware(lm.device),
        "threads": torch.get_num_threads(),
        "n_decode": N_DECODE,
        "versions": versions(),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
