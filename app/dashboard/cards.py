"""Cards: a few numbers, each with its name, what it is of, and a definition on demand."""

from collections.abc import Iterable
from dataclasses import dataclass

import streamlit as st

from dashboard.look import CARD
from dashboard.markdown import md
from diagnostics.support.glossary import GLOSSARY


@dataclass(frozen=True)
class Card:
    """One number.

    Parameters
    ----------
    name
        What it is, in a word or two.
    value
        The number, as it is shown.
    note
        What it is of, or its unit.
    term
        The word of the glossary that defines it.
    """

    name: str
    value: str
    note: str
    term: str


def cards(shown: Iterable[Card]) -> None:
    """Show cards side by side, in as many rows as the window needs."""
    row = st.container(horizontal=True)
    for card in shown:
        with row.container(border=True, key=f"{CARD} {card.name}"):
            st.metric(card.name, card.value, help=GLOSSARY[card.term])
            st.caption(md(card.note))
