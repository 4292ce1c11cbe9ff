"""``report``: a run or an evaluation as one page."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="folder of a run or an evaluation", show_default=False)],
    html: Annotated[Path, typer.Option(help="file to write")],
) -> None:
    """Write one self-contained HTML page of a run, with its recommendation, figures and benchmark if there is one.

    The goals are those of the run's ``recommendation.json``, or the default ones. Of an evaluation: its table and
    figures.
    """
    from diagnostics.benchmark import load_benchmark
    from diagnostics.errors import UserError
    from diagnostics.evaluate.folder import EVALUATION, load_evaluation
    from diagnostics.policies.recommendation import read_recommendation
    from diagnostics.recommend import Criterion, recommend
    from diagnostics.results import BENCHMARK, MANIFEST, RECOMMENDATION, load_run

    try:
        from diagnostics import report as pages
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        raise UserError("reports need plotly: pip install 'speed-diagnostics[figures]'") from None
    if os.path.exists(run / EVALUATION) and not os.path.exists(run / MANIFEST):
        pages.write_report(html, pages.evaluation_report(load_evaluation(run)))
        print(f"Report: {html}")
        return
    loaded = load_run(run)
    saved = read_recommendation(run).get("criterion") if (run / RECOMMENDATION).exists() else None
    known = {field.name for field in fields(Criterion)}
    goals = {name: value for name, value in saved.items() if name in known} if isinstance(saved, dict) else {}
    if not all(isinstance(value, int | float) for value in goals.values()):
        raise UserError(f"the goals in {str(run / RECOMMENDATION)!r} are not numbers: make it anew with `recommend`")
    benchmark = load_benchmark(run) if os.path.exists(run / BENCHMARK) else None
    pages.write_report(html, pages.report(loaded, recommend(loaded, **goals), benchmark))
    print(f"Report: {html}")
