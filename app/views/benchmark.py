"""Benchmark: TTFT, TPOT and KV of policies against prompt length, beside the limit that counting gives."""

import streamlit as st

from dashboard.catalog import Entry
from dashboard.state import entries, md, runs_folder, show
from diagnostics import figures
from diagnostics.generation.benchmark_folder import Benchmark, load_benchmark
from diagnostics.support.errors import UserError

COLUMNS = {
    "n_prompt": "prompt tokens",
    "spec": "policy",
    "ttft_s": "TTFT, s",
    "ttft_s_ratio": "of full",
    "ttft_limit": "limit",
    "tpot_ms": "TPOT, ms",
    "tpot_s_ratio": "of full ",
    "tpot_limit": "limit ",
    "kv_mib": "KV, MiB",
    "kv_bytes_ratio": "of full  ",
    "peak_gib": "peak, GiB",
    "repeats": "repeats",
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
    st.stop()
entry = benchmarks[st.selectbox("Benchmark", list(benchmarks), key="benchmark")]
bench = load(entry)
m = bench.manifest
about = [
    m.get("model"),
    m.get("dtype"),
    m.get("hardware"),
    f"{m.get('new_tokens')} new tokens",
    f"made {m.get('created')}",
]
st.caption(md(", ".join(str(part) for part in about)))
show(entry, "benchmark", lambda: figures.benchmark_ratios(bench))
table = bench.summary().assign(
    tpot_ms=lambda t: 1000 * t["tpot_s"],
    kv_mib=lambda t: t["kv_bytes"] / 2**20,
    peak_gib=lambda t: t["peak_bytes"] / 2**30,
)
st.dataframe(table[list(COLUMNS)].rename(columns=COLUMNS).round(3), hide_index=True, width="stretch")
st.caption("Medians over repeats; a ratio is the median of those within a repeat. The limit is counted, not measured.")
for note in m.get("notes", []):
    st.caption(f":material/info: {md(note)}")
