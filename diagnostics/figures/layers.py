"""Measurements by layer: probe curves with the regions, heads, and the logit lens of one prompt."""

import html

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.regions import Region
from diagnostics.figures.style import GREY, PALETTE, about, add_curve, finished, literal, per_layer, tick
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError

SELECTION, STABILIZATION = "rgba(230, 159, 0, 0.16)", "rgba(0, 158, 115, 0.14)"


# Panels of the layer curves: title of the axis, and its curves (column, name).
CURVES = {
    "share of the attention": (("mass_prompt", "on the prompt"), ("mass_anchor", "on the anchors")),
    "taken from the prompt": (("selectivity", "selectivity"), ("prompt_contribution", "contribution")),
    "drift, 1 - cos": (("drift_prompt_centred", "prompt, centred"), ("drift_decode", "decode")),
    "logit lens, nats": (("lens_kl", "KL from the end"), ("lens_kl_translated", "the same, translated")),
}


def layer_curves(run: Run, recommendation: Recommendation | None = None) -> go.Figure:
    """Draw the probes layer by layer: the mean over prompts, with the band between their quartiles.

    With a recommendation the selection region is shaded orange, the stabilization region green, and the cutoff is a
    line between the last layer that prompt tokens run through and the next.
    """
    figure = make_subplots(rows=len(CURVES), cols=1, shared_xaxes=True, vertical_spacing=0.035)
    layers = np.arange(run.n_layers)
    for row, (unit, curves) in enumerate(CURVES.items(), start=1):
        for number, (column, name) in enumerate(curves):
            values, colour = per_layer(run, column), PALETTE[2 * (row - 1) + number]
            add_curve(figure, layers, values, f"{unit.split(',')[0]}: {name}", colour, row=row)
        figure.update_yaxes(title_text=unit, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="layer", dtick=tick(run.n_layers), row=len(CURVES), col=1)
    if recommendation is not None:
        _mark_regions(figure, recommendation)
    figure = finished(figure, "What each layer does with the prompt", 980, about(run))
    # The legend is below: its many names would overlap the title.
    return figure.update_layout(legend={"y": -0.07, "yanchor": "top"}, margin={"t": 66, "b": 160})


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
    figure.update_xaxes(title_text="head", dtick=tick(values.shape[2]))
    figure.update_yaxes(title_text="layer", dtick=tick(values.shape[1]))
    return finished(figure, f"{column} of every head", 640, about(run))


def logit_lens(run: Run, prompt_id: str, first: int = 0, count: int = 12) -> go.Figure:
    """Draw the logit lens of one prompt: the most likely token after every layer, at ``count`` decode positions.

    Colour is the token's probability; tokens that the last layer also predicts are bold. The axis below has the
    reference tokens that the columns predict; ``first`` is the first column shown. Raises UserError for a prompt that
    the run does not keep in detail.
    """
    rows = run.lens[run.lens["prompt_id"] == prompt_id]
    if rows.empty:
        raise UserError(f"run {run.name!r} keeps no tokens of prompt {prompt_id!r}: see `detail_prompts`")
    positions = np.sort(rows["position"].unique())[first : first + count]
    rows = rows[rows["position"].isin(positions)]
    grid = {
        name: rows.pivot(index="layer", columns="position", values=name).to_numpy()
        for name in ("lens_text", "lens_token", "lens_probability")
    }
    agrees = grid["lens_token"] == grid["lens_token"][-1]
    text = np.vectorize(_cell, otypes=[object])(grid["lens_text"], agrees)
    hover_text = np.vectorize(_visible, otypes=[object])(grid["lens_text"])
    tokens = run.tokens[run.tokens["prompt_id"] == prompt_id].set_index("position")["text"]
    columns = np.arange(len(positions))
    following = [_visible(tokens.get(position + 1, "")) for position in positions]
    figure = go.Figure(
        go.Heatmap(
            x=columns,
            z=grid["lens_probability"].astype(float),
            text=text,
            customdata=hover_text,
            texttemplate="%{text}",
            textfont={"size": 11},
            zmin=0,
            zmax=1,
            colorscale="Blues",
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "probability", "side": "right"}},
            hovertemplate="after layer %{y}: %{customdata}, probability %{z:.3f}<extra></extra>",
        )
    )
    labels = [_shortened(token) for token in following]
    figure.update_xaxes(title_text="next token of the reference", tickvals=columns, ticktext=labels, tickangle=0)
    figure.update_yaxes(title_text="after layer", dtick=tick(run.n_layers))
    subject = f"{literal(run.manifest['model'])}, prompt {literal(prompt_id)}"
    return finished(figure, "Logit lens", 160 + 20 * run.n_layers, subject)


def _visible(text: str) -> str:
    """Make white space visible, and escape markup in a token."""
    return literal(text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7"))


def _shortened(visible: str, most: int = 9) -> str:
    text = html.unescape(visible)
    return visible if len(text) <= most else literal(text[: most - 1]) + "\u2026"


def _cell(text: str, agrees: bool) -> str:
    short = _shortened(_visible(text))
    return f"<b>{short}</b>" if agrees else short


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
