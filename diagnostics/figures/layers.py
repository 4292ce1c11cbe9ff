"""The probes layer by layer: one panel per question, with the regions and the cutoff, and a sentence on each panel."""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.regions import Region
from diagnostics.figures.style import BLUE, GREY, ORANGE, about, add_curve, finished, per_layer, tick
from diagnostics.runs.run import Run
from diagnostics.support.finite import finite_mean

SELECTION, STABILIZATION = "rgba(230, 159, 0, 0.16)", "rgba(0, 158, 115, 0.14)"
# Pixels: a panel, the room above it for its heading and legend, and the room above and below all panels.
PANEL, HEADING, ABOVE, BELOW = 170, 84, 150, 60


@dataclass(frozen=True)
class Panel:
    """One question with its axis and its two curves, (column of the layers table, name)."""

    question: str
    axis: str
    curves: tuple[tuple[str, str], ...]


PANELS = {
    "attention": Panel(
        "Where do decode positions look?",
        "share of attention",
        (("mass_prompt", "on the prompt"), ("mass_anchor", "on the anchors")),
    ),
    "uptake": Panel(
        "What do they take from the prompt?",
        "0 to 1; of the residual",
        (("selectivity", "selectivity"), ("prompt_contribution", "contribution")),
    ),
    "drift": Panel(
        "How much does a layer change the residual?",
        "1 - cosine",
        (("drift_prompt_centred", "prompt, centred"), ("drift_decode", "decode")),
    ),
    "lens": Panel(
        "How far is the prediction from the final one?",
        "KL, nats",
        (("lens_kl", "logit lens"), ("lens_kl_translated", "translated lens")),
    ),
}


def layer_curves(run: Run, recommendation: Recommendation | None = None) -> go.Figure:
    """Draw the probes layer by layer: the mean over prompts, with the band between their quartiles.

    Every panel has its own heading and legend. With a recommendation the selection region is shaded orange, the
    stabilization region green, and the cutoff is a line between the last layer that prompt tokens run through and the
    next.
    """
    n = len(PANELS)
    inside = n * PANEL + (n - 1) * HEADING
    height = inside + ABOVE + BELOW
    figure = make_subplots(rows=n, cols=1, shared_xaxes=True, vertical_spacing=HEADING / inside)
    for row, panel in enumerate(PANELS.values(), start=1):
        _draw(figure, run, panel, row)
        top = figure.layout[f"yaxis{row if row > 1 else ''}"].domain[1]
        heading = {"x": 0, "xref": "paper", "y": top, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(text=f"<b>{panel.question}</b>", yshift=26, font={"size": 14}, showarrow=False, **heading)
        figure.update_layout({_legend(row): {"orientation": "h", "x": 0, "y": top, "yanchor": "bottom"}})
    figure.update_xaxes(title_text="layer", row=n, col=1)
    if recommendation is not None:
        _mark_regions(figure, recommendation, _legend(n + 1))
    figure = finished(figure, "What each layer does with the prompt", height, about(run))
    regions = {"orientation": "h", "x": 0, "y": 1 - 58 / height, "yref": "container", "yanchor": "top"}
    return figure.update_layout({_legend(n + 1): regions}, margin={"t": ABOVE, "b": BELOW})


def layer_panel(run: Run, name: str, recommendation: Recommendation | None = None) -> go.Figure:
    """Draw one of ``PANELS`` alone, as `layer_curves` does; what it is of, its reader says once for all panels."""
    panel = PANELS[name]
    figure = make_subplots(rows=1, cols=1)
    _draw(figure, run, panel)
    figure.update_xaxes(title_text="layer")
    if recommendation is not None:
        _mark_regions(figure, recommendation, _legend(1))
    return finished(figure, panel.question, 330)


def layer_sentences(run: Run, recommendation: Recommendation | None = None) -> dict[str, str]:
    """Say in a sentence what each of ``PANELS`` shows of these prompts; "" where nothing was measured."""
    mean = {column: finite_mean(per_layer(run, column), axis=0) for p in PANELS.values() for column, _ in p.curves}
    cutoff = None if recommendation is None or recommendation.cutoff == run.n_layers else recommendation.cutoff
    return {
        "attention": _about_attention(mean["mass_prompt"]),
        "uptake": _about_uptake(mean["selectivity"], mean["prompt_contribution"], cutoff),
        "drift": _about_drift(mean["drift_prompt_centred"], cutoff),
        "lens": _about_lens(mean["lens_kl"]),
    }


def _draw(figure: go.Figure, run: Run, panel: Panel, row: int = 1) -> None:
    first = len(figure.data)
    for (column, name), colour in zip(panel.curves, (BLUE, ORANGE), strict=True):
        add_curve(figure, np.arange(run.n_layers), per_layer(run, column), name, colour, row=row)
    for trace in figure.data[first:]:
        trace.legend = _legend(row)
    figure.update_yaxes(title_text=panel.axis, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(dtick=tick(run.n_layers), range=[-0.5, run.n_layers - 0.5], row=row, col=1)


def _legend(number: int) -> str:
    return "legend" if number == 1 else f"legend{number}"


def _mark_regions(figure: go.Figure, recommendation: Recommendation, legend: str) -> None:
    for region, colour, name in (
        (recommendation.selection_region, SELECTION, "selection"),
        (recommendation.stabilization_region, STABILIZATION, "stabilization"),
    ):
        if isinstance(region, Region):
            figure.add_vrect(region.first - 0.5, region.last + 0.5, fillcolor=colour, line_width=0, layer="below")
            mark = {"size": 12, "symbol": "square", "color": colour.replace("0.1", "0.5")}
            label = f"{name} region"
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=mark, name=label, legend=legend))
    line = {"color": GREY, "width": 2, "dash": "dash"}
    figure.add_vline(recommendation.cutoff - 0.5, line=line)
    label = f"cutoff {recommendation.cutoff}"
    figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label, legend=legend))


# --- Sentences ---


def _about_attention(mass: np.ndarray) -> str:
    if not np.isfinite(mass).any():
        return ""
    top = int(np.nanargmax(mass))
    return (
        f"The prompt gets most attention in layer {top}, {mass[top]:.0%} of it. Attention alone is not use: much of it "
        "rests on tokens that all positions look at."
    )


def _about_uptake(selectivity: np.ndarray, contribution: np.ndarray, cutoff: int | None) -> str:
    if not (np.isfinite(selectivity).any() and np.isfinite(contribution).any()):
        return ""
    looks = f"Positions differ most in what they look at in layer {int(np.nanargmax(selectivity))}"
    total = np.nansum(contribution)
    if cutoff is None or not total > 0:
        return f"{looks}, and take most from the prompt in layer {int(np.nanargmax(contribution))}."
    above = np.nansum(contribution[cutoff:]) / total
    return f"{looks}. The layers above cutoff {cutoff} take {above:.0%} of what all layers take from the prompt."


def _about_drift(drift: np.ndarray, cutoff: int | None) -> str:
    if not np.isfinite(drift).any():
        return ""
    if cutoff is None:
        middle, most = np.nanmedian(drift), int(np.nanargmax(drift))
        return f"The median layer turns the prompt's residuals by {middle:.2f}; layer {most} turns them most."
    below, above = (f"{np.nanmedian(part):.2f}" for part in (drift[:cutoff], drift[cutoff:]))
    return (
        f"The median layer below cutoff {cutoff} turns the prompt's residuals by {below}, above it by {above}. "
        "Where the curve is low, a further layer changes little."
    )


def _about_lens(kl: np.ndarray) -> str:
    if not np.isfinite(kl).any():
        return ""
    late = np.flatnonzero(~(kl < np.nanmax(kl) / 2))
    first = int(late[-1]) + 1 if len(late) else 0
    if first >= len(kl):
        return "The prediction comes no nearer to the final one before the last layer."
    return f"From layer {first} on the prediction is less than half as far from the final one as it was at most."
