"""A fine-tuning in the terminal: the cutoffs before and after, and the new recommendation."""

from collections.abc import Callable

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diagnostics.cutoffs.recommendation import recommend
from diagnostics.finetune.cutoff_comparison import by_category
from diagnostics.finetune.finetuning_folder import BEFORE, FineTuning
from diagnostics.policies.recommendation import read_recommendation
from diagnostics.runs.run import load_run

AROUND = 3  # rows of the table on either side of a cutoff


def show_finetuning(
    finetuning: FineTuning,
    table: pd.DataFrame,
    console: Console,
    *,
    notes: bool = True,
    phrase: Callable[[str], str] = str,
) -> None:
    """Print the cutoffs around those that matter, the categories at the trained one, and both recommendations.

    Notes and advice are printed as ``phrase`` has them: the command names its flags in them.
    """
    before, after, goal = goal_cutoffs(finetuning)
    n_layers, settings = int(finetuning.manifest["n_layers"]), finetuning.manifest["settings"]
    trained = int(settings["cutoff"])
    shown = cutoffs_table(finetuning, table, {before, after})
    shown.title = f"KL from {baseline(finetuning)}, nats per token, and same top token; held-out prompts"
    console.print(shown)
    for name, kl in by_category(finetuning, trained).iterrows():
        console.print(f"  {name}: {kl['before']:.3f} -> {kl['after']:.3f} at cutoff {trained}", markup=False)
    assert finetuning.path is not None
    for note in read_recommendation(finetuning.path)["notes"] if notes else ():
        console.print(f"Note: {phrase(note)}.", style="yellow", markup=False)
    if (drift := float(table["kl_after"].iloc[-1])) > goal:
        advice = f"a larger share of steps at full depth (`hold`, {settings.get('hold', 0):g} here) keeps it nearer."
        console.print(
            f"At full depth the trained model is {drift:.3f} nats per token away, more than the goal: {phrase(advice)}"
        )
    console.print(f"Goal of {goal:g} nats per token: cutoff {before} of {n_layers} before training, {after} after it.")


def goal_cutoffs(finetuning: FineTuning) -> tuple[int, int, float]:
    """Return the cutoffs recommended before and after training, and their goal in nats per token."""
    assert finetuning.path is not None
    after = read_recommendation(finetuning.path)
    goal = float(after["criterion"]["max_kl"])
    return recommend(load_run(finetuning.path / BEFORE), max_kl=goal).cutoff, int(after["cutoff"]), goal


def baseline(finetuning: FineTuning) -> str:
    """Say what the losses are measured against."""
    itself = finetuning.manifest["settings"]["against"] == "itself"
    return "full depth" if itself else "full depth before training"


def cutoffs_table(finetuning: FineTuning, table: pd.DataFrame, recommended: set[int]) -> Table:
    """Return the losses around the recommended cutoffs and the trained one, which is bold, and at full depth."""
    trained, n_layers = int(finetuning.manifest["settings"]["cutoff"]), int(finetuning.manifest["n_layers"])
    near = {k + away for k in {trained} | recommended for away in range(-AROUND, AROUND + 1)} | {n_layers}
    shown = Table(box=SIMPLE_HEAD)
    for title in ("cutoff", "KL before", "KL after", "same top token before", "same top token after"):
        shown.add_column(title, justify="right")
    for row in table[table["cutoff"].isin(near)].to_dict("records"):
        shown.add_row(
            str(row["cutoff"]),
            f"{row['kl_before']:.3f}",
            f"{row['kl_after']:.3f}",
            f"{row['top1_agreement_before']:.1%}",
            f"{row['top1_agreement_after']:.1%}",
            style="bold" if row["cutoff"] == trained else None,
        )
    return shown
