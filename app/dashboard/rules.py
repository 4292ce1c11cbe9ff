"""The part of the page *Cutoff* on rules that only look at the layers: which of them would have been right."""

from typing import Any

import pandas as pd
import streamlit as st

from dashboard.catalog import Entry
from dashboard.markdown import md
from dashboard.state import show
from diagnostics import figures
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.rule_verdicts import description, must_see_sentence, rule_verdicts, rules_sentence
from diagnostics.cutoffs.rules import all_rules
from diagnostics.runs.run import Run
from diagnostics.support.glossary import GLOSSARY

NOT_MEASURED = (
    "Rules that were not measured read what this run does not hold. `speed-diagnostics recommend MODEL --rules all` "
    "measures it; the costly ones are named as well, as in `--rules all,leave-one-out`."
)
# Columns of the table: heading, and the word of the glossary that explains it.
COLUMNS = {
    "title": ("rule", "rule"),
    "cutoff": ("cutoff", "cutoff"),
    "off": ("from the knee", "knee"),
    "kl": ("KL there", "KL"),
    "saved": ("work saved", None),
    "saved_vs_knee": ("against the knee", None),
    "range": ("90% of resamples", None),
    "note": ("note", None),
}
SHARES = ("saved", "saved_vs_knee")


def rules(entry: Entry, run: Run, rec: Recommendation) -> None:
    """Show where rules put the cutoff beside the measured knee, for the goal of the page."""
    st.subheader("Rules that only look at the layers", help=GLOSSARY["rule"])
    verdicts = rule_verdicts(rec)
    if verdicts.empty:
        st.info("No rule was asked.")
        return
    st.markdown(md(rules_sentence(rec)))
    goals = tuple(rec.data["criterion"].items())

    def draw(name: str, figure: Any, **more: Any) -> None:
        show(entry, name, lambda **_: figure(run, rec), goals=goals, **more)

    draw(
        "rules",
        figures.rule_cutoffs,
        note="A bar holds 90% of the resamples of the prompts; hover for what a rule does and where it is from.",
        table=lambda: verdicts.drop(columns=["ours", "fixed", "absent"]),
        help=GLOSSARY["knee"],
    )
    table(verdicts)
    with st.expander("What our rule reads", icon=":material/functions:"):
        draw("uptake above", figures.uptake_above, note=md(GLOSSARY["uptake"]), help=GLOSSARY["uptake"])
        if rec.data["must_see"]:
            draw("must see", figures.must_see, note=md(must_see_sentence(rec)), help=GLOSSARY["leave-one-out loss"])
    with st.expander("What each rule is", icon=":material/menu_book:"):
        descriptions(list(verdicts["rule"]))


def table(verdicts: pd.DataFrame) -> None:
    """Show all rules, those without a cutoff too."""
    lines = verdicts.assign(
        range=[
            "" if pd.isna(low) else f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
            for low, high in zip(verdicts["low"], verdicts["high"], strict=True)
        ],
    )[list(COLUMNS)]
    lines[list(SHARES)] *= 100
    config: dict[str, Any] = {}
    for name, (heading, term) in COLUMNS.items():
        of = {"help": None if term is None else GLOSSARY[term]}
        if name in SHARES:
            config[name] = st.column_config.NumberColumn(heading, format="%+.0f%%" if "_" in name else "%.0f%%", **of)
        elif name == "kl":
            config[name] = st.column_config.NumberColumn(heading, format="%.3f", **of)
        elif name in ("cutoff", "off"):
            config[name] = st.column_config.NumberColumn(heading, format="%+d" if name == "off" else "%d", **of)
        else:
            config[name] = st.column_config.TextColumn(heading, **of)
    st.dataframe(lines, hide_index=True, width="stretch", column_config=config, placeholder="", key="rules_table")
    if verdicts["absent"].any():
        st.caption(f":material/info: {NOT_MEASURED}")


def descriptions(names: list[str]) -> None:
    """Say of each rule how its curve becomes a cutoff, its thresholds, what it cannot judge, and its source."""
    known = all_rules()
    st.markdown(
        "\n".join(f"- **{md(known[name].title)}**: {md(description(known[name]))}" for name in names if name in known)
    )
