"""Overview: which runs there are, the headline of the chosen one, and a way in for runs from elsewhere."""

import os

import pandas as pd
import streamlit as st

from dashboard.catalog import Entry
from dashboard.headline import headline, headline_savings
from dashboard.state import (
    current_entry,
    empty_state,
    entries,
    look_at,
    look_into,
    md,
    missing_run,
    runs_folder,
    saved_recommendation,
)
from dashboard.upload import MAX_MEGABYTES, import_zip
from diagnostics.support.errors import UserError


def row(entry: Entry) -> dict[str, object]:
    """Return one line of the table of runs."""
    line: dict[str, object] = {"run": entry.name, "status": entry.status, "problem": entry.problem}
    if entry.manifest is None:
        return line
    line |= {"model": entry.manifest["model"], "prompts": entry.finished_prompts, "layers": entry.manifest["n_layers"]}
    line["context"] = entry.manifest["identity"].get("context_length")
    line["made"] = str(entry.manifest.get("created", ""))[:16].replace("T", " ")
    if entry.readable:
        try:
            data = saved_recommendation(entry).data
        except UserError as error:
            return line | {"status": "damaged", "problem": str(error)}
        at = data["evidence"][data["cutoff"] - 1]
        savings = headline_savings(data)
        line |= {"cutoff": data["cutoff"], "KL": at["kl"], "bound": at["kl_bound"], "TTFT": savings["ttft_ratio"]}
    return line


def choose(listed: list[Entry]) -> None:
    """Make the clicked line the run that all pages look at."""
    chosen = st.session_state["runs_table"]["selection"]["rows"]
    if chosen and listed[chosen[0]].readable:
        look_at(listed[chosen[0]].name)


def table(listed: list[Entry]) -> None:
    """Show what lies in the folder; a click chooses a run."""
    columns = [
        "run",
        "model",
        "status",
        "cutoff",
        "layers",
        "KL",
        "bound",
        "TTFT",
        "prompts",
        "context",
        "made",
        "problem",
    ]
    lines = pd.DataFrame([row(entry) for entry in listed]).reindex(columns=columns)
    if lines["problem"].isna().all():
        lines = lines.drop(columns="problem")
    st.dataframe(
        lines,
        hide_index=True,
        width="stretch",
        on_select=lambda: choose(listed),
        selection_mode="single-row",
        key="runs_table",
        column_config={
            "cutoff": st.column_config.NumberColumn(
                "cutoff", help="recommended: layers that prompt tokens run through"
            ),
            "KL": st.column_config.NumberColumn("KL", format="%.3f", help="at the cutoff, nats per token, mean"),
            "bound": st.column_config.NumberColumn("bound", format="%.3f", help="upper 95% bound of that mean"),
            "TTFT": st.column_config.NumberColumn(
                "TTFT", format="%.2f", help="predicted at 8192 prompt tokens, of full depth"
            ),
            "context": st.column_config.NumberColumn("context", help="tokens per prompt at most"),
            "problem": st.column_config.TextColumn("problem", width="large"),
        },
    )


def upload() -> None:
    """Take in a run folder from elsewhere."""
    with st.expander("Add a run from another machine, or look into another folder", icon=":material/upload:"):
        given = st.file_uploader(
            f"A run folder as a zip file, {MAX_MEGABYTES} MB unpacked at most",
            type="zip",
            key="zip",
            max_upload_size=MAX_MEGABYTES,
        )
        if given is not None and st.button("Add it to the folder", key="add"):
            try:
                name = import_zip(given.getvalue(), given.name, runs_folder())
            except UserError as error:
                st.error(md(error))
            else:
                st.session_state["added"] = name
                st.rerun()
        if name := st.session_state.pop("added", None):
            st.success(f"Added: {md(name)}")
        folder = st.text_input("Folder of runs, or one run", value=str(runs_folder()), key="folder_asked")
        if folder != str(runs_folder()) and st.button("Look into it", key="look"):
            if os.path.isdir(os.path.expanduser(folder)):
                look_into(folder)
                st.rerun()
            st.error(f"There is no folder {md(folder)}.")


st.title("How deep must a prompt go?")
# Folders with a benchmark and nothing else, and the like, have a page of their own.
runs = [entry for entry in entries() if entry.status != entry.kind]
if runs:
    table(runs)
else:
    empty_state()
if runs and current_entry() is None:
    missing_run()
if (chosen := current_entry()) is not None:
    headline(chosen)
upload()
