"""Layers: the probes layer by layer, the heads, and one prompt looked at closely."""

import streamlit as st

from dashboard.catalog import Entry
from dashboard.prompt_text import PAGE_TOKENS, legend, prompt_text
from dashboard.state import current_run, md, saved_recommendation, show
from diagnostics import figures
from diagnostics.figures.lens import LENS_COLUMNS
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError

HEAD_MEASURES = {
    "selectivity": "selectivity: queries look at different prompt tokens",
    "mass_prompt": "attention on the prompt",
    "mass_anchor": "attention on the anchors",
    "mass_decode": "attention on decode-phase tokens",
    "prompt_entropy": "entropy of the attention over the prompt",
    "prompt_top5": "share of the prompt mass on the top 5% of tokens",
    "evidence_mass": "attention on the evidence",
}


def filtered(run: Run) -> tuple[str, ...]:
    """Let the reader choose categories and prompts; return the prompts that remain, all of them if none is chosen."""
    left, right = st.columns(2)
    categories = left.multiselect(
        "Categories", sorted(run.prompts["category"].unique()), placeholder="all", key="categories"
    )
    offered = run.prompts[run.prompts["category"].isin(categories)] if categories else run.prompts
    chosen = right.multiselect("Prompts", list(offered["prompt_id"]), placeholder="all", key="prompts")
    return tuple(chosen or offered["prompt_id"])


def curves(entry: Entry, run: Run, ids: tuple[str, ...]) -> None:
    """Show the layer curves and the heads of some prompts."""
    recommendation = saved_recommendation(entry)
    marked = st.toggle("Regions and cutoff of the whole run", value=True, key="regions")
    show(
        entry,
        "layers",
        lambda ids, marked: figures.layer_curves(run.select(ids), recommendation if marked else None),
        ids=ids,
        marked=marked,
    )
    measured = [name for name in HEAD_MEASURES if name in run.heads and run.heads[name].notna().any()]
    st.subheader("Heads")
    measure = st.selectbox("Measure", measured, format_func=HEAD_MEASURES.__getitem__, key="head_measure")
    if measure:
        show(entry, "heads", lambda ids, measure: figures.head_map(run.select(ids), measure), ids=ids, measure=measure)


@st.fragment
def one_prompt(entry: Entry, run: Run, ids: tuple[str, ...]) -> None:
    """Show one prompt's text, coloured, and its logit lens."""
    st.subheader("One prompt")
    kept = [i for i in ids if i in set(run.tokens["prompt_id"])]
    if not kept:
        st.info(
            "This run keeps no tokens of these prompts. `diagnose` and `recommend` keep those of the first "
            "`--detail-prompts` prompts (7 if not said otherwise)."
        )
        return
    left, middle, right = st.columns([2, 1, 2])
    prompt_id = left.selectbox("Prompt", kept, key="one_prompt")
    colour = middle.segmented_control("Colour", ["attention", "segment"], default="attention", key="colour")
    every = "mean over layers"
    layer = right.select_slider(
        "Attention received in layer", [every, *range(run.n_layers)], key="layer", disabled=colour == "segment"
    )
    tokens = run.tokens[run.tokens["prompt_id"] == prompt_id]
    first = 0
    if len(tokens) > PAGE_TOKENS:
        first = st.slider("From token", 0, len(tokens) - PAGE_TOKENS, 0, step=PAGE_TOKENS // 4, key="from_token")
    st.html(legend(colour or "segment"))
    with st.container(height=420, border=True):
        st.html(prompt_text(tokens, None if layer == every else int(layer), colour or "segment", first))
    row = run.prompts[run.prompts["prompt_id"] == prompt_id].iloc[0]
    st.caption(f"{row['n_prompt']:,} prompt tokens, {row['n_decode']} of the reference; category {md(row['category'])}")
    lens(entry, run, prompt_id)


def lens(entry: Entry, run: Run, prompt_id: str) -> None:
    """Show the logit lens of one prompt, some columns at a time."""
    positions = run.lens[run.lens["prompt_id"] == prompt_id]["position"].nunique()
    start = 0
    if positions > LENS_COLUMNS:
        start = st.slider("Logit lens from decode position", 0, positions - LENS_COLUMNS, 0, key="from_position")
    try:
        show(
            entry,
            "logit lens",
            lambda prompt_id, start: figures.logit_lens(run, prompt_id, start, LENS_COLUMNS),
            prompt_id=prompt_id,
            start=start,
        )
    except UserError as error:  # a fragment that runs alone is not below main.py
        st.info(md(error))


entry, run = current_run()
st.title("What each layer does with the prompt")
chosen = filtered(run)
curves(entry, run, chosen)
one_prompt(entry, run, chosen)
with st.expander("What the measures mean"):
    columns = run.manifest.get("columns")
    for name, meaning in columns.items() if isinstance(columns, dict) else ():
        st.markdown(f"**{md(name)}**: {md(meaning)}")
