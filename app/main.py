"""The dashboard: `speed-diagnostics dashboard` runs this file with Streamlit; every page is one file in views/."""

import threading
from importlib import import_module
from pathlib import Path

import streamlit as st

from dashboard.address import begin, copy_link, finish
from dashboard.ending import PageEndedError
from dashboard.look import dress
from dashboard.markdown import md
from dashboard.start import example_banner
from dashboard.state import current_name, entries, look_at, runs_folder
from diagnostics.support.errors import UserError

st.set_page_config(page_title="SPEED diagnostics", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")

PAGES = {
    "Results": [
        st.Page("views/overview.py", title="Overview", icon=":material/list:", default=True),
        st.Page("views/layers.py", title="Layers", icon=":material/layers:"),
        st.Page("views/cutoff.py", title="Cutoff", icon=":material/content_cut:"),
        st.Page("views/benchmark.py", title="Benchmark", icon=":material/speed:"),
        st.Page("views/quality.py", title="Quality", icon=":material/fact_check:"),
        st.Page("views/finetuning.py", title="Fine-tuning", icon=":material/tune:"),
        st.Page("views/compare.py", title="Compare", icon=":material/compare_arrows:"),
    ],
    "Run a model": [
        st.Page("views/playground.py", title="Playground", icon=":material/play_arrow:"),
        st.Page("views/diagnosis.py", title="New diagnosis", icon=":material/add:"),
    ],
}
# Pages of one run, which the sidebar chooses; the others choose what they show themselves.
OF_ONE_RUN = ("", "layers", "cutoff", "playground")


def choose_run() -> None:
    """Let the sidebar choose the run to look at; one that an address names and that is not there is not replaced."""
    names = [entry.name for entry in entries() if entry.readable]
    if not names:
        st.sidebar.caption(f"No run in {md(runs_folder())}")
        return
    name = current_name()
    st.session_state["run_choice"] = name if name in names else None
    st.sidebar.selectbox(
        "Run",
        names,
        None if name not in names else 0,
        key="run_choice",
        on_change=lambda: look_at(st.session_state["run_choice"]),
        placeholder="choose a run",
        help=f"in {md(runs_folder())}",
    )


@st.cache_resource
def load_ahead() -> threading.Timer:
    """Import what other pages need once the first is on the screen: figures, then torch and transformers."""

    def load() -> None:
        import_module("diagnostics.figures")
        # plotly loads the rest of itself with the first figure.
        import_module("plotly.graph_objects").Figure(layout={"template": "plotly"}).to_json()
        import_module("diagnostics.generation.generation")

    timer = threading.Timer(0.5, load)
    timer.daemon = True
    timer.start()
    return timer


page = st.navigation(PAGES)
begin(page.url_path)
dress()
current_name()  # every page's address says it
if page.url_path in OF_ONE_RUN:
    choose_run()
example_banner()
try:
    page.run()
except UserError as error:
    st.error(md(error))
except PageEndedError:
    pass
finish()
with st.sidebar:
    copy_link()
load_ahead()
