"""New diagnosis: choose model and prompts, watch it work in a process of its own, cancel or resume it."""

import streamlit as st

from dashboard.jobs import Job, cancel_job, forget_job, list_jobs, resume_job, save_prompts, start_job
from dashboard.state import look_at, md, runs_folder
from diagnostics.cli.common import new_folder
from diagnostics.cli.options import MODEL_HELP
from diagnostics.diagnosis.capture import BACKENDS
from diagnostics.models.devices import DTYPES
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.errors import UserError

SYMBOLS = {"running": "progress_activity", "complete": "check", "cancelled": "cancel", "failed": "error"}


def form() -> None:
    """Ask what to diagnose, and start it."""
    with st.form("diagnosis"):
        model = st.text_input("Model", EMBEDDED_MODEL, key="model", help=MODEL_HELP)
        left, middle, right = st.columns(3)
        context = left.number_input("Context length, tokens", 16, 1 << 20, 1024, key="context")
        most = middle.number_input("Prompts at most", 1, 10_000, 28, key="max_prompts")
        decode = right.number_input("Reference tokens", 1, 4096, 48, key="decode")
        given = st.file_uploader(
            "Prompts: a JSONL file, or none for the built-in set",
            type=["jsonl"],
            key="prompt_file",
            max_upload_size=100,
        )
        with st.expander("More"):
            left, middle, right = st.columns(3)
            anchors = left.number_input("Anchors", 0, 64, 1, key="anchors", help="leading tokens that keep their KV")
            goal = middle.number_input("Goal: KL at most", 0.0, 100.0, 0.1, 0.01, key="goal", help="nats per token")
            detail = right.number_input("Prompts kept token by token", 0, 1000, 7, key="detail")
            device = left.text_input("Device", "auto", key="device", help="auto, map, cpu, cuda, cuda:1, mps")
            dtype = middle.selectbox("Type", ["auto", *DTYPES], key="dtype")
            backend = right.selectbox("Backend", list(BACKENDS), key="backend")
        started = st.form_submit_button("Start", type="primary", icon=":material/play_arrow:")
    if not started:
        return
    options = {
        "--context-length": context,
        "--max-prompts": most,
        "--decode-tokens": decode,
        "--anchors": anchors,
        "--max-kl": goal,
        "--detail-prompts": detail,
        "--device": device,
        "--dtype": dtype,
        "--backend": backend,
    }
    try:
        if model.strip().startswith("-") or not model.strip():
            raise UserError("name a model")
        name = new_folder(model.strip(), parent=runs_folder()).name
        if given is not None:
            options["--prompts"] = str(save_prompts(runs_folder(), name, given.getvalue()))
        # One word each, so that no value can pass for an option.
        start_job(runs_folder(), name, [model.strip(), *(f"{key}={value}" for key, value in options.items())])
    except UserError as error:
        st.error(md(error))


def card(job: Job) -> None:
    """Show one job with what can be done to it."""
    state = job.state
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.markdown(f":material/{SYMBOLS[state]}: **{md(job.name)}** {md(job.arguments[0])}: {state}")
        progress = job.progress
        if state == "running":
            if right.button("Cancel", key=f"cancel {job.name}", width="stretch"):
                cancel_job(job)
                st.rerun(scope="fragment")
            done, total = progress or (0, 1)
            st.progress(done / total, f"{done} of {total} prompts" if progress else "loading the model, first prompt")
            return
        if state == "complete":
            if right.button("Show", key=f"show {job.name}", width="stretch"):
                look_at(job.name)
                st.switch_page("views/overview.py")
        elif right.button("Resume" if progress else "Try again", key=f"resume {job.name}", width="stretch"):
            try:
                resume_job(job)
            except UserError as error:
                st.error(md(error))
            else:
                st.rerun(scope="fragment")
        if progress and state != "complete":
            st.caption(f"{progress[0]} of {progress[1]} prompts are finished and kept.")
        if state == "failed":
            st.error(md(job.message or "it ended without a word"))
        if right.button("Remove", key=f"forget {job.name}", width="stretch", help="from this list; the run stays"):
            forget_job(job)
            st.rerun(scope="fragment")


@st.fragment(run_every=1.0)
def jobs() -> None:
    """List the jobs, as they are now; when one ends the whole page follows, so that its run can be chosen."""
    listed = list_jobs(runs_folder())
    if listed:
        st.subheader("Diagnoses")
    running = {job.name for job in listed if job.running}
    for job in listed:
        card(job)
    if st.session_state.get("running_jobs", running) - running:
        st.session_state["running_jobs"] = running
        st.rerun()
    st.session_state["running_jobs"] = running


st.title("Diagnose a model")
st.caption(f"The same as `speed-diagnostics recommend`, in a process of its own; runs go to {md(runs_folder())}.")
form()
jobs()
