"""Which rule finds the knee from the layers alone, on real models whose loss is measured at every cutoff.

    python analyses/study_rules.py --out FOLDER --model NAME=MODEL --model NAME=MODEL ...   # run it again to go on

Every model is diagnosed on built-in prompts and on pages of Python's documentation, at several lengths; then every
rule names a cutoff for every run and goal. The results go to `analyses/results/rules/`: all readings, a table by rule,
what a threshold fitted to the other models does, and the layers in which the prompt must be seen, as CSV; the settings
as JSON. `analyses/study_rules.md` has the conclusions.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from diagnostics import Run, UserError, diagnose, load_model, load_run
from diagnostics.cutoffs.rules import all_rules
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.loading import LoadedModel
from diagnostics.support.console import fail
from diagnostics.support.files import write_json, write_text
from diagnostics.support.versions import hardware, versions
from rules_study.scores import Measured, by_rule, fitted, must_see_layers, readings
from rules_study.texts import KINDS, prompts

RESULTS = Path(__file__).parent / "results" / "rules"
GOALS = (0.05, 0.1, 0.2)
# Prompts of each kind by their length: long ones cost more, and vary less.
N_PROMPTS = {512: 7, 1024: 5, 2048: 4, 4096: 3}
# Rules with measures that cost as much as the rest of a diagnosis are judged on prompts of this length alone.
COSTLY_LENGTH = 512
COSTLY = ("leave-one-out", "leave-one-in", "fisher-gate")


def measure(lm: LoadedModel, name: str, kind: str, length: int, options: argparse.Namespace, bar: Progress) -> Run:
    """Diagnose one model on one set of prompts, or finish what is there."""
    out = options.out / f"{name}-{kind}-{length}"
    line = bar.add_task(out.name, total=None)
    return diagnose(
        lm,
        prompts(kind, lm.tokenizer, length, N_PROMPTS[length], options.decode_tokens),
        decode_tokens=options.decode_tokens,
        detail_prompts=0,
        rules=["all", *COSTLY] if length == COSTLY_LENGTH else "all",
        out=out,
        resume=out.exists(),
        progress=lambda done, total, _: bar.update(line, completed=done, total=total),
    )


def main() -> None:
    """Run the study, or the rest of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; a study there goes on")
    parser.add_argument("--model", action="append", metavar="NAME=MODEL", help="give it once for each model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], choices=N_PROMPTS)
    parser.add_argument("--decode-tokens", type=int, default=48, help="reference tokens per prompt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    models = dict(model.split("=", 1) for model in options.model or [f"{EMBEDDED_MODEL}={EMBEDDED_MODEL}"])
    sets = [(kind, length) for length in options.lengths for kind in KINDS]
    measured: list[Measured] = []
    with Progress(console=Console(stderr=True)) as bar:
        for name, model in models.items():
            folders = {(kind, length): options.out / f"{name}-{kind}-{length}" for kind, length in sets}
            runs = {key: load_run(folder) for key, folder in folders.items() if (folder / "manifest.json").exists()}
            if not all(key in runs and runs[key].complete for key in sets):
                lm = load_model(model, dtype="float32")
                runs = {(kind, length): measure(lm, name, kind, length, options, bar) for kind, length in sets}
                del lm
                gc.collect()
            measured += [Measured(name, kind, length, runs[kind, length]) for kind, length in sets]
    table = readings(measured, GOALS)
    tables = {
        "readings": table,
        "by_rule": by_rule(table),
        "fitted": fitted(measured, GOALS, all_rules()),
        "must_see": must_see_layers(measured),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        write_text(options.results / f"{name}.csv", frame.to_csv(index=False, float_format="%.4g"))
    device = torch.device(measured[0].run.manifest["identity"]["device"])
    asked = {"models": list(models), "lengths": options.lengths, "decode_tokens": options.decode_tokens}
    about = {"command": "python analyses/study_rules.py --out FOLDER --model NAME=MODEL ...", "settings": asked}
    write_json(options.results / "study.json", about | {"hardware": hardware(device), "versions": versions()})
    print(json.dumps({name: str(options.results / f"{name}.csv") for name in tables}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
