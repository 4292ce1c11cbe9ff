"""Quality: what policies score beside full depth, whether that is within a margin, and where answers changed."""

import io
import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from dashboard.catalog import Entry, Signature
from dashboard.state import entries, md, runs_folder, show
from diagnostics import figures
from diagnostics.evaluate.answer_metrics import FAILURES
from diagnostics.evaluate.evaluation_folder import ITEMS, Evaluation, load_evaluation
from diagnostics.evaluate.score_table import FULL, kept, markdown, plural, summarize, texts
from diagnostics.figures.quality import policy_label
from diagnostics.report import asked_margin, asked_seed

SIDES = {"lost": "Lost", "won": "Won"}
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
    first = 100 * asked_margin(manifest)
    # A key of its own: Streamlit forgets those of widgets when the page is left.
    own = f"own margin {entry.name}"
    chosen = st.number_input(
        "Margin, points",
        0.0,
        100.0,
        float(st.session_state.get(own, first)),
        0.5,
        key=f"margin {entry.name}",
        help="A policy is non-inferior if it is, with 95% confidence, less than this below full depth.",
    )
    st.session_state[own] = chosen
    return round(chosen / 100, 6)


def about(evaluation: Evaluation) -> None:
    """Say what was evaluated, and what did not finish."""
    m = evaluation.manifest
    identity = m["identity"] if isinstance(m.get("identity"), dict) else {}
    n = evaluation.items.groupby("task")["item_id"].nunique()
    parts = [m["model"], identity.get("dtype"), m.get("hardware"), f"{n.sum():,} items of {plural(len(n))}"]
    parts += [f"query: {identity['query']}"] if "query" in identity else []
    parts += [f"made {m['created']}"] if "created" in m else []
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
    st.dataframe(shown.rename_axis("policy"), width="stretch")
    st.caption(
        "Scores in percent ± half of the 95% interval. \\* differs significantly from full depth (5%, corrected over "
        "the tasks of a policy; averages are not tested). ✓ non-inferior at the margin. Kept: the average as a share "
        "of that of full depth."
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
                show(entry, f"quality {name.lower()}", lambda figure=figure, **_: figure, margin=margin)


def changed(items: pd.DataFrame, policy: str) -> dict[str, pd.DataFrame]:
    """Return the items that a policy loses and wins against full depth, a row each with what both answered."""
    full, other = (items[items["policy"] == name] for name in (FULL, policy))
    both = full.merge(other, on=["task", "item_id"], suffixes=("", "_policy"))
    return {
        "lost": both[both["score"] > both["score_policy"]].reset_index(drop=True),
        "won": both[both["score"] < both["score_policy"]].reset_index(drop=True),
    }


def where_answers_changed(items: pd.DataFrame, policies: list[str]) -> None:
    """Let the reader look at the items that a policy answers otherwise."""
    st.subheader("Where answers changed")
    left, middle, right = st.columns([2, 2, 3], vertical_alignment="bottom")
    policy = left.selectbox("Policy", policies, format_func=policy_label, key="changed_policy")
    task = middle.selectbox("Task", ["all tasks", *dict.fromkeys(items["task"])], key="changed_task")
    changes = changed(items if task == "all tasks" else items[items["task"] == task], str(policy))
    side = right.segmented_control(
        "Items",
        list(SIDES),
        default="lost",
        required=True,
        format_func=lambda side: f"{SIDES[side]} ({len(changes[side])})",
        key="changed_side",
        label_visibility="collapsed",
    )
    rows = changes[str(side)]
    label = policy_label(str(policy))
    columns = {
        "task": "task",
        "item_id": "item",
        "category": "category",
        "score": "score, full depth",
        "score_policy": f"score, {label}",
        "gold": "right choice",
        "chosen": "chosen, full depth",
        "chosen_policy": f"chosen, {label}",
        "accepted": "accepted",
        "answer": "answer, full depth",
        "answer_policy": f"answer, {label}",
    }
    shown = [name for name in columns if name in rows and (rows[name].notna() & (rows[name] != "")).any()]
    if rows.empty:
        st.caption("None.")
        return
    st.dataframe(rows[shown].rename(columns=columns), hide_index=True, width="stretch", height="auto")
    st.caption(
        "Lost: full depth is right and the policy wrong, or scores lower where scores are graded. Won: the reverse."
    )
    if "answer" in rows and rows["answer"].notna().any():
        answers(rows[rows["answer"].notna()].reset_index(drop=True), label)


def answers(rows: pd.DataFrame, label: str) -> None:
    """Show both answers to an item, as text."""
    chosen = st.selectbox(
        "Both answers to",
        range(len(rows)),
        format_func=lambda i: f"{rows.loc[i, 'task']}: {rows.loc[i, 'item_id']}",
        key="changed_item",
    )
    row = rows.loc[int(chosen)]
    if isinstance(row.get("accepted"), str):
        st.caption(f"Accepted: {md(row['accepted'])}")
    sides = (("full depth", row["score"], row["answer"]), (label, row["score_policy"], row["answer_policy"]))
    for column, (name, score, answer) in zip(st.columns(2), sides, strict=True):
        column.caption(md(f"{name}: score {score:.2g}" + ("" if str(answer).strip() else ", empty")))
        column.code(str(answer), language=None, wrap_lines=True)


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
    for column, (name, (data, kind)) in zip(st.columns(3), files.items(), strict=True):
        column.download_button(name, data, name, kind, width="stretch", key=name)


evaluations = {entry.name: entry for entry in entries() if entry.has_evaluation}
st.title("What quality do policies keep?")
if not evaluations:
    st.info(f"There is no evaluation in **{md(runs_folder())}** yet. Make one in a terminal:")
    st.code("speed-diagnostics evaluate --tasks needle@512,arc_easy --policies speed:22,speed:25", language="bash")
    st.stop()
left, right = st.columns([3, 1])
entry = evaluations[left.selectbox("Evaluation", list(evaluations), key="evaluation")]
if not os.path.exists(entry.path / ITEMS):
    st.info(f"**{md(entry.name)}** is not finished. If nothing runs any more, go on with what began it, and add:")
    st.code(f"--out {entry.path} --resume", language="bash")
    st.stop()
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
    where_answers_changed(evaluation.items, policies)
downloads(table)
