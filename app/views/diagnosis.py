"""New diagnosis: choose model and prompts, watch it work in a process of its own, cancel or resume it."""

from pathlib import Path
from typing import Any

import streamlit as st

from dashboard.address import Kind, bind, keep, number, one_of, text, whole
from dashboard.estimate import estimate
from dashboard.jobs import (
    Job,
    cancel_job,
    forget_job,
    list_jobs,
    option_of,
    resume_job,
    save_prompts,
    saved_prompts,
    start_job,
)
from dashboard.markdown import md
from dashboard.settings_check import Settings, check_settings
from dashboard.state import entries, look_at, runs_folder
from diagnostics.cli.common import new_folder
from diagnostics.cli.options import MODEL_HELP
from diagnostics.diagnosis.capture import BACKENDS
from diagnostics.models.devices import DTYPES
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.errors import UserError
from diagnostics.support.glossary import GLOSSARY
from diagnostics.support.progress import readable_duration

SYMBOLS = {"running": "progress_activity", "complete": "check", "cancelled": "cancel", "failed": "error"}
TYPES = ["auto", *DTYPES]
# Values of --rules, as the form says them.
RULES = {
    "all": "all that cost a few percent",
    "all,leave-one-out": "these and leave-one-out, for about twice the time",
    "none": "none",
}
# Fields of the form: the option of the command, the default, and the values.
FIELDS: dict[str, tuple[str, Any, Kind[Any]]] = {
    "model": ("", EMBEDDED_MODEL, text()),
    "context": ("--context-length", 1024, whole(16, 1 << 20)),
    "max_prompts": ("--max-prompts", 28, whole(1, 10_000)),
    "decode": ("--decode-tokens", 48, whole(1, 4096)),
    "anchors": ("--anchors", 1, whole(0, 64)),
    "goal": ("--max-kl", 0.1, number(0, 100)),
    "detail": ("--detail-prompts", 7, whole(0, 1000)),
    "device": ("--device", "auto", text()),
    "dtype": ("--dtype", "auto", one_of(TYPES)),
    "backend": ("--backend", "hooks", one_of(BACKENDS)),
    "rules": ("--rules", "all", one_of(RULES)),
}
LOG_LINES = 200


def field(key: str) -> str:
    """Give a field the value that the reader chose, now or before a reload; return its key."""
    _, default, kind = FIELDS[key]
    bind(key, key, default, kind)
    return key


def form() -> None:
    """Ask what to diagnose, say how long it will take, and start it."""
    with st.container(border=True):
        model = st.text_input("Model", key=field("model"), help=MODEL_HELP).strip()
        left, middle, right = st.columns(3)
        left.number_input(
            "Context length, tokens", 16, 1 << 20, key=field("context"), help="Longer documents are cut to this."
        )
        middle.number_input("Prompts at most", 1, 10_000, key=field("max_prompts"))
        right.number_input("Reference tokens", 1, 4096, key=field("decode"), help=GLOSSARY["reference"])
        given = st.file_uploader(
            "Prompts: a JSONL file, or none for the built-in set",
            type=["jsonl"],
            key="prompt_file",
            max_upload_size=100,
        )
        again = saved_prompts(runs_folder(), st.session_state.get("prompts_of", ""))
        if given is None and again is not None:
            row = st.container(horizontal=True, vertical_alignment="center")
            row.caption(f"Without a new file, the prompts of {md(st.session_state['prompts_of'])} are used again.")
            if row.button("Take the built-in set", type="tertiary", key="builtin_prompts"):
                del st.session_state["prompts_of"]
                st.rerun()
        with st.expander("More"):
            left, middle, right = st.columns(3)
            left.number_input("Anchors", 0, 64, key=field("anchors"), help=GLOSSARY["anchor"])
            middle.number_input("Goal: KL at most", 0.0, 100.0, step=0.01, key=field("goal"), help=GLOSSARY["KL"])
            right.number_input(
                "Prompts kept token by token",
                0,
                1000,
                key=field("detail"),
                help="Their text can be read on the page Layers.",
            )
            left.text_input("Device", key=field("device"), help="auto, map, cpu, cuda, cuda:1, mps")
            middle.selectbox("Type", TYPES, key=field("dtype"))
            right.selectbox("Backend", list(BACKENDS), key=field("backend"))
            st.selectbox(
                "Rules to set beside the measured loss",
                list(RULES),
                key=field("rules"),
                format_func=RULES.__getitem__,
                help=GLOSSARY["rule"],
            )
        st.caption(f":material/timer: {how_long(model)}")
        started = st.button("Start", type="primary", icon=":material/play_arrow:", key="start")
    if started:
        try:
            start(model, given.getvalue() if given is not None else again.read_bytes() if again is not None else None)
        except UserError as error:
            st.error(md(error))


def how_long(model: str) -> str:
    """Say how long the diagnosis will take, and how that is known."""
    values = {key: st.session_state[key] for key in FIELDS}
    n_tokens = values["context"] + values["decode"]
    found = estimate(entries(), model, values["max_prompts"], n_tokens, values["device"])
    if found is None:
        return "No finished run of this model tells how long it takes: an estimate comes after the first prompt."
    return f"About {readable_duration(found.seconds)}, from the time that {md(found.run)} took."


def start(model: str, prompts: bytes | None) -> None:
    """Check the settings and start a job; raise UserError for what cannot work."""
    if model.startswith("-") or not model:
        raise UserError("name a model")
    values = {key: st.session_state[key] for key in FIELDS}
    name = new_folder(model, parent=runs_folder()).name
    options = {option: values[key] for key, (option, *_) in FIELDS.items() if option}
    if prompts is not None:
        options["--prompts"] = str(save_prompts(runs_folder(), name, prompts))
    checked = {key: values[key] for key in ("context", "max_prompts", "decode", "device", "dtype")}
    with st.spinner("Checking the settings ..."):
        try:
            check_settings(Settings(model=model, prompts=str(options.get("--prompts", "builtin")), **checked))
        except UserError:
            if prompts is not None:
                Path(str(options["--prompts"])).unlink(missing_ok=True)
            raise
    # One word each, so that no value can pass for an option.
    start_job(runs_folder(), name, [model, *(f"{key}={value}" for key, value in options.items())])


def try_again(job: Job) -> None:
    """Put the settings of a job back into the form."""
    keep("model", job.arguments[0])
    for key, (option, *_) in FIELDS.items():
        if option and (value := option_of(job, option)) is not None:
            keep(key, value)
    st.session_state["prompts_of"] = job.name


def card(job: Job) -> None:
    """Show one job with what can be done to it."""
    state = job.state
    with st.container(border=True):
        left, right = st.columns([4, 1], vertical_alignment="center")
        left.markdown(f":material/{SYMBOLS[state]}: **{md(job.name)}** {md(job.arguments[0])}: {state}")
        progress = job.progress
        if state == "running":
            if right.button("Cancel", key=f"cancel {job.name}", width="stretch"):
                cancel_job(job)
                st.rerun(scope="fragment")
            done, total = progress or (0, 1)
            st.progress(done / total, f"{done} of {total} prompts" if progress else "loading the model, first prompt")
            if job.message:
                st.caption(md(job.message))
        elif state == "complete":
            if right.button("Show", key=f"show {job.name}", width="stretch"):
                look_at(job.name)
                st.switch_page("views/overview.py")
        else:
            if progress and right.button("Resume", key=f"resume {job.name}", width="stretch"):
                try:
                    resume_job(job)
                except UserError as error:
                    st.error(md(error))
                else:
                    st.rerun(scope="fragment")
            help_text = "puts these settings back into the form above"
            if right.button("Try again", key=f"again {job.name}", width="stretch", help=help_text):
                try_again(job)
                st.rerun()
            if progress:
                st.caption(f"{progress[0]} of {progress[1]} prompts are finished and kept.")
            if state == "failed":
                st.error(md(job.message or "it ended without a word"))
        with st.expander("Log"):
            st.code("\n".join(job.lines[-LOG_LINES:]) or "nothing yet", language=None, wrap_lines=True)
        if state != "running" and right.button(
            "Remove", key=f"forget {job.name}", width="stretch", help="from this list; the run stays"
        ):
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
