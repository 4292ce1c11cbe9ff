"""The look of all pages: the styles that Streamlit's own settings do not reach."""

import streamlit as st

CARD = "speed-card"
STYLES = f"""<style>
/* The toolbar above is small: no need for six lines of white below it. */
[data-testid="stMainBlockContainer"] {{ padding-top: 2.75rem; }}
[data-testid="stMainBlockContainer"] h1 {{ padding-top: 0; }}
/* Cards: as many beside each other as fit; a number is never cut, the text below it wraps. */
[data-testid="stLayoutWrapper"]:has(> [class*="st-key-{CARD}"]) {{
    flex: 1 1 11rem; min-width: max-content; max-width: 22rem; }}
[class*="st-key-{CARD}"] {{ gap: 0.25rem; }}
[class*="st-key-{CARD}"] [data-testid="stCaptionContainer"] {{ contain: inline-size; }}
[class*="st-key-{CARD}"] [data-testid="stMetricValue"] {{ font-size: 1.75rem; }}
[class*="st-key-{CARD}"] [data-testid="stMetric"] * {{ overflow: visible; text-overflow: clip; }}
</style>"""


def dress() -> None:
    """Put the styles on the page."""
    st.html(STYLES)
