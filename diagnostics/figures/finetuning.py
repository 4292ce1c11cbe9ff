"""What a fine-tuning changed: the loss of every cutoff, the progress of training, and categories of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diagnostics.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILION, add_line, finished, literal, tick
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from diagnostics.finetune.finetuning_folder import FineTuning

# Maximum number of curves between the first and the last.
MOST_BETWEEN = 8
# Up to FEW_STEPS steps single points are marked; the moving mean is over SMOOTHING of all steps.
FEW_STEPS, SMOOTHING = 30, 0.1
BEFORE = "before"


def finetuning_cutoffs(finetuning: FineTuning, goal: float | None = None) -> go.Figure | None:
    """Draw the loss of every cutoff before, during and after training; None if nothing has been measured yet.

    Losses are means over the held-out prompts, on a logarithmic axis. At most eight measurements during training are
    drawn, later ones darker. ``goal`` (nats per token) is dashed, the trained cutoff is grey. Full depth is not drawn
    where it is compared with itself.
    """
    measured = _measured(finetuning)
    if not measured:
        return None
    figure = go.Figure()
    first, last, between = measured[0], measured[-1], _thinned(measured[1:-1])
    shades = np.linspace(0.2, 0.6, len(between) + 1)[1:]
    for step, shade in zip(between, shades, strict=True):
        figure.add_trace(_curve(finetuning, step, f"step {step}"))
        figure.data[-1].update(
            mode="lines",
            line={"color": BLUE, "width": 1.5},
            opacity=float(shade),
            legendgroup="between",
            name=f"steps {between[0]} to {between[-1]}" if len(between) > 1 else f"step {step}",
            showlegend=step == between[-1],
        )
    figure.add_trace(_curve(finetuning, first, BEFORE).update(line={"color": ORANGE}))
    if last != first:
        figure.add_trace(_curve(finetuning, last, _last_name(finetuning)).update(line={"color": BLUE, "width": 3}))
    n_layers = int(finetuning.manifest["n_layers"])
    if goal:  # a logarithmic axis has no 0
        figure.add_hline(goal, line={"dash": "dash", "color": VERMILION})
        # plotly positions annotations, unlike lines, by the logarithm
        position = {"x": 0, "xref": "x domain", "xanchor": "left", "y": np.log10(goal), "yanchor": "top"}
        figure.add_annotation(text=f"goal {goal:g}", showarrow=False, **position)
    trained = _trained(finetuning)
    figure.add_vline(
        trained,
        line={"color": GREY, "width": 2},
        layer="below",
        annotation_text=f"trained at {trained}",
        annotation_position="bottom left",
        annotation_xshift=-4,
    )
    figure.update_xaxes(title_text="cutoff: layers that prompt tokens run through", dtick=tick(n_layers))
    baseline = "own full depth" if _against_itself(finetuning) else "full depth before training"
    unit = f"KL from {baseline},<br>nats per token"
    figure.update_yaxes(title_text=unit, type="log", exponentformat="power", dtick=1)
    return _finished(figure, "Loss of every cutoff", 480, finetuning)


def finetuning_steps(finetuning: FineTuning) -> go.Figure | None:
    """Draw the loss of every training step with its moving mean, and the KL of held-out prompts at the trained cutoff.

    Both are in nats per token. The window of the moving mean is a tenth of the steps. A cutoff that changes during
    training has its own panel. None if there is neither a step nor a measurement.
    """
    steps, measured, trained = finetuning.steps, _measured(finetuning), _trained(finetuning)
    if steps.empty and not measured:
        return None
    lowered = steps["cutoff"].nunique() > 1
    figure = make_subplots(
        rows=1 + lowered, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.75, 0.25][: 1 + lowered]
    )
    mode = "lines" if len(steps) > FEW_STEPS else "lines+markers"
    x = steps["step"]
    if len(steps):
        _add(figure, y=steps["loss"], name="training loss", colour=GREY, mode=mode, opacity=0.6, width=1, x=x)
    if (window := round(SMOOTHING * len(steps))) > 1:
        mean = steps["loss"].rolling(window, min_periods=1).mean()
        _add(figure, y=mean, name=f"its mean over {window} steps", colour=BLUE, mode="lines", width=2.5, x=x)
    if measured:
        # Also with a schedule: the cutoff at its end counts.
        kl = [finetuning.curve(step).get(trained, np.nan) for step in measured]
        name = f"KL at cutoff {trained}, held-out prompts"
        add_line(figure, measured, kl, name, VERMILION, "{}<br>step %{{x}}: %{{y:.4f}} nats/token")
        figure.data[-1].update(line={"width": 2.5}, marker={"size": 9})
    figure.update_yaxes(title_text="nats per token", rangemode="tozero", row=1, col=1)
    if lowered:
        _add(figure, y=steps["cutoff"], name="cutoff of the step", colour=GREEN, mode="lines", x=x, row=2)
        figure.data[-1].update(line={"shape": "hv"}, hovertemplate="step %{x}: cutoff %{y}<extra></extra>")
        spread = int(steps["cutoff"].max() - steps["cutoff"].min())
        figure.update_yaxes(title_text="cutoff", dtick=max(1, -(-spread // 4)), row=2, col=1)
    figure.update_xaxes(title_text="training step", row=1 + lowered, col=1)
    if max([*steps["step"], *measured]) <= FEW_STEPS:
        figure.update_xaxes(dtick=2)  # no labels at half steps
    figure = _finished(figure, "Training", 460 + 140 * lowered, finetuning)
    # The legend is below: in a narrow window its many names would overlap the title.
    return figure.update_layout(legend={"y": -0.2, "yanchor": "top"}, margin={"t": 66, "b": 150})


def finetuning_categories(
    finetuning: FineTuning, cutoff: int | None = None, goal: float | None = None
) -> go.Figure | None:
    """Draw the loss at a cutoff by category of held-out prompts, before and after: bars for means, a dot per prompt.

    The default is the trained cutoff; ``goal`` (nats per token) is dashed. None if nothing has been measured yet.
    Raises UserError for a cutoff that the model does not have.
    """
    cutoff = _trained(finetuning) if cutoff is None else cutoff
    if not 1 <= cutoff <= int(finetuning.manifest["n_layers"]):
        raise UserError(f"cutoff {cutoff} was not measured: give 1 to {finetuning.manifest['n_layers']}")
    measured = _measured(finetuning)
    if not measured:
        return None
    losses = finetuning.sweeps[finetuning.sweeps["cutoff"] == cutoff]
    categories = list(dict.fromkeys(losses["category"]))
    figure = go.Figure()
    sides = {measured[0]: (BEFORE, ORANGE, 0.0)}
    if len(measured) > 1:
        sides = {measured[0]: (BEFORE, ORANGE, -0.2), measured[-1]: (_last_name(finetuning), BLUE, 0.2)}
    for step, (name, colour, shift) in sides.items():
        rows = losses[losses["step"] == step]
        grouped = rows.groupby("category")["kl"].agg(["mean", "size"]).reindex(categories)
        figure.add_trace(
            go.Bar(
                x=grouped["mean"],
                y=np.arange(len(categories)) + shift,
                width=0.36,
                orientation="h",
                name=name,
                legendgroup=name,
                marker={"color": colour, "opacity": 0.4},
                customdata=[[literal(c), n] for c, n in zip(categories, grouped["size"], strict=True)],
                hovertemplate=f"%{{customdata[0]}}, {name}: KL %{{x:.4f}}, %{{customdata[1]}} prompts<extra></extra>",
            )
        )
        # Dots of a bar are spread across it in their order, so that equal ones are visible.
        rank = rows.groupby("category").cumcount() + 0.5
        size = rows.groupby("category")["kl"].transform("size")
        figure.add_trace(
            go.Scatter(
                x=rows["kl"],
                y=rows["category"].map(categories.index) + shift + 0.28 * (rank / size - 0.5),
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker={"color": colour, "size": 6},
                text=[literal(prompt_id) for prompt_id in rows["prompt_id"]],
                hovertemplate=f"%{{text}}, {name}: KL %{{x:.4f}}<extra></extra>",
            )
        )
    if goal:
        figure.add_vline(goal, line={"dash": "dash", "color": VERMILION})
    marks = f"dots: prompts; dashed: goal {goal:g}" if goal else "dots: prompts"
    figure.update_xaxes(title_text=f"KL at cutoff {cutoff}, nats per token ({marks})", rangemode="tozero")
    figure.update_yaxes(tickvals=list(range(len(categories))), ticktext=[*map(literal, categories)], automargin=True)
    figure.update_yaxes(range=[len(categories) - 0.5, -0.5])
    return _finished(figure, "By kind of prompt", 170 + 64 * len(categories), finetuning)


def _measured(finetuning: FineTuning) -> list[int]:
    """Return the steps at which all cutoffs were measured, in order."""
    return sorted(int(step) for step in finetuning.sweeps["step"].unique())


def _thinned(steps: list[int]) -> list[int]:
    indices = np.linspace(0, len(steps) - 1, min(len(steps), MOST_BETWEEN)).round().astype(int)
    return [steps[index] for index in indices]


def _curve(finetuning: FineTuning, step: int, name: str) -> go.Scatter:
    """Return the mean loss by cutoff at a measured step, without losses that are only rounding error."""
    kl, same = finetuning.curve(step), finetuning.curve(step, "top1_agreement")
    is_itself = step == 0 or _against_itself(finetuning)
    shown = kl.where((kl > 1e-6) & ~(is_itself & (kl.index == finetuning.manifest["n_layers"])))
    return go.Scatter(
        x=shown.index,
        y=shown,
        customdata=same,
        mode="lines+markers",
        name=name,
        hovertemplate=f"{name}<br>cutoff %{{x}}: KL %{{y:.4f}} nats/token"
        "<br>same top token %{customdata:.1%}<extra></extra>",
    )


def _add(figure: go.Figure, *, name: str, colour: str, row: int = 1, width: float = 2, **more: Any) -> None:
    """Add a curve over the steps of training."""
    hover = f"{name}<br>step %{{x}}: %{{y:.4f}}<extra></extra>"
    trace = go.Scatter(name=name, line={"color": colour, "width": width}, hovertemplate=hover, **more)
    figure.add_trace(trace, row=row, col=1)


def _finished(figure: go.Figure, title: str, height: int, finetuning: FineTuning) -> go.Figure:
    figure = finished(figure, title, height, _about(finetuning))
    return figure.update_layout(showlegend=True)  # also for a single curve


def _trained(finetuning: FineTuning) -> int:
    return int(finetuning.manifest["settings"]["cutoff"])


def _against_itself(finetuning: FineTuning) -> bool:
    return bool(finetuning.manifest["settings"].get("against") == "itself")


def _last_name(finetuning: FineTuning) -> str:
    return "after" if finetuning.complete else f"step {_measured(finetuning)[-1]}"


def _about(finetuning: FineTuning) -> str:
    n = finetuning.sweeps["prompt_id"].nunique()
    return f"{literal(finetuning.manifest['model'])}, {n} held-out prompt{'' if n == 1 else 's'}"
