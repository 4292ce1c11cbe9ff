"""Quality under policies: scores, paired differences, cutoffs and failures.

All figures are drawn from the table that `diagnostics.evaluate.score_table.summarize` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.evaluate.answer_metrics import FAILURES
from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.score_table import FULL
from diagnostics.figures.style import BLUE, GREY, PALETTE, VERMILION, add_line, faint, finished, literal
from diagnostics.policies import Policy, parse_policy
from diagnostics.support.errors import UserError

COLOURS = tuple(colour for colour in PALETTE if colour != GREY)
# After seven policies or tasks colours repeat, with another symbol or dash.
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
DASHES = ("solid", "dash", "dot")
LONGEST_NAME = 28
# Parts of a figure's height outside the plot: the title above it, the axis below, and the legend below the axis.
ABOVE, AXIS, LEGEND = 80, 66, 50


def quality_scores(summary: pd.DataFrame) -> go.Figure:
    """Draw the score of every task and policy with its 95% interval; full depth is a grey bar across each task."""
    tasks, policies = _tasks(summary), _policies(summary)
    figure = go.Figure()
    full = summary[summary["policy"] == FULL].set_index("task")
    if len(full):
        _add_full(figure, full.loc[[task for task in tasks if task in full.index]], tasks)
    for number, policy in enumerate(policies):
        rows = summary[summary["policy"] == policy]
        figure.add_trace(
            _dots(
                policy,
                number,
                y=_heights(rows, tasks, number, len(policies)),
                values=100 * rows[["score", "low", "high"]].to_numpy(float),
                hover_data=rows[["task", "n"]].assign(task=rows["task"].map(literal)),
                hover="%{customdata[0]}: %{x:.1f} (%{customdata[2]:.1f} to %{customdata[3]:.1f}), "
                "%{customdata[1]} items",
            )
        )
    figure.update_xaxes(title_text="score, %")
    return _by_task(figure, "Scores with their 95% intervals", tasks, len(policies))


def quality_differences(summary: pd.DataFrame, margin: float) -> go.Figure | None:
    """Draw paired differences to full depth with their 95% intervals; None if there is nothing to compare.

    ``margin`` is the margin of non-inferiority, as a share of the score. A star marks differences that are significant
    at 5% after correction over tasks. A one-sided bound decides non-inferiority; it lies inside the drawn interval.
    """
    if "difference" not in summary or summary["difference"].isna().all():
        return None
    tasks, policies = _tasks(summary), _policies(summary)
    figure = go.Figure()
    for number, policy in enumerate(policies):
        rows = summary[(summary["policy"] == policy) & summary["difference"].notna()]
        values = 100 * rows[["difference", "difference_low", "difference_high"]].to_numpy(float)
        y = _heights(rows, tasks, number, len(policies))
        p_values = pd.to_numeric(rows["p_holm"])
        hover_data = pd.DataFrame(
            {
                "task": rows["task"].map(literal),
                "p": [f", p = {p:.2g} corrected" if np.isfinite(p) else "" for p in p_values],
            }
        )
        hover = "%{customdata[0]}: %{x:+.1f} (%{customdata[2]:+.1f} to %{customdata[3]:+.1f})%{customdata[1]}"
        figure.add_trace(_dots(policy, number, y=y, values=values, hover_data=hover_data, hover=hover))
        stars = (p_values < 0.05).to_numpy(bool)
        ends = np.where(np.isfinite(values[:, 2]), values[:, 2], values[:, 0])
        figure.add_trace(
            go.Scatter(
                x=ends[stars],
                y=y[stars],
                text=[" *"] * int(stars.sum()),
                mode="text",
                textposition="middle right",
                textfont={"size": 16},
                legendgroup=_label(policy),
                showlegend=False,
                hoverinfo="skip",
            )
        )
    figure.add_vline(0, line={"color": GREY, "width": 2}, layer="below")
    figure.add_vline(-100 * margin, line={"color": VERMILION, "dash": "dash", "width": 1.5}, layer="below")
    figure.add_annotation(
        x=-100 * margin, y=1, yref="paper", text=f"margin {100 * margin:g}", showarrow=False, yanchor="bottom"
    )
    figure.update_xaxes(title_text="difference to full depth, points (* significant)")
    return _by_task(figure, "Differences on the same items", tasks, len(policies))


def quality_by_cutoff(summary: pd.DataFrame) -> go.Figure | None:
    """Draw each cutoff's score relative to full depth, with a panel per kind of policy and a line per task.

    A kind is a policy with all its settings except the cutoff. None if no kind has two cutoffs, or full depth is
    missing; a task on which full depth scores 0 has no line.
    """
    full = summary[summary["policy"] == FULL].set_index("task")["score"].astype(float)
    kinds = _cutoffs(list(dict.fromkeys(summary["policy"])))
    if full.empty or not kinds:
        return None
    tasks = _tasks(summary)
    figure = make_subplots(
        rows=len(kinds),
        cols=1,
        shared_xaxes=True,
        shared_yaxes="all",
        vertical_spacing=0.16 / len(kinds),
        subplot_titles=[literal(kind) for kind in kinds],
    )
    for row, specs in enumerate(kinds.values(), start=1):
        scores = summary[summary["policy"].isin(list(specs))].pivot(index="policy", columns="task", values="score")
        scores = scores.rename(index=specs).sort_index()
        for number, task in enumerate(tasks):
            if task not in scores or not full.get(task, 0) > 0:
                continue
            bold = task == AVERAGE
            style: dict[str, Any] = {"width": 4 if bold else 1.5, "dash": "solid"}
            if not bold:
                style["dash"] = DASHES[number // (len(COLOURS) - 1) % len(DASHES)]
            add_line(
                figure,
                scores.index,
                100 * scores[task] / full[task],
                _short(task),
                BLUE if bold else COLOURS[1 + number % (len(COLOURS) - 1)],
                "{}, cutoff %{{x}}: %{{y:.1f}}% of full depth, score %{{customdata:.1%}}",
                row=row,
                customdata=scores[task],
                legendgroup=_short(task),
                showlegend=row == 1,
            )
            figure.data[-1].update(line=style)
    figure.add_hline(100, line={"color": GREY, "dash": "dash", "width": 1.5})
    cutoffs = sorted({cutoff for specs in kinds.values() for cutoff in specs.values()})
    figure.update_xaxes(tickvals=cutoffs)
    figure.update_xaxes(title_text="cutoff: layers that prompt tokens run through", row=len(kinds), col=1)
    figure.update_yaxes(title_text="% of full depth")
    return _legend_below(figure, "What cutoffs keep of the score", 260 * len(kinds))


def quality_failures(summary: pd.DataFrame) -> go.Figure | None:
    """Draw how often the generated answers of every policy fail, as means over tasks; None if none fails."""
    of_tasks = summary[summary["task"] != AVERAGE]
    names = [name for name in FAILURES if name in of_tasks and (of_tasks[name] > 0).any()]
    if not names:
        return None
    policies = list(dict.fromkeys(summary["policy"]))
    rates = of_tasks.groupby("policy")[names].mean().reindex(policies)
    labels = [_label(policy) for policy in policies]
    figure = go.Figure()
    for name, colour in zip(names, COLOURS, strict=False):
        hover = f"%{{y}}, {name}: %{{x:.1f}}%<extra></extra>"
        bars = go.Bar(x=100 * rates[name], y=labels, orientation="h", name=name, hovertemplate=hover)
        figure.add_trace(bars.update(marker={"color": colour}))
    figure.update_xaxes(title_text="generated answers, %", rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_layout(barmode="group", bargap=0.4)
    return _legend_below(figure, "How answers fail", len(policies) * max(36, 12 * len(names) + 10))


def policy_label(spec: str) -> str:
    """Return a policy's name for readers: ``SPEED 24, no anchor`` for ``speed:24:anchors=0``; else the spec itself."""
    policy = _parsed(spec)
    return spec if policy is None else _described(policy)


# --- Policies ---


def _parsed(spec: str) -> Policy | None:
    try:
        return parse_policy(spec)
    except UserError:  # a policy of another version
        return None


def _described(policy: Policy, *, with_cutoff: bool = True) -> str:
    title, settings = policy.title, []
    for field in fields(policy):
        value = getattr(policy, field.name)
        if field.name == "cutoff":
            title += f" {value}" if with_cutoff else ""
        elif value != field.default:
            setting = f"{field.name.replace('_', ' ')} {value}"
            settings.append("no anchor" if setting == "anchors 0" else setting)
    return ", ".join([title, *settings])


def _cutoffs(specs: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the cutoff of every policy, by kind, for kinds with two or more cutoffs."""
    kinds: dict[Policy, dict[str, int]] = {}
    for spec in specs:
        policy: Any = _parsed(spec)
        if policy is not None and policy.takes_cutoff():
            kinds.setdefault(replace(policy, cutoff=1), {})[spec] = policy.cutoff
    several = {kind: cutoffs for kind, cutoffs in kinds.items() if len(set(cutoffs.values())) > 1}
    return {_described(kind, with_cutoff=False): cutoffs for kind, cutoffs in several.items()}


def _label(spec: str) -> str:
    return literal(policy_label(spec))


# --- Dot plots: a row per task, in it a dot per policy ---


def _tasks(summary: pd.DataFrame) -> list[str]:
    """Return the tasks in their order, the average last."""
    return sorted(dict.fromkeys(summary["task"]), key=lambda task: task == AVERAGE)


def _policies(summary: pd.DataFrame) -> list[str]:
    return [policy for policy in dict.fromkeys(summary["policy"]) if policy != FULL]


def _short(task: str) -> str:
    name = task if len(task) <= LONGEST_NAME else f"{task[: LONGEST_NAME - 7]}…{task[-6:]}"
    return f"<b>{literal(name)}</b>" if task == AVERAGE else literal(name)


def _heights(rows: pd.DataFrame, tasks: list[str], number: int, n_policies: int) -> np.ndarray:
    """Return the heights of a policy's dots: policies are below each other within a task's row."""
    offset = 0.7 * ((number + 0.5) / n_policies - 0.5)
    return np.array([tasks.index(task) + offset for task in rows["task"]])


def _dots(
    policy: str, number: int, *, y: np.ndarray, values: np.ndarray, hover_data: pd.DataFrame, hover: str
) -> go.Scatter:
    """Return dots at ``values`` [tasks, (mean, low, high)]; ``hover`` uses ``hover_data``'s columns, low and high."""
    mean, low, high = values.T
    colour = COLOURS[number % len(COLOURS)]
    bars = {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "width": 0}
    return go.Scatter(
        x=mean,
        y=y,
        error_x=bars | {"thickness": 1.5, "color": colour},
        mode="markers",
        marker={"color": colour, "size": 9, "symbol": SYMBOLS[number // len(COLOURS) % len(SYMBOLS)]},
        name=_label(policy),
        legendgroup=_label(policy),
        customdata=hover_data.assign(low=low, high=high).to_numpy(object),
        hovertemplate=f"{_label(policy)}<br>{hover}<extra></extra>",
    )


def _add_full(figure: go.Figure, full: pd.DataFrame, tasks: list[str]) -> None:
    """Draw full depth as a bar across each task's row, over its interval."""
    gap = [None]
    heights = [tasks.index(task) for task in full.index]
    score, low, high = (100 * full[["score", "low", "high"]].to_numpy(float)).T
    band_x = [x for a, b in zip(low, high, strict=True) for x in (a, b, b, a, *gap)]
    band_y = [y for row in heights for y in (row - 0.42, row - 0.42, row + 0.42, row + 0.42, *gap)]
    band = {"fill": "toself", "fillcolor": faint(GREY), "mode": "lines", "line": {"width": 0}}
    group = {"legendgroup": FULL, "name": _label(FULL)}
    figure.add_trace(go.Scatter(x=band_x, y=band_y, showlegend=False, hoverinfo="skip", **group, **band))
    figure.add_trace(
        go.Scatter(
            x=[x for s in score for x in (s, s, s, *gap)],
            y=[y for row in heights for y in (row - 0.42, row, row + 0.42, *gap)],
            mode="lines",
            line={"color": GREY, "width": 3},
            text=[name for task in full.index for name in [literal(task)] * 4],
            hovertemplate=f"{_label(FULL)}<br>%{{text}}: %{{x:.1f}}<extra></extra>",
            **group,
        )
    )


def _by_task(figure: go.Figure, title: str, tasks: list[str], n_policies: int) -> go.Figure:
    names = [_short(task) for task in tasks]
    figure.update_yaxes(tickvals=list(range(len(tasks))), ticktext=names, automargin=True)
    figure.update_yaxes(range=[len(tasks) - 0.5, -0.5])
    if len(tasks) > 1 and tasks[-1] == AVERAGE:
        figure.add_hline(len(tasks) - 1.5, line={"color": GREY, "width": 1})
    return _legend_below(figure, title, len(tasks) * max(34, (14 if n_policies <= 6 else 11) * n_policies + 8))


def _legend_below(figure: go.Figure, title: str, height: int) -> go.Figure:
    """Finish a figure whose plot has ``height`` pixels; its legend may be long, so it is below the plot."""
    figure = finished(figure, title, height=height + ABOVE + AXIS + LEGEND)
    legend = {"y": -AXIS / height, "yanchor": "top"}
    figure.update_xaxes(title_standoff=8)
    margin = {"l": 20, "r": 30, "t": ABOVE, "b": AXIS + LEGEND}
    return figure.update_layout(showlegend=True, legend=legend, margin=margin)
