"""The chosen run at a glance: the answer in one sentence, the measured loss, the numbers, and the ways onwards."""

import re
from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard.address import bind, one_of
from dashboard.cards import Card, cards
from dashboard.catalog import Entry
from dashboard.markdown import md
from dashboard.state import goals_problem, open_run, saved_recommendation, show
from dashboard.steps import steps
from diagnostics.cutoffs.answer import ANSWER_LENGTH, answer
from diagnostics.cutoffs.goals import goals_in_words
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.region_verdicts import region_verdict
from diagnostics.cutoffs.savings import Savings, predict_savings
from diagnostics.runs.run import Run

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def headline(entry: Entry) -> None:
    """Show the headline evidence of a run."""
    run, recommendation = open_run(entry), saved_recommendation(entry)
    sentence = st.container()
    row = st.container(horizontal=True, vertical_alignment="center")
    subject = row.container()
    n_prompt = choose_length(row)
    savings = savings_at(run, recommendation.cutoff, n_prompt)
    at_length = replace(recommendation, data=recommendation.data | {"predicted": [savings.to_dict()]})
    sentence.markdown(f"#### {md(answer(at_length, n_prompt))}")
    of = f"{len(run.prompts)} prompts"
    measured = f"measured on {of}" if recommendation.measured else f"its layers on {of}; no loss was measured"
    subject.caption(f"{md(run.manifest['model'])}, {measured}. Goal: {md(goal(recommendation))}.")
    if problem := goals_problem(entry):
        st.warning(md(problem))
    show(
        entry,
        "headline",
        lambda **_: _figure(run, recommendation),
        goals=tuple(recommendation.data["criterion"].items()),
    )
    numbers(run, recommendation, savings)
    onwards()
    st.markdown("##### What SPEED does at this cutoff")
    steps(recommendation.cutoff, run.n_layers)
    with st.expander("How sure is this?", icon=":material/help:"):
        st.markdown(agreement(recommendation))
        for note in recommendation.data["notes"]:
            st.markdown(f"- {plain(note)}")


def choose_length(place: Any) -> int:
    """Let the reader choose for which length of prompts savings are predicted; all pages share the choice."""
    bind("length", "length", ANSWER_LENGTH, one_of(LENGTHS))
    label = "Length of your prompts, tokens"
    return int(place.select_slider(label, LENGTHS, format_func="{:,}".format, key="length", width=250))


def savings_at(run: Run, cutoff: int, n_prompt: int) -> Savings:
    """Return what a cutoff is predicted to save at a length."""
    shape, anchors = run.manifest["shape"], int(run.manifest["identity"]["anchors"])
    positions = run.manifest["max_positions"]
    return predict_savings(shape, cutoff, anchors=anchors, lengths=[n_prompt], max_positions=positions)[0]


def numbers(run: Run, recommendation: Recommendation, savings: Savings) -> None:
    """Show the cutoff, what it changes and what it saves."""
    length = f"{savings.n_prompt:,} tokens"
    cards(
        [
            Card(
                "Cutoff",
                f"{recommendation.cutoff} / {run.n_layers}",
                f"layers, {recommendation.data['depth_fraction']:.0%} of the depth",
                "cutoff",
            ),
            *loss_cards(recommendation),
            Card("TTFT", f"{savings.ttft_ratio:.2f}", f"of full depth, predicted at {length}", "TTFT"),
            Card("KV cache", f"{savings.kv_ratio:.2f}", f"of full depth, at {length}", "KV cache"),
        ]
    )


def loss_cards(recommendation: Recommendation) -> list[Card]:
    """Return what the cutoff changes; where no loss was measured, what our rule goes by."""
    if not recommendation.measured:
        return [uptake_card(recommendation, recommendation.cutoff)]
    at = recommendation.evidence[recommendation.cutoff - 1]
    bound = "" if at["kl_bound"] is None else f", at most {at['kl_bound']:.3f} by its bound"
    return [
        Card("KL from full depth", f"{at['kl']:.3f}", f"nats per token{bound}", "KL"),
        Card("Same top token", f"{at['top1_agreement']:.1%}", "of decode positions", "same top token"),
    ]


def uptake_card(recommendation: Recommendation, cutoff: int) -> Card:
    """Return the uptake that a cutoff leaves above it, which our rule limits."""
    left = float(recommendation.regions.uptake[cutoff:].sum())
    limit = recommendation.data["agreement"]["max_uptake_above"]
    return Card("Uptake left above", f"{left:.3f}", f"our rule allows {limit:.3g}; no loss was measured", "uptake")


def onwards() -> None:
    """Lead to the pages that say why, try it, and give it away."""
    ways = {
        "Why this cutoff?": ("layers", ":material/layers:"),
        "Try it": ("playground", ":material/play_arrow:"),
        "Take it": ("cutoff", ":material/download:"),
    }
    row = st.container(horizontal=True)
    for label, (page, icon) in ways.items():
        if row.button(label, icon=icon, key=f"to {page}", type="primary" if page == "layers" else "secondary"):
            st.switch_page(f"views/{page}.py")


def goal(recommendation: Recommendation) -> str:
    """Say in words what was asked of the cutoff."""
    criterion = recommendation.data["criterion"]
    sure = (
        ""
        if "kv_budget" in criterion or not recommendation.measured
        else f", with {criterion['confidence']:.0%} confidence"
    )
    return f"{goals_in_words(criterion)}{sure}"


def plain(note: object) -> str:
    """Return a note without the argument of Python that it names at its end."""
    return md(re.sub(r" \(`[^`]*`\)$", "", str(note)))


def agreement(recommendation: Recommendation) -> str:
    """Say what the regions are, where the layers alone put the cutoff, and whether the measured loss agrees."""
    selection, stabilization = recommendation.selection_region, recommendation.stabilization_region
    parts = []
    if selection is not None:
        parts.append(f"Layers {selection.first} to {selection.last} select from the prompt.")
    parts.append(md(region_verdict(recommendation)))
    if stabilization is None:
        parts.append("No stabilization region was found: the prompt changes up to the last layers.")
    else:
        parts.append(
            f"From layer {stabilization.first} on the prompt hardly changes, which says nothing of the cutoff."
        )
    return " ".join(parts)


def _figure(run: Run, recommendation: Recommendation) -> Any:
    from diagnostics.figures import measured_loss, uptake_above

    return (measured_loss if recommendation.measured else uptake_above)(run, recommendation)
