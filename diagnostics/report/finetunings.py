"""The page of a fine-tuning: what it changed at every cutoff, then what the trained model's run has to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diagnostics import figures
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.report.document import Card, Facts, Page, Part, Picture, Section, Table
from diagnostics.report.facts import named, run_facts
from diagnostics.report.runs import goal, run_sections
from diagnostics.report.tables import from_frame, from_terminal
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from diagnostics.finetune.finetuning_folder import FineTuning


def finetuning_report(finetuning: FineTuning, after: Run, recommendation: Recommendation) -> str:
    """Return the page of a finished fine-tuning as HTML.

    Raises UserError for a folder that lacks parts of a finished one.
    """
    try:
        return _page(finetuning, after, recommendation).render()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"fine-tuning {str(finetuning.path)!r} is damaged: {type(error).__name__} {error}") from None


def finetuning_data(manifest: Mapping[str, Any]) -> str:
    """Return a sentence on how a fine-tuning used its data; "" if the manifest does not have it or was edited."""
    from diagnostics.finetune.examples import Counts

    try:
        return Counts(**manifest["data"]).said()
    except (KeyError, TypeError, ValueError):
        return ""


def _page(finetuning: FineTuning, after: Run, recommendation: Recommendation) -> Page:
    from diagnostics.finetune.cutoff_comparison import compare_cutoffs
    from diagnostics.terminal.finetuning import baseline, cutoffs_table, goal_cutoffs

    m, n_layers = finetuning.manifest, after.n_layers
    trained = int(m["settings"]["cutoff"])
    cutoffs = compare_cutoffs(finetuning)
    first, last, limit = goal_cutoffs(finetuning)
    facts = named(m["settings"]) | {"Data": f"{m.get('source', '')}: {finetuning_data(m)}", "Model": str(m["model"])}
    losses = from_terminal(
        cutoffs_table(finetuning, cutoffs, {first, last}),
        caption=f"KL from {baseline(finetuning)}, nats per token; means over the held-out prompts",
    )
    return Page(
        title=f"Cutoff {recommendation.cutoff} of {n_layers} for {m['model']} trained at {trained}",
        answer=f"Goal of {limit:g} nats per token: cutoff {first} of {n_layers} before training, {last} after it.",
        cards=_cards(cutoffs, trained, first, last),
        remarks=[goal(after, recommendation)],
        notes=recommendation.data["notes"],
        sections=[
            Section("What training changed", [*_pictures(finetuning, limit), losses, _categories(finetuning, trained)]),
            *run_sections(after, recommendation),
            Section("How it was trained", [Facts(facts)]),
            Section("How this was measured", [Facts(run_facts(after))]),
        ],
    )


def _cards(cutoffs: pd.DataFrame, trained: int, first: int, last: int) -> list[Card]:
    at, full = cutoffs.set_index("cutoff").loc[trained], cutoffs.iloc[-1]
    return [
        Card("Cutoff", f"{first} to {last}", "before and after training, at the same goal"),
        Card(
            f"KL at cutoff {trained}", f"{at['kl_before']:.3f} to {at['kl_after']:.3f}", "the trained one, nats/token"
        ),
        Card(
            "Same top token",
            f"{at['top1_agreement_before']:.0%} to {at['top1_agreement_after']:.0%}",
            f"at cutoff {trained}",
        ),
        Card("KL at full depth", f"{full['kl_after']:.3f}", "how far training moved the model itself"),
    ]


def _pictures(finetuning: FineTuning, limit: float) -> list[Part]:
    drawn = (
        (
            figures.finetuning_cutoffs(finetuning, limit),
            "Where the blue line lies below the orange one, training made that cutoff closer to full depth; where it "
            "lies above, it moved the model further than the cutoff did.",
        ),
        (
            figures.finetuning_steps(finetuning),
            "The loss of a step is noisy: its moving mean and the held-out prompts tell whether training helps.",
        ),
        (
            figures.finetuning_categories(finetuning, goal=limit),
            "Kinds of held-out prompts gain differently; a dot is one prompt.",
        ),
    )
    return [Picture(figure, caption) for figure, caption in drawn if figure is not None]


def _categories(finetuning: FineTuning, trained: int) -> Table:
    from diagnostics.finetune.cutoff_comparison import by_category

    table = by_category(finetuning, trained).map("{:.3f}".format)
    table.columns = [f"KL {when}" for when in table.columns]
    return from_frame(table, "category", caption=f"Held-out prompts at cutoff {trained}, nats per token")
