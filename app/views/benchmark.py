"""Benchmark: TTFT, TPOT and KV of policies against prompt length, beside the limit that counting gives."""

import streamlit as st

from dashboard.address import bind, one_of
from dashboard.catalog import Entry
from dashboard.ending import end_page
from dashboard.markdown import md
from dashboard.state import entries, runs_folder, show
from diagnostics import figures
from diagnostics.generation.benchmark_folder import Benchmark, load_benchmark
from diagnostics.support.errors import UserError
from diagnostics.support.glossary import GLOSSARY
from diagnostics.terminal.units import readable_time

RATIO = "median over repeats of the ratio to full depth within the repeat"
# Column of the table: its heading, its format, and what it is.
COLUMNS = {
    "n_prompt": ("prompt tokens", "%d", ""),
    "spec": ("policy", None, ""),
    "ttft_s": ("TTFT, s", "%.3f", GLOSSARY["TTFT"]),
    "ttft_s_ratio": ("TTFT of full depth", "%.3f", RATIO),
    "ttft_s_range": ("TTFT, range", None, "smallest and largest ratio of a repeat"),
    "ttft_limit": ("TTFT limit", "%.3f", GLOSSARY["limit"]),
    "tpot_ms": ("TPOT, ms", "%.1f", GLOSSARY["TPOT"]),
    "tpot_s_ratio": ("TPOT of full depth", "%.3f", RATIO),
    "tpot_s_range": ("TPOT, range", None, "smallest and largest ratio of a repeat"),
    "tpot_limit": ("TPOT limit", "%.3f", GLOSSARY["limit"]),
    "kv_mib": ("KV, MiB", "%.1f", GLOSSARY["KV cache"]),
    "kv_bytes_ratio": ("KV of full depth", "%.3f", "measured from the tensors after the last token"),
    "peak_gib": ("peak memory, GiB", "%.3f", "above the loaded model"),
    "repeats": ("repeats", "%d", "how often it was measured"),
}


def load(entry: Entry) -> Benchmark:
    """Read a benchmark; raise UserError where its tables are damaged."""
    try:
        benchmark = load_benchmark(entry.path)
        benchmark.summary()
        return benchmark
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the benchmark in {str(entry.path)!r} is damaged: {error}") from None


benchmarks = {entry.name: entry for entry in entries() if entry.has_benchmark}
st.title("What policies cost")
if not benchmarks:
    st.info(f"There is no benchmark in **{md(runs_folder())}** yet. Make one in a terminal:")
    st.code("speed-diagnostics bench --lengths 512,2K --policies full,speed:24,projected:24,fastkv", language="bash")
    end_page()
bind("benchmark", "benchmark", next(iter(benchmarks)), one_of(benchmarks), of=str(runs_folder()), always=True)
entry = benchmarks[str(st.selectbox("Benchmark", list(benchmarks), key="benchmark"))]
bench = load(entry)
m = bench.manifest
st.markdown("\n".join(f"- {md(sentence)}" for sentence in figures.benchmark_sentences(bench).values()))
about = [
    m.get("model"),
    m.get("dtype"),
    m.get("hardware"),
    f"{m.get('new_tokens')} new tokens",
    f"made {readable_time(m.get('created'))}",
]
st.caption(md(", ".join(str(part) for part in about if part)))
table = bench.summary().assign(
    tpot_ms=lambda t: 1000 * t["tpot_s"],
    kv_mib=lambda t: t["kv_bytes"] / 2**20,
    peak_gib=lambda t: t["peak_bytes"] / 2**30,
)
for name in ("ttft_s", "tpot_s"):
    ends = zip(table[f"{name}_ratio_low"], table[f"{name}_ratio_high"], strict=True)
    table[f"{name}_range"] = [f"{low:.3f} to {high:.3f}" for low, high in ends]
show(
    entry,
    "benchmark",
    lambda: figures.benchmark_ratios(bench),
    note="Ratios to full depth. Dots are medians, bars reach from the smallest to the largest repeat.",
    help=GLOSSARY["limit"],
    table=bench.rows,
)
st.dataframe(
    table[list(COLUMNS)],
    hide_index=True,
    width="stretch",
    column_config={
        column: st.column_config.TextColumn(title, help=help_text)
        if form is None
        else st.column_config.NumberColumn(title, format=form, help=help_text)
        for column, (title, form, help_text) in COLUMNS.items()
    },
)
st.caption("Medians over repeats. A limit is counted, not measured.")
for note in m.get("notes", []):
    st.caption(f":material/info: {md(note)}")
