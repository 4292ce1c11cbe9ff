"""The text of a prompt as HTML: every token coloured by its segment, or by what was measured at it."""

import html

import numpy as np
import pandas as pd

# Of the palette of `diagnostics.figures`: anchors blue, decode-phase tokens green, measures orange, evidence purple.
SEGMENTS = {"anchor": (0, 114, 178), "prompt": (138, 138, 138), "decode": (0, 158, 115)}
MEASURE = (230, 130, 0)
EVIDENCE = "#CC79A7"
# Tokens shown at a time: a browser takes long over more.
PAGE_TOKENS = 4096
# Measures are heavy-tailed: the strongest tokens would leave all others white.
FULL_COLOUR_QUANTILE = 0.99
FULL_OPACITY = 0.85
# On stronger colours text is dark also where the page is dark.
DARK_TEXT_FROM = 0.55
MEANINGS = {
    "selectivity": "its part of the selectivity",
    "attention": "attention it receives, mean over decode positions and heads",
    "head": "attention it receives from this head, mean over decode positions",
}

STYLE = "font: 14px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere"


def prompt_text(tokens: pd.DataFrame, colour: str, weights: np.ndarray | None = None, first: int = 0) -> str:
    """Return the HTML of one prompt's rows of ``run.tokens``, ``PAGE_TOKENS`` of them from ``first``.

    ``colour`` is ``segment``, or the name of a measure whose ``weights`` [tokens], >= 0 and NaN where unknown, colour
    the tokens of the prompt; full colour is the 99th percentile of the prompt. Evidence is underlined.
    """
    weights = np.full(len(tokens), np.nan) if weights is None else weights
    known = weights[np.isfinite(weights)]
    top = max(float(np.quantile(known, FULL_COLOUR_QUANTILE)), 1e-12) if len(known) else 1.0
    spans = []
    page = slice(first, first + PAGE_TOKENS)
    for row, weight in zip(tokens.iloc[page].itertuples(), weights[page], strict=True):
        text = html.escape(str(row.text)).replace("\n", "\u21b5\n")
        if not text:
            continue
        note = f"token {row.position}, {row.segment}"
        if np.isfinite(weight):
            note += f", {'attention' if colour == 'head' else colour} {weight:.2g}"
        opacity = 0.30 if row.segment != "prompt" else 0.08
        background = _rgba(SEGMENTS.get(str(row.segment), SEGMENTS["prompt"]), opacity)
        if colour != "segment" and row.segment == "prompt":
            opacity = FULL_OPACITY * min(1.0, weight / top) if np.isfinite(weight) else 0.0
            background = _rgba(MEASURE, opacity)
        style = f"background:{background}"
        if opacity >= DARK_TEXT_FROM:
            style += ";color:#050505"
        if row.evidence:
            style += f";border-bottom:2px solid {EVIDENCE}"
        spans.append(f'<span title="{html.escape(note)}" style="{style}">{text}</span>')
    return f'<div style="{STYLE}">{"".join(spans)}</div>'


def measured_at(tokens: pd.DataFrame, column: str, layer: int | None) -> np.ndarray:
    """Return a measure of each token, ``attention`` or ``selectivity``, in a layer or as the mean over layers.

    NaN where it is unknown.
    """
    values = np.full(len(tokens), np.nan)
    for index, weights in enumerate(tokens[column]):
        if weights is not None and np.ndim(weights) == 1:
            values[index] = np.mean(weights) if layer is None else weights[layer]
    return values


def attention_of_head(tokens: pd.DataFrame, head_tokens: pd.DataFrame) -> np.ndarray:
    """Return the attention of one head, from its rows of ``run.head_tokens``, on each token; NaN where not kept."""
    return tokens["position"].map(head_tokens.set_index("position")["attention"]).to_numpy(float)


def legend(colour: str) -> str:
    """Return the HTML that says what the colours mean."""
    names = {"anchor": "anchors", "decode": "decode phase (last prompt token and reference)"}
    if colour == "segment":
        names = {"anchor": "anchors", "prompt": "prompt", "decode": names["decode"]}
    boxes = [(_rgba(SEGMENTS[key], 0.3 if key != "prompt" else 0.1), name) for key, name in names.items()]
    if colour != "segment":
        boxes.append((_rgba(MEASURE, FULL_OPACITY), f"token of the prompt: {MEANINGS[colour]}"))
    marks = "".join(
        f'<span style="background:{box};padding:0 .7em;margin-right:.4em"></span>'
        f'<span style="margin-right:1.5em">{html.escape(name)}</span>'
        for box, name in boxes
    )
    return f'<div style="font-size:13px">{marks}<span style="border-bottom:2px solid {EVIDENCE}">evidence</span></div>'


def _rgba(colour: tuple[int, int, int], alpha: float) -> str:
    return f"rgba({colour[0]},{colour[1]},{colour[2]},{alpha:.2f})"
