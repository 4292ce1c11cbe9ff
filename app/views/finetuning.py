"""Fine-tuning: what training under SPEED changed at every cutoff, how it went, and for which kinds of prompts."""

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from dashboard.address import bind, one_of, whole
from dashboard.cards import Card, cards
from dashboard.catalog import Entry, Signature
from dashboard.ending import end_page
from dashboard.markdown import md
from dashboard.state import compare_runs, entries, recommendation, runs_folder, show
from diagnostics import figures
from diagnostics.cutoffs.goals import goals_in_words
from diagnostics.finetune.cutoff_comparison import compare_cutoffs
from diagnostics.finetune.finetuning_folder import (
    AFTER,
    BEFORE,
    FINETUNING_FOLDER,
    STEPS,
    SWEEPS,
    FineTuning,
    load_finetuning,
)
from diagnostics.report import finetuning_data
from diagnostics.support.defaults import MAX_KL
from diagnostics.support.errors import UserError
from diagnostics.support.glossary import GLOSSARY
from diagnostics.terminal.units import readable_time

Runs = dict[str, Entry]


@st.cache_resource(max_entries=8, show_spinner="Reading the fine-tuning ...")
def load(path: str, signature: Signature) -> FineTuning:
    """Read a fine-tuning, as far as it is."""
    return load_finetuning(path)


def runs_of(entry: Entry, listed: list[Entry]) -> Runs:
    """Return the runs before and after, as far as there is something of them."""
    paths = {entry.path / name: name for name in (BEFORE, AFTER)}
    return {paths[run.path]: run for run in listed if run.path in paths and run.readable}


def goals_of(entry: Entry, manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return the goals of its recommendation; what was asked for while there is none yet."""
    arguments = manifest.get("arguments")
    asked = arguments.get("max_kl") if isinstance(arguments, dict) else None
    return entry.goals or {"max_kl": float(asked) if isinstance(asked, int | float) and asked > 0 else MAX_KL}


def cutoffs_of(runs: Runs, goals: dict[str, float]) -> dict[str, int]:
    """Recommend a cutoff for the finished runs."""
    finished = {name: run for name, run in runs.items() if run.status == "complete"}
    return {name: recommendation(run, goals).cutoff for name, run in finished.items()}


def unfinished(entry: Entry, manifest: Mapping[str, Any], done: int) -> None:
    """Say how far it is, and how it goes on."""
    state = f"**{md(entry.name)}** is not finished: step {done} of {md(manifest['settings'].get('steps', '?'))}"
    st.info(f"{state}. If nothing runs any more, go on with what began it, and add:")
    st.code(f"--out {entry.path} --resume", language="bash")


def about(manifest: Mapping[str, Any]) -> None:
    """Say what was trained, and how."""
    settings, held_out = manifest["settings"], manifest.get("held_out")
    shares = {0: "self-distillation", 1: "given answers"}
    share = settings.get("supervised", 0)
    method = f"LoRA of rank {settings.get('rank')}" if settings.get("method") == "lora" else "all weights"
    parts: list[Any] = [method, shares.get(share, f"{share} given answers, the rest self-distillation")]
    parts += [f"{settings.get('steps')} steps of {settings.get('batch_size')} x {settings.get('accumulate')} rows"]
    parts += [f"{settings['hold']:.0%} of them at full depth"] if settings.get("hold") else []
    if settings.get("start_cutoff", settings["cutoff"]) != settings["cutoff"]:
        parts += [f"cutoff lowered from {settings['start_cutoff']}"]
    parts += [f"data: {manifest['source']}"] if "source" in manifest else []
    if isinstance(held_out, dict):
        parts += [f"held out: {held_out.get('n_prompts')} prompts of {held_out.get('name')}"]
    parts += [manifest.get("hardware"), f"made {readable_time(manifest['created'])}" if "created" in manifest else None]
    st.caption(md(", ".join(str(part) for part in parts if part)))


def what_changed(recommended: dict[str, int], n_layers: int) -> str:
    """Say in words, and in a colour, whether prompts can stop earlier after training."""
    if len(recommended) < 2:
        return "The recommended cutoffs before and after training cannot be compared: one of the runs is missing."
    before, after = recommended[BEFORE], recommended[AFTER]
    if after < before:
        words = f"prompts can stop at layer {after} of {n_layers}, {_layers(before - after)} earlier than before"
    elif after > before:
        words = f"prompts must run through {after} of {n_layers} layers, {_layers(after - before)} more than before"
    else:
        words = f"prompts must run through {after} of {n_layers} layers, as before"
    return f"{_badge(before, after)} After training, at the same goal, {words}."


def what_changed_at(trained: int, before: float, after: float) -> str:
    """Say in words, and in a colour, how the loss at the trained cutoff changed: KL before and after."""
    form = ".3f" if max(before, after) >= 0.001 else ".2g"
    went = "fell" if after < before else "rose" if after > before else "stayed"
    return (
        f"{_badge(before, after)} At the trained cutoff {trained} the KL from full depth {went} from {before:{form}} "
        f"to {after:{form}} nats per token."
    )


def _badge(before: float, after: float) -> str:
    """Judge a number that is better when it is smaller."""
    return ":green-badge[better]" if after < before else ":red-badge[worse]" if after > before else ":gray-badge[equal]"


def _layers(n: int) -> str:
    return f"{n} layer{'' if n == 1 else 's'}"


def headline(finetuning: FineTuning, table: pd.DataFrame, recommended: dict[str, int], goals: dict[str, float]) -> None:
    """Show in a few figures what was gained, and what it cost."""
    m, n_layers = finetuning.manifest, int(finetuning.manifest["n_layers"])
    trained = int(m["settings"]["cutoff"])
    rows = table.set_index("cutoff")
    started = finetuning.sweeps["step"].max() > 0

    def change(cutoff: int, column: str, form: str, unit: str) -> tuple[str, str]:
        before, now = (format(rows[f"{column}_{when}"][cutoff], form) for when in (BEFORE, AFTER))
        return (now, f"{before} before; {unit}") if started else (before, unit)

    st.subheader(f"{md(m['model'])}: trained at cutoff {trained} of {n_layers} layers")
    st.markdown(what_changed(recommended, n_layers))
    if started:
        st.markdown(what_changed_at(trained, *(float(rows[f"kl_{when}"][trained]) for when in (BEFORE, AFTER))))
    numbers = {
        "Recommended cutoff": (
            " → ".join(str(recommended.get(name, "?")) for name in (BEFORE, AFTER)),
            f"before → after; goal: {goals_in_words(goals)}",
        ),
        f"KL at cutoff {trained}": change(trained, "kl", ".3f", "nats per token"),
        f"Same top token at {trained}": change(trained, "top1_agreement", ".1%", "of decode positions"),
    }
    if m["settings"].get("against") == "itself":
        numbers["NLL at full depth"] = change(n_layers, "nll", ".3f", "nats per token of the references")
    else:
        drift = format(rows[f"kl_{AFTER}"][n_layers], ".3f") if started else "-"
        numbers["Full depth's own drift"] = (drift, "KL from before training, nats per token")
    terms = ("cutoff", "KL", "same top token", "NLL" if m["settings"].get("against") == "itself" else "KL")
    cards(Card(name, *number, term) for (name, number), term in zip(numbers.items(), terms, strict=True))


def compare(runs: Runs) -> None:
    """Lead to the page that shows both runs side by side."""
    if len(runs) < 2:
        return

    def preselect() -> None:
        compare_runs([runs[name].name for name in (BEFORE, AFTER)])

    if st.button("Compare layers before and after", icon=":material/compare_arrows:", on_click=preselect, key="both"):
        st.switch_page("views/compare.py")


def drawn(entry: Entry, finetuning: FineTuning, goal: float | None) -> None:
    """Show the figures."""
    name, m = entry.name, finetuning.manifest
    trained, n_layers = int(m["settings"]["cutoff"]), int(m["n_layers"])
    show(entry, "finetuning cutoffs", lambda **_: figures.finetuning_cutoffs(finetuning, goal), goal=goal)
    show(entry, "finetuning steps", lambda **_: figures.finetuning_steps(finetuning))
    bind(f"kinds {name}", "kinds_at", trained, whole(1, n_layers), of=name)
    cutoff = st.slider(
        "Cutoff to look at, by kind of prompt", 1, n_layers, key=f"kinds {name}", help=GLOSSARY["cutoff"]
    )
    show(
        entry,
        "finetuning kinds",
        lambda cutoff, **_: figures.finetuning_categories(finetuning, int(cutoff), goal),
        cutoff=cutoff,
        goal=goal,
    )


def all_cutoffs(finetuning: FineTuning, table: pd.DataFrame, recommended: dict[str, int]) -> None:
    """Show what every cutoff loses, before and after; from full depth down, where cutoffs lose little."""
    st.subheader("Every cutoff")
    notes = []
    for cutoff in table["cutoff"]:
        note = ["trained"] if cutoff == finetuning.manifest["settings"]["cutoff"] else []
        sides = [name for name, best in recommended.items() if best == cutoff]
        notes.append(", ".join(note + ([f"recommended {' and '.join(sides)}"] if sides else [])))
    lines = table.assign(note=notes)
    now = "after" if finetuning.complete else "now"
    titles = {"kl": "KL", "top1_agreement": "same token", "nll": "NLL"}
    columns = {
        f"{column}_{when}": st.column_config.NumberColumn(f"{title} {when_shown}", format="%.3f")
        for column, title in titles.items()
        for when, when_shown in ((BEFORE, "before"), (AFTER, now))
    }
    if not finetuning.sweeps["step"].max():  # measured before training only
        columns = {name: column for name, column in columns.items() if name.endswith(BEFORE)}
    config = columns | {"note": st.column_config.TextColumn("note", width="medium")}
    st.dataframe(lines[["cutoff", "note", *columns]][::-1], hide_index=True, column_config=config)
    st.caption("Means over the held-out prompts; KL and NLL in nats per token. Same token: share of equal top tokens.")


def details(manifest: Mapping[str, Any]) -> None:
    """Show what became of the data, what was asked for, and with which versions."""
    with st.expander("Data, settings and versions", icon=":material/info:"):
        if fate := finetuning_data(manifest):
            st.caption(f"Data: {md(fate)}")
        for column, name in zip(st.columns(2), ("settings", "versions"), strict=True):
            values = manifest.get(name)
            if isinstance(values, dict):
                lines = {key.replace("_", " "): str(value) for key, value in values.items()}
                shown = pd.Series(lines, name="value", dtype=object).rename_axis(name).reset_index()
                column.dataframe(shown, hide_index=True, height="content")


listed = entries()
finetunings = {entry.name: entry for entry in listed if entry.has_finetuning}
st.title("What did fine-tuning change?")
if not finetunings:
    st.info(f"There is no fine-tuning in **{md(runs_folder())}** yet. Make one in a terminal:")
    st.code("speed-diagnostics finetune --cutoff 20", language="bash")
    end_page()
bind("finetuning", "finetuning", next(iter(finetunings)), one_of(finetunings), of=str(runs_folder()), always=True)
entry = finetunings[str(st.selectbox("Fine-tuning", list(finetunings), key="finetuning"))]
manifest = FINETUNING_FOLDER.read(entry.path)
runs = runs_of(entry, listed)
if not all(os.path.exists(entry.path / name) for name in (STEPS, SWEEPS)):
    unfinished(entry, manifest, 0)
    st.caption(f"Nothing of the training was written yet. Before it: {runs[BEFORE].status if BEFORE in runs else '-'}.")
    details(manifest)
    end_page()
finetuning = load(str(entry.path), entry.signature)
if not finetuning.complete:
    unfinished(entry, manifest, int(max([0, *finetuning.steps["step"]])))
goals = goals_of(entry, manifest)
try:
    recommended = cutoffs_of(runs, goals)
except UserError as error:  # a run in it is damaged; what was measured in training is not
    st.error(md(error))
    recommended = {}
table = compare_cutoffs(finetuning)
headline(finetuning, table, recommended, goals)
about(manifest)
compare(runs)
drawn(entry, finetuning, goals.get("max_kl"))
all_cutoffs(finetuning, table, recommended)
details(manifest)
if AFTER in recommended:
    for note in recommendation(runs[AFTER], goals).data["notes"]:
        st.caption(f":material/info: {md(note)}")
