"""Run tables -> plotly figures: pure functions, for the dashboard, notebooks and reports alike.

Every figure has a transparent background and takes its text colours from plotly's template, so it serves light and dark
pages. Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart, without their
yellow, which does not show on white.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.benchmark import Benchmark
from diagnostics.recommend import Recommendation
from diagnostics.regions import Region
from diagnostics.results import Run
from diagnostics.savings import predict_savings

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BROWN, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#8A8A8A"),
)
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BROWN, GREY)
SELECTION, STABILIZATION = "rgba(230, 159, 0, 0.16)", "rgba(0, 158, 115, 0.14)"

# Panels of the layer curves: title of the axis, and its curves (column, name).
CURVES = {
    "share of the attention": (("mass_prompt", "on the prompt"), ("mass_anchor", "on the anchors")),
    "taken from the prompt": (("selectivity", "selectivity"), ("prompt_contribution", "contribution")),
    "drift, 1 - cos": (("drift_prompt_centred", "prompt, centred"), ("drift_decode", "decode")),
    "logit lens, nats": (("lens_kl", "KL from the end"), ("lens_kl_translated", "the same, translated")),
}


def layer_curves(run: Run, recommendation: Recommendation | None = None) -> go.Figure:
    """Draw the probes layer by layer: mean over prompts, with the quarter of prompts above and below shaded.

    With a recommendation the selection region is shaded orange, the stabilization region green, and the cutoff is a
    line between the last layer that prompt tokens run through and the next.
    """
    figure = make_subplots(rows=len(CURVES), cols=1, shared_xaxes=True, vertical_spacing=0.035)
    layers = np.arange(run.n_layers)
    for row, (unit, curves) in enumerate(CURVES.items(), start=1):
        for number, (column, name) in enumerate(curves):
            values, colour = _per_layer(run, column), PALETTE[2 * (row - 1) + number]
            _curve(figure, layers, values, f"{unit.split(',')[0]}: {name}", colour, row=row)
        figure.update_yaxes(title_text=unit, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="layer", dtick=_tick(run.n_layers), row=len(CURVES), col=1)
    if recommendation is not None:
        _mark_regions(figure, recommendation)
    figure = _finished(figure, f"What each layer does with the prompt: {_about(run)}", height=980)
    # Below: so many names would run into the title.
    return figure.update_layout(legend={"y": -0.07, "yanchor": "top"}, margin={"t": 50, "b": 160})


def head_map(run: Run, column: str = "selectivity") -> go.Figure:
    """Draw one measure per layer and head, mean over prompts; layer 0 at the bottom."""
    values = run.array(column)
    if values.ndim != 3:
        raise ValueError(f"{column} is not measured per head")
    figure = go.Figure(
        go.Heatmap(
            z=np.nanmean(values, axis=0) if np.isfinite(values).any() else values[0],
            colorscale="Viridis",
            colorbar={"title": {"text": column, "side": "right"}},
            hovertemplate="layer %{y}, head %{x}<br>" + column + " %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="head", dtick=_tick(values.shape[2]))
    figure.update_yaxes(title_text="layer", dtick=_tick(values.shape[1]))
    return _finished(figure, f"{column} of every head: {_about(run)}", height=640)


def cutoff_loss(run: Run, recommendation: Recommendation, n_prompt: int = 8192) -> go.Figure:
    """Draw the measured loss against the cutoff above the savings predicted for prompts of ``n_prompt`` tokens.

    The band reaches up to the confidence bound that decides; the tolerance is dashed. Loss is on a logarithmic axis.
    """
    evidence = pd.DataFrame(recommendation.evidence)
    cutoffs = evidence["cutoff"].to_numpy()
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    # The loss of full depth is 0, up to rounding, which a logarithmic axis does not have.
    has_place = (evidence["kl"] > 1e-6) & (evidence["cutoff"] < run.n_layers)
    shown = evidence["kl"].where(has_place)
    if "kl_bound" in evidence and evidence["kl_bound"].notna().any():
        bound = evidence["kl_bound"].astype(float).where(has_place)
        band = {"x": cutoffs, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(y=shown, **band), row=1, col=1)
        figure.add_trace(go.Scatter(y=bound, fill="tonexty", fillcolor=_faint(BLUE), **band), row=1, col=1)
    figure.add_trace(
        go.Scatter(
            x=cutoffs,
            y=shown,
            customdata=evidence[["top1_agreement", "nll_increase"]],
            mode="lines+markers",
            name="KL from full depth",
            line={"color": BLUE},
            hovertemplate="cutoff %{x}: KL %{y:.4f} nats/token<br>same top token %{customdata[0]:.1%}"
            "<br>NLL %{customdata[1]:+.4f}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    limit = recommendation.data["criterion"].get("max_kl")
    if limit is not None:
        figure.add_hline(
            limit, line={"dash": "dash", "color": VERMILION}, annotation_text=f"tolerance {limit:g}", row=1, col=1
        )
    ratios = _predicted(run, n_prompt)
    for (column, name), colour in zip(
        (("ttft_ratio", "TTFT"), ("tpot_ratio", "TPOT"), ("kv_ratio", "KV")), (ORANGE, GREEN, PURPLE), strict=True
    ):
        _line(figure, ratios["cutoff"], ratios[column], f"{name}, predicted", colour, "{}: %{{y:.3f}} of full", row=2)
    figure.data[-1].line.dash = "dot"  # TTFT is often the same, and below it
    figure.update_yaxes(title_text="loss, nats per token", type="log", exponentformat="power", dtick=1, row=1, col=1)
    figure.update_yaxes(title_text=f"of full depth, {n_prompt:,} tokens", range=[0, 1.05], row=2, col=1)
    figure.update_xaxes(title_text="cutoff: layers that prompt tokens run through", row=2, col=1)
    figure.update_xaxes(dtick=_tick(len(cutoffs)))
    for row in (1, 2):
        figure.add_vline(recommendation.cutoff, line={"color": GREY, "width": 2}, row=row, col=1)
    return _finished(figure, f"Cutoff {recommendation.cutoff} of {run.n_layers}: {_about(run)}", height=640)


def retention(run: Run, recommendation: Recommendation | None = None) -> go.Figure:
    """Draw which share of the prompt's attention mass and contribution lies below each cutoff, summed over layers."""
    figure = go.Figure()
    for (column, name), colour in zip(
        (("mass_prompt", "attention mass"), ("prompt_contribution", "contribution")), (BLUE, GREEN), strict=True
    ):
        values = _per_layer(run, column)
        values = np.where(np.isfinite(values), values, 0)
        total = values.sum(axis=1, keepdims=True)
        share = np.cumsum(values, axis=1) / np.where(total > 0, total, np.nan)
        _curve(figure, np.arange(1, run.n_layers + 1), share, name, colour)
    if recommendation is not None:
        figure.add_vline(recommendation.cutoff, line={"color": GREY, "width": 2}, annotation_text="cutoff")
    figure.update_xaxes(title_text="cutoff", dtick=_tick(run.n_layers))
    figure.update_yaxes(title_text="share below the cutoff", range=[0, 1.02])
    return _finished(figure, f"What a cutoff keeps of the prompt: {_about(run)}", height=420)


def benchmark_ratios(benchmark: Benchmark) -> go.Figure:
    """Draw TTFT, TPOT and KV bytes of every policy as ratios to full depth against prompt length; limits are dotted."""
    table = benchmark.summary()
    panels = [("ttft_s_ratio", "ttft_limit", "TTFT"), ("tpot_s_ratio", "tpot_limit", "TPOT")]
    panels.append(("kv_bytes_ratio", "kv_limit", "KV bytes"))
    figure = make_subplots(rows=1, cols=3, subplot_titles=[name for *_, name in panels], horizontal_spacing=0.06)
    for number, (spec, rows) in enumerate(table[table["policy"] != "full"].groupby("spec", sort=False)):
        colour = PALETTE[number % len(PALETTE)]
        for at, (measured, limit, name) in enumerate(panels, start=1):
            group: dict[str, Any] = {"legendgroup": str(spec), "showlegend": at == 1}
            _line(
                figure,
                rows["n_prompt"],
                rows[measured],
                str(spec),
                colour,
                "{}, " + name + " %{{y:.3f}}",
                col=at,
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
                col=at,
            )
    figure.add_hline(1, line={"color": GREY, "width": 1})
    figure.update_xaxes(title_text="prompt tokens", type="log", tickvals=sorted(table["n_prompt"].unique()))
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="of full depth", row=1, col=1)
    m = benchmark.manifest
    return _finished(figure, f"Measured beside the limit (dotted): {m['model']}, {m['hardware']}", height=440)


def compare_runs(runs: Sequence[Run]) -> go.Figure:
    """Draw the loss of several runs against relative depth, cutoff / layers."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        kl = run.array("kl").mean(axis=0)
        depth = np.arange(1, run.n_layers + 1) / run.n_layers
        shown = np.where(kl > 1e-6, kl, np.nan)
        _line(figure, depth, shown, run.name, PALETTE[number % len(PALETTE)], "{}: KL %{{y:.4f}} at %{{x:.0%}}")
    figure.update_xaxes(title_text="cutoff / layers", tickformat=".0%")
    figure.update_yaxes(title_text="KL from full depth, nats per token", type="log", exponentformat="power", dtick=1)
    return _finished(figure, "Loss at relative depth", height=460)


def _per_layer(run: Run, column: str) -> np.ndarray:
    """Return one measure [prompt, layer], the mean over heads where it has heads."""
    values = run.array(column)
    return values.mean(axis=-1) if values.ndim == 3 else values


def _curve(
    figure: go.Figure, x: np.ndarray, values: np.ndarray, name: str, colour: str, row: int | None = None
) -> None:
    """Mean over prompts of [prompts, x], between its quartiles."""
    place = {} if row is None else {"row": row, "col": 1}
    counted = np.isfinite(values)
    if len(values) > 1:
        filled = np.where(counted, values, np.nan)
        filled[:, ~counted.any(axis=0)] = 0  # drawn nowhere: their mean is missing
        low, high = np.nanquantile(filled, [0.25, 0.75], axis=0)
        band = {"x": x, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(y=low, legendgroup=name, **band), **place)
        figure.add_trace(
            go.Scatter(y=high, fill="tonexty", fillcolor=_faint(colour), legendgroup=name, **band), **place
        )
    mean = np.where(counted, values, 0).sum(axis=0) / np.where(counted.any(axis=0), counted.sum(axis=0), np.nan)
    hover = f"{name}<br>%{{x}}: %{{y:.3f}}<extra></extra>"
    line = go.Scatter(x=x, y=mean, mode="lines", name=name, legendgroup=name, line={"color": colour})
    figure.add_trace(line.update(hovertemplate=hover), **place)


def _line(
    figure: go.Figure,
    x: Any,
    y: Any,
    name: str,
    colour: str,
    hover: str,
    row: int = 1,
    col: int = 1,
    **more: Any,
) -> None:
    hover = hover.format(name) + "<extra></extra>"
    trace = go.Scatter(x=x, y=y, mode="lines+markers", name=name, line={"color": colour}, hovertemplate=hover, **more)
    figure.add_trace(trace, **({} if figure._grid_ref is None else {"row": row, "col": col}))


def _mark_regions(figure: go.Figure, recommendation: Recommendation) -> None:
    for region, colour, name in (
        (recommendation.selection_region, SELECTION, "selection"),
        (recommendation.stabilization_region, STABILIZATION, "stabilization"),
    ):
        if isinstance(region, Region):
            figure.add_vrect(region.first - 0.5, region.last + 0.5, fillcolor=colour, line_width=0, layer="below")
            legend = {"size": 12, "symbol": "square", "color": colour.replace("0.1", "0.5")}
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=legend, name=f"{name} region"))
    figure.add_vline(recommendation.cutoff - 0.5, line={"color": GREY, "width": 2, "dash": "dash"})
    line = {"color": GREY, "width": 2, "dash": "dash"}
    figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=f"cutoff {recommendation.cutoff}"))


def _predicted(run: Run, n_prompt: int) -> pd.DataFrame:
    shape, anchors = run.manifest["shape"], int(run.manifest["identity"]["anchors"])
    rows = []
    for cutoff in range(1, run.n_layers + 1):
        (savings,) = predict_savings(shape, cutoff, anchors=anchors, lengths=[n_prompt])
        rows.append({"cutoff": cutoff} | savings.to_dict())
    return pd.DataFrame(rows)


def _about(run: Run) -> str:
    n = len(run.prompts)
    return f"{run.manifest['model']}, {n} prompt{'s' if n > 1 else ''}"


def _tick(n: int) -> int:
    """Step of an axis of ``n`` whole numbers, so that labels do not crowd."""
    return next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, n) if n / step <= 20)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def _finished(figure: go.Figure, title: str, height: int) -> go.Figure:
    return (
        figure.update_layout(
            title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 17}},
            height=height,
            margin={"l": 70, "r": 20, "t": 90, "b": 60},
            paper_bgcolor="rgba(0, 0, 0, 0)",
            plot_bgcolor="rgba(0, 0, 0, 0)",
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            hovermode="closest",
            modebar={"bgcolor": "rgba(0, 0, 0, 0)"},
        )
        .update_xaxes(showgrid=True, gridcolor="rgba(128, 128, 128, 0.18)", zeroline=False)
        .update_yaxes(showgrid=True, gridcolor="rgba(128, 128, 128, 0.18)", zeroline=False)
    )
