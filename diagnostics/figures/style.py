"""What all figures share: colours, curves with their spread, axes, layout.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart, without their yellow,
which does not show on white.
"""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from diagnostics.runs.run import Run

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BROWN, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#8A8A8A"),
)
TITLE_PLACE = {"x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}}
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BROWN, GREY)


def per_layer(run: Run, column: str) -> np.ndarray:
    """Return one measure [prompt, layer], or [prompt, L] of a cutoff's; of measures per head the mean over heads."""
    table, axis = (run.layers, "layer") if column in run.layers else (run.cutoffs, "cutoff")
    wide = table.pivot(index="prompt_id", columns=axis, values=column).sort_index(axis=1)
    return wide.loc[run.prompts["prompt_id"]].to_numpy(float)


def add_curve(
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
        figure.add_trace(go.Scatter(y=high, fill="tonexty", fillcolor=faint(colour), legendgroup=name, **band), **place)
    mean = np.where(counted, values, 0).sum(axis=0) / np.where(counted.any(axis=0), counted.sum(axis=0), np.nan)
    hover = f"{name}<br>%{{x}}: %{{y:.3f}}<extra></extra>"
    line = go.Scatter(x=x, y=mean, mode="lines", name=name, legendgroup=name, line={"color": colour})
    figure.add_trace(line.update(hovertemplate=hover), **place)


def add_line(
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
    """Add one curve with markers; ``hover`` has a place for its name."""
    hover = hover.format(name) + "<extra></extra>"
    trace = go.Scatter(x=x, y=y, mode="lines+markers", name=name, line={"color": colour}, hovertemplate=hover, **more)
    figure.add_trace(trace, **({} if figure._grid_ref is None else {"row": row, "col": col}))


def about(run: Run) -> str:
    """Say whose figure it is, for the title."""
    n = len(run.prompts)
    return f"{literal(run.manifest['model'])}, {n} prompt{'s' if n > 1 else ''}"


def literal(text: object) -> str:
    """Return a name so that plotly shows it as it is: it takes ``<b>`` and the like for markup."""
    return html.escape(str(text), quote=False)


def tick(n: int) -> int:
    """Step of an axis of ``n`` whole numbers, so that labels do not crowd."""
    return next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, n) if n / step <= 20)


def faint(colour: str) -> str:
    """Return a colour of the palette for a band."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def finished(figure: go.Figure, title: str, height: int, subject: str = "") -> go.Figure:
    """Give a figure its title, height in pixels, and the layout that all share.

    ``subject`` says what was measured; it has a line of its own, since plotly cuts a line that the window cannot hold.
    """
    if subject:
        title = f'{title}<br><span style="font-size: 13px">{subject}</span>'
    return (
        figure.update_layout(
            # At the top, whatever is below it: a legend of two rows has room between title and curves.
            title={"text": title, "font": {"size": 17}} | TITLE_PLACE,
            height=height,
            margin={"l": 70, "r": 20, "t": 110, "b": 60},
            paper_bgcolor="rgba(0, 0, 0, 0)",
            plot_bgcolor="rgba(0, 0, 0, 0)",
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            hovermode="closest",
            modebar={"bgcolor": "rgba(0, 0, 0, 0)"},
        )
        .update_xaxes(showgrid=True, gridcolor="rgba(128, 128, 128, 0.18)", zeroline=False)
        .update_yaxes(showgrid=True, gridcolor="rgba(128, 128, 128, 0.18)", zeroline=False)
    )
