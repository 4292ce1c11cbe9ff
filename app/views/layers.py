"""Layers: the probes layer by layer, the heads, and one prompt looked at closely; one section at a time."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import streamlit as st

from dashboard.address import bind, flag, keep, one_of, some_of, whole
from dashboard.catalog import Entry
from dashboard.markdown import md
from dashboard.prompt_text import PAGE_TOKENS, attention_of_head, legend, measured_at, prompt_text
from dashboard.state import current_run, saved_recommendation, show
from diagnostics import figures
from diagnostics.figures.heads import HEAD_MEASURES
from diagnostics.figures.layers import PANELS
from diagnostics.figures.lens import LENS_COLUMNS
from diagnostics.runs.run import Run
from diagnostics.support.glossary import GLOSSARY

EVERY = "mean over layers"
COLOURS = ("selectivity", "attention", "segment")
# Pixels: the head map and the text stand side by side where both fit.
SIDE, TEXT_BOX = 470, 420
NAMED_TOKENS = 5
NO_TOKENS = (
    "This run keeps no tokens of its prompts. `diagnose` and `recommend` keep those of the first "
    "`--detail-prompts` prompts (7 if not said otherwise)."
)
TERMS = {"attention": "attention mass", "uptake": "selectivity", "drift": "drift", "lens": "logit lens"}
# Columns of a run by what they answer, by the beginnings of their names; the longest that fits counts.
DEFINED = {
    PANELS["attention"].question: ("mass_", "evidence_", "attention"),
    PANELS["uptake"].question: ("selectivity", "prompt_", "removal_"),
    PANELS["drift"].question: ("drift_", "update_", "to_final_"),
    PANELS["lens"].question: ("lens_", "n_lens_"),
    "Which prompt tokens matter?": ("saliency_",),
    "What does a cutoff lose?": ("kl", "top1_", "nll"),
    "What do rules read?": (
        *("rank_variance", "window_", "lazy_", "attention_cosine", "attention_update", "angular_", "cka_"),
        *("head_gate", "oracle_", "leave_one_", "fisher_"),
    ),
}
ADDED = "Of probes that were added"


def filtered(entry: Entry, run: Run) -> tuple[str, ...]:
    """Let the reader choose categories and prompts; return the prompts that remain, all of them if none is chosen."""
    left, right = st.columns(2)
    every = sorted(run.prompts["category"].unique())
    bind("categories", "category", [], some_of(every), of=entry.name)
    categories = left.multiselect("Categories", every, placeholder="all", key="categories")
    offered = list(run.prompts.loc[run.prompts["category"].isin(categories or every), "prompt_id"])
    bind("prompts", "prompt", [], some_of(offered), of=f"{entry.name} {categories}")
    chosen = right.multiselect("Prompts", offered, placeholder="all", key="prompts")
    return tuple(chosen or offered)


def curves(entry: Entry, run: Run) -> None:
    """Show each panel of the layer curves with a sentence on it."""
    ids = filtered(entry, run)
    bind("regions", "regions", True, flag())
    marked = st.toggle(
        "Regions and cutoff of the whole run",
        key="regions",
        help=f"{GLOSSARY['selection region']} {GLOSSARY['stabilization region']} {GLOSSARY['cutoff']}",
    )
    recommendation = saved_recommendation(entry) if marked else None
    n = f"{len(ids)} prompt{'s' if len(ids) > 1 else ''}"
    st.caption(f"{md(run.manifest['model'])}: mean over {n}, with the band between the quartiles.")
    sentences = figures.layer_sentences(run.select(ids), recommendation)
    for name in PANELS:
        show(
            entry,
            f"layers {name}",
            lambda panel, ids, marked: figures.layer_panel(run.select(ids), panel, recommendation),
            note=sentences[name],
            help=GLOSSARY[TERMS[name]],
            panel=name,
            ids=ids,
            marked=marked,
        )


def heads(entry: Entry, run: Run) -> None:
    """Show one measure of all heads; a click on one, or the selectors, shows what it looks at in a prompt."""
    ids = filtered(entry, run)
    measured = [name for name in HEAD_MEASURES if name in run.heads and run.heads[name].notna().any()]
    if not measured:
        st.info("This run has no measure per head.")
        return
    bind("head_measure", "measure", measured[0], one_of(measured), of=entry.name)
    measure = str(st.selectbox("Measure", measured, format_func=HEAD_MEASURES.__getitem__, key="head_measure"))
    mean = np.nan_to_num(np.nanmean(run.array(measure), axis=0), nan=-np.inf)
    n_layers, n_heads = mean.shape
    # Until one is chosen: the head with the most of it.
    first = [int(i) for i in np.unravel_index(np.argmax(mean), mean.shape)]
    row = st.container(horizontal=True, gap="medium")
    with row.container(width=SIDE):
        left, right = st.columns(2)
        bind("head_layer", "layer", first[0], one_of(range(n_layers)), of=entry.name)
        layer = int(left.selectbox("Layer", range(n_layers), key="head_layer"))
        bind("head", "head", first[1], one_of(range(n_heads)), of=entry.name)
        head = int(right.selectbox("Head", range(n_heads), key="head"))
        show(
            entry,
            "heads",
            lambda ids, measure, marked: figures.head_map(run.select(ids), measure, marked),
            note="A click on a cell shows what that head looks at.",
            table=lambda: run.heads[run.heads["prompt_id"].isin(ids)][["prompt_id", "layer", "head", measure]],
            on_select=lambda: choose_head(entry),
            ids=ids,
            measure=measure,
            marked=(layer, head),
        )
    with row.container(width=SIDE):
        one_head(entry, run, layer, head)


def choose_head(entry: Entry) -> None:
    """Take the head that was clicked."""
    points = st.session_state["figure heads"]["selection"]["points"]
    if points:
        keep("layer", int(points[-1]["y"]), of=entry.name)
        keep("head", int(points[-1]["x"]), of=entry.name)


def one_head(entry: Entry, run: Run, layer: int, head: int) -> None:
    """Show what a head looks at in one prompt."""
    of_runs = run.head_tokens
    if of_runs.empty:
        st.info(
            NO_TOKENS
            if run.tokens.empty
            else "This run was made before the tokens of every head were kept: diagnose the model again to see them."
        )
        return
    prompt_id = choose_prompt(entry, list(dict.fromkeys(of_runs["prompt_id"])))
    tokens = run.tokens[run.tokens["prompt_id"] == prompt_id]
    rows = of_runs[(of_runs["prompt_id"] == prompt_id) & (of_runs["layer"] == layer) & (of_runs["head"] == head)]
    st.markdown(f"##### Layer {layer}, head {head}")
    st.markdown(head_sentence(tokens, rows))
    text_box(tokens, "head", attention_of_head(tokens, rows))


def head_sentence(tokens: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Say which tokens of a prompt a head attends to most, and how much of its attention they get together."""
    top = rows.nlargest(NAMED_TOKENS, "attention")
    texts = tokens.set_index("position")["text"]
    visible = (str(texts.get(position, "")).replace(" ", "·").replace("\n", "↵") for position in top["position"])
    named = ", ".join(f"**{md(text)}**" for text in visible)
    if not named:
        return "It gives no attention to this prompt."
    return f"Most attention goes to {named}: {top['attention'].sum():.0%} of all attention that this head gives."


def one_prompt(entry: Entry, run: Run) -> None:
    """Show one prompt's text, coloured."""
    kept_prompts = list(dict.fromkeys(run.tokens["prompt_id"]))
    if not kept_prompts:
        st.info(NO_TOKENS)
        return
    row = st.container(horizontal=True, vertical_alignment="bottom")
    with row.container(width=300):
        prompt_id = choose_prompt(entry, kept_prompts)
    colours = [name for name in COLOURS if name == "segment" or name in run.tokens]
    bind("colour", "colour", colours[0], one_of(colours), of=entry.name)
    with row.container(width=300):
        colour = str(st.segmented_control("Colour", colours, required=True, key="colour"))
    bind("layer", "text_layer", EVERY, one_of([EVERY, *range(run.n_layers)]), of=entry.name)
    with row.container(width=300):
        layer = st.select_slider("In layer", [EVERY, *range(run.n_layers)], key="layer", disabled=colour == "segment")
    if "selectivity" not in colours:
        st.caption("This run was made before selectivity was kept by token: diagnose the model again to colour by it.")
    elif colour != "segment":
        st.caption(GLOSSARY["selectivity" if colour == "selectivity" else "attention mass"])
    tokens = run.tokens[run.tokens["prompt_id"] == prompt_id]
    weights = None if colour == "segment" else measured_at(tokens, colour, None if layer == EVERY else int(layer))
    text_box(tokens, colour, weights)
    about = run.prompts[run.prompts["prompt_id"] == prompt_id].iloc[0]
    st.caption(
        f"{about['n_prompt']:,} prompt tokens, {about['n_decode']} of the reference; category {md(about['category'])}"
    )


def choose_prompt(entry: Entry, kept_prompts: list[str]) -> str:
    """Let the reader choose one of the prompts whose tokens are kept."""
    bind("one_prompt", "one_prompt", kept_prompts[0], one_of(kept_prompts), of=entry.name)
    return str(st.selectbox("Prompt", kept_prompts, key="one_prompt"))


def text_box(tokens: pd.DataFrame, colour: str, weights: np.ndarray | None) -> None:
    """Show the text of a prompt in a box that scrolls, long ones in pages."""
    first = 0
    if len(tokens) > PAGE_TOKENS:
        first = st.slider("From token", 0, len(tokens) - PAGE_TOKENS, 0, step=PAGE_TOKENS // 4, key="from_token")
    st.html(legend(colour))
    with st.container(height=TEXT_BOX, border=True):
        st.html(prompt_text(tokens, colour, weights, first))


def lens(entry: Entry, run: Run) -> None:
    """Show the logit lens of one prompt, some columns at a time."""
    kept_prompts = list(dict.fromkeys(run.lens["prompt_id"]))
    if not kept_prompts:
        st.info(NO_TOKENS)
        return
    prompt_id = choose_prompt(entry, kept_prompts)
    rows = run.lens[run.lens["prompt_id"] == prompt_id]
    last = rows["position"].nunique() - LENS_COLUMNS
    start = 0
    if last > 0:
        bind("from_position", "position", 0, whole(0, last), of=f"{entry.name} {prompt_id}")
        start = st.slider("From decode position", 0, last, key="from_position")
    show(
        entry,
        "logit lens",
        lambda prompt_id, start: figures.logit_lens(run, prompt_id, start, LENS_COLUMNS),
        note="Each column is one next token, each row what the model would say after that layer; bold is what it says "
        "in the end.",
        help=GLOSSARY["logit lens"],
        table=rows,
        prompt_id=prompt_id,
        start=start,
    )


def definitions(entry: Entry, run: Run) -> None:
    """Say what the columns of the run mean, by the question that they answer."""
    found = run.manifest.get("columns")
    columns = dict(found) if isinstance(found, dict) else {}
    groups: dict[str, list[str]] = {title: [] for title in (*DEFINED, ADDED)}
    for column in columns:
        groups[group_of(column)].append(column)
    for title, group in groups.items():
        if group:
            st.markdown(f"##### {title}")
            lines = [{"Column": md(column), "Meaning": md(columns[column])} for column in group]
            st.table(pd.DataFrame(lines).set_index("Column"))


def group_of(column: str) -> str:
    """Return the question that a column answers."""
    fitting = [(len(start), title) for title, starts in DEFINED.items() for start in starts if column.startswith(start)]
    return max(fitting)[1] if fitting else ADDED


SECTIONS: dict[str, Callable[[Entry, Run], None]] = {
    "Curves": curves,
    "Heads": heads,
    "One prompt": one_prompt,
    "Logit lens": lens,
    "Definitions": definitions,
}

st.title("What each layer does with the prompt")
chosen_entry, chosen_run = current_run()
bind("section", "section", "Curves", one_of(SECTIONS))
section = st.segmented_control("Section", list(SECTIONS), required=True, key="section", label_visibility="collapsed")
SECTIONS[str(section)](chosen_entry, chosen_run)
