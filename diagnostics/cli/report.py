"""``report``: a run, a benchmark, an evaluation or a fine-tuning as one page."""

import os
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path, typer.Argument(help="folder of a run, a benchmark, an evaluation or a fine-tuning", show_default=False)
    ],
    html: Annotated[Path, typer.Option(help="file to write")],
) -> None:
    """Write one self-contained HTML page of a run, with its recommendation, figures and benchmark if there is one.

    The goals are those of the run's ``recommendation.json``, or the default ones. For an evaluation or a benchmark the
    page has its tables and figures; for a fine-tuning, what it changed, and the run of the trained model.
    """
    from diagnostics.cutoffs.goals import saved_goals
    from diagnostics.cutoffs.recommendation import recommend
    from diagnostics.evaluate.evaluation_folder import EVALUATION, load_evaluation
    from diagnostics.finetune.finetuning_folder import AFTER, FINETUNING, load_finetuning
    from diagnostics.generation.benchmark_folder import BENCHMARK_MANIFEST, load_benchmark
    from diagnostics.runs.places import BENCHMARK, MANIFEST
    from diagnostics.runs.run import load_run
    from diagnostics.support.errors import UserError

    try:
        from diagnostics import report as pages
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        raise UserError("reports need plotly: pip install 'speed-diagnostics[figures]'") from None
    is_run = os.path.exists(run / MANIFEST)
    if os.path.exists(run / EVALUATION) and not is_run:
        page = pages.evaluation_report(load_evaluation(run))
    elif os.path.exists(run / FINETUNING) and not is_run:
        finetuning = load_finetuning(run)
        if not finetuning.complete:
            raise UserError(f"fine-tuning {str(run)!r} is not finished: continue it with --resume")
        after = load_run(run / AFTER)
        page = pages.finetuning_report(finetuning, after, recommend(after, **saved_goals(run)))
    elif os.path.exists(run / BENCHMARK_MANIFEST) and not is_run:
        page = pages.benchmark_report(load_benchmark(run))
    else:
        loaded = load_run(run)
        benchmark = load_benchmark(run) if os.path.exists(run / BENCHMARK) else None
        page = pages.report(loaded, recommend(loaded, **saved_goals(run)), benchmark)
    pages.write_report(html, page)
    print(f"Report: {html}")
