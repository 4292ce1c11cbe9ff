"""The text of a prompt as HTML: every token coloured by its segment, or by the attention that it receives."""

import html

import numpy as np
import pandas as pd

# Of the palette of `diagnostics.figures`: anchors blue, decode-phase tokens green, attention orange, evidence purple.
SEGMENTS = {"anchor": (0, 114, 178), "prompt": (138, 138, 138), "decode": (0, 158, 115)}
ATTENTION = (230, 130, 0)
EVIDENCE = "#CC79A7"
# Tokens shown at a time: a browser takes long over more.
PAGE_TOKENS = 4096
# Attention is heavy-tailed: the strongest tokens would leave all others white.
FULL_COLOUR_QUANTILE = 0.99

STYLE = "font: 14px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere"


def prompt_text(tokens: pd.DataFrame, layer: int | None, colour: str, first: int = 0) -> str:
    """Return the HTML of one prompt's rows of ``run.tokens``, ``PAGE_TOKENS`` of them from ``first``.

    ``colour`` is ``attention`` (received in one layer, or the mean over layers where ``layer`` is None; full colour
    at the 99th percentile of the prompt) or ``segment``. Evidence is underlined.
    """
    received = received_attention(tokens, layer)
    known = received[np.isfinite(received)]
    top = max(float(np.quantile(known, FULL_COLOUR_QUANTILE)), 1e-12) if len(known) else 1.0
    spans = []
    page = slice(first, first + PAGE_TOKENS)
    for row, weight in zip(tokens.iloc[page].itertuples(), received[page], strict=True):
        text = html.escape(str(row.text)).replace("\n", "\u21b5\n")
        if not text:
            continue
        note = f"token {row.position}, {row.segment}"
        if np.isfinite(weight):
            note += f", attention {weight:.2g}"
        if colour == "attention" and row.segment == "prompt":
            share = min(1.0, weight / top) if np.isfinite(weight) else 0.0
            background = _rgba(ATTENTION, 0.85 * share)
        else:
            background = _rgba(
                SEGMENTS.get(str(row.segment), SEGMENTS["prompt"]), 0.30 if row.segment != "prompt" else 0.08
            )
        line = f";border-bottom:2px solid {EVIDENCE}" if row.evidence else ""
        spans.append(f'<span title="{html.escape(note)}" style="background:{background}{line}">{text}</span>')
    return f'<div style="{STYLE}">{"".join(spans)}</div>'


def received_attention(tokens: pd.DataFrame, layer: int | None) -> np.ndarray:
    """Return the attention weight that each token receives in a layer, or on average over layers; NaN where unknown."""
    received = np.full(len(tokens), np.nan)
    for index, weights in enumerate(tokens["attention"]):
        if weights is not None and np.ndim(weights) == 1:
            received[index] = np.mean(weights) if layer is None else weights[layer]
    return received


def legend(colour: str) -> str:
    """Return the HTML that says what the colours mean."""
    names = {"anchor": "anchors", "decode": "decode phase (last prompt token and reference)"}
    if colour == "segment":
        names = {"anchor": "anchors", "prompt": "prompt", "decode": names["decode"]}
    boxes = [(_rgba(SEGMENTS[key], 0.3 if key != "prompt" else 0.1), name) for key, name in names.items()]
    if colour == "attention":
        boxes.append((_rgba(ATTENTION, 0.85), "prompt: attention received, mean over decode queries and heads"))
    marks = "".join(
        f'<span style="background:{box};padding:0 .7em;margin-right:.4em"></span>'
        f'<span style="margin-right:1.5em">{html.escape(name)}</span>'
        for box, name in boxes
    )
    return f'<div style="font-size:13px">{marks}<span style="border-bottom:2px solid {EVIDENCE}">evidence</span></div>'


def _rgba(colour: tuple[int, int, int], alpha: float) -> str:
    return f"rgba({colour[0]},{colour[1]},{colour[2]},{alpha:.2f})"
