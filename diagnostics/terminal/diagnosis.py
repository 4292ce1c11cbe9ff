"""A diagnosis and a recommendation in the terminal: curves, tables and one sentence."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.goals import goals_in_words
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.region_verdicts import region_lines, region_verdict
from diagnostics.runs.run import Run
from diagnostics.terminal.rules import show_rules
from diagnostics.terminal.units import readable_bytes

BARS = "▁▂▃▄▅▆▇█"
# Column of the layers table -> its label.
CURVES = (
    ("mass_prompt", "attention on prompt"),
    ("selectivity", "selectivity"),
    ("prompt_contribution", "contribution"),
    ("drift_prompt_centred", "prompt drift"),
    ("saliency_overlap", "saliency overlap"),
    ("lens_kl_translated", "lens KL, translated"),
)
REGION_NAME = 22  # columns of a region's name and the space behind it
NEIGHBOURS = 3
RULER = 5  # layers from one number below the bars to the next
MARGINS = 39  # columns that the frame, the labels and the scales take


def show_run(run: Run, console: Console, *, phrase: Callable[[str], str] = str) -> None:
    """Print the curves of a diagnosis and its notes, each as ``phrase`` has it."""
    console.print(Panel(Group(_title(run), *_curves(run, console.width))))
    _show_notes(map(phrase, run.manifest["notes"]), console)


def show_recommendation(
    run: Run, recommendation: Recommendation, console: Console, *, phrase: Callable[[str], str] = str
) -> None:
    """Print the answer, then what it rests on, and the answer again: the last lines are those that stay in sight.

    Notes are printed as ``phrase`` has them: the command names its flags in them.
    """
    console.print(Text(f"{answer(recommendation)}\n", style="bold"))
    console.print(Panel(Group(_title(run), *_curves(run, console.width, recommendation))))
    for name, region in region_lines(recommendation).items():
        console.print(f"{name:<{REGION_NAME}}{region}")
    console.print()
    if recommendation.measured:
        console.print(loss_table(recommendation))
    console.print(savings_table(recommendation))
    show_rules(recommendation, console, phrase=phrase)
    _show_notes(map(phrase, recommendation.data["notes"]), console)
    console.print(_verdict(recommendation))
    console.print(Text(answer(recommendation), style="bold"))


def _show_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(Text(f"Note: {note}.", style="yellow"))


def _title(run: Run) -> Text:
    prompts = run.prompts
    shortest, longest = prompts["n_prompt"].min(), prompts["n_prompt"].max()
    return Text(f"{run.manifest['model']}: {len(prompts)} prompts of {shortest} to {longest} tokens\n", style="bold")


def _curves(run: Run, width: int, recommendation: Recommendation | None = None) -> Iterator[RenderableType]:
    """One line per curve, a bar per layer, layer 0 first; deep models in several blocks, to fit the width."""
    means = run.layers.groupby("layer").mean(numeric_only=True)
    rows: list[tuple[str, Text, str]] = []
    for column, label in CURVES:
        values = means[column].to_numpy()
        # Layer 0 turns embeddings into a residual; on its scale nothing else would show.
        scale = values[1:] if column in ("prompt_contribution", "drift_prompt_centred") else values
        if np.isfinite(scale).any():
            top = np.nanmax(scale)
            rows.append((label, Text(bars(values, top)), f"0 .. {top:.2g}"))
    if run.has_sweep:
        losses = run.cutoffs.groupby("cutoff")["kl"].mean().to_numpy()
        rows.append(("loss if cut above, KL", Text(bars(losses, losses.max())), f"0 .. {losses.max():.2g}"))
    if recommendation:
        rows.append(("regions", _marks(recommendation, run.n_layers), ""))
        rows.append(("prompt runs through", _depth(recommendation.cutoff, run.n_layers), ""))
    block = max(RULER, (width - MARGINS) // RULER * RULER)
    for first in range(0, run.n_layers, block):
        layers = range(first, min(first + block, run.n_layers))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right")
        grid.add_column(no_wrap=True)
        grid.add_column(style="dim", no_wrap=True)
        for label, line, scale_text in rows:
            grid.add_row(label, line[layers.start : layers.stop], scale_text)
        grid.add_row("layer", _ruler(layers), "")
        yield grid
    if recommendation:
        yield Text("regions: s selects from the prompt, = the prompt is stable", style="dim")


def bars(values: Sequence[float] | np.ndarray, top: float) -> str:
    """Draw one block per value on a scale from 0 to ``top``; a blank where there is no value."""
    scaled = np.clip(np.asarray(values, dtype=float) / (top or 1.0), 0, 1)
    return "".join(" " if np.isnan(x) else BARS[min(int(x * len(BARS)), len(BARS) - 1)] for x in scaled)


def _marks(recommendation: Recommendation, n_layers: int) -> Text:
    selection, stable = recommendation.selection_region, recommendation.stabilization_region
    text = Text()
    for layer in range(n_layers):
        if selection and selection.first <= layer <= selection.last:
            text.append("s", style="green")
        elif stable and stable.first <= layer <= stable.last:
            text.append("=", style="blue")
        else:
            text.append("·", style="dim")
    return text


def _depth(cutoff: int, n_layers: int) -> Text:
    """Draw a line through the layers below the cutoff."""
    return Text("━" * cutoff, style="bold red") + Text("·" * (n_layers - cutoff), style="dim")


def _ruler(layers: range) -> str:
    """Number every fifth layer under its bar."""
    return "".join(f"{layer:<{RULER}}" for layer in layers[::RULER]).rstrip()


def loss_table(recommendation: Recommendation) -> Table:
    """Return the measured loss at the recommended cutoff, which is bold, and at its neighbours."""
    cutoff, n_layers = recommendation.cutoff, recommendation.data["n_layers"]
    criterion = recommendation.data["criterion"]
    confidence = f"{100 * criterion['confidence']:g}%"
    goals = goals_in_words(criterion)
    table = Table(
        title=f"Measured loss of SPEED around the cutoff ({recommendation.data['n_prompts']} prompts; goal: {goals})",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in (
        "cutoff",
        "KL, nats/token",
        f"{confidence} bound",
        "same top token",
        "NLL increase",
        "goal",
    ):
        table.add_column(heading, justify="right")
    for row in recommendation.evidence[max(0, cutoff - 1 - NEIGHBOURS) : min(n_layers, cutoff + NEIGHBOURS)]:
        bound = "-" if row["kl_bound"] is None else f"{row['kl_bound']:.4f}"
        verdict = "met" if row["admissible"] else "missed"
        table.add_row(
            f"{row['cutoff']}",
            f"{row['kl']:.4f}",
            bound,
            f"{row['top1_agreement']:.1%}",
            f"{row['nll_increase']:+.4f}",
            verdict,
            style="bold" if row["cutoff"] == cutoff else None,
        )
    return table


def savings_table(recommendation: Recommendation) -> Table:
    """Return what the cutoff is predicted to save, a row per prompt length."""
    table = Table(
        title="Predicted savings at this cutoff (counted, not measured)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("prompt tokens", "TTFT", "speed-up", "TPOT", "KV", "KV bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in recommendation.data["predicted"]:
        beyond = "" if row["within_positions"] else " *"
        table.add_row(
            f"{row['n_prompt']:,}{beyond}",
            f"{row['ttft_ratio'] - 1:+.1%}",
            f"{row['speedup_ttft']:.2f}x",
            f"{row['tpot_ratio'] - 1:+.1%}",
            f"{row['kv_ratio'] - 1:+.1%}",
            f"{readable_bytes(row['kv_bytes'])} of {readable_bytes(row['kv_bytes_full'])}",
        )
    if not all(row["within_positions"] for row in recommendation.data["predicted"]):
        table.caption = "* beyond the model's positions"
        table.caption_justify = "left"
    return table


def _verdict(recommendation: Recommendation) -> Text:
    """Say the cutoff, and whether the layers, which do not know the loss, put it there too."""
    data, cutoff = recommendation.data, recommendation.cutoff
    text = Text(f"\nRecommended cutoff: {cutoff} of {data['n_layers']} layers", style="bold")
    anchors = "1 anchor" if data["anchors"] == 1 else f"{data['anchors']} anchors"
    text.append(f" ({data['depth_fraction']:.0%} of the depth, {anchors})", style="not bold")
    text.append(f"\n{region_verdict(recommendation)}", style="not bold")
    return text
