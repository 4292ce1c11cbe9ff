"""Compare: several models or runs on relative depth."""

import pandas as pd
import streamlit as st

from dashboard.address import bind, some_of
from dashboard.state import current_entry, empty_state, entries, open_run, recommendation, runs_folder, show
from diagnostics import figures

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


st.title("Runs side by side")
readable = {entry.name: entry for entry in entries() if entry.readable}
if not readable:
    empty_state()
    st.stop()
current = current_entry()
first = list(readable)[:6] if len(readable) > 1 else [current.name] if current else []
bind("compared", "compared", first, some_of(readable), of=str(runs_folder()), always=True)
chosen = st.multiselect("Runs", list(readable), key="compared")
left, right = st.columns(2)
measure = left.selectbox("Measure", list(MEASURES), format_func=MEASURES.__getitem__, key="measure")
limit = right.slider(
    "Goal of the table: KL at most, nats per token", 0.005, 1.0, 0.1, 0.005, format="%.3f", key="same_goal"
)
if not chosen:
    st.info("Choose at least one run.")
    st.stop()
runs = [open_run(readable[name]) for name in chosen]
signatures = tuple((name, readable[name].signature) for name in chosen)
show(
    readable[chosen[0]],
    "comparison",
    # By their names here: in their own folders those of every fine-tuning are called the same.
    lambda measure, **_: figures.compare_runs(runs, measure, chosen),
    measure=measure,
    runs=signatures,
)
lines = []
for name, run in zip(chosen, runs, strict=True):
    data = recommendation(readable[name], {"max_kl": limit}).data
    at = data["evidence"][data["cutoff"] - 1]
    identity = run.manifest["identity"]
    lines.append(
        {
            "run": name,
            "model": run.manifest["model"],
            "cutoff": data["cutoff"],
            "layers": run.n_layers,
            "depth": data["depth_fraction"],
            "KL": at["kl"],
            "bound": at["kl_bound"],
            "same top token": at["top1_agreement"],
            "prompts": len(run.prompts),
            "context": identity.get("context_length"),
            "anchors": identity["anchors"],
        }
    )
st.dataframe(pd.DataFrame(lines).round(3), hide_index=True, width="stretch")
