"""The values that a figure draws, as a table: what a reader takes away beside the picture."""

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go


def figure_values(figure: go.Figure) -> pd.DataFrame:
    """Return exactly the data that a figure draws, a row per point or cell.

    Columns: ``panel`` (the title of the panel's vertical axis, where there are several), ``curve``, the titles of both
    axes (``x`` and ``y`` where they have none or differ between panels), and ``value`` for the cells of a heat map.
    """
    rows = [
        _rows(figure, trace) for trace in figure.data if trace.x is not None or getattr(trace, "z", None) is not None
    ]
    if not rows:
        return pd.DataFrame(columns=["curve", "x", "y"])
    table = pd.concat(rows, ignore_index=True)
    titles = {"x": _titles(figure, "x"), "y": _titles(figure, "y")}
    if len(titles["y"]) <= 1:
        table = table.drop(columns="panel")
    if not table["curve"].astype(bool).any():
        table = table.drop(columns="curve")
    names = {axis: found[0] for axis, found in titles.items() if len(found) == 1 and found[0] not in table}
    return table.rename(columns=names if len(set(names.values())) == len(names) else {})


def _rows(figure: go.Figure, trace: Any) -> pd.DataFrame:
    panel = _title(figure, "y", (getattr(trace, "yaxis", None) or "y")[1:])
    curve = html.unescape(str(trace.name or ""))
    cells = getattr(trace, "z", None)
    if cells is None:
        rows = pd.DataFrame({"x": list(trace.x), "y": list(trace.y)})
    else:
        cells = np.asarray(cells)
        height, width = cells.shape
        x, y = (range(n) if given is None else list(given) for given, n in ((trace.x, width), (trace.y, height)))
        rows = pd.DataFrame({"x": np.tile(x, height), "y": np.repeat(y, width), "value": cells.ravel()})
    rows.insert(0, "panel", panel)
    rows.insert(1, "curve", curve)
    return rows


def _titles(figure: go.Figure, axis: str) -> list[str]:
    """The different titles of all axes in one direction."""
    numbers = [
        name.removeprefix(f"{axis}axis") for name in figure.layout.to_plotly_json() if name.startswith(f"{axis}axis")
    ]
    return list(dict.fromkeys(filter(None, (_title(figure, axis, number) for number in numbers))))


def _title(figure: go.Figure, axis: str, number: str) -> str:
    found = figure.layout[f"{axis}axis{number}"].title.text
    return html.unescape(found) if found else ""
