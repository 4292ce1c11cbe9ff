"""The chosen run in a few figures: its cutoff, what it costs, what it saves, and whether the regions agree."""

from typing import Any

import streamlit as st

from dashboard.cards import Card, cards
from dashboard.catalog import Entry
from dashboard.state import md, open_run, saved_recommendation
from diagnostics.cutoffs.regions import Region


def headline(entry: Entry) -> None:
    """Show the headline evidence of a run."""
    run, recommendation = open_run(entry), saved_recommendation(entry)
    data = recommendation.data
    at = data["evidence"][recommendation.cutoff - 1]
    savings = headline_savings(data)
    st.subheader(f"{md(run.manifest['model'])}: cutoff {recommendation.cutoff} of {run.n_layers} layers")
    asked = {name.replace("_", " "): value for name, value in data["criterion"].items()}
    goals = ", ".join(name if value is True else f"{name} {value:g}" for name, value in asked.items())
    st.caption(f"{len(run.prompts)} prompts of {md(run.manifest.get('prompt_set', ''))}; goal: {md(goals)}")
    bound = "" if at["kl_bound"] is None else f", bound {at['kl_bound']:.3f}"
    length = f"{savings['n_prompt']:,} tokens"
    cards(
        [
            Card(
                "Cutoff",
                f"{recommendation.cutoff} / {run.n_layers}",
                f"{data['depth_fraction']:.0%} of the depth",
                "cutoff",
            ),
            Card("KL from full depth", f"{at['kl']:.3f}", f"nats per token{bound}", "KL"),
            Card("Same top token", f"{at['top1_agreement']:.1%}", "of decode positions", "same top token"),
            Card("TTFT", f"{savings['ttft_ratio']:.2f}", f"of full, predicted at {length}", "TTFT"),
            Card("KV cache", f"{savings['kv_ratio']:.2f}", f"of full, at {length}", "KV cache"),
        ]
    )
    left, right = st.columns(2)
    left.markdown(f"**Selection region** {_region(recommendation.selection_region)}")
    right.markdown(f"**Stabilization region** {_region(recommendation.stabilization_region)}")
    st.markdown(_agreement(data["agreement"]))
    for note in data["notes"]:
        st.caption(f":material/info: {md(note)}")


def headline_savings(data: dict[str, Any]) -> dict[str, Any]:
    """Return what a recommendation predicts for long prompts: at 8192 tokens, or at its first length."""
    return next((s for s in data["predicted"] if s["n_prompt"] == 8192), data["predicted"][0])


def _region(region: Region | None) -> str:
    if region is None:
        return "none found"
    ends = ""
    if region.first_range and region.last_range:
        (a, b), (c, d) = region.first_range, region.last_range
        ends = f" (90% of resamples: first {a} to {b}, last {c} to {d})"
    return f"layers {region.first} to {region.last}{ends}"


def _agreement(agreement: dict[str, object]) -> str:
    sources = {"above the selection": "cutoff_by_selection", "at the start of stabilization": "cutoff_by_stabilization"}
    cutoffs = [f"{where} {agreement[key]}" for where, key in sources.items() if agreement[key] is not None]
    if not cutoffs:
        return "The regions put the cutoff nowhere; the measured loss decides."
    verdict = "agree with" if agreement["agree"] else "**differ from**"
    return f"The regions put the cutoff {', '.join(cutoffs)}: they {verdict} the measured loss, which decides."
