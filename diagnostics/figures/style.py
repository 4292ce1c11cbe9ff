"""Shared parts of all figures: colours, curves with their spread, axes, layout.

Colours are those of Okabe and Ito (2008), which people with any colour vision can distinguish, without their yellow,
which is hardly visible on white.
"""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb

from diagnostics.runs.run import Run

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BROWN, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#8A8A8A"),
)
# Pixels that stay above a figure without its title, for panels' titles and labels of lines.
LEAST_ABOVE = 28
TITLE_PLACE = {"x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}}
TITLE_HEIGHT, LEGEND_HEIGHT = 60, 50  # pixels
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BROWN, GREY)
# Of all heat maps: from dark to light, so that texts on it have contrast, on light and dark pages.
SEQUENTIAL = "Viridis"
COLOR_BAR = {"thickness": 10, "xpad": 4, "outlinewidth": 0}
DARK_TEXT, LIGHT_TEXT = "#050505", "#FFFFFF"


def per_layer(run: Run, column: str) -> np.ndarray:
    """Return a column of the layers table as [prompts, layers], or of the cutoffs table as [prompts, cutoffs 1..L]."""
    table, axis = (run.layers, "layer") if column in run.layers else (run.cutoffs, "cutoff")
    wide = table.pivot(index="prompt_id", columns=axis, values=column).sort_index(axis=1)
    return wide.loc[run.prompts["prompt_id"]].to_numpy(float)


def add_curve(
    figure: go.Figure, x: np.ndarray, values: np.ndarray, name: str, colour: str, row: int | None = None
) -> None:
    """Add the mean over prompts of ``values`` [prompts, x], with the band between its quartiles."""
    panel = {} if row is None else {"row": row, "col": 1}
    finite = np.isfinite(values)
    if len(values) > 1:
        filled = np.where(finite, values, np.nan)
        filled[:, ~finite.any(axis=0)] = 0  # not drawn: the mean is missing there
        low, high = np.nanquantile(filled, [0.25, 0.75], axis=0)
        band = {"x": x, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        lower, upper = ({"name": f"{name}, {end} quartile", "legendgroup": name} | band for end in ("lower", "upper"))
        figure.add_trace(go.Scatter(y=low, **lower), **panel)
        figure.add_trace(go.Scatter(y=high, fill="tonexty", fillcolor=faint(colour), **upper), **panel)
    mean = np.where(finite, values, 0).sum(axis=0) / np.where(finite.any(axis=0), finite.sum(axis=0), np.nan)
    hover = f"{name}<br>%{{x}}: %{{y:.3f}}<extra></extra>"
    line = go.Scatter(x=x, y=mean, mode="lines", name=name, legendgroup=name, line={"color": colour})
    figure.add_trace(line.update(hovertemplate=hover), **panel)


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
    """Add one curve with markers; ``hover`` is a format string for its name."""
    hover = hover.format(name) + "<extra></extra>"
    trace = go.Scatter(x=x, y=y, mode="lines+markers", name=name, line={"color": colour}, hovertemplate=hover, **more)
    figure.add_trace(trace, **({} if figure._grid_ref is None else {"row": row, "col": col}))


def about(run: Run) -> str:
    """Return the subject of a run's figure, for the title: the model and the number of prompts."""
    n = len(run.prompts)
    return f"{literal(run.manifest['model'])}, {n} prompt{'s' if n > 1 else ''}"


def literal(text: object) -> str:
    """Escape a name so that plotly shows it unchanged: it interprets ``<b>`` and the like as markup."""
    return html.escape(str(text), quote=False)


def tick(n: int) -> int:
    """Return the tick step of an axis of ``n`` integers, so that labels do not overlap."""
    return next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, n) if n / step <= 20)


def faint(colour: str) -> str:
    """Return a transparent version of a palette colour, for a band."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def readable_on(shares: np.ndarray) -> np.ndarray:
    """Return for places on ``SEQUENTIAL``, 0 to 1, the text colour with more contrast, by relative luminance (WCAG)."""
    known = np.nan_to_num(np.asarray(shares, float)).clip(0, 1)
    rgb = np.array([unlabel_rgb(colour) for colour in sample_colorscale(SEQUENTIAL, known.ravel().tolist())]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = (linear @ [0.2126, 0.7152, 0.0722]).reshape(known.shape)
    return np.where(luminance > 0.1825, DARK_TEXT, LIGHT_TEXT)


def finished(figure: go.Figure, title: str, height: int, subject: str = "") -> go.Figure:
    """Set a figure's title, height in pixels, and the layout that all figures share.

    ``subject`` says what was measured; it has a separate line, since plotly cuts a line that is wider than the window.
    """
    both = title if not subject else f'{title}<br><span style="font-size: 13px">{subject}</span>'
    return (
        figure.update_layout(
            # Always at the top: a legend of two rows fits between title and curves.
            title={"text": both, "font": {"size": 17}} | TITLE_PLACE,
            meta={"title": title, "subject": subject},
            height=height,
            margin={"l": 70, "r": 20, "t": TITLE_HEIGHT + LEGEND_HEIGHT, "b": 60},
            paper_bgcolor="rgba(0, 0, 0, 0)",
            plot_bgcolor="rgba(0, 0, 0, 0)",
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            hovermode="closest",
            modebar={"bgcolor": "rgba(0, 0, 0, 0)"},
        )
        .update_xaxes(showgrid=True, gridcolor="rgba(128, 128, 128, 0.18)", zeroline=False)
        .update_yaxes(showgrid=True, gridcolor="rgba(128, 128, 128, 0.18)", zeroline=False)
    )


def legend_at_each_panel(figure: go.Figure) -> go.Figure:
    """Give every panel of a figure, one above the other, a legend of its own, just above its curves.

    Call it after `finished`; panels need about 0.12 of vertical spacing for it.
    """
    for trace in figure.data:
        number = (trace.yaxis or "y")[1:]
        trace.legend = f"legend{number}"
        top = figure.layout[f"yaxis{number}"].domain[1]
        figure.layout[trace.legend] = {"orientation": "h", "x": 0, "y": top, "yref": "paper", "yanchor": "bottom"}
    return figure


def title_of(figure: go.Figure) -> tuple[str, str]:
    """Return a figure's title and subject as plain text, without plotly's markup."""
    meta = figure.layout.meta or {}
    return html.unescape(meta.get("title", "")), html.unescape(meta.get("subject", ""))


def without_title(figure: go.Figure) -> go.Figure:
    """Return a copy without the title and the room for it, for a page that has it as a heading: plotly cuts titles."""
    bare = go.Figure(figure)
    bare.layout.title = None
    # A legend makes room for itself, however many rows it has.
    room = max(0, bare.layout.margin.t - LEAST_ABOVE)
    bare.layout.margin.t -= room
    bare.layout.height -= room
    return bare
