"""``evaluate``: tasks under policies, with intervals and tests."""

from pathlib import Path
from typing import Annotated

from rich.console import Console

from diagnostics.cli.common import INTERRUPTED, announce, claim, fail, load, new_folder, plain, progress
from diagnostics.cli.flags import with_flags
from diagnostics.cli.options import (
    RESULTS,
    Device,
    Dtype,
    Model,
    Quiet,
    RemoteCode,
    Resume,
    Revision,
    SkipSelfTest,
    option,
    seed_option,
)
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support import defaults
from diagnostics.support.errors import UserError

EVALUATION = "Evaluation"  # heading of its options


def evaluate(
    model: Model = EMBEDDED_MODEL,
    *,
    tasks: Annotated[str, option(EVALUATION, help="such as arc_easy,boolq:mc,needle@4K,mine.jsonl")],
    policies: Annotated[str, option(EVALUATION, help="such as full,speed:24,speed:24:anchors=0,fastkv")],
    limit: Annotated[
        int | None,
        option(EVALUATION, help=f"items of each task, drawn at random  [all; retrieval: {defaults.RETRIEVAL_ITEMS}]"),
    ] = None,
    query: Annotated[
        str, option(EVALUATION, help="the query about a document: prompt, later or decode")
    ] = defaults.QUERY,
    margin: Annotated[
        float, option(EVALUATION, help="margin of non-inferiority, as a share of the score")
    ] = defaults.MARGIN,
    run_code: Annotated[bool, option(EVALUATION, "--run-code", help="let tasks run code that the model wrote")] = False,
    chunk_size: Annotated[int | None, option(EVALUATION, help="prompt tokens per forward pass; bounds memory")] = None,
    seed: Annotated[int, seed_option(EVALUATION, "seed of the drawn items and of the bootstrap")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    skip_self_test: SkipSelfTest = False,
    out: Annotated[Path | None, option(RESULTS, help="folder  [runs/MODEL-eval_TIME]")] = None,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Annotated[bool, option(RESULTS, "--json", help="print the table alone, as JSON")] = False,
) -> None:
    """Answer tasks under policies, and compare every policy with full depth item by item."""
    arguments = dict(locals())
    if resume and out is None:
        raise UserError("--resume needs --out: the folder of the evaluation to continue")
    out = out or new_folder(model, "-eval")
    from diagnostics.policies import parse_policy

    chosen = [parse_policy(text) for text in policies.split(",")]
    claim(out)
    announce(f"Answering tasks with {model} under policies; results go to {out}.", quiet=quiet)
    lm = load(arguments, chosen)
    from diagnostics.evaluate.evaluation import evaluate as run_evaluation
    from diagnostics.evaluate.score_table import summarize
    from diagnostics.evaluate.tasks import load_task

    loaded = [load_task(name.strip(), lm.tokenizer, limit=limit, seed=seed) for name in tasks.split(",")]
    try:
        with progress("answering", quiet=quiet) as advance:
            result = run_evaluation(
                lm,
                loaded,
                chosen,
                limit=limit,
                query=query,
                chunk_size=chunk_size,
                run_code=run_code,
                margin=margin,
                seed=seed,
                out=out,
                resume=resume,
                progress=advance,
                arguments=plain(arguments),
            )
    except KeyboardInterrupt:
        fail(f"interrupted; what is finished is kept, continue with --out {out} --resume", INTERRUPTED)
    table = summarize(result, margin=margin, seed=seed)
    if json:
        print(table.to_json(orient="records", indent=1))
    else:
        from diagnostics.terminal.evaluation import show_evaluation

        show_evaluation(table, Console(highlight=False))
        print(f"Evaluation folder: {out}")
    if result.manifest["errors"]:
        fail(with_flags(f"not finished: {'; '.join(result.manifest['errors'])}"), 1)
