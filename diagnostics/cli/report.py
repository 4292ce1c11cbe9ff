"""``report``: a run as one page."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="run folder", show_default=False)],
    html: Annotated[Path, typer.Option(help="file to write")],
) -> None:
    """Write one self-contained HTML page of a run, with its recommendation, figures and benchmark if there is one.

    The goals are those of the run's ``recommendation.json``, or the default ones.
    """
    from diagnostics.benchmark import load_benchmark
    from diagnostics.errors import UserError
    from diagnostics.policies.recommendation import read_recommendation
    from diagnostics.recommend import Criterion, recommend
    from diagnostics.results import BENCHMARK, RECOMMENDATION, load_run

    try:
        from diagnostics.report import write_report
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        raise UserError("reports need plotly: pip install 'speed-diagnostics[figures]'") from None
    loaded = load_run(run)
    saved = read_recommendation(run).get("criterion") if (run / RECOMMENDATION).exists() else None
    known = {field.name for field in fields(Criterion)}
    goals = {name: value for name, value in saved.items() if name in known} if isinstance(saved, dict) else {}
    if not all(isinstance(value, int | float) for value in goals.values()):
        raise UserError(f"the goals in {str(run / RECOMMENDATION)!r} are not numbers: make it anew with `recommend`")
    benchmark = load_benchmark(run) if os.path.exists(run / BENCHMARK) else None
    write_report(html, loaded, recommend(loaded, **goals), benchmark)
    print(f"Report: {html}")
