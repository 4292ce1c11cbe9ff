"""Cutoff: move it and the goal, and see the loss, what is kept, and what is saved."""

import pandas as pd
import streamlit as st

from dashboard.cards import Card, cards
from dashboard.catalog import Entry
from dashboard.state import current_run, md, recommendation, saved_recommendation, show
from diagnostics import figures
from diagnostics.cutoffs.recommendation import Recommendation, loss_by_category, retention_at
from diagnostics.cutoffs.savings import Savings, predict_savings
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError

# Goals: name shown, unit and help, range, step.
GOALS = {
    "max_kl": (
        "KL from full depth, at most",
        "nats per token, upper bound of the mean over prompts",
        0.005,
        1.0,
        0.005,
    ),
    "max_nll_increase": ("NLL increase, at most", "nats per token, upper bound", 0.005, 1.0, 0.005),
    "min_agreement": ("Same top token, at least", "share of decode positions, lower bound", 0.5, 1.0, 0.005),
    "kv_budget": ("KV cache, at most", "share of full depth; asks for the largest cutoff that fits", 0.05, 1.0, 0.01),
}
DEFAULTS = {"max_kl": 0.1, "max_nll_increase": 0.1, "min_agreement": 0.9, "kv_budget": 0.75}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def choose_goals(entry: Entry) -> dict[str, float]:
    """Let the reader choose goals and their tolerances; they begin with those that were saved with the run."""
    saved = saved_recommendation(entry).data["criterion"]
    # A key of their own: Streamlit forgets those of widgets when the page is left.
    key = f"own goals {entry.name}"
    own = st.session_state.setdefault(key, {name: saved[name] for name in GOALS if name in saved})
    titles = {name: title for name, (title, *_) in GOALS.items()}
    left, right = st.columns([1, 2])
    names = left.multiselect("Goals", list(GOALS), list(own), format_func=titles.get, key=f"goals {entry.name}")
    limits = {}
    for name, column in zip(names, right.columns(max(1, len(names))), strict=False):
        title, unit, low, high, step = GOALS[name]
        first = float(saved.get(name, DEFAULTS[name]))
        limits[name] = column.slider(
            f"{title}: {unit}",
            min(low, first),
            max(high, first),
            float(own.get(name, first)),
            step,
            format="%.3f",
            key=f"{name} {entry.name}",
        )
    st.session_state[key] = limits
    if not limits:
        st.info("Choose a goal.")
        st.stop()
    kept = ["confidence"] if "kv_budget" in limits else ["confidence", "every_category"]
    return limits | {name: saved[name] for name in kept if name in saved}


def choose_cutoff(entry: Entry, run: Run, recommended: int) -> int:
    """Return the cutoff to look at: the recommended one until the reader moves the slider."""
    key, own = f"cutoff {entry.name}", f"own cutoff {entry.name}"
    st.session_state[key] = min(st.session_state.get(own) or recommended, run.n_layers)

    def moved() -> None:
        st.session_state[own] = st.session_state[key]

    def follow() -> None:
        st.session_state[own] = None

    left, right = st.columns([5, 2], vertical_alignment="bottom")
    chosen = left.slider(
        f"Cutoff: layers that prompt tokens run through (recommended: {recommended})",
        1,
        run.n_layers,
        key=key,
        on_change=moved,
    )
    right.button("Recommended", on_click=follow, disabled=chosen == recommended, width="stretch", key="follow")
    return int(chosen)


def evidence(run: Run, rec: Recommendation, cutoff: int, savings: Savings) -> None:
    """Show what was measured at the cutoff, and what it is predicted to save."""
    at = rec.evidence[cutoff - 1]
    kept = retention_at(run, cutoff)

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    full = savings.kv_bytes_full / 2**20
    cards(
        [
            Card(
                "KL from full depth", f"{at['kl']:.3f}", f"bound {number(at['kl_bound'], '.3f')} nats per token", "KL"
            ),
            Card("Same top token", f"{at['top1_agreement']:.1%}", "of decode positions", "same top token"),
            Card(
                "NLL increase",
                f"{at['nll_increase']:+.3f}",
                f"bound {number(at['nll_increase_bound'], '+.3f')} nats per token",
                "NLL increase",
            ),
            Card(
                "Attention kept", number(kept["mass_prompt"], ".1%"), "of the mass, below the cutoff", "attention kept"
            ),
            Card(
                "Contribution kept",
                number(kept["prompt_contribution"], ".1%"),
                "of what layers take from the prompt",
                "contribution kept",
            ),
            Card(
                "TTFT",
                f"{savings.ttft_ratio:.3f}",
                f"of full, predicted: {savings.speedup_ttft:.2f} times as fast",
                "TTFT",
            ),
            Card("TPOT", f"{savings.tpot_ratio:.3f}", "of full, predicted by bytes read", "TPOT"),
            Card(
                "KV cache",
                f"{savings.kv_bytes / 2**20:,.1f} MiB",
                f"{savings.kv_ratio:.3f} of {full:,.1f} MiB",
                "KV cache",
            ),
        ]
    )
    if not savings.within_positions:
        st.caption(f":material/info: {savings.n_prompt:,} tokens are more than the model has positions.")
    if at["admissible"]:
        st.success(f"Cutoff {cutoff} meets the goal.", icon=":material/check:")
    else:
        st.warning(f"Cutoff {cutoff} does not meet the goal.", icon=":material/warning:")


def export(entry: Entry, rec: Recommendation, cutoff: int, drawn: dict[str, object]) -> None:
    """Offer the recommendation, the figures, and the Python that uses the cutoff."""
    st.subheader("Take it with you")
    left, middle, *rest = st.columns(2 + len(drawn))
    left.download_button(
        RECOMMENDATION,
        rec.to_json(),
        RECOMMENDATION,
        "application/json",
        width="stretch",
        key="json",
        help="what `recommend` writes: the recommended cutoff and the evidence for every other",
    )
    if middle.button("Save in the run folder", width="stretch", key="save"):
        rec.save(entry.path / RECOMMENDATION)
        st.toast(f"Saved: {RECOMMENDATION} with cutoff {rec.cutoff}")
    for column, (name, figure) in zip(rest, drawn.items(), strict=True):
        column.download_button(
            f"{name}.html",
            lambda figure=figure: figure.to_html(include_plotlyjs=True),  # 5 MB: made when it is asked for
            f"{entry.name.replace('/', '-')}-{name}.html",
            "text/html",
            width="stretch",
            key=f"html {name}",
        )
    st.caption("PNG: the camera above each figure.")
    anchors = rec.data["anchors"]
    settings = f"cutoff={cutoff}" + ("" if anchors == 1 else f", anchors={anchors}")
    st.code(
        f"""from diagnostics import SpeedPolicy, load_model

lm = load_model({rec.data["model"]!r})
policy = SpeedPolicy({settings})
inputs = lm.tokenizer("...", return_tensors="pt").to(lm.device)
with policy(lm.model):
    tokens = lm.model.generate(**inputs, max_new_tokens=64)""",
        language="python",
    )


entry, run = current_run()
st.title("Which cutoff?")
goals = choose_goals(entry)
try:
    rec = recommendation(entry, goals)
except UserError as error:
    st.error(md(error))
    st.stop()
k = choose_cutoff(entry, run, rec.cutoff)
n_prompt = st.select_slider(
    "Context length for the prediction, tokens", LENGTHS, 8192, format_func="{:,}".format, key="length"
)
anchors = int(run.manifest["identity"]["anchors"])
(savings,) = predict_savings(
    run.manifest["shape"], k, anchors=anchors, lengths=[n_prompt], max_positions=run.manifest["max_positions"]
)
evidence(run, rec, k, savings)
drawn = {
    "loss": show(
        entry,
        "loss",
        lambda n_prompt, k, **_: figures.cutoff_loss(run, rec, n_prompt, k),
        n_prompt=n_prompt,
        k=k,
        goals=tuple(goals.items()),
    ),
    "retention": show(entry, "retention", lambda **_: figures.retention(run, rec), goals=tuple(goals.items())),
}
with st.expander("Loss by category of prompts, at this cutoff"):
    losses = pd.Series(loss_by_category(run, k), name="KL, nats per token").rename_axis("category").reset_index()
    st.dataframe(losses.sort_values(losses.columns[1], ascending=False), hide_index=True)
export(entry, rec, k, drawn)
for note in rec.data["notes"]:
    st.caption(f":material/info: {md(note)}")
