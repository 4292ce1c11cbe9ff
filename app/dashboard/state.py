"""What pages know of the session: the folder of runs, the run that is looked at, and what was computed from it.

Everything expensive is cached by what a folder contains, so a run that changes is read again; caches are bounded.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard.catalog import Entry, Signature, find_runs
from diagnostics.cli.dashboard import RUNS_VARIABLE
from diagnostics.cutoffs.recommendation import Recommendation, recommend
from diagnostics.runs.run import Run, load_run
from diagnostics.support.errors import UserError

# Key of the session's state: the names of the runs that are compared.
COMPARED = "compared_runs"


def runs_folder() -> Path:
    """Return the folder whose runs are shown."""
    return Path(os.path.expanduser(st.session_state.get("folder") or os.environ.get(RUNS_VARIABLE, "runs")))


def entries() -> list[Entry]:
    """List what lies in the folder of runs, as it is now."""
    return find_runs(runs_folder())


def current_entry() -> Entry | None:
    """Return the entry chosen in the sidebar."""
    name = st.session_state.get("run")
    return next((entry for entry in entries() if entry.name == name and entry.readable), None)


def current_run() -> tuple[Entry, Run]:
    """Return the run to show; where there is none, say what to do and end the page."""
    entry = current_entry()
    if entry is None:
        empty_state()
        st.stop()
        raise AssertionError  # st.stop does not return
    return entry, open_run(entry)


def open_run(entry: Entry) -> Run:
    """Read a run; raise UserError for one that cannot be read."""
    return _load(str(entry.path), entry.signature)


def recommendation(entry: Entry, goals: dict[str, float]) -> Recommendation:
    """Recommend a cutoff for a run and goals (none: the default); raise UserError for goals that make no sense."""
    return _recommend(str(entry.path), entry.signature, tuple(sorted(goals.items())))


def saved_recommendation(entry: Entry) -> Recommendation:
    """Recommend by the goals that were saved with the run, if there are any."""
    try:
        return recommendation(entry, entry.goals)
    except (UserError, TypeError):  # goals written by hand
        return recommendation(entry, {})


def show(entry: Entry, name: str, draw: Callable[..., Any], **values: Any) -> Any:
    """Show the figure that ``draw(**values)`` makes of an entry, drawn once for its name and plain values."""
    figure = _figure(draw, name, str(entry.path), entry.signature, values)
    options = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2, "filename": name}}
    st.plotly_chart(figure, width="stretch", config=options, key=f"figure {name}")
    return figure


def empty_state() -> None:
    """Say how to get a run."""
    st.info(f"There is no run to show in **{md(str(runs_folder()))}** yet.")
    st.markdown("Make one here, under *New diagnosis*, or in a terminal:")
    st.code(
        "speed-diagnostics recommend                # the embedded model, built-in prompts\n"
        "speed-diagnostics recommend MODEL --prompts mine.jsonl",
        language="bash",
    )
    st.markdown("A run from another machine can be uploaded as a zip file under *Overview*.")


def md(text: object) -> str:
    """Return text that Markdown shows as it is: names of models, files and prompts are not ours."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>$~:" else c for c in str(text)).replace("\n", " ")


@st.cache_resource(max_entries=64, show_spinner=False)
def _figure(_draw: Callable[..., Any], name: str, path: str, signature: Signature, values: dict[str, Any]) -> Any:
    return _draw(**values)


@st.cache_resource(max_entries=8, show_spinner="Reading the run ...")
def _load(path: str, signature: Signature) -> Run:
    try:
        return load_run(path)
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # tables changed by hand
        raise UserError(f"run {path!r} is damaged: {type(error).__name__} {error}") from None


@st.cache_resource(max_entries=64, show_spinner="Computing the recommendation ...")
def _recommend(path: str, signature: Signature, goals: tuple[tuple[str, float], ...]) -> Recommendation:
    run = _load(path, signature)
    try:
        chosen: dict[str, Any] = dict(goals)
        return recommend(run, **chosen)
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"run {path!r} is damaged: {type(error).__name__} {error}") from None
