"""One self-contained HTML page of a run, to be mailed: its recommendation, figures and evidence; no network needed."""

import html
import os
from io import StringIO
from pathlib import Path

from rich.console import Console

from diagnostics import figures
from diagnostics.benchmark import Benchmark
from diagnostics.errors import UserError
from diagnostics.recommend import Recommendation
from diagnostics.results import Run, write_text
from diagnostics.terminal.diagnosis import show_recommendation

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
# Wide enough for the terminal's layer curves and tables.
COLUMNS = 110


def report(run: Run, recommendation: Recommendation, benchmark: Benchmark | None = None) -> str:
    """Return the page as text: about 5 MB, since plotly's program is in it."""
    drawn = [
        figures.cutoff_loss(run, recommendation),
        figures.layer_curves(run, recommendation),
        figures.head_map(run),
        figures.retention(run, recommendation),
    ]
    if benchmark is not None:
        drawn.append(figures.benchmark_ratios(benchmark))
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        for number, figure in enumerate(drawn)
    ]
    title = f"Cutoff {recommendation.cutoff} of {run.n_layers} for {run.manifest['model']}"
    return PAGE.format(
        title=html.escape(title),
        summary=html.escape(_summary(run, recommendation)),
        figures="\n".join(parts),
        facts="".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in _facts(run)),
    )


def write_report(
    path: str | Path, run: Run, recommendation: Recommendation, benchmark: Benchmark | None = None
) -> None:
    """Write the page atomically; raise UserError where that is not possible."""
    try:
        write_text(Path(path), report(run, recommendation, benchmark))
    except OSError as error:
        raise UserError(f"cannot write the report {os.fspath(path)!r}: {error.strerror or error}") from None


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
    return [(name, value) for name, value in facts.items() if value]
