"""An evaluation in the terminal: tasks in rows, policies in columns, and below them how answers fail."""

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diagnostics.evaluate.answers import FAILURES
from diagnostics.evaluate.summary import AVERAGE, cell


def show_evaluation(summary: pd.DataFrame, console: Console) -> None:
    """Print scores in percent with the half-width of their 95% interval; ``*`` marks what differs from full depth."""
    policies = list(dict.fromkeys(summary["policy"]))
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for policy in policies:
        table.add_column(Text(str(policy)), justify="right")
    for task in dict.fromkeys(summary["task"]):
        cells = summary[summary["task"] == task].set_index("policy")
        shown = [cell(cells.loc[policy]) if policy in cells.index else "-" for policy in policies]
        table.add_row(Text(str(task)), *shown, style="bold" if task == AVERAGE else None)
    for name in FAILURES:
        if name in summary and summary[name].notna().any():
            rates = summary.groupby("policy")[name].mean()
            table.add_row(name, *(f"{rates[policy]:.1%}" for policy in policies), style="dim")
    console.print(table)
    console.print(
        "Scores in percent, ± half of the 95% interval; * differs from full depth (5%, corrected over tasks)."
    )
