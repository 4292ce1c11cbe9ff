"""What a reader takes from the page *Cutoff*: the recommendation, the figures, and the Python that uses the cutoff."""

import os
from typing import Any

import streamlit as st

from dashboard.catalog import Entry
from dashboard.markdown import md
from dashboard.state import download, is_example
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.runs.places import RECOMMENDATION

PROMPT = "Write one sentence about the sea."


def export(entry: Entry, rec: Recommendation, cutoff: int, figures: dict[str, Any]) -> None:
    """Offer the recommendation, the figures, and the Python that uses the cutoff."""
    st.subheader("Take it with you")
    row = st.container(horizontal=True)
    name = entry.name.replace("/", "-")
    download(row, "Recommendation", rec.to_json(), f"{name}-recommendation.json", "application/json")
    for title, figure in figures.items():
        # 5 MB: made when it is asked for.
        html = lambda figure=figure: figure.to_html(include_plotlyjs=True)  # noqa: E731
        download(row, f"Figure of the {title}", html, f"{name}-{title}.html", "text/html")
    save(row, entry, rec)
    st.caption("The figures are pages that need no network; as PNG: the camera above each.")
    anchors = rec.data["anchors"]
    settings = f"cutoff={cutoff}" + ("" if anchors == 1 else f", anchors={anchors}")
    st.code(
        f"""from diagnostics import SpeedPolicy, load_model

lm = load_model({rec.data["model"]!r})
policy = SpeedPolicy({settings})
inputs = lm.tokenizer({PROMPT!r}, return_tensors="pt").to(lm.device)
with policy(lm.model):
    tokens = lm.model.generate(**inputs, max_new_tokens=64)
print(lm.tokenizer.decode(tokens[0], skip_special_tokens=True))""",
        language="python",
    )


def save(place: Any, entry: Entry, rec: Recommendation) -> None:
    """Offer to save the recommendation with the run; one that is there is replaced only when that is confirmed."""
    label, icon = "Save in the run folder", ":material/save:"
    if is_example():
        place.button(label, icon=icon, disabled=True, key="save", help="The example is for reading only.")
        return
    if os.path.lexists(entry.path / RECOMMENDATION):
        place = place.popover(label, icon=icon)
        place.markdown(f"**{md(entry.name)}** has a {md(RECOMMENDATION)} already. The dashboard and policies read it.")
        label = f"Replace it: cutoff {rec.cutoff}"
    if place.button(label, icon=icon, key="save"):
        rec.save(entry.path / RECOMMENDATION)
        st.toast(f"Saved: {RECOMMENDATION} with cutoff {rec.cutoff}")
