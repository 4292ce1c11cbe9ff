"""Items of an evaluation that a policy answers otherwise than full depth: which, what they asked, and both answers."""

import string

import pandas as pd
import streamlit as st

from dashboard.address import bind, one_of
from dashboard.markdown import md
from diagnostics.evaluate.score_table import FULL
from diagnostics.figures.quality import policy_label

SIDES = {"lost": "Lost", "won": "Won"}
EVERY_TASK = "all tasks"
# Characters of a question in the list; below it stands whole.
IN_LIST = 120


def changed(items: pd.DataFrame, policy: str) -> dict[str, pd.DataFrame]:
    """Return the items that a policy loses and wins against full depth, a row each with what both answered."""
    full, other = (items[items["policy"] == name] for name in (FULL, policy))
    both = full.merge(other, on=["task", "item_id"], suffixes=("", "_policy"))
    return {
        "lost": both[both["score"] > both["score_policy"]].reset_index(drop=True),
        "won": both[both["score"] < both["score_policy"]].reset_index(drop=True),
    }


def where_answers_changed(items: pd.DataFrame, policies: list[str], of: str) -> None:
    """Let the reader look at the items that a policy answers otherwise; ``of`` names the evaluation."""
    st.subheader("Where answers changed")
    left, middle, right = st.columns([2, 2, 3], vertical_alignment="bottom")
    bind("changed_policy", "policy", policies[0], one_of(policies), of=of)
    policy = str(left.selectbox("Policy", policies, format_func=policy_label, key="changed_policy"))
    tasks = [EVERY_TASK, *dict.fromkeys(items["task"])]
    bind("changed_task", "task", EVERY_TASK, one_of(tasks), of=of)
    task = middle.selectbox("Task", tasks, key="changed_task")
    changes = changed(items if task == EVERY_TASK else items[items["task"] == task], policy)
    bind("changed_side", "side", "lost", one_of(SIDES), of=of)
    side = right.segmented_control(
        "Items",
        list(SIDES),
        required=True,
        format_func=lambda side: f"{SIDES[side]} ({len(changes[side])})",
        key="changed_side",
        label_visibility="collapsed",
        help="Lost: full depth is right and the policy wrong, or scores lower where scores are graded. Won: the "
        "reverse.",
    )
    rows = changes[str(side)]
    label = policy_label(policy)
    st.caption("Lost: full depth is right and the policy wrong, or scores lower where scores are graded.")
    if rows.empty:
        st.caption("None.")
        return
    st.dataframe(_list(rows, label), hide_index=True, width="stretch", height="auto")
    if "question" not in rows:
        st.caption("This evaluation was made before questions and choices were kept: make it again to read them.")
    if "question" in rows or "answer" in rows:
        _one_item(rows, label, f"{of} {policy} {task} {side}")


def _list(rows: pd.DataFrame, label: str) -> pd.DataFrame:
    """Return a line per item, with what it is and what both answered; columns that say nothing are left out."""
    columns = {
        "task": "task",
        "item_id": "item",
        "category": "category",
        "question": "question",
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
    lines = rows[shown].copy()
    for name in ("gold", "chosen", "chosen_policy"):
        if name in lines:
            lines[name] = lines[name].map(_letter)
    if "question" in lines:
        lines["question"] = lines["question"].map(_in_list)
    return lines.rename(columns=columns)


def _one_item(rows: pd.DataFrame, label: str, of: str) -> None:
    """Show what an item asked, its choices, and both answers, as text."""
    bind("changed_item", "item", 0, one_of(range(len(rows))), of=of)
    number = st.selectbox(
        "Question and both answers of",
        range(len(rows)),
        format_func=lambda i: f"{rows.loc[i, 'task']}: {rows.loc[i, 'item_id']}",
        key="changed_item",
    )
    row = rows.loc[int(number)]
    if isinstance(row.get("question"), str):
        with st.container(border=True):
            st.text(row["question"])
    if isinstance(row.get("choices"), list):
        marks = {"right": row["gold"], "full depth": row["chosen"], label: row["chosen_policy"]}
        lines = [
            {"": _letter(index), "choice": md(text.strip())}
            | {md(who): "✓" if index == chosen else "" for who, chosen in marks.items()}
            for index, text in enumerate(row["choices"])
        ]
        st.table(pd.DataFrame(lines).set_index(""))
    if not isinstance(row.get("answer"), str):
        return
    if isinstance(row.get("accepted"), str):
        st.caption(f"Accepted: {md(row['accepted'])}")
    sides = (("full depth", row["score"], row["answer"]), (label, row["score_policy"], row["answer_policy"]))
    for column, (name, score, answer) in zip(st.columns(2), sides, strict=True):
        column.caption(md(f"{name}: score {score:.2g}" + ("" if str(answer).strip() else ", empty")))
        column.code(str(answer), language=None, wrap_lines=True)


def _letter(index: object) -> str:
    """Name a choice by its letter, A for 0; beyond the alphabet by its number."""
    if not isinstance(index, int | float) or pd.isna(index):
        return ""
    number = int(index)
    return string.ascii_uppercase[number] if number < len(string.ascii_uppercase) else str(number)


def _in_list(question: object) -> str:
    """Return the end of a question, where what is asked stands, in one line."""
    line = " ".join(str(question).split())
    return line if len(line) <= IN_LIST else f"… {line[-IN_LIST:]}"
