"""What pages know of the session: the folder of runs, the run that is looked at, and what was computed from it.

Everything expensive is cached by what a folder contains, so a run that changes is read again; caches are bounded.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from dashboard.address import keep, kept, leave, one_of, text
from dashboard.catalog import Entry, Signature, find_runs
from dashboard.ending import end_page
from dashboard.look import HEADING
from dashboard.markdown import md
from diagnostics.cli.dashboard import RUNS_VARIABLE
from diagnostics.cutoffs.recommendation import Recommendation, recommend
from diagnostics.cutoffs.regions import RegionRules
from diagnostics.runs.example import example_folder
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.runs.run import Run, load_run
from diagnostics.support.errors import UserError

EXAMPLE = "example"  # in the address, as the folder


def runs_folder() -> Path:
    """Return the folder whose runs are shown."""
    if kept("folder", "", one_of([EXAMPLE])):
        return example_folder()
    return Path(os.path.expanduser(st.session_state.get("folder") or os.environ.get(RUNS_VARIABLE, "runs")))


def look_into(folder: str) -> None:
    """Show the runs of another folder; `EXAMPLE` for the example, nothing for the folder of the start."""
    keep("folder", EXAMPLE if folder == EXAMPLE else None)
    st.session_state["folder"] = "" if folder == EXAMPLE else folder
    leave()


def is_example() -> bool:
    """Whether the example is shown, into which nothing is saved."""
    folder, example = (os.path.realpath(path) for path in (runs_folder(), example_folder()))
    return os.path.commonpath([folder, example]) == example


def entries() -> list[Entry]:
    """List what lies in the folder of runs, as it is now."""
    return find_runs(runs_folder())


def look_at(name: str) -> None:
    """Make a run the one that all pages look at."""
    keep("run", name, of=str(runs_folder()))
    leave()


def compare_runs(names: list[str]) -> None:
    """Choose the runs that the page *Compare* shows."""
    keep("compared", names, of=str(runs_folder()))


def current_name() -> str:
    """Return the name of the run to look at: the chosen one, whether it is there or not, else the newest."""
    folder = str(runs_folder())
    newest = next((entry.name for entry in entries() if entry.readable), "")
    name = kept("run", newest, text(), of=folder, always=bool(newest))
    if name:  # a newer run, or the loss of this one, is no reason to show another
        keep("run", name, of=folder)
    return name


def current_entry() -> Entry | None:
    """Return the entry of the run to look at; None where it is not there, or cannot be read."""
    name = current_name()
    return next((entry for entry in entries() if entry.name == name and entry.readable), None)


def current_run() -> tuple[Entry, Run]:
    """Return the run to show; where there is none, say what to do and end the page."""
    entry = current_entry()
    if entry is None:
        missing_run()
        end_page()
    return entry, open_run(entry)


def missing_run() -> None:
    """Say that the run that was asked for is not there, and which are; where there are none, how to get one."""
    listed, name = entries(), current_name()
    names = [entry.name for entry in listed if entry.readable]
    problem = next((entry.problem or "it has no finished prompt" for entry in listed if entry.name == name), None)
    if problem is not None:
        st.error(f"The run {md(name)} cannot be shown: {md(problem)}")
    elif name:
        here = f"Runs here: {md(', '.join(names[:12]))}{', ...' if len(names) > 12 else ''}." if names else ""
        st.error(f"There is no run {md(name)} in {md(runs_folder())}. {here}")
    else:
        empty_state()


def open_run(entry: Entry) -> Run:
    """Read a run; raise UserError for one that cannot be read."""
    return _load(str(entry.path), entry.signature)


def recommendation(entry: Entry, goals: dict[str, float]) -> Recommendation:
    """Recommend a cutoff for a run and goals (none: the default); raise UserError for goals that make no sense."""
    return _recommend(str(entry.path), entry.signature, tuple(sorted(goals.items())), entry.region_rules)


def saved_recommendation(entry: Entry) -> Recommendation:
    """Recommend by the goals that were saved with the run, by the default ones where there are no sensible ones."""
    goals = {} if entry.goals is None else entry.goals
    try:
        return recommendation(entry, goals)
    except (UserError, TypeError):  # goals written by hand
        return recommendation(entry, {})


def goals_problem(entry: Entry) -> str | None:
    """Say what is wrong with the recommendation saved with a run; None if nothing is."""
    try:
        if entry.goals is not None:
            recommendation(entry, entry.goals)
            return None
    except (UserError, TypeError):
        pass
    return f"{RECOMMENDATION} of {entry.name} is damaged: its goals cannot be read, so the default goal is shown"


def show(
    entry: Entry,
    name: str,
    draw: Callable[..., Any],
    *,
    note: str = "",
    help: str | None = None,
    table: pd.DataFrame | Callable[[], pd.DataFrame] | None = None,
    on_select: Any = "ignore",
    **values: Any,
) -> Any:
    """Show the figure that ``draw(**values)`` makes of an entry, drawn once for its name and plain values.

    Its title stands above it as a heading with ``help`` as its tooltip, beside a download of ``table``, by default the
    data drawn; ``note`` says what to see. Selections of points, where ``on_select`` asks for them, are kept as those of
    the widget ``figure NAME``. Returns the figure.
    """
    drawn = _figure(draw, name, str(entry.path), entry.signature, values)
    row = st.container(horizontal=True, vertical_alignment="bottom", key=f"{HEADING} {name}")
    title, subject = drawn.title
    told = f"##### {md(title)}" + (f" :gray[:small[{md(subject)}]]" if subject else "")
    row.markdown(told, width="stretch", help=help)
    file_name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{entry.name}-{name}")
    download(row, "CSV", drawn.csv if table is None else to_csv(table), f"{file_name}.csv", "text/csv", type="tertiary")
    options = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2, "filename": file_name}}
    if note:
        st.markdown(note)
    st.plotly_chart(
        drawn.bare,
        width="stretch",
        config=options,
        key=f"figure {name}",
        on_select=on_select,
        selection_mode="points",
    )
    return drawn.figure


def download(place: Any, label: str, data: Any, file_name: str, mime: str, **look: Any) -> None:
    """Offer a file. Taking it runs no page, which would replace what other buttons are about to hand out."""
    place.download_button(
        label,
        data,
        file_name,
        mime,
        on_click="ignore",
        icon=":material/download:",
        key=f"download {file_name}",
        **look,
    )


def to_csv(table: pd.DataFrame | Callable[[], pd.DataFrame]) -> str:
    """Return a table as the text of a CSV file."""
    return (table() if callable(table) else table).to_csv(index=False)


def empty_state() -> None:
    """Say how to get a run: look at an example, make one here, or in a terminal."""
    st.info(f"There is no run in **{md(str(runs_folder()))}** yet.")
    row = st.container(horizontal=True)
    if row.button("Look at an example", type="primary", icon=":material/school:", key="example"):
        look_into(EXAMPLE)
        st.rerun()
    if row.button("New diagnosis", icon=":material/add:", key="new"):
        st.switch_page("views/diagnosis.py")
    st.markdown("Or make one in a terminal:")
    st.code(
        "speed-diagnostics recommend  # embedded model, built-in prompts\n"
        "speed-diagnostics recommend MODEL --prompts mine.jsonl",
        language="bash",
    )


@dataclass(frozen=True)
class Drawn:
    """A figure, and what a page makes of it."""

    figure: Any
    bare: Any
    title: tuple[str, str]
    csv: str


@st.cache_resource(max_entries=64, show_spinner=False)
def _figure(_draw: Callable[..., Any], name: str, path: str, signature: Signature, values: dict[str, Any]) -> Drawn:
    from diagnostics.figures.style import title_of, without_title
    from diagnostics.figures.values import figure_values

    figure = _draw(**values)
    return Drawn(figure, without_title(figure), title_of(figure), to_csv(figure_values(figure)))


@st.cache_resource(max_entries=8, show_spinner="Reading the run ...")
def _load(path: str, signature: Signature) -> Run:
    try:
        return load_run(path)
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # tables changed by hand
        raise UserError(f"run {path!r} is damaged: {type(error).__name__} {error}") from None


@st.cache_resource(max_entries=64, show_spinner="Computing the recommendation ...")
def _recommend(
    path: str, signature: Signature, goals: tuple[tuple[str, float], ...], rules: RegionRules | None
) -> Recommendation:
    run = _load(path, signature)
    try:
        chosen: dict[str, Any] = dict(goals)
        return recommend(run, rules=rules, **chosen)
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"run {path!r} is damaged: {type(error).__name__} {error}") from None
