"""Overview: which runs there are, the headline of the chosen one, and a way in for runs from elsewhere."""

import os

import pandas as pd
import streamlit as st

from dashboard.address import keep
from dashboard.catalog import Entry
from dashboard.headline import headline, savings_at
from dashboard.markdown import md
from dashboard.start import start
from dashboard.state import (
    current_entry,
    current_name,
    entries,
    is_example,
    look_at,
    look_into,
    missing_run,
    open_run,
    runs_folder,
    saved_recommendation,
)
from dashboard.upload import MAX_MEGABYTES, import_zip
from diagnostics.cutoffs.answer import ANSWER_LENGTH
from diagnostics.support.errors import UserError


def row(entry: Entry) -> dict[str, object]:
    """Return one line of the table of runs."""
    line: dict[str, object] = {"run": entry.name, "status": entry.status, "problem": reason(entry, entry.problem)}
    if entry.manifest is None:
        return line
    line |= {"model": entry.manifest["model"], "prompts": entry.finished_prompts, "layers": entry.manifest["n_layers"]}
    line["context"] = entry.manifest["identity"].get("context_length")
    line["made"] = str(entry.manifest.get("created", ""))[:16].replace("T", " ")
    if entry.readable:
        try:
            recommended = saved_recommendation(entry)
            savings = savings_at(open_run(entry), recommended.cutoff, ANSWER_LENGTH)
        except UserError as error:
            return line | {"status": "damaged", "problem": reason(entry, str(error))}
        line |= {"cutoff": recommended.cutoff, "TTFT": savings.ttft_ratio}
        if recommended.measured:
            at = recommended.evidence[recommended.cutoff - 1]
            line |= {"KL": at["kl"], "bound": at["kl_bound"]}
    return line


def reason(entry: Entry, problem: str | None) -> str | None:
    """Return what is wrong without the path, which hides the rest in a column: the line names the run."""
    return problem and problem.replace(f"{str(entry.path)!r} ", "").replace(f"{entry.path}{os.sep}", "")


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
        "problem",
        "cutoff",
        "layers",
        "KL",
        "bound",
        "TTFT",
        "prompts",
        "context",
        "made",
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
        placeholder="",
        column_config={
            "cutoff": st.column_config.NumberColumn(
                "cutoff", help="recommended: layers that prompt tokens run through"
            ),
            "KL": st.column_config.NumberColumn(
                "KL", format="%.3f", help="at the cutoff, nats per token, mean; empty where no loss was measured"
            ),
            "bound": st.column_config.NumberColumn("bound", format="%.3f", help="upper 95% bound of that mean"),
            "TTFT": st.column_config.NumberColumn(
                "TTFT", format="%.2f", help="predicted at 8192 prompt tokens, of full depth"
            ),
            "context": st.column_config.NumberColumn("context", help="tokens per prompt at most"),
            "problem": st.column_config.TextColumn("problem", width="large"),
        },
    )


# What chooses each kind of results in the address, and the page that shows it; runs are shown here.
PAGES = {
    "evaluation": ("evaluation", "quality"),
    "benchmark": ("benchmark", "benchmark"),
    "fine-tuning": ("finetuning", "finetuning"),
}


def upload() -> None:
    """Take in results from elsewhere, and open them on their page."""
    with st.expander("Add results from another machine, or look into another folder", icon=":material/upload:"):
        if is_example():
            st.caption("The example is for reading only: go back to your runs to add some.")
        else:
            add()
        folder = st.text_input("Folder of runs, or one run", value=str(runs_folder()), key="folder_asked")
        if folder != str(runs_folder()) and st.button("Look into it", key="look"):
            if os.path.isdir(os.path.expanduser(folder)):
                look_into(folder)
                st.rerun()
            st.error(f"There is no folder {md(folder)}.")


def add() -> None:
    """Unpack a zip file into the folder."""
    given = st.file_uploader(
        "A folder as a zip file: a run, an evaluation, a benchmark, or a fine-tuning, whose weights stay out; "
        f"{MAX_MEGABYTES} MB unpacked at most",
        type="zip",
        key="zip",
        max_upload_size=MAX_MEGABYTES,
    )
    if given is None or not st.button("Add it to the folder", key="add"):
        return
    try:
        name = import_zip(given.getvalue(), given.name, runs_folder())
    except UserError as error:
        st.error(md(error))
        return
    st.toast(f"Added: {md(name)}", icon=":material/check:")
    entry = next(entry for entry in entries() if entry.name == name)
    if entry.manifest is None and entry.kind is not None:
        chooser, page = PAGES[entry.kind]
        keep(chooser, name, of=str(runs_folder()))
        st.switch_page(f"views/{page}.py")
    look_at(name)
    st.rerun()


st.title("How deep must a prompt go?")
# Folders with a benchmark and nothing else, and the like, have a page of their own.
runs = [entry for entry in entries() if entry.status != entry.kind]
if (chosen := current_entry()) is not None:
    headline(chosen)
elif runs or current_name():
    missing_run()
else:
    start()
if runs:
    st.markdown("##### All runs")
    table(runs)
upload()
