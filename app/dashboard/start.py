"""What a visitor without runs sees, and the banner above the example."""

import streamlit as st

from dashboard.address import kept, text
from dashboard.state import empty_state, is_example, look_into
from dashboard.steps import steps


def start() -> None:
    """Say what this is, and lead on."""
    st.markdown(
        "A language model can read a long prompt in its lower layers only and still answer at full depth. "
        "This dashboard shows how deep *your* model must read: what every depth saves, and what it changes."
    )
    steps()
    empty_state()


def example_banner() -> None:
    """Say that the example is shown, and lead back to where it was looked at from."""
    if not is_example():
        return
    row = st.container(horizontal=True, vertical_alignment="center")
    row.info("You are looking at the example: results of a small model, for reading only.", icon=":material/school:")
    if kept("folder", "", text()) and row.button("Back to your runs", icon=":material/arrow_back:", key="leave"):
        look_into("")
        st.rerun()
