"""Measured costs of policies relative to full depth, beside the limits from counting operations and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.figures.style import GREY, PALETTE, add_line, finished, literal
from diagnostics.policies.full import FullPolicy

if TYPE_CHECKING:
    from diagnostics.generation.benchmark_folder import Benchmark


def benchmark_ratios(benchmark: Benchmark) -> go.Figure:
    """Draw TTFT, TPOT and KV bytes of every policy as ratios to full depth against prompt length; limits are dotted."""
    table = benchmark.summary()
    panels = [("ttft_s_ratio", "ttft_limit", "TTFT"), ("tpot_s_ratio", "tpot_limit", "TPOT")]
    panels.append(("kv_bytes_ratio", "kv_limit", "KV bytes"))
    figure = make_subplots(rows=1, cols=3, subplot_titles=[name for *_, name in panels], horizontal_spacing=0.06)
    for number, (spec, rows) in enumerate(table[table["policy"] != FullPolicy.name].groupby("spec", sort=False)):
        colour = PALETTE[number % len(PALETTE)]
        for panel, (measured, limit, name) in enumerate(panels, start=1):
            group: dict[str, Any] = {"legendgroup": str(spec), "showlegend": panel == 1}
            add_line(
                figure,
                rows["n_prompt"],
                rows[measured],
                str(spec),
                colour,
                "{}, " + name + " %{{y:.3f}}",
                col=panel,
                **group,
            )
            dotted = {"color": colour, "dash": "dot", "width": 1}
            figure.add_trace(
                go.Scatter(
                    x=rows["n_prompt"],
                    y=rows[limit],
                    mode="lines+markers",
                    name=f"{spec}: limit",
                    line=dotted,
                    marker={"symbol": "line-ew-open", "size": 9},
                    legendgroup=str(spec),
                    showlegend=False,
                    hovertemplate="limit %{y:.3f}<extra></extra>",
                ),
                row=1,
                col=panel,
            )
    figure.add_hline(1, line={"color": GREY, "width": 1})
    figure.update_xaxes(title_text="prompt tokens", type="log", tickvals=sorted(table["n_prompt"].unique()))
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="of full depth", row=1, col=1)
    m = benchmark.manifest
    subject = f"{literal(m['model'])}, {literal(m['hardware'])}"
    figure = finished(figure, "Measured beside the limit (dotted)", 460, subject)
    # The legend is below: the panels' titles are above.
    return figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"t": 90, "b": 90})
