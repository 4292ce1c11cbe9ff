"""The logit lens of one prompt: what every layer would say next."""

import html

import numpy as np
import plotly.graph_objects as go

from diagnostics.figures.style import COLOR_BAR, SEQUENTIAL, TITLE_HEIGHT, finished, literal, readable_on, tick
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError

LENS_COLUMNS = 8
# Characters of a token that fit a column where a page is narrow.
LONGEST = 7


def logit_lens(run: Run, prompt_id: str, first: int = 0, count: int = LENS_COLUMNS) -> go.Figure:
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
    probability = grid["lens_probability"].astype(float)
    agrees = grid["lens_token"] == grid["lens_token"][-1]
    tokens = run.tokens[run.tokens["prompt_id"] == prompt_id].set_index("position")["text"]
    columns = np.arange(len(positions))
    following = [_visible(tokens.get(position + 1, "")) for position in positions]
    figure = go.Figure(
        go.Heatmap(
            x=columns,
            z=probability,
            customdata=np.vectorize(_visible, otypes=[object])(grid["lens_text"]),
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            xgap=1,
            ygap=1,
            colorbar=COLOR_BAR,
            hovertemplate="after layer %{y}: %{customdata}, probability %{z:.3f}<extra></extra>",
        )
    )
    cells = np.vectorize(_cell, otypes=[object])(grid["lens_text"], agrees)
    colours = readable_on(probability)
    for colour in np.unique(colours):
        layer, column = np.nonzero(colours == colour)
        figure.add_trace(
            go.Scatter(
                x=column,
                y=layer,
                text=cells[layer, column],
                mode="text",
                textfont={"size": 11, "color": str(colour)},
                showlegend=False,
                hoverinfo="skip",
            )
        )
    labels = [_shortened(token) for token in following]
    figure.update_xaxes(title_text="next token of the reference", tickvals=columns, ticktext=labels, tickangle=0)
    figure.update_yaxes(title_text="after layer", dtick=tick(run.n_layers), range=[-0.5, run.n_layers - 0.5])
    subject = f"{literal(run.manifest['model'])}, prompt {literal(prompt_id)}"
    figure = finished(figure, "Probability of the most likely token", TITLE_HEIGHT + 70 + 20 * run.n_layers, subject)
    return figure.update_layout(margin={"t": TITLE_HEIGHT + 10})


def _visible(text: str) -> str:
    """Make white space visible, and escape markup in a token."""
    return literal(text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7"))


def _shortened(visible: str, most: int = LONGEST) -> str:
    text = html.unescape(visible)
    return visible if len(text) <= most else literal(text[: most - 1]) + "\u2026"


def _cell(text: str, agrees: bool) -> str:
    short = _shortened(_visible(text))
    return f"<b>{short}</b>" if agrees else short
