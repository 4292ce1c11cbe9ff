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
    literal,
    per_layer,
    tick,
)
from diagnostics.runs.run import Run
from diagnostics.support.finite import finite_mean


def cutoff_loss(run: Run, recommendation: Recommendation, n_prompt: int = 8192, cutoff: int | None = None) -> go.Figure:
    """Draw the measured loss against the cutoff above the savings predicted for prompts of ``n_prompt`` tokens.

    The band reaches up to the confidence bound that decides; the tolerance is dashed. Loss is on a logarithmic axis.
    The grey line is the recommended cutoff; the dotted line is ``cutoff``, another one to inspect.
    """
    evidence = pd.DataFrame(recommendation.evidence)
    cutoffs = evidence["cutoff"].to_numpy()
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    drawable = _drawable(run, evidence["kl"], evidence["cutoff"])
    loss = evidence["kl"].where(drawable)
    if "kl_bound" in evidence and evidence["kl_bound"].notna().any():
        bound = evidence["kl_bound"].astype(float).where(drawable)
        band = {"x": cutoffs, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(y=loss, **band), row=1, col=1)
        figure.add_trace(go.Scatter(y=bound, fill="tonexty", fillcolor=faint(BLUE), **band), row=1, col=1)
    figure.add_trace(
        go.Scatter(
            x=cutoffs,
            y=loss,
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
    if limit:  # a logarithmic axis has no 0
        figure.add_hline(limit, line={"dash": "dash", "color": VERMILION}, row=1, col=1)
        # plotly positions annotations, unlike lines, by the logarithm
        position = {"x": 1, "xref": "x domain", "xanchor": "right", "y": np.log10(limit), "yanchor": "bottom"}
        figure.add_annotation(text=f"tolerance {limit:g}", showarrow=False, row=1, col=1, **position)
    ratios = _predicted(run, n_prompt)
    for (column, name), colour in zip(
        (("ttft_ratio", "TTFT"), ("tpot_ratio", "TPOT"), ("kv_ratio", "KV")), (ORANGE, GREEN, PURPLE), strict=True
    ):
        add_line(
            figure, ratios["cutoff"], ratios[column], f"{name}, predicted", colour, "{}: %{{y:.3f}} of full", row=2
        )
    figure.data[-1].line.dash = "dot"  # it often covers TTFT's line
    figure.update_yaxes(title_text="loss, nats per token", type="log", exponentformat="power", dtick=1, row=1, col=1)
    figure.update_yaxes(title_text=f"of full depth, {n_prompt:,} tokens", range=[0, 1.05], row=2, col=1)
    figure.update_xaxes(title_text="cutoff: layers that prompt tokens run through", row=2, col=1)
    figure.update_xaxes(dtick=tick(len(cutoffs)))
    for row in (1, 2):
        figure.add_vline(recommendation.cutoff, line={"color": GREY, "width": 2}, row=row, col=1)
        if cutoff is not None and cutoff != recommendation.cutoff:
            figure.add_vline(cutoff, line={"color": BLUE, "width": 2, "dash": "dot"}, row=row, col=1)
    return finished(figure, f"Recommended cutoff {recommendation.cutoff} of {run.n_layers}", 640, about(run))


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
    figure.update_xaxes(title_text="cutoff", dtick=tick(run.n_layers))
    figure.update_yaxes(title_text="share below the cutoff", range=[0, 1.02])
    return finished(figure, "What a cutoff keeps of the prompt", 420, about(run))


def compare_runs(runs: Sequence[Run], column: str = "kl", names: Sequence[str] | None = None) -> go.Figure:
    """Draw a measure of several runs against relative depth: cutoff / layers for a loss, else (layer + 1) / layers.

    ``names`` labels the runs; by default each run has its own name.
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
        add_line(figure, depth, mean, literal(name), PALETTE[number % len(PALETTE)], hover)
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
