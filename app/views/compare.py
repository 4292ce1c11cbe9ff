"""Compare: several models or runs on relative depth."""

from typing import Any

import pandas as pd
import streamlit as st

from dashboard.address import bind, number, one_of, some_of
from dashboard.catalog import Entry
from dashboard.differences import differing_settings
from dashboard.ending import end_page
from dashboard.markdown import md
from dashboard.state import current_entry, empty_state, entries, open_run, recommendation, runs_folder, show
from diagnostics import figures
from diagnostics.runs.run import Run
from diagnostics.support.glossary import GLOSSARY

MEASURES = {
    "kl": "loss: KL from full depth",
    "top1_agreement": "same top token",
    "selectivity": "selectivity",
    "prompt_contribution": "contribution of the prompt",
    "mass_prompt": "attention on the prompt",
    "drift_prompt_centred": "drift of the prompt, centred",
    "saliency_overlap": "overlap of salient tokens",
    "lens_kl": "logit lens: KL from the end",
}
LOSSES = ("kl", "top1_agreement")  # measured by the sweep alone
MOST_AT_FIRST = 6


def first_choice(readable: dict[str, Entry]) -> list[str]:
    """Return the runs that are compared before the reader chooses: finished ones, the newest first."""
    finished = [name for name, entry in readable.items() if entry.status == "complete"]
    current = current_entry()
    return finished[:MOST_AT_FIRST] or ([current.name] if current else [])


def colours_of(names: list[str]) -> list[str]:
    """Return a colour for each run; a run keeps its colour while others come and go."""
    kept: dict[str, str] = st.session_state.setdefault("colours of runs", {})
    for name in names:
        taken = [kept[other] for other in names if other in kept and other != name]
        if name not in kept or kept[name] in taken:
            kept[name] = next((colour for colour in figures.PALETTE if colour not in taken), figures.PALETTE[0])
    return [kept[name] for name in names]


def line(name: str, entry: Entry, run: Run, limit: float) -> dict[str, Any]:
    """Return one line of the table: what a run recommends under the goal of all."""
    recommended = recommendation(entry, {"max_kl": limit})
    data = recommended.data
    at = recommended.evidence[recommended.cutoff - 1] if recommended.measured else {}
    return {
        "run": name,
        "model": run.manifest["model"],
        "cutoff": data["cutoff"],
        "layers": run.n_layers,
        "depth": data["depth_fraction"],
        "KL": at.get("kl"),
        "bound": at.get("kl_bound"),
        "same top token": at.get("top1_agreement"),
        "prompts": len(run.prompts),
    }


st.title("Runs side by side")
readable = {entry.name: entry for entry in entries() if entry.readable}
if not readable:
    empty_state()
    end_page()
bind("compared", "compared", first_choice(readable), some_of(readable), of=str(runs_folder()), always=True)
chosen = st.multiselect("Runs", list(readable), key="compared")
left, right = st.columns(2)
bind("measure", "measure", "kl", one_of(MEASURES))
measure = left.selectbox("Measure", list(MEASURES), format_func=MEASURES.__getitem__, key="measure")
bind("same_goal", "max_kl", 0.1, number(0.005, 1.0))
limit = right.slider(
    "Goal of the table: KL at most, nats per token", 0.005, 1.0, step=0.005, format="%.3f", key="same_goal"
)
if not chosen:
    st.info("Choose at least one run.")
    end_page()
runs = [open_run(readable[name]) for name in chosen]
colours = colours_of(chosen)
unmeasured = [name for name, run in zip(chosen, runs, strict=True) if not run.has_sweep]
if unmeasured:
    st.info(f"No loss was measured in {md(', '.join(unmeasured))}: the cutoff there is by our rule.")
drawn = [i for i, name in enumerate(chosen) if measure not in LOSSES or name not in unmeasured]
if drawn:
    show(
        readable[chosen[0]],
        "comparison",
        # By their names here: in their own folders those of every fine-tuning are called the same.
        lambda measure, colours, **_: figures.compare_runs(
            [runs[i] for i in drawn], measure, [chosen[i] for i in drawn], colours
        ),
        measure=measure,
        colours=tuple(colours[i] for i in drawn),
        runs=tuple((chosen[i], readable[chosen[i]].signature) for i in drawn),
    )
lines = [line(name, readable[name], run, limit) for name, run in zip(chosen, runs, strict=True)]
config = {
    column: st.column_config.Column(help=GLOSSARY[term])
    for column, term in (("cutoff", "cutoff"), ("KL", "KL"), ("bound", "bound"), ("same top token", "same top token"))
}
st.dataframe(pd.DataFrame(lines).round(3), hide_index=True, width="stretch", column_config=config, placeholder="")
if len(runs) > 1:
    st.markdown("##### What differs in their settings")
    differing = differing_settings(dict(zip(chosen, runs, strict=True)))
    if differing.empty:
        st.caption("Nothing: they were made with the same settings.")
    else:
        st.dataframe(differing, hide_index=True, width="stretch", placeholder="")
