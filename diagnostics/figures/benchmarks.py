"""Measured costs of policies relative to full depth, beside the limits from counting operations and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.figures.style import GREY, PALETTE, add_line, finished, literal
from diagnostics.policies.full import FullPolicy

if TYPE_CHECKING:
    from diagnostics.generation.benchmark_folder import Benchmark

# Measure, its limit, and its name.
PANELS = (("ttft_s", "ttft_limit", "TTFT"), ("tpot_s", "tpot_limit", "TPOT"), ("kv_bytes", "kv_limit", "KV cache"))


def benchmark_ratios(benchmark: Benchmark) -> go.Figure:
    """Draw TTFT, TPOT and KV bytes of every policy as ratios to full depth against prompt length; limits are dotted.

    Bars reach from the smallest to the largest ratio within a repeat.
    """
    table = benchmark.summary()
    names = [name for *_, name in PANELS]
    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=names, horizontal_spacing=0.04, shared_yaxes=True)
    for number, (spec, rows) in enumerate(table[table["policy"] != FullPolicy.name].groupby("spec", sort=False)):
        colour = PALETTE[number % len(PALETTE)]
        for column, (measure, limit, name) in enumerate(PANELS, start=1):
            group: dict[str, Any] = {"legendgroup": str(spec), "showlegend": column == 1}
            ratio, low, high = (rows[f"{measure}_ratio{end}"] for end in ("", "_low", "_high"))
            group["error_y"] = {"symmetric": False, "array": high - ratio, "arrayminus": ratio - low, "width": 3}
            group["customdata"] = list(zip(low, high, strict=True))
            hover = "{}, " + name + " %{{y:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})"
            add_line(figure, rows["n_prompt"], ratio, str(spec), colour, hover, col=column, **group)
            figure.add_trace(
                go.Scatter(
                    x=rows["n_prompt"],
                    y=rows[limit],
                    mode="lines+markers",
                    name=f"{spec}: limit",
                    line={"color": colour, "dash": "dot", "width": 1},
                    marker={"symbol": "line-ew-open", "size": 9},
                    legendgroup=str(spec),
                    showlegend=False,
                    hovertemplate="limit %{y:.3f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
    figure.add_hline(1, line={"color": GREY, "width": 1})
    lengths = sorted(table["n_prompt"].unique())
    figure.update_xaxes(title_text="prompt tokens", type="log", tickvals=lengths)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="of full depth", row=1, col=1)
    m = benchmark.manifest
    subject = f"{literal(m['model'])}, {literal(m['hardware'])}"
    figure = finished(figure, "Measured, with the limit dotted", 460, subject)
    # The legend is below: the panels' titles are above.
    return figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"t": 90, "b": 90})


def benchmark_sentences(benchmark: Benchmark) -> dict[str, str]:
    """Say in a sentence what each policy needs at the longest prompt that was measured under it, by policy."""
    table = benchmark.summary()
    said = {}
    for spec, rows in table[table["policy"] != FullPolicy.name].groupby("spec", sort=False):
        at = rows.sort_values("n_prompt").iloc[-1]
        if at[[f"{measure}_ratio" for measure, *_ in PANELS]].isna().all():
            continue  # full depth was not measured
        said[str(spec)] = (
            f"At {int(at['n_prompt']):,} tokens {spec} needs {at['ttft_s_ratio']:.2f} of full depth's time to first "
            f"token, {at['tpot_s_ratio']:.2f} of its time per further token and {at['kv_bytes_ratio']:.2f} of its KV "
            "cache."
        )
    return said
