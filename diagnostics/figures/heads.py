"""The heads of all layers as a map of one measure."""

import numpy as np
import plotly.graph_objects as go

from diagnostics.figures.style import COLOR_BAR, SEQUENTIAL, TITLE_HEIGHT, VERMILION, about, finished, tick
from diagnostics.runs.run import Run

# Columns of the heads table, in words.
HEAD_MEASURES = {
    "selectivity": "selectivity",
    "mass_prompt": "attention on the prompt",
    "mass_anchor": "attention on the anchors",
    "mass_decode": "attention on decode-phase tokens",
    "prompt_entropy": "entropy of the attention over the prompt",
    "prompt_top5": "share of the prompt mass on the top 5% of tokens",
    "evidence_mass": "attention on the evidence",
}


def head_map(run: Run, column: str = "selectivity", marked: tuple[int, int] | None = None) -> go.Figure:
    """Draw one measure per layer and head, mean over prompts; layer 0 at the bottom.

    ``marked`` is a (layer, head) to frame. Every cell has an invisible point above it, (x, y) = (head, layer): plotly
    reports clicks on points, not on cells. Raises ValueError for a column that is not measured per head.
    """
    values = run.array(column)
    if values.ndim != 3:
        raise ValueError(f"{column} is not measured per head")
    mean = np.nanmean(values, axis=0) if np.isfinite(values).any() else values[0]
    name = HEAD_MEASURES.get(column, column)
    n_layers, n_heads = mean.shape
    figure = go.Figure(go.Heatmap(z=mean, colorscale=SEQUENTIAL, colorbar=COLOR_BAR, hoverinfo="skip"))
    layer, head = np.indices(mean.shape).reshape(2, -1)
    figure.add_trace(
        go.Scatter(
            x=head,
            y=layer,
            customdata=mean.ravel(),
            mode="markers",
            marker={"opacity": 0, "size": 14},
            selected={"marker": {"opacity": 0}},
            unselected={"marker": {"opacity": 0}},
            showlegend=False,
            hovertemplate=f"layer %{{y}}, head %{{x}}<br>{name} %{{customdata:.3f}}<extra></extra>",
        )
    )
    if marked is not None:
        y, x = marked
        figure.add_shape(
            type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line={"color": VERMILION, "width": 3}
        )
    figure.update_xaxes(title_text="head", dtick=tick(n_heads), range=[-0.5, n_heads - 0.5])
    figure.update_yaxes(title_text="layer", dtick=tick(n_layers), range=[-0.5, n_layers - 0.5])
    title = f"{name[0].upper()}{name[1:]} of every head"
    figure = finished(figure, title, TITLE_HEIGHT + 70 + min(900, max(120, 13 * n_layers)), about(run))
    # Without a limit the nearest point is found from everywhere in its cell.
    return figure.update_layout(hoverdistance=-1, margin={"t": TITLE_HEIGHT + 10})
