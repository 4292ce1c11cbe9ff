"""The dashboard: `speed-diagnostics dashboard` runs this file with Streamlit; every page is one file in views/."""

import threading
from importlib import import_module
from pathlib import Path

import streamlit as st

from dashboard.state import entries, md, runs_folder
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


def choose_run() -> None:
    """Let the sidebar choose the run that all pages look at, and keep it in the address, where a reload finds it."""
    names = [entry.name for entry in entries() if entry.readable]
    if not names:
        st.session_state.pop("run", None)
        st.sidebar.caption(f"No run in {md(runs_folder())}")
        return
    asked = st.session_state.get("run") or st.query_params.get("run")
    chosen = asked if asked in names else names[0]
    # Two keys: Streamlit forgets a widget's own when a page is left.
    st.session_state["run"] = st.session_state["run_choice"] = st.query_params["run"] = chosen

    def choose() -> None:
        st.session_state["run"] = st.session_state["run_choice"]

    st.sidebar.selectbox("Run", names, key="run_choice", on_change=choose, help=f"in {md(runs_folder())}")


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
choose_run()
try:
    page.run()
except UserError as error:
    st.error(md(error))
load_ahead()
