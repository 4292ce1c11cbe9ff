"""SPEED in three steps, as a picture that suits light and dark pages and any width."""

from base64 import b64encode

import streamlit as st

ROWS, SIDE, GAP = 6, 11, 3
ANCHOR, PROMPT, DECODE = "#E69F00", "#56B4E9", "#009E73"
N_PROMPT, N_DECODE = 9, 3


def steps(cutoff: int | None = None, n_layers: int | None = None) -> None:
    """Show the three steps, for a cutoff of so many layers or in general."""
    low = 4 if cutoff is None or n_layers is None else min(ROWS, max(1, round(ROWS * cutoff / n_layers)))
    k = "k" if cutoff is None else str(cutoff)
    every = "all layers" if n_layers is None else f"all {n_layers} layers"
    told = [
        (
            "1. Read",
            f"The prompt runs through the lower {k} layers only, its first token, the anchor, through {every}.",
        ),
        ("2. Keep", f"Keys and values of the prompt are kept in these {k} layers; above them only the anchor's are."),
        ("3. Answer", f"The last prompt token and every new one run through {every}: shallow prefill, deep decode."),
    ]
    pictures = [_picture(low, reads=True), _picture(low), _picture(low, answers=True)]
    parts = [
        f'<figure style="flex:1 1 13rem;margin:0">{picture}<figcaption style="font-size:0.875rem;line-height:1.4">'
        f"<strong>{title}</strong><br>{text}</figcaption></figure>"
        for picture, (title, text) in zip(pictures, told, strict=True)
    ]
    colours = {"anchor": ANCHOR, "prompt": PROMPT, "decode phase": DECODE}
    key = ", ".join(f'<span style="color:{colour}">■</span> {name}' for name, colour in colours.items())
    key = f"Tokens in columns, layers in rows: {key}; filled runs, pale is kept, dashed is neither."
    strip = f'<div class="speed-steps" style="display:flex;flex-wrap:wrap;gap:1rem 2rem">{"".join(parts)}</div>'
    st.html(f'{strip}<div style="font-size:0.8rem;opacity:0.7;margin-top:0.6rem">{key}</div>')


def _picture(low: int, *, reads: bool = False, answers: bool = False) -> str:
    """Draw tokens in columns and layers in rows, the last layer on top: filled is computed, outlined is kept."""
    cells = []
    for column in range(1 + N_PROMPT + N_DECODE):
        is_decode = column > N_PROMPT
        colour = ANCHOR if column == 0 else DECODE if is_decode else PROMPT
        for row in range(ROWS):
            x, y = column * (SIDE + GAP) + 1, (ROWS - 1 - row) * (SIDE + GAP) + 1
            box = f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" rx="2"'
            if is_decode and not answers:
                continue
            if 0 < column <= N_PROMPT and row >= low:
                cells.append(f'{box} fill="none" stroke="#888" stroke-opacity="0.5" stroke-dasharray="2 2"/>')
            elif reads or is_decode:
                cells.append(f'{box} fill="{colour}"/>')
            else:
                cells.append(f'{box} fill="{colour}" fill-opacity="0.3" stroke="{colour}"/>')
    width, height = (1 + N_PROMPT + N_DECODE) * (SIDE + GAP), ROWS * (SIDE + GAP)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"{''.join(cells)}</svg>"
    )
    # As an image: Streamlit takes SVG elements out of a page's HTML.
    source = f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
    return f'<img src="{source}" alt="" style="max-width:100%;margin-bottom:0.4rem">'
