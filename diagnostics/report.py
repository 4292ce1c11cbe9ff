"""One self-contained HTML page of a run, an evaluation or a fine-tuning, to be mailed; no network needed."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from diagnostics import figures
from diagnostics.benchmark import Benchmark
from diagnostics.errors import UserError
from diagnostics.recommend import Recommendation
from diagnostics.results import Run, write_text
from diagnostics.terminal.diagnosis import show_recommendation

if TYPE_CHECKING:
    from diagnostics.evaluate.folder import Evaluation
    from diagnostics.finetune.folder import FineTuning

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
  pre {{ font: 13px/1.35 ui-monospace, monospace; overflow-x: auto; }}
  h1 {{ font-size: 1.5rem; }}
  dt {{ font-weight: 600; float: left; clear: left; width: 11rem; }}
  dd {{ margin-left: 11rem; overflow-wrap: anywhere; }}
  .js-plotly-plot .main-svg text {{ fill: currentColor !important; }}
</style>
<h1>{title}</h1>
<pre>{summary}</pre>
{figures}
<h2>How this was measured</h2>
<dl>{facts}</dl>
</html>
"""
# Wide enough for the terminal's layer curves and tables; an evaluation's table grows with its policies.
COLUMNS, EVALUATION_COLUMNS = 110, 1000


def report(run: Run, recommendation: Recommendation, benchmark: Benchmark | None = None) -> str:
    """Return the page as text: about 5 MB, since plotly's program is in it."""
    drawn = _figures(run, recommendation)
    if benchmark is not None:
        drawn.append(figures.benchmark_ratios(benchmark))
    title = f"Cutoff {recommendation.cutoff} of {run.n_layers} for {run.manifest['model']}"
    return _page(title, _summary(run, recommendation), drawn, _facts(run))


def evaluation_report(evaluation: Evaluation) -> str:
    """Return the page of an evaluation, at the margin and with the seed that it was made with."""
    from diagnostics.evaluate.summary import summarize
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
    identity = m["identity"] if isinstance(m.get("identity"), dict) else {}
    facts |= {name.capitalize(): str(identity[name]) for name in ("dtype", "query", "seed") if name in identity}
    title = f"Quality of {m['model']} under {table['policy'].nunique()} policies"
    return _page(title, text.getvalue(), [one for one in drawn if one is not None], facts.items())


def finetuning_report(made: FineTuning, after: Run, recommendation: Recommendation) -> str:
    """Return the page of a finished fine-tuning: what it changed, then the report of the trained model's run.

    Raises UserError for a folder that lacks what a finished one has.
    """
    from diagnostics.finetune.summary import compare_cutoffs
    from diagnostics.terminal.finetuning import show_finetuning

    m, goal = made.manifest, recommendation.data["criterion"].get("max_kl")
    text = StringIO()
    try:
        show_finetuning(made, compare_cutoffs(made), Console(file=text, width=COLUMNS, highlight=False, no_color=True))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"fine-tuning {str(made.path)!r} is damaged: {type(error).__name__} {error}") from None
    drawn = [
        figures.finetuning_cutoffs(made, goal),
        figures.finetuning_steps(made),
        figures.finetuning_categories(made, goal=goal),
        *_figures(after, recommendation),
    ]
    facts = {name.replace("_", " ").capitalize(): str(value) for name, value in m["settings"].items()}
    facts |= {"Data": f"{m.get('source', '')}: {finetuning_data(m)}", "Model": str(m["model"])}
    title = f"Cutoff {recommendation.cutoff} of {after.n_layers} for {m['model']} trained at {m['settings']['cutoff']}"
    summary = f"{text.getvalue()}\n{_summary(after, recommendation)}"
    return _page(title, summary, [one for one in drawn if one is not None], [*facts.items(), *_facts(after)])


def read_finetuning(path: str | Path) -> FineTuning:
    """Read a fine-tuning, finished or not, whose tables can be drawn; raise UserError for any other."""
    from diagnostics.finetune.folder import load_finetuning

    made = load_finetuning(path)
    if problem := _finetuning_problem(made):
        raise UserError(f"fine-tuning {os.fspath(path)!r} is damaged: {problem}")
    return made


def finetuning_data(manifest: dict[str, Any]) -> str:
    """Say what became of the data of a fine-tuning; nothing if that is not known yet, or was changed by hand."""
    from diagnostics.finetune.data import Counts

    try:
        return Counts(**manifest["data"]).said()
    except (KeyError, TypeError, ValueError):
        return ""


def _finetuning_problem(made: FineTuning) -> str | None:
    n_layers, trained = made.manifest["n_layers"], made.manifest["settings"].get("cutoff")
    if not isinstance(trained, int) or not 1 <= trained <= n_layers:
        return f"its cutoff is {trained!r}, not 1 to {n_layers}"
    numbers = {"steps": ("step", "loss", "cutoff"), "sweeps": ("step", "cutoff", "kl", "top1_agreement", "nll")}
    for table, columns in numbers.items():
        frame = getattr(made, table)
        for column in columns:
            if column not in frame or not pd.api.types.is_numeric_dtype(frame[column]) or frame[column].isna().any():
                return f"{table} has no column {column}, or not numbers in it"
    sweeps = made.sweeps
    texts = ("prompt_id", "category")
    if not all(name in sweeps and sweeps[name].map(lambda text: isinstance(text, str)).all() for name in texts):
        return "sweeps has no names of prompts or categories"
    counted = sweeps.groupby(["step", "prompt_id"])["cutoff"].agg(["size", "nunique", "min", "max"])
    whole = counted.eq([n_layers, n_layers, 1, n_layers]).all(axis=None)
    if not whole or 0 not in counted.index.get_level_values("step"):
        return "rows of sweeps are missing, or there twice"
    return None


def asked_margin(manifest: dict[str, Any]) -> float:
    """Return the margin of non-inferiority that an evaluation was asked for, as a share of the score."""
    from diagnostics.evaluate.summary import MARGIN

    arguments = manifest.get("arguments")
    asked = arguments.get("margin") if isinstance(arguments, dict) else None
    return float(asked) if isinstance(asked, int | float) and 0 <= asked <= 1 else MARGIN


def asked_seed(manifest: dict[str, Any]) -> int:
    """Return the seed of an evaluation."""
    identity = manifest.get("identity")
    asked = identity.get("seed") if isinstance(identity, dict) else None
    return asked if isinstance(asked, int) and asked >= 0 else 0


def write_report(path: str | Path, page: str) -> None:
    """Write a page atomically; raise UserError where that is not possible."""
    try:
        write_text(Path(path), page)
    except OSError as error:
        raise UserError(f"cannot write the report {os.fspath(path)!r}: {error.strerror or error}") from None


def _page(title: str, summary: str, drawn: Sequence[Any], facts: Iterable[tuple[str, str]]) -> str:
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        for number, figure in enumerate(drawn)
    ]
    return PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary),
        figures="\n".join(parts),
        facts="".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts if value),
    )


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
    facts |= {name.replace("_", " ").capitalize(): str(value) for name, value in identity.items()}
    return list(facts.items())
