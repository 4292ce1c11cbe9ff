"""Quality: what policies score beside full depth, whether that is within a margin, and where answers changed."""

import io
import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from dashboard.address import bind, number, one_of
from dashboard.catalog import Entry, Signature
from dashboard.changed_items import where_answers_changed
from dashboard.ending import end_page
from dashboard.markdown import md
from dashboard.state import download, entries, runs_folder, show
from diagnostics import figures
from diagnostics.evaluate.answer_metrics import FAILURES
from diagnostics.evaluate.evaluation_folder import ITEMS, Evaluation, load_evaluation
from diagnostics.evaluate.score_table import FULL, KEPT, kept, markdown, plural, summarize, texts
from diagnostics.figures.quality import policy_label
from diagnostics.report import asked_margin, asked_seed
from diagnostics.support.glossary import GLOSSARY
from diagnostics.terminal.units import readable_time

MARGIN_HELP = f"{GLOSSARY['margin']} Non-inferior: {GLOSSARY['non-inferior']}"
# Headings of columns in words, with what they are.
KEPT_HELP = "the average as a share of that of full depth"
FAILURE_HELP = {
    "empty": "generated answers without any text",
    "unfinished": "generated answers that were not over when the tokens ran out",
    "repeating": "generated answers that repeat themselves",
    "unparseable": "generated answers in which no answer was found",
}
# More verdicts than these scroll in a box of so many pixels.
MOST_VERDICTS, BOX = 5, 250


@st.cache_resource(max_entries=4, show_spinner="Reading the evaluation ...")
def load(path: str, signature: Signature) -> Evaluation:
    """Read an evaluation."""
    return load_evaluation(path)


@st.cache_data(max_entries=16, show_spinner="Drawing resamples ...")
def summary(path: str, signature: Signature, seed: int) -> pd.DataFrame:
    """Summarize an evaluation, which takes seconds; the margin is not part of it."""
    return summarize(load(path, signature), seed=seed).drop(columns="non_inferior", errors="ignore")


def within(table: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Return the summary with the verdict for a margin."""
    if "lower_bound" not in table:  # nothing to compare with: full depth is missing, or alone
        return table
    fits = (table["lower_bound"] > -margin).astype("boolean").mask(table["lower_bound"].isna())
    return table.assign(non_inferior=fits)


def choose_margin(entry: Entry, manifest: Mapping[str, Any]) -> float:
    """Let the reader move the margin; it begins with the one that was asked for."""
    key = f"margin {entry.name}"
    bind(key, "margin", 100 * asked_margin(manifest), number(0, 100), of=entry.name)
    chosen = st.number_input("Margin, points", 0.0, 100.0, step=0.5, key=key, help=MARGIN_HELP)
    return round(chosen / 100, 6)


def about(evaluation: Evaluation) -> None:
    """Say what was evaluated, and what did not finish."""
    m = evaluation.manifest
    identity = m["identity"] if isinstance(m.get("identity"), dict) else {}
    n = evaluation.items.groupby("task")["item_id"].nunique()
    parts = [m["model"], identity.get("dtype"), m.get("hardware"), f"{n.sum():,} items of {plural(len(n))}"]
    parts += [f"query: {identity['query']}"] if "query" in identity else []
    parts += [f"made {readable_time(m['created'])}"] if "created" in m else []
    st.caption(md(", ".join(str(part) for part in parts if part)))
    errors = m.get("errors")
    for error in errors if isinstance(errors, list) else []:
        st.caption(f":material/warning: not finished: {md(error)}")


def verdict(table: pd.DataFrame, policy: str, margin: float) -> str:
    """Say in plain words what a policy keeps of full depth."""
    return f"**{md(policy_label(policy))}** {kept(table, policy, margin)}."


def scores(table: pd.DataFrame) -> None:
    """Show the table of a paper: policies in rows, tasks, the average and ways to fail in columns."""
    shown = texts(table)
    if "non_inferior" in table:
        for _, row in table[table["non_inferior"].fillna(False).astype(bool)].iterrows():
            shown.loc[row["policy"], row["task"]] += " ✓"
    shown = shown.rename(index=policy_label)
    headings = {KEPT: st.column_config.TextColumn("average kept, %", help=KEPT_HELP)}
    for name in FAILURES:
        headings[f"{name}, %"] = st.column_config.TextColumn(f"{name} answers, %", help=FAILURE_HELP.get(name))
    st.dataframe(shown.rename_axis("policy"), width="stretch", column_config=headings)
    st.caption(
        "Scores in percent ± half of the 95% interval. \\* differs significantly from full depth (5%, corrected over "
        "the tasks of a policy; averages are not tested). ✓ non-inferior at the margin."
    )


def drawn(entry: Entry, table: pd.DataFrame, margin: float) -> None:
    """Show the figures."""
    drawings = {
        "Differences": (figures.quality_differences(table, margin), "There is nothing to compare."),
        "Scores": (figures.quality_scores(table), ""),
        "By cutoff": (
            figures.quality_by_cutoff(table),
            "There are no two cutoffs of one policy: evaluate several, such as `--policies speed:22,speed:24`.",
        ),
        "Failures": (
            figures.quality_failures(table),
            f"No answer failed: no generated one is {', '.join(FAILURES[:-1])} or {FAILURES[-1]}.",
        ),
    }
    for tab, (name, (figure, missing)) in zip(st.tabs(list(drawings)), drawings.items(), strict=True):
        with tab:
            if figure is None:
                st.caption(missing)
            else:
                show(entry, f"quality {name.lower()}", lambda figure=figure, **_: figure, table=table, margin=margin)


def downloads(table: pd.DataFrame) -> None:
    """Offer the table in three formats."""
    st.subheader("Take it with you")
    packed = io.BytesIO()
    table.to_parquet(packed, index=False)
    files = {
        "summary.csv": (table.to_csv(index=False), "text/csv"),
        "summary.parquet": (packed.getvalue(), "application/vnd.apache.parquet"),
        "summary.md": (markdown(table), "text/markdown"),
    }
    row = st.container(horizontal=True)
    for name, (data, kind) in files.items():
        download(row, name, data, name, kind)


evaluations = {entry.name: entry for entry in entries() if entry.has_evaluation}
st.title("What quality do policies keep?")
if not evaluations:
    st.info(f"There is no evaluation in **{md(runs_folder())}** yet. Make one in a terminal:")
    st.code("speed-diagnostics evaluate --tasks needle@512,arc_easy --policies speed:22,speed:25", language="bash")
    end_page()
left, right = st.columns([3, 1])
bind("evaluation", "evaluation", next(iter(evaluations)), one_of(evaluations), of=str(runs_folder()), always=True)
entry = evaluations[str(left.selectbox("Evaluation", list(evaluations), key="evaluation"))]
if not os.path.exists(entry.path / ITEMS):
    st.info(f"**{md(entry.name)}** is not finished. If nothing runs any more, go on with what began it, and add:")
    st.code(f"--out {entry.path} --resume", language="bash")
    end_page()
evaluation = load(str(entry.path), entry.signature)
seed = asked_seed(evaluation.manifest)
with right:
    margin = choose_margin(entry, evaluation.manifest)
table = within(summary(str(entry.path), entry.signature, seed), margin)
policies = [policy for policy in dict.fromkeys(table["policy"]) if policy != FULL]
about(evaluation)
if "difference" in table:
    box = st.container(height=BOX if len(policies) > MOST_VERDICTS else "content", border=False)
    box.markdown("\n".join(f"- {verdict(table, policy, margin)}" for policy in policies))
scores(table)
drawn(entry, table, margin)
if "difference" in table:
    where_answers_changed(evaluation.items, policies, entry.name)
downloads(table)
