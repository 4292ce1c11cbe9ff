"""A self-contained HTML page of a run, an evaluation or a fine-tuning, to send by mail; it needs no network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from rich.console import Console

from diagnostics import figures
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.generation.benchmark_folder import Benchmark
from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError
from diagnostics.support.files import write_text
from diagnostics.terminal.diagnosis import show_recommendation

if TYPE_CHECKING:
    from diagnostics.evaluate.evaluation_folder import Evaluation
    from diagnostics.finetune.finetuning_folder import FineTuning

TEMPLATE = "report.html.jinja"
# Wide enough for the terminal's layer curves and tables; an evaluation's table grows with its policies.
COLUMNS, EVALUATION_COLUMNS = 110, 1000


def report(run: Run, recommendation: Recommendation, benchmark: Benchmark | None = None) -> str:
    """Return the page of a run as text: about 5 MB, since it contains plotly's program."""
    drawn = _figures(run, recommendation)
    if benchmark is not None:
        drawn.append(figures.benchmark_ratios(benchmark))
    title = f"Cutoff {recommendation.cutoff} of {run.n_layers} for {run.manifest['model']}"
    return _page(title, _summary(run, recommendation), drawn, _facts(run))


def evaluation_report(evaluation: Evaluation) -> str:
    """Return the page of an evaluation, with its own margin and seed."""
    from diagnostics.evaluate.score_table import summarize
    from diagnostics.terminal.evaluation import show_evaluation

    m = evaluation.manifest
    margin = asked_margin(m)
    table = summarize(evaluation, margin=margin, seed=asked_seed(m))
    drawn = [
        figures.quality_differences(table, margin),
        figures.quality_scores(table),
        figures.quality_by_cutoff(table),
        figures.quality_failures(table),
    ]
    text = StringIO()
    show_evaluation(table, Console(file=text, width=EVALUATION_COLUMNS, highlight=False, no_color=True))
    n = evaluation.items.groupby("task", sort=False)["item_id"].nunique()
    facts = {
        "Evaluation": str(evaluation.path or "in memory"),
        "Made": str(m.get("created", "")),
        "Hardware": str(m.get("hardware", "")),
        "Items": ", ".join(f"{name} {count}" for name, count in n.items()),
        "Margin": f"{100 * margin:g} points",
    }
    identity = m.get("identity", {})
    facts |= {name.capitalize(): str(identity[name]) for name in ("dtype", "query", "seed") if name in identity}
    title = f"Quality of {m['model']} under {table['policy'].nunique()} policies"
    return _page(title, text.getvalue(), [figure for figure in drawn if figure is not None], facts.items())


def finetuning_report(finetuning: FineTuning, after: Run, recommendation: Recommendation) -> str:
    """Return the page of a finished fine-tuning: its changes, then the report of the trained model's run.

    Raises UserError for a folder that lacks parts of a finished one.
    """
    from diagnostics.finetune.cutoff_comparison import compare_cutoffs
    from diagnostics.terminal.finetuning import show_finetuning

    m, goal = finetuning.manifest, recommendation.data["criterion"].get("max_kl")
    text = StringIO()
    try:
        plain = Console(file=text, width=COLUMNS, highlight=False, no_color=True)
        # Without notes: the recommendation below has them.
        show_finetuning(finetuning, compare_cutoffs(finetuning), plain, notes=False)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"fine-tuning {str(finetuning.path)!r} is damaged: {type(error).__name__} {error}") from None
    drawn = [
        figures.finetuning_cutoffs(finetuning, goal),
        figures.finetuning_steps(finetuning),
        figures.finetuning_categories(finetuning, goal=goal),
        *_figures(after, recommendation),
    ]
    facts = {name.replace("_", " ").capitalize(): str(value) for name, value in m["settings"].items()}
    facts |= {"Data": f"{m.get('source', '')}: {finetuning_data(m)}", "Model": str(m["model"])}
    title = f"Cutoff {recommendation.cutoff} of {after.n_layers} for {m['model']} trained at {m['settings']['cutoff']}"
    summary = f"{text.getvalue()}\n{_summary(after, recommendation)}"
    return _page(title, summary, [figure for figure in drawn if figure is not None], [*facts.items(), *_facts(after)])


def finetuning_data(manifest: Mapping[str, Any]) -> str:
    """Return a sentence on how a fine-tuning used its data; "" if the manifest does not have it or was edited."""
    from diagnostics.finetune.examples import Counts

    try:
        return Counts(**manifest["data"]).said()
    except (KeyError, TypeError, ValueError):
        return ""


def asked_margin(manifest: Mapping[str, Any]) -> float:
    """Return an evaluation's margin of non-inferiority, as a share of the score."""
    from diagnostics.support.defaults import MARGIN

    margin = manifest.get("margin", manifest.get("arguments", {}).get("margin"))  # older manifests: only an argument
    return float(margin) if isinstance(margin, int | float) and 0 <= margin <= 1 else MARGIN


def asked_seed(manifest: Mapping[str, Any]) -> int:
    """Return the seed of an evaluation."""
    seed = manifest.get("identity", {}).get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else 0


def write_report(path: str | Path, page: str) -> None:
    """Write a page atomically; raise UserError if that fails."""
    try:
        write_text(Path(path), page)
    except OSError as error:
        raise UserError(f"cannot write the report {os.fspath(path)!r}: {error.strerror or error}") from None


def _page(title: str, summary: str, drawn: Sequence[Any], facts: Iterable[tuple[str, str]]) -> str:
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        for number, figure in enumerate(drawn)
    ]
    template = Environment(autoescape=True).from_string(files("diagnostics").joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(title=title, summary=summary, figures=parts, facts=facts)


def _figures(run: Run, recommendation: Recommendation) -> list[Any]:
    return [
        figures.cutoff_loss(run, recommendation),
        figures.layer_curves(run, recommendation),
        figures.head_map(run),
        figures.retention(run, recommendation),
    ]


def _summary(run: Run, recommendation: Recommendation) -> str:
    text = StringIO()
    show_recommendation(run, recommendation, Console(file=text, width=COLUMNS, highlight=False, no_color=True))
    return text.getvalue()


def _facts(run: Run) -> list[tuple[str, str]]:
    m, identity = run.manifest, run.manifest["identity"]
    facts = {
        "Run": str(run.path or "in memory"),
        "Made": str(m.get("created", "")),
        "Hardware": str(m.get("hardware", "")),
        "Prompt set": f"{len(run.prompts)} of {m.get('prompt_set', '')}",
        "Versions": ", ".join(f"{name} {version}" for name, version in m.get("versions", {}).items()),
    }
    # The libraries are among the versions.
    entries: dict[str, Any] = {name: value for name, value in identity.items() if name != "libraries"}
    if "adapters" in entries:
        entries["adapters"] = "; ".join(entries["adapters"]) or "none"
    facts |= {name.replace("_", " ").capitalize(): str(value) for name, value in entries.items()}
    return list(facts.items())
