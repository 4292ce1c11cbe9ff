"""The results of a benchmark, in memory and in a folder, which may be a run folder.

- ``benchmark.json``: what was measured, on what, with which versions
- ``benchmark.parquet``: one row per policy, length and repeat
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required

import pandas as pd

from diagnostics.policies.full import FullPolicy
from diagnostics.runs.places import BENCHMARK, MANIFEST
from diagnostics.support.files import remove_scratch, write_sealed, write_table
from diagnostics.support.folders import FolderKind, Head
from diagnostics.support.overview import Overview, Readable

BENCHMARK_MANIFEST = "benchmark.json"
# Columns that a benchmark must have.
NUMBERS = (
    *("cutoff", "n_prompt", "batch_size", "repeat", "ttft_s", "tpot_s", "kv_bytes", "kv_bytes_formula", "peak_bytes"),
    *("prefill_tflops", "decode_gb_s", "ttft_limit", "tpot_limit", "kv_limit"),
)
MEASURED = ("ttft_s", "tpot_s", "kv_bytes", "peak_bytes")


class BenchmarkManifest(Head, total=False):
    """The content of ``benchmark.json``."""

    hardware: Required[str]  # type: ignore[misc]  # times mean nothing without it
    weight_hash: str
    n_layers: int
    shape: dict[str, Any]
    dtype: str
    device: str
    threads: int
    attention: str
    policies: list[str]
    new_tokens: int
    chunk_size: int | None
    seed: int
    notes: Required[list[str]]
    identity: dict[str, Any]


BENCHMARK_FOLDER: FolderKind[BenchmarkManifest] = FolderKind(
    "benchmark", BENCHMARK_MANIFEST, BenchmarkManifest, tables=(BENCHMARK,), beside=(MANIFEST,), resumable=False
)


@dataclass(frozen=True, eq=False, repr=False)
class Benchmark(Readable):
    """Measurements of one model.

    ``rows``: one per policy, length and repeat, with columns policy, spec, cutoff (layers that all prompt tokens run
    through), n_prompt, batch_size, repeat, ttft_s, tpot_s (seconds), kv_bytes (measured from the tensors after the last
    token), kv_bytes_formula, peak_bytes (above the loaded model; NaN where it cannot be measured), prefill_tflops and
    decode_gb_s (achieved), ttft_limit, tpot_limit, kv_limit (ratio to full depth, counted).
    """

    manifest: BenchmarkManifest
    rows: pd.DataFrame
    path: Path | None = None

    def overview(self) -> Overview:
        """What was measured on what; `summary` has the numbers."""
        lengths = ", ".join(f"{length:,}" for length in self.rows["n_prompt"].unique())
        facts = {
            "hardware": self.manifest["hardware"],
            "policies": ", ".join(self.rows["spec"].unique()),
            "prompt tokens": f"{lengths}; {self.rows['repeat'].nunique()} repeats",
            "folder": self.path,
        }
        return Overview(f"Benchmark of {self.manifest['model']}", facts=facts)

    def summary(self) -> pd.DataFrame:
        """One row per length and policy: mean, std, median of each measure, and ratios to full depth.

        A ratio is the median over repeats of the ratio within the repeat; ``ratio_low`` and ``ratio_high`` are the
        smallest and the largest of these.
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
            table[name], ratio = grouped[name].median(), grouped[f"{name}_ratio"]
            table[f"{name}_ratio"] = ratio.median()
            table[f"{name}_ratio_low"], table[f"{name}_ratio_high"] = ratio.min(), ratio.max()
        table["prefill_tflops"], table["decode_gb_s"] = (
            grouped["prefill_tflops"].median(),
            grouped["decode_gb_s"].median(),
        )
        table["repeats"] = grouped.size()
        return table.reset_index()


def load_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark from its folder; raise UserError where there is none, or it is damaged."""
    manifest = BENCHMARK_FOLDER.read(path)
    rows = BENCHMARK_FOLDER.read_table(path, BENCHMARK)
    if problem := _problem(rows):
        raise BENCHMARK_FOLDER.damaged(path, problem)
    return Benchmark(manifest, rows, Path(path))


def write_benchmark(path: Path, manifest: BenchmarkManifest, rows: pd.DataFrame) -> None:
    """Write what is measured so far; raise UserError where that is not possible."""
    with BENCHMARK_FOLDER.writing(path):
        path.mkdir(parents=True, exist_ok=True)
        remove_scratch(path)
        write_table(path / BENCHMARK, rows)
        write_sealed(path / BENCHMARK_MANIFEST, manifest)


def _problem(rows: pd.DataFrame) -> str | None:
    """Return what is wrong with the rows of a benchmark; None if nothing is."""
    for name in ("policy", "spec", *NUMBERS):
        if name not in rows:
            return f"it has no column {name}"
        if name in NUMBERS and not pd.api.types.is_numeric_dtype(rows[name]):
            return f"column {name} is not numbers"
    return None if len(rows) else "it has no rows"
