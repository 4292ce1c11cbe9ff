"""The page of a benchmark: measured times and memory of policies beside full depth, and their limits."""

from __future__ import annotations

import pandas as pd

from diagnostics import figures
from diagnostics.figures.quality import policy_label
from diagnostics.generation.benchmark_folder import Benchmark
from diagnostics.policies.full import FullPolicy
from diagnostics.report.document import Card, Facts, Page, Part, Picture, Section, Table
from diagnostics.report.facts import measured_facts, named
from diagnostics.terminal.benchmark import spread
from diagnostics.terminal.units import readable_bytes

CAPTION = (
    "Measured beside the limit: a ratio below 1 is cheaper than full depth. Where a line lies above its dotted limit, "
    "the policy saves less than its operations and bytes allow."
)
FACTS = ("dtype", "device", "threads", "attention", "new_tokens", "chunk_size", "seed", "weight_hash")


def benchmark_report(benchmark: Benchmark) -> str:
    """Return the page of a benchmark as HTML."""
    manifest, summary = benchmark.manifest, benchmark.summary()
    entries: dict[str, object] = dict(manifest)
    facts = measured_facts(entries, benchmark.path) | named({name: entries.get(name) for name in FACTS})
    n = len(_others(summary))
    policies = f"{n} {'policy' if n == 1 else 'policies'} beside full depth" if n else "full depth alone"
    return Page(
        title=f"Costs of {manifest['model']}: {policies}",
        answer=benchmark_answer(summary),
        cards=_cards(summary),
        notes=manifest["notes"],
        sections=[
            Section("Measured costs", benchmark_parts(benchmark)),
            Section("How this was measured", [Facts(facts)]),
        ],
    ).render()


def benchmark_answer(summary: pd.DataFrame) -> str:
    """Say what the policies save at the longest prompts that were measured."""
    length = int(summary["n_prompt"].max())
    rows = summary[(summary["n_prompt"] == length) & (summary["policy"] != FullPolicy.name)]
    if rows.empty:
        (full,) = summary[summary["n_prompt"] == length].to_dict("records")[:1]
        return f"Full depth takes {full['ttft_s']:.3g} s to the first token of {length:,} prompt tokens."
    parts = [
        f"{policy_label(row['spec'])} takes {row['ttft_s_ratio']:.0%} of the time to first token of full depth, and "
        f"{row['kv_bytes_ratio']:.0%} of its KV cache"
        for row in rows.to_dict("records")
    ]
    return f"At {length:,} prompt tokens {'; '.join(parts)}."


def benchmark_parts(benchmark: Benchmark) -> list[Part]:
    """Return the figure of a benchmark, and a table for every prompt length."""
    parts: list[Part] = []
    summary = benchmark.summary()
    if len(_others(summary)):
        parts.append(Picture(figures.benchmark_ratios(benchmark), CAPTION))
    for length, rows in summary.groupby("n_prompt", sort=False):
        batch, repeats = int(rows["batch_size"].iloc[0]), int(rows["repeats"].max())
        parts.append(f"{int(str(length)):,} prompt tokens, batch of {batch}, {repeats} repeats (mean ± std):")
        parts.append(_costs(rows))
    return parts


def _costs(rows: pd.DataFrame) -> Table:
    table = [
        [
            policy_label(row["spec"]),
            spread(row["ttft_s_mean"], row["ttft_s_std"], 3),
            _ratio(row["ttft_s_ratio"], row["ttft_limit"]),
            spread(1000 * row["tpot_s_mean"], 1000 * row["tpot_s_std"], 1),
            _ratio(row["tpot_s_ratio"], row["tpot_limit"]),
            readable_bytes(row["kv_bytes"]),
            _ratio(row["kv_bytes_ratio"], row["kv_limit"]),
            "-" if pd.isna(row["peak_bytes"]) else readable_bytes(row["peak_bytes"]),
        ]
        for row in rows.to_dict("records")
    ]
    headings = ["policy", "TTFT, s", "of full (limit)", "TPOT, ms", "of full (limit)", "KV", "of full (limit)", "peak"]
    strong = rows["policy"].tolist().index(FullPolicy.name) if FullPolicy.name in set(rows["policy"]) else None
    caption = "of full: ratio to full depth, median over repeats. Peak: memory above the loaded model"
    return Table(headings, table, strong, 1, caption)


def _ratio(measured: float, limit: float) -> str:
    return "-" if pd.isna(measured) else f"{measured:.3f} ({limit:.3f})"


def _cards(summary: pd.DataFrame) -> list[Card]:
    length = int(summary["n_prompt"].max())
    rows = summary[summary["n_prompt"] == length]
    return [
        Card(f"TTFT, {policy_label(row['spec'])}", f"{row['ttft_s']:.3g} s", f"{length:,} prompt tokens, median")
        for row in rows.to_dict("records")
    ]


def _others(summary: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(summary.loc[summary["policy"] != FullPolicy.name, "spec"]))
