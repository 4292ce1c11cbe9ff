"""The table of recommendations: as files, written anew after every pair, and in the terminal."""

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cutoff_selection.config import RATIOS, Plan
from diagnostics.cutoffs.goals import GOALS
from diagnostics.support.files import write_table, write_text

TABLE = "recommendations"

Row = dict[str, Any]

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem; }}
  div {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
  th, td {{ border-bottom: 1px solid #8886; padding: 0.3rem 0.7rem; text-align: right; vertical-align: top; }}
  th.text, td.text {{ text-align: left; overflow-wrap: break-word; }}
  td:nth-last-child(-n+2):not(:empty) {{ min-width: 20rem; }}
  tr.failed td {{ background: #e0304030; }}
</style>
<h1>{title}</h1>
<p>{goal}. Losses are measured at the cutoff; ratios to full depth are predicted, for so many prompt tokens.</p>
<div><table>
<thead><tr>{heading}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
</html>
"""


def write_tables(plan: Plan, rows: dict[int, Row]) -> None:
    """Write the rows in the order of the config, as CSV, parquet and HTML, each atomically."""
    table = pd.DataFrame(in_order(rows), columns=list(plan.columns)).astype(plan.columns)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_table(plan.out / f"{TABLE}.parquet", table)
    write_text(plan.out / f"{TABLE}.csv", table.to_csv(index=False))
    write_text(plan.out / f"{TABLE}.html", page(plan, in_order(rows)))


def in_order(rows: dict[int, Row]) -> list[Row]:
    """Return the rows in the order of the config."""
    return [rows[number] for number in sorted(rows)]


def page(plan: Plan, rows: Sequence[Row]) -> str:
    """Return the table as an HTML page that needs nothing else."""
    texts = {name for name, kind in plan.columns.items() if kind == "string"}

    def cells(tag: str, values: dict[str, Any]) -> str:
        opening = {name: f'<{tag} class="text">' if name in texts else f"<{tag}>" for name in plan.columns}
        return "".join(f"{opening[name]}{html.escape(_shown(values.get(name)))}</{tag}>" for name in plan.columns)

    return PAGE.format(
        title=html.escape(f"Recommended cutoffs: {plan.name}"),
        goal=html.escape(_goal(plan)),
        heading=cells("th", {name: name.replace("_", " ") for name in plan.columns}),
        body="\n".join(f'<tr class="{row["status"]}">{cells("td", row)}</tr>' for row in rows),
    )


def show(plan: Plan, rows: Sequence[Row], console: Console) -> None:
    """Print the main columns, and below them what failed and why."""
    length = plan.lengths[0]
    table = Table(title=_goal(plan), title_justify="left", box=SIMPLE_HEAD)
    for heading in ("model", "prompts"):
        table.add_column(heading)
    for heading in ("cutoff", "KL", "bound", "same top", "selects", "stable", f"TTFT at {length:,}", "TPOT", "KV"):
        table.add_column(heading, justify="right", no_wrap=True)
    losses, regions = ("kl", "kl_bound", "top1_agreement"), ("selection_region", "stabilization_region")
    for row in rows:
        ok = row["status"] == "ok"
        cutoff = f"{row['cutoff']} of {row['n_layers']}" if ok else "failed"
        values = [row.get(name) for name in (*losses, *regions, *(f"{name}_ratio_{length}" for name in RATIOS))]
        texts = (row["model"], row["prompts"], cutoff, *(_shown(value, 3) or "-" for value in values))
        table.add_row(*map(Text, texts), style=None if ok else "red")
    # Where the screen is too narrow the terminal wraps lines: nothing is cut.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)
    for row in rows:
        if said := row.get("error") or row.get("notes"):
            style = "yellow" if row["status"] == "ok" else "red"
            console.print(Text(f"{row['model']} on {row['prompts']}: {said}", style=style))


def _goal(plan: Plan) -> str:
    limits = " and ".join(f"{label} {plan.goal[name]:g}" for name, label in GOALS.items() if name in plan.goal)
    return f"Goal: {limits}"


def _shown(value: Any, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
