"""Rules that only look at the layers: their cutoffs beside the measured knee, and the curve that our rule reads."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.cutoffs.must_see import COLUMN as LEAVE_ONE_OUT
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.regions import uptake
from diagnostics.cutoffs.rule_verdicts import measured_knee, rule_verdicts, rules_goal
from diagnostics.cutoffs.rules import all_rules
from diagnostics.figures.cutoffs import CUTOFF_AXIS
from diagnostics.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    about,
    add_curve,
    add_line,
    finished,
    legend_at_each_panel,
    literal,
    per_layer,
    tick,
)
from diagnostics.runs.run import Run
from diagnostics.support.finite import finite_mean

# Pixels of one rule, and of all that is not a rule.
ROW, AROUND = 26, 190
# How a mark looks, by the KL at the cutoff as a multiple of the goal, from 0 to below the next one.
MARKS = (
    ("within the goal", 0.0, GREEN, "circle"),
    ("up to twice the goal", 1.0, ORANGE, "diamond"),
    ("above that", 2.0, VERMILION, "x"),
)
NOT_MEASURED = ("loss not measured", GREY, "circle-open")
ROUNDING = 1 + 1e-9


def rule_cutoffs(run: Run, recommendation: Recommendation) -> go.Figure:
    """Draw the cutoff of every rule that names one, ours on top, with its range over 90% of the bootstrap.

    A mark's colour is the mean KL measured at its cutoff beside the goal; the line is the measured knee.
    """
    verdicts = rule_verdicts(recommendation)
    knee, goal = measured_knee(verdicts), rules_goal(recommendation)
    named = verdicts[verdicts["cutoff"].notna()]
    figure = go.Figure()
    multiples = named["kl"] / goal if goal > 0 else named["kl"].where(named["kl"].isna(), np.inf)
    for number, (label, least, colour, symbol) in enumerate(MARKS):
        above = multiples > least * ROUNDING if number else multiples.notna()
        below = multiples <= MARKS[number + 1][1] * ROUNDING if number + 1 < len(MARKS) else multiples.notna()
        _add_marks(figure, named[above & below], label, colour, symbol)
    _add_marks(figure, named[multiples.isna()], *NOT_MEASURED)
    if knee is not None:
        line = {"color": GREY, "width": 2}
        figure.add_vline(knee, line=line)
        named_line = {"mode": "lines", "line": line, "name": f"measured knee: {knee}", "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=[None], y=[None], **named_line))
    figure.update_xaxes(title_text=CUTOFF_AXIS, range=[0, run.n_layers + 1], tick0=0, dtick=tick(run.n_layers))
    titles = [literal(title) for title in named["title"]]
    figure = finished(figure, f"Where rules put the cutoff for KL {goal:g}", AROUND + ROW * len(named), about(run))
    return figure.update_yaxes(
        categoryorder="array", categoryarray=titles[::-1], range=[-0.6, len(named) - 0.4], automargin=True
    )


def _add_marks(figure: go.Figure, rules: pd.DataFrame, label: str, colour: str, symbol: str) -> None:
    if rules.empty:
        return
    known = all_rules()
    about_rule = [
        f"{literal(known[name].mapping)}<br>{literal(known[name].source)}" if name in known else ""
        for name in rules["rule"]
    ]
    off = ["" if np.isnan(off) else f", {off:+.0f} from the knee" for off in rules["off"]]
    kl = ["" if np.isnan(kl) else f"<br>KL {kl:.3f} nats per token" for kl in rules["kl"]]
    ends = {"array": rules["high"] - rules["cutoff"], "arrayminus": rules["cutoff"] - rules["low"]}
    figure.add_trace(
        go.Scatter(
            x=rules["cutoff"],
            y=[literal(title) for title in rules["title"]],
            error_x={"color": colour, "thickness": 1.5, "width": 3, "symmetric": False}
            | {side: ends[side].fillna(0).to_numpy() for side in ends},
            mode="markers",
            name=label,
            marker={"color": colour, "symbol": symbol, "size": 10},
            customdata=np.stack([off, kl, about_rule], axis=1),
            hovertemplate="%{y}: cutoff %{x}%{customdata[0]}%{customdata[1]}<br>%{customdata[2]}<extra></extra>",
        )
    )


def uptake_above(run: Run, recommendation: Recommendation) -> go.Figure:
    """Draw what our rule reads, the sum of uptake over the layers above each cutoff, above the KL measured there.

    Both on logarithmic axes, with their limits dashed; the line is the cutoff by our rule. Without a measured loss
    there is the first panel alone.
    """
    agreement, measured = recommendation.data["agreement"], recommendation.measured
    rows = 2 if measured else 1
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.13)
    cutoffs = np.arange(1, run.n_layers)  # above full depth there is nothing
    values = uptake(run)
    tails = np.cumsum(values[:, ::-1], axis=1)[:, ::-1][:, 1:]
    add_curve(figure, cutoffs, np.where(tails > 0, tails, np.nan), "uptake left above", BLUE, row=1)
    _log_axis(figure, "sum of uptake", agreement["max_uptake_above"], 1)
    if measured:
        kl = finite_mean(per_layer(run, "kl"), axis=0)[: run.n_layers - 1]
        drawn = np.where(kl > 1e-6, kl, np.nan)
        hover = "{} at cutoff %{{x}}: %{{y:.4f}} nats/token"
        add_line(figure, cutoffs, drawn, "KL from full depth, measured", GREEN, hover, row=2)
        _log_axis(figure, "KL, nats per token", rules_goal(recommendation), 2)
    by_selection = agreement["cutoff_by_selection"]
    for row in range(1, rows + 1):
        if by_selection is not None:
            figure.add_vline(by_selection, line={"color": GREY, "width": 2}, row=row, col=1)
    figure.update_xaxes(range=[0, run.n_layers + 1], tick0=0, dtick=tick(run.n_layers))
    figure.update_xaxes(title_text=CUTOFF_AXIS, row=rows, col=1)
    height = 560 if measured else 360
    title = "What our rule reads, and the measured loss" if measured else "What our rule reads"
    return legend_at_each_panel(finished(figure, title, height, about(run)))


def _log_axis(figure: go.Figure, title: str, limit: float, row: int) -> None:
    figure.update_yaxes(title_text=title, type="log", exponentformat="power", dtick=1, row=row, col=1)
    if limit > 0:  # a logarithmic axis has no 0
        figure.add_hline(limit, line={"dash": "dash", "color": VERMILION}, row=row, col=1)
        place = {"x": 1, "xref": "x domain", "xanchor": "right", "y": np.log10(limit), "yanchor": "bottom"}
        figure.add_annotation(text=f"limit {limit:.3g}", showarrow=False, row=row, col=1, **place)


def must_see(run: Run, recommendation: Recommendation) -> go.Figure | None:
    """Draw uptake per layer above the loss where this layer alone does not see the prompt; None where not measured.

    The dashed line is the mean of these losses.
    """
    found = recommendation.data.get("must_see")
    if not found:
        return None
    layers = np.arange(run.n_layers)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.13)
    losses = np.array(found[LEAVE_ONE_OUT], dtype=float)
    panels = (
        ("uptake", recommendation.regions.uptake, BLUE, "uptake"),
        ("loss without this layer", losses, GREEN, "KL, nats per token"),
    )
    for row, (name, values, colour, axis) in enumerate(panels, start=1):
        bars = go.Bar(x=layers, y=values, name=name, marker={"color": colour}, showlegend=True)
        figure.add_trace(bars.update(hovertemplate=f"layer %{{x}}: {name} %{{y:.3g}}<extra></extra>"), row=row, col=1)
        figure.update_yaxes(title_text=axis, rangemode="tozero", row=row, col=1)
    figure.add_hline(found["above"], line={"dash": "dash", "color": VERMILION}, row=2, col=1)
    figure.update_xaxes(range=[-0.6, run.n_layers - 0.4], dtick=tick(run.n_layers))
    figure.update_xaxes(title_text="layer", row=2, col=1)
    return legend_at_each_panel(finished(figure, "Where the prompt must be seen", 520, about(run)))
