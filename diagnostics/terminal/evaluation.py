"""An evaluation in the terminal: scores of tasks under policies, what is kept of them, and how answers fail."""

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.summary import texts

LONGEST = 30


def show_evaluation(summary: pd.DataFrame, console: Console) -> None:
    """Print scores in percent with the half-width of their 95% interval; ``*`` marks what differs from full depth."""
    shown = texts(summary)
    if len(shown) < len(shown.columns):
        shown = shown.T  # the fewer columns the better they fit
    table = Table(box=SIMPLE_HEAD)
    # What the rows are is said whole; titles of columns take a second line instead.
    table.add_column("", min_width=min(LONGEST, max(len(str(name)) for name in shown.index)))
    for title in shown.columns:
        table.add_column(Text(str(title)), justify="right", overflow="fold")
    for name, row in shown.iterrows():
        table.add_row(Text(str(name)), *row, style="bold" if name == AVERAGE else None)
    console.print(table)
    console.print(
        "Scores in percent, ± half of the 95% interval; * differs from full depth (5%, corrected over tasks); "
        "kept: the average as a share of full depth's."
    )
