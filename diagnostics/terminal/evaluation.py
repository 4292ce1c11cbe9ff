"""An evaluation in the terminal: scores of tasks under policies, their retention, and how answers fail."""

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.score_table import KEPT, texts

LONGEST, NARROWEST = 30, 8
FEW = 50  # items of a task; below, half of a 95% interval can be 14 points and more


def show_evaluation(summary: pd.DataFrame, console: Console) -> None:
    """Print scores in percent, with the half-width of their 95% interval where that fits."""
    table, head = _table(texts(summary)), "Scores in percent, ± half of the 95% interval"
    endless = console.options.update(width=10_000)  # rich measures no wider than the console
    if console.measure(table, options=endless).minimum > console.width:
        shown = texts(summary, spread=False)
        first = [AVERAGE, KEPT]  # in case the last columns do not fit either
        shown = shown[[*(name for name in first if name in shown), *(name for name in shown if name not in first)]]
        table, head = _table(shown, narrow=True), "Scores in percent; summary.md has their intervals"
    console.print(table)
    console.print(
        f"{head}; * differs from full depth (5%, corrected over tasks); kept: the average as a share of full depth's."
    )
    of_tasks = summary[summary["task"] != AVERAGE]
    few = of_tasks.loc[of_tasks["n"] < FEW].drop_duplicates("task")
    if len(few):
        counts = ", ".join(f"{task} ({n})" for task, n in zip(few["task"], few["n"], strict=True))
        console.print(
            Text(f"Few items: {counts}. Their intervals are wide; differences mean little below {FEW} items.", "yellow")
        )


def _table(shown: pd.DataFrame, narrow: bool = False) -> Table:
    if len(shown) < len(shown.columns):
        shown = shown.T  # the fewer columns the better they fit
    table = Table(box=None if narrow else SIMPLE_HEAD, padding=(0, 1, 0, 0) if narrow else (0, 1))
    # Names of rows stay on one line; titles of columns wrap.
    table.add_column("", min_width=min(LONGEST, max(len(str(name)) for name in shown.index)))
    for title, cells in shown.items():
        width = max(map(len, cells))
        most = max(width, NARROWEST) if narrow else None
        table.add_column(Text(str(title)), justify="right", overflow="fold", min_width=width, max_width=most)
    for name, row in shown.iterrows():
        table.add_row(Text(str(name)), *row, style="bold" if name == AVERAGE else None)
    return table
