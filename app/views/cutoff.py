"""Cutoff: move it and the goal, and see the loss, what is kept, and what is saved."""

from typing import Any

import pandas as pd
import streamlit as st

from dashboard.address import bind, flag, keep, number, some_of, whole
from dashboard.cards import Card, cards
from dashboard.catalog import Entry
from dashboard.ending import end_page
from dashboard.export import export
from dashboard.headline import choose_length, goal, plain, savings_at, uptake_card
from dashboard.look import beside
from dashboard.markdown import md
from dashboard.rules import rules
from dashboard.state import current_run, goals_problem, recommendation, saved_recommendation, show
from diagnostics import figures
from diagnostics.cutoffs.losses import loss_by_category
from diagnostics.cutoffs.recommendation import Recommendation, retention_at
from diagnostics.cutoffs.savings import Savings
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError
from diagnostics.support.glossary import GLOSSARY

# Goals: what is limited, the limit in words, the word of the glossary, range, step.
GOALS = {
    "max_kl": ("How much next tokens change (KL)", "at most, nats per token", "KL", 0.005, 1.0, 0.005),
    "max_nll_increase": (
        "Loss on the answers (NLL)",
        "at most, nats per token",
        "NLL increase",
        0.005,
        1.0,
        0.005,
    ),
    "min_agreement": ("Next tokens that stay the same", "at least, share", "same top token", 0.5, 1.0, 0.005),
    "kv_budget": ("Size of the KV cache", "at most, share of full depth", "KV cache", 0.05, 1.0, 0.01),
}
# Goals that need no measured loss: our rule follows the one, the other counts bytes.
WITHOUT_LOSS = ("max_kl", "kv_budget")
DEFAULTS = {"max_kl": 0.1, "max_nll_increase": 0.1, "min_agreement": 0.9, "kv_budget": 0.75}


def choose_goals(entry: Entry, place: Any) -> dict[str, float]:
    """Let the reader choose goals and their limits; they begin with those that were saved with the run."""
    first_answer = saved_recommendation(entry)
    saved = first_answer.data["criterion"]
    offered = [name for name in GOALS if first_answer.measured or name in WITHOUT_LOSS]
    with place.popover("Goal", icon=":material/flag:"):
        bind("goals", "goals", [name for name in offered if name in saved], some_of(offered), of=entry.name)
        names = st.multiselect("What is limited", offered, format_func=lambda name: GOALS[name][0], key="goals")
        limits: dict[str, float] = {}
        for name in names:
            title, words, term, low, high, step = GOALS[name]
            first = float(saved.get(name, DEFAULTS[name]))
            low, high = min(low, first), max(high, first)
            bind(name, name, first, number(low, high), of=entry.name)
            limits[name] = st.slider(
                f"{title}: {words}", low, high, step=step, format="%.3f", key=name, help=GLOSSARY[term]
            )
        each = False
        if names and "kv_budget" not in names and first_answer.measured:
            bind("each", "every_category", bool(saved.get("every_category")), flag(), of=entry.name)
            each = st.toggle("For every kind of prompt, not only on average", key="each")
    if not limits:
        st.info("Choose a goal.")
        end_page()
    return limits | ({"every_category": 1.0} if each else {}) | {"confidence": saved["confidence"]}


def choose_cutoff(entry: Entry, run: Run, recommended: int) -> int:
    """Return the cutoff to look at: the recommended one until the reader moves the slider."""
    chosen = bind("cutoff", "cutoff", recommended, whole(1, run.n_layers), of=entry.name)
    st.slider(
        f"Cutoff, layers (recommended: {recommended})",
        1,
        run.n_layers,
        key="cutoff",
        help=GLOSSARY["cutoff"],
    )
    return chosen


def verdict(place: Any, entry: Entry, rec: Recommendation, cutoff: int) -> None:
    """Say whether the cutoff meets the goal, and lead back to the recommended one."""
    if not rec.measured:
        lower = f", and {cutoff} is lower" if cutoff < rec.cutoff else ""
        place.info(f"No loss was measured. Our rule says {rec.cutoff}{lower}: {md(goal(rec))}.", icon=":material/info:")
    elif rec.evidence[cutoff - 1]["admissible"]:
        place.success(f"Cutoff {cutoff} meets the goal: {md(goal(rec))}.", icon=":material/check:")
    else:
        place.warning(f"Cutoff {cutoff} does not meet the goal: {md(goal(rec))}.", icon=":material/warning:")
    place.button(
        f"Recommended: {rec.cutoff}",
        on_click=lambda: keep("cutoff", None, of=entry.name),
        disabled=cutoff == rec.cutoff,
        key="follow",
    )


def evidence(rec: Recommendation, cutoff: int, savings: Savings) -> None:
    """Show in four numbers what was measured at the cutoff, and what it is predicted to save."""
    kept, full = savings.kv_bytes / 2**20, savings.kv_bytes_full / 2**20
    if rec.measured:
        at = rec.evidence[cutoff - 1]
        losses = [
            Card("KL from full depth", f"{at['kl']:.3f}", f"nats per token, {bound(at['kl_bound'], '.3f')}", "KL"),
            Card("Same top token", f"{at['top1_agreement']:.1%}", "of decode positions", "same top token"),
        ]
    else:
        losses = [uptake_card(rec, cutoff)]
    cards(
        [
            *losses,
            Card("TTFT", f"{savings.ttft_ratio:.3f}", f"of full: {savings.speedup_ttft:.2f} times as fast", "TTFT"),
            Card("KV cache", f"{savings.kv_ratio:.3f}", f"of full: {kept:,.1f} of {full:,.1f} MiB", "KV cache"),
        ]
    )
    if not savings.within_positions:
        st.caption(f":material/info: {savings.n_prompt:,} tokens are more than the model has positions.")


def more(run: Run, rec: Recommendation, cutoff: int, savings: Savings) -> None:
    """Show the other numbers, and the loss of every kind of prompt."""
    kept = retention_at(run, cutoff)

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    with st.expander("More numbers at this cutoff", icon=":material/more_horiz:"):
        cards(
            [
                *nll_card(rec, cutoff),
                Card("Attention kept", share(kept["mass_prompt"]), "of the mass on the prompt", "attention kept"),
                Card(
                    "Contribution kept",
                    share(kept["prompt_contribution"]),
                    "of what layers take from the prompt",
                    "contribution kept",
                ),
                Card("TPOT", f"{savings.tpot_ratio:.3f}", "of full, predicted by bytes read", "TPOT"),
            ]
        )
        if rec.measured:
            losses = pd.Series(loss_by_category(run, cutoff), name="KL, nats per token").rename_axis("kind of prompt")
            st.dataframe(losses.sort_values(ascending=False).reset_index(), hide_index=True)


def nll_card(rec: Recommendation, cutoff: int) -> list[Card]:
    """Return how much less likely the answers get; nothing where no loss was measured."""
    if not rec.measured:
        return []
    at = rec.evidence[cutoff - 1]
    note = f"nats per token, {bound(at['nll_increase_bound'], '+.3f')}"
    return [Card("NLL increase", f"{at['nll_increase']:+.3f}", note, "NLL increase")]


def bound(value: float | None, form: str) -> str:
    """Say a bound, or that there are too few prompts for one."""
    return "no bound: too few prompts" if value is None else f"bound {format(value, form)}"


def drawn(entry: Entry, run: Run, rec: Recommendation, n_prompt: int, cutoff: int) -> dict[str, Any]:
    """Show loss and savings above what is kept, their axes aligned; return the figures."""
    goals = tuple(rec.data["criterion"].items())

    def loss(n_prompt: int, cutoff: int, **_: Any) -> Any:
        return figures.cutoff_loss(run, rec, n_prompt, cutoff)

    return {
        "loss": show(entry, "loss", loss, n_prompt=n_prompt, cutoff=cutoff, goals=goals),
        "retention": show(entry, "retention", lambda **_: figures.retention(run, rec), goals=goals),
    }


st.title("Which cutoff?")
entry, run = current_run()
sliders = st.container(horizontal=True, vertical_alignment="bottom")
judged = st.container(horizontal=True, vertical_alignment="center")
said = judged.container(horizontal=True, vertical_alignment="center")
goals = choose_goals(entry, judged)
try:
    rec = recommendation(entry, goals)
except UserError as error:
    st.error(md(error))
    end_page()
with sliders:
    k = choose_cutoff(entry, run, rec.cutoff)
    n_prompt = choose_length(st)
savings = savings_at(run, k, n_prompt)
verdict(said, entry, rec, k)
if problem := goals_problem(entry):
    st.warning(md(problem))
wide, narrow = beside()
with narrow:
    evidence(rec, k, savings)
with wide:
    shown = drawn(entry, run, rec, n_prompt, k)
more(run, rec, k, savings)
rules(entry, run, rec)
export(entry, rec, k, shown)
for note in rec.data["notes"]:
    st.caption(f":material/info: {plain(note)}")
