"""What a cutoff costs and saves: loss, savings, retention, and a comparison of several runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.savings import predict_savings
from diagnostics.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    PURPLE,
    VERMILION,
    about,
    add_curve,
    add_line,
    faint,
    finished,
    legend_at_each_panel,
    literal,
    per_layer,
    tick,
)
from diagnostics.runs.run import Run
from diagnostics.support.errors import require
from diagnostics.support.finite import finite_mean

CUTOFF_AXIS = "cutoff: layers that prompt tokens run through"
# Lines of runs that are compared; the first lies below the others.
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square-open", "diamond-open", "triangle-up-open", "cross-open")


def cutoff_loss(run: Run, recommendation: Recommendation, n_prompt: int = 8192, cutoff: int | None = None) -> go.Figure:
    """Draw the measured loss against the cutoff above the savings predicted for prompts of ``n_prompt`` tokens.

    The band reaches up to the confidence bound that decides; the tolerance is dashed. Loss is on a logarithmic axis.
    The grey line is the recommended cutoff; the dotted line is ``cutoff``, another one to inspect. Without a measured
    loss there are the savings alone.
    """
    rows = 2 if recommendation.measured else 1
    figure = make_subplots(
        rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.13, row_heights=[0.6, 0.4] if rows == 2 else None
    )
    if recommendation.measured:
        _add_loss(figure, run, recommendation)
    ratios = _predicted(run, n_prompt)
    # TTFT and KV nearly coincide: KV is a broad band of colour below TTFT's thin line.
    broad = {"color": PURPLE, "width": 8}
    hover = "{}: %{{y:.3f}} of full"
    for column, name, look in (
        ("kv_ratio", "KV", {"line": broad, "opacity": 0.45, "mode": "lines"}),
        ("ttft_ratio", "TTFT", {"line": {"color": ORANGE}}),
        ("tpot_ratio", "TPOT", {"line": {"color": GREEN, "dash": "dot"}, "marker": {"symbol": "diamond"}}),
    ):
        add_line(figure, ratios["cutoff"], ratios[column], f"{name}, predicted", GREEN, hover, row=rows)
        figure.data[-1].update(look)
    figure.update_yaxes(title_text="of full depth", range=[0, 1.05], row=rows, col=1)
    figure.update_xaxes(title_text=CUTOFF_AXIS, row=rows, col=1)
    _mark_cutoffs(figure, recommendation.cutoff, cutoff, rows)
    _align(figure, run.n_layers)
    title, height = (f"Loss, and savings at {n_prompt:,} tokens", 600)
    if not recommendation.measured:
        title, height = (f"Savings at {n_prompt:,} tokens", 400)
    return legend_at_each_panel(finished(figure, title, height, about(run)))


def measured_loss(run: Run, recommendation: Recommendation) -> go.Figure:
    """Draw the measured loss alone, small, with the recommended cutoff: the headline in one picture.

    Raises UserError for a run without a sweep.
    """
    require(recommendation.measured, f"run {run.name!r} has no measured loss: it was diagnosed without the sweep")
    figure = make_subplots(rows=1, cols=1)
    _add_loss(figure, run, recommendation)
    figure.update_xaxes(title_text=CUTOFF_AXIS)
    _mark_cutoffs(figure, recommendation.cutoff, None, rows=1)
    _align(figure, run.n_layers)
    place = {"x": recommendation.cutoff, "y": 0, "yref": "y domain", "yanchor": "bottom", "xanchor": "right"}
    figure.add_annotation(text=f"cutoff {recommendation.cutoff} ", showarrow=False, font={"size": 14}, **place)
    return finished(figure, "What every cutoff changes", 380, about(run))


def _add_loss(figure: go.Figure, run: Run, recommendation: Recommendation) -> None:
    """Add the loss at every cutoff, its bound and the tolerance to the first panel."""
    evidence = pd.DataFrame(recommendation.evidence)
    cutoffs = evidence["cutoff"].to_numpy()
    drawable = _drawable(run, evidence["kl"], evidence["cutoff"])
    loss = evidence["kl"].where(drawable)
    if "kl_bound" in evidence and evidence["kl_bound"].notna().any():
        bound = evidence["kl_bound"].astype(float).where(drawable)
        band = {"x": cutoffs, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(y=loss, **band, name="KL, mean"), row=1, col=1)
        filled = {"fill": "tonexty", "fillcolor": faint(BLUE), "name": "KL, upper bound"}
        figure.add_trace(go.Scatter(y=bound, **filled, **band), row=1, col=1)
    figure.add_trace(
        go.Scatter(
            x=cutoffs,
            y=loss,
            customdata=evidence[["top1_agreement", "nll_increase"]],
            mode="lines+markers",
            name="KL from full depth",
            line={"color": BLUE},
            showlegend=True,
            hovertemplate="cutoff %{x}: KL %{y:.4f} nats/token<br>same top token %{customdata[0]:.1%}"
            "<br>NLL %{customdata[1]:+.4f}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    limit = recommendation.data["criterion"].get("max_kl")
    if limit:  # a logarithmic axis has no 0
        figure.add_hline(limit, line={"dash": "dash", "color": VERMILION}, row=1, col=1)
        # plotly positions annotations, unlike lines, by the logarithm
        position = {"x": 1, "xref": "x domain", "xanchor": "right", "y": np.log10(limit), "yanchor": "bottom"}
        figure.add_annotation(text=f"tolerance {limit:g}", showarrow=False, row=1, col=1, **position)
    figure.update_yaxes(title_text="loss, nats per token", type="log", exponentformat="power", dtick=1, row=1, col=1)


def _mark_cutoffs(figure: go.Figure, recommended: int, cutoff: int | None, rows: int) -> None:
    for row in range(1, rows + 1):
        figure.add_vline(recommended, line={"color": GREY, "width": 2}, row=row, col=1)
        if cutoff is not None and cutoff != recommended:
            figure.add_vline(cutoff, line={"color": BLUE, "width": 2, "dash": "dot"}, row=row, col=1)


def _align(figure: go.Figure, n_layers: int) -> None:
    """Give an axis of cutoffs the range and ticks that all of them have: figures one above the other line up."""
    figure.update_xaxes(range=[0, n_layers + 1], tick0=0, dtick=tick(n_layers))
    figure.update_yaxes(automargin=False)  # it would move one figure's axis and not the other's


def retention(run: Run, recommendation: Recommendation | None = None) -> go.Figure:
    """Draw the share of the prompt's attention mass and contribution in the layers below each cutoff."""
    figure = go.Figure()
    for (column, name), colour in zip(
        (("mass_prompt", "attention mass"), ("prompt_contribution", "contribution")), (BLUE, GREEN), strict=True
    ):
        values = per_layer(run, column)
        values = np.where(np.isfinite(values), values, 0)
        total = values.sum(axis=1, keepdims=True)
        share = np.cumsum(values, axis=1) / np.where(total > 0, total, np.nan)
        add_curve(figure, np.arange(1, run.n_layers + 1), share, name, colour)
    if recommendation is not None:
        figure.add_vline(recommendation.cutoff, line={"color": GREY, "width": 2}, annotation_text="cutoff")
    figure.update_xaxes(title_text=CUTOFF_AXIS)
    _align(figure, run.n_layers)
    figure.update_yaxes(title_text="share below the cutoff", range=[0, 1.02])
    return finished(figure, "What a cutoff keeps of the prompt", 420, about(run))


def compare_runs(
    runs: Sequence[Run],
    column: str = "kl",
    names: Sequence[str] | None = None,
    colours: Sequence[str] = PALETTE,
) -> go.Figure:
    """Draw a measure of several runs against relative depth: cutoff / layers for a loss, else (layer + 1) / layers.

    ``names`` labels the runs, by default by their own names; ``colours`` are theirs in turn. Lines of equal runs remain
    visible: each has its own dashes and markers.
    """
    names = [run.name for run in runs] if names is None else names
    figure = go.Figure()
    is_loss = column in runs[0].cutoffs
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        mean = finite_mean(per_layer(run, column), axis=0)
        if column == "kl":
            mean = np.where(_drawable(run, mean, np.arange(1, run.n_layers + 1)), mean, np.nan)
        depth = np.arange(1, run.n_layers + 1) / run.n_layers
        hover = f"{{}}: {column} %{{{{y:.4f}}}} at %{{{{x:.0%}}}}"
        colour, dash, symbol = (cycle[number % len(cycle)] for cycle in (colours, DASHES, SYMBOLS))
        add_line(figure, depth, mean, literal(name), colour, hover, marker={"symbol": symbol, "size": 7})
        figure.data[-1].line.update(dash=dash, width=2)
    figure.update_xaxes(title_text="cutoff / layers" if is_loss else "depth: (layer + 1) / layers", tickformat=".0%")
    if column == "kl":
        unit = "KL from full depth, nats per token"
        figure.update_yaxes(title_text=unit, type="log", exponentformat="power", dtick=1)
    else:
        figure.update_yaxes(title_text=column, rangemode="tozero")
    return finished(figure, f"{'Loss' if column == 'kl' else column} at relative depth", height=460)


def _drawable(run: Run, kl: Any, cutoffs: Any) -> Any:
    """Say which losses fit a logarithmic axis: without a teacher the loss at full depth is 0 up to rounding."""
    has_teacher = bool(run.manifest.get("identity", {}).get("teacher"))
    return (kl > 1e-6) & (has_teacher | (cutoffs < run.n_layers))


def _predicted(run: Run, n_prompt: int) -> pd.DataFrame:
    shape, anchors = run.manifest["shape"], int(run.manifest["identity"]["anchors"])
    rows = []
    for cutoff in range(1, run.n_layers + 1):
        (savings,) = predict_savings(shape, cutoff, anchors=anchors, lengths=[n_prompt])
        rows.append({"cutoff": cutoff} | savings.to_dict())
    return pd.DataFrame(rows)
