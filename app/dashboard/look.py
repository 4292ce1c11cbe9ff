"""The look of all pages: the styles that Streamlit's own settings do not reach."""

from typing import Any

import streamlit as st

CARD = "speed-card"
HEADING = "speed-heading"
WIDE, NARROW = "speed-wide", "speed-narrow"
STYLES = f"""<style>
/* The toolbar above is small: no need for six lines of white below it. */
[data-testid="stMainBlockContainer"] {{ padding-top: 2.75rem; }}
[data-testid="stMainBlockContainer"] h1 {{ padding-top: 0; }}
/* Cards: as many beside each other as fit; a number is never cut, the text below it wraps. */
[data-testid="stLayoutWrapper"]:has(> [class*="st-key-{CARD}"]) {{
    flex: 1 1 11rem; min-width: max-content; max-width: 22rem; }}
[class*="st-key-{CARD}"] {{ gap: 0.25rem; height: 100%; }}
[class*="st-key-{CARD}"] [data-testid="stCaptionContainer"] {{ contain: inline-size; }}
[class*="st-key-{CARD}"] [data-testid="stMetricValue"] {{ font-size: 1.75rem; }}
[class*="st-key-{CARD}"] [data-testid="stMetric"] * {{ overflow: visible; text-overflow: clip; }}
/* A figure's heading wraps beside its download. */
[class*="st-key-{HEADING}"] > [data-testid="stElementContainer"]:first-child {{ flex: 1 1 0; min-width: 0; }}
/* Beside each other where there is room, else one below the other. */
[data-testid="stLayoutWrapper"]:has(> .st-key-{WIDE}) {{ flex: 3 1 28rem; min-width: 0; }}
[data-testid="stLayoutWrapper"]:has(> .st-key-{NARROW}) {{ flex: 1 1 13rem; }}
</style>"""


def dress() -> None:
    """Put the styles on the page."""
    st.html(STYLES)


def beside() -> tuple[Any, Any]:
    """Return two containers, a wide and a narrow one: beside each other where the window has the room. Once a page."""
    row = st.container(horizontal=True)
    return row.container(key=WIDE), row.container(key=NARROW)
