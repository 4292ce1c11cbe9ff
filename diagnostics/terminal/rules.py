"""What rules that only look at the layers say, in the terminal: a short table beside the measured knee."""

from collections.abc import Callable, Iterator

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.rule_verdicts import measured_knee, rule_verdicts, rules_goal

ROWS = 12  # at most, with the line of fixed fractions and that of what is left out
NONE = "-"
FINDS_NONE = "finds none: "  # begins a note that gives the reason
# The last two: shares of the layers that prompts skip, of all of them and beyond those that the knee lets them skip.
HEADINGS = ("rule", "cutoff", "from knee", "KL there", "saved", "saved more")
FULL_ALONE = HEADINGS.index("saved")


def show_rules(recommendation: Recommendation, console: Console, *, phrase: Callable[[str], str] = str) -> None:
    """Print the table of rules, and which name no cutoff, as ``phrase`` has it; nothing where no rule was asked."""
    verdicts = rule_verdicts(recommendation)
    if verdicts.empty:
        return
    console.print(rules_table(recommendation, ROWS))
    for line in silent_rules(verdicts):
        console.print(Text(phrase(line), style="dim"))


def rules_table(recommendation: Recommendation, n_rows: int | None = None) -> Table:
    """Return the rules that name a cutoff, ours first and bold, then those nearest to the measured knee.

    With ``n_rows`` the fixed fractions are one row, rules that are too many are left out, and a row says how many;
    the column "saved" is left out as well.
    """
    verdicts = rule_verdicts(recommendation)
    knee, goal = measured_knee(verdicts), f"KL {rules_goal(recommendation):g}"
    beside = f"no cutoff is within {goal}" if recommendation.measured else "no loss was measured"
    if knee is not None:
        beside = f"knee of {goal}: {knee}"
    title = f"Rules that only look at the layers ({beside})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns = [i for i in range(len(HEADINGS)) if n_rows is None or i != FULL_ALONE]
    for i in columns:
        table.add_column(HEADINGS[i], justify="right" if i else "left", no_wrap=i > 0)
    rows = [
        (cells(row), row["ours"])
        for _, row in verdicts[verdicts["cutoff"].notna()].iterrows()
        if n_rows is None or not row["fixed"]
    ]
    fixed = [] if n_rows is None else _fixed_fractions(verdicts)
    if n_rows is not None and len(rows) > n_rows - len(fixed):
        left = rows[n_rows - len(fixed) - 1 :]
        rows = rows[: -len(left)]
        fixed.append((f"{len(left)} more, farther away", *[""] * (len(HEADINGS) - 1)))
    for row_cells, ours in [*rows, *((row, False) for row in fixed)]:
        table.add_row(*(row_cells[i] for i in columns), style="bold" if ours else None)
    return table


def cells(row: pd.Series) -> tuple[str, ...]:
    """Return one rule as the texts that `HEADINGS` name; the cutoff with its range over the resamples."""
    cutoff = f"{row['cutoff']:.0f}"
    if row["low"] < row["high"]:  # False where there is no range
        cutoff += f" ({row['low']:.0f}-{row['high']:.0f})"
    return (
        str(row["title"]),
        cutoff,
        distance(row["off"]),
        number(row["kl"], ".3f"),
        number(row["saved"], ".0%"),
        against_knee(row["saved_vs_knee"]),
    )


def distance(off: float) -> str:
    """Return a distance from the knee in layers, as "0", "+1", "-5"; "-" where there is none."""
    return "0" if off == 0 else number(off, "+.0f")


def against_knee(share: float) -> str:
    """Return a share of the layers that is saved beyond the knee's, as "0%", "+3%", "-10%"; "-" where there is none."""
    return "0%" if share == 0 else number(share, "+.0%")


def number(value: float, form: str) -> str:
    """Return a number as text, "-" where there is none."""
    return NONE if pd.isna(value) else format(value, form)


def silent_rules(verdicts: pd.DataFrame) -> Iterator[str]:
    """Yield in a line each, by their names: the rules that find no cutoff, and those whose measures the run lacks."""
    silent = verdicts[verdicts["cutoff"].isna()]
    named = silent[~silent["absent"]]
    if len(named):
        yield f"Find no cutoff: {', '.join(map(_with_reason, named['rule'], named['note']))}."
    absent = list(silent.loc[silent["absent"], "rule"])
    if absent:
        yield f"Not measured in this run: {', '.join(absent)}. To measure one, name it: `rules='all,{absent[0]}'`."


def _with_reason(rule: str, note: str) -> str:
    reasons = [part.removeprefix(FINDS_NONE) for part in note.split("; ") if part.startswith(FINDS_NONE)]
    return f"{rule} ({reasons[0]})" if reasons else rule


def _fixed_fractions(verdicts: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return one row for all rules that read nothing of the model; nothing where there is none."""
    fixed = verdicts[verdicts["fixed"] & verdicts["cutoff"].notna()]
    if fixed.empty:
        return []

    def both(column: str, form: Callable[[float], str], between: str = " to ") -> str:
        ends = dict.fromkeys(map(form, (fixed[column].min(), fixed[column].max())))
        return NONE if fixed[column].isna().all() else between.join(ends)

    return [
        (
            f"fixed depths ({len(fixed)})",
            both("cutoff", "{:.0f}".format),
            both("off", distance),
            both("kl", "{:.2f}".format, "-"),
            both("saved", "{:.0%}".format),
            both("saved_vs_knee", against_knee),
        )
    ]
