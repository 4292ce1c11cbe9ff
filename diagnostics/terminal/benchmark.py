"""A benchmark in the terminal: one table per prompt length."""

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from diagnostics.generation.benchmark_folder import Benchmark
from diagnostics.terminal.units import readable_bytes


def show_benchmark(result: Benchmark, console: Console) -> None:
    """Print, per length, each policy's figures, their ratios to full depth, and the counted limits of these."""
    manifest = result.manifest
    title = f"{manifest['model']} on {manifest['hardware']}, {manifest['dtype']}, {manifest['new_tokens']} new tokens\n"
    console.print(Text(title, style="bold"))
    for length, rows in result.summary().groupby("n_prompt", sort=False):
        batch, repeats = int(rows["batch_size"].iloc[0]), int(rows["repeats"].max())
        console.print(f"{int(str(length)):,} prompt tokens, batch {batch}, {repeats} repeats (mean ± std)")
        for table in (_times(rows), _memory(rows)):
            _print_uncut(table, console)
    console.print(
        "x: ratio to full depth, median over repeats. limit: that ratio counted, by operations of the prefill (TTFT), "
        "bytes read (TPOT) and bytes held (KV). peak: memory above the loaded model.",
        style="dim",
    )
    for note in manifest["notes"]:
        console.print(Text(f"Note: {note}.", style="yellow"))


def _print_uncut(table: Table, console: Console) -> None:
    """Print a table without cutting figures: where the screen is too narrow, lines wrap."""
    screen = console.width
    console.width = max(screen, Measurement.get(console, console.options.update(width=1000), table).maximum)
    try:
        console.print(table)
    finally:
        console.width = screen


def _times(rows: pd.DataFrame) -> Table:
    table = _table("policy", "TTFT, s", "x", "limit", "TPOT, ms", "x", "limit")
    for _, row in rows.iterrows():
        table.add_row(
            row["spec"],
            spread(row["ttft_s_mean"], row["ttft_s_std"], 3),
            f"{row['ttft_s_ratio']:.3f}",
            f"{row['ttft_limit']:.3f}",
            spread(1000 * row["tpot_s_mean"], 1000 * row["tpot_s_std"], 1),
            f"{row['tpot_s_ratio']:.3f}",
            f"{row['tpot_limit']:.3f}",
        )
    return table


def _memory(rows: pd.DataFrame) -> Table:
    table = _table("policy", "KV", "x", "limit", "peak", "TFLOP/s", "GB/s")
    for _, row in rows.iterrows():
        table.add_row(
            row["spec"],
            readable_bytes(row["kv_bytes"]),
            f"{row['kv_bytes_ratio']:.3f}",
            f"{row['kv_limit']:.3f}",
            "-" if pd.isna(row["peak_bytes"]) else readable_bytes(row["peak_bytes"]),
            f"{row['prefill_tflops']:.3g}",
            f"{row['decode_gb_s']:.3g}",
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def spread(mean: float, std: float, digits: int) -> str:
    """Write a mean with its standard deviation, where there is one."""
    return f"{mean:.{digits}f}" + ("" if pd.isna(std) else f" ± {std:.{digits}f}")
