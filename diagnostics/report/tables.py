"""Tables of a page: those of the terminal, with the same cells, and those of data frames."""

import pandas as pd
import rich.table

from diagnostics.report.document import Table


def from_terminal(table: rich.table.Table, *, text_columns: int = 0, caption: str = "") -> Table:
    """Return a table of the terminal as one of a page; its bold row is the strong one."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    strong = next((number for number, row in enumerate(table.rows) if row.style == "bold"), None)
    caption = ". ".join(text for text in (str(table.caption or ""), caption) if text)
    rows = list(zip(*columns, strict=True))
    return Table([str(column.header) for column in table.columns], rows, strong, text_columns, caption)


def from_frame(frame: pd.DataFrame, first: str, *, strong: str | None = None, caption: str = "") -> Table:
    """Return a frame of texts as a table; its index is the first column, under the heading ``first``."""
    rows = [[str(name), *map(str, row)] for name, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    names = list(map(str, frame.index))
    number = names.index(strong) if strong in names else None
    return Table([first, *map(str, frame.columns)], rows, number, 1, caption)
