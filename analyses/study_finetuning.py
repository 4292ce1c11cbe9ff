"""How much fine-tuning under SPEED lowers the loss of the embedded model at a cutoff below its knee.

    python analyses/study_finetuning.py --out FOLDER                        # all; run it again to go on
    python analyses/study_finetuning.py --out FOLDER --arm speed --seed 0   # one run, to share them among cores

Four arms, three seeds each, the same rows: the model's own answers at full depth to built-in prompts.

- ``hold``: self-distillation at the cutoff, every fourth step at full depth: the command's default
- ``speed``: the same with every step at the cutoff
- ``control``: the same rows, steps and rows per step without the policy. Self-distillation at full depth has nothing to
  learn and would leave the stock model unchanged, so the model learns its own answers as targets (cross-entropy).
- ``targets``: the control's objective at the cutoff

All are measured on prompts of other categories than the training prompts, against full depth of the stock model. The
means go to ``analyses/results/finetuning/``.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import Progress

from diagnostics import UserError, load_model
from diagnostics.finetune import (
    Counts,
    Example,
    FineTuning,
    Settings,
    Source,
    finetune,
    load_data,
    load_finetuning,
    load_held_out,
)
from diagnostics.finetune.cutoff_comparison import by_category
from diagnostics.finetune.sources import HELD_OUT
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.loading import LoadedModel
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.support.console import fail, quiet
from diagnostics.support.files import write_json, write_text

RESULTS = Path(__file__).parent / "results" / "finetuning"
CUTOFF, SEEDS = 20, (0, 1, 2)
EXAMPLES = 384
ARMS: dict[str, dict[str, Any]] = {
    "hold": {"cutoff": CUTOFF, "supervised": 0.0, "hold": 0.25},
    "speed": {"cutoff": CUTOFF, "supervised": 0.0, "hold": 0.0},
    "control": {"cutoff": 30, "supervised": 1.0, "hold": 0.0},
    "targets": {"cutoff": CUTOFF, "supervised": 1.0, "hold": 0.0},
}
COMMON: dict[str, Any] = {"against": "base", "steps": 160}


@dataclass(frozen=True, eq=False)
class Shared(Source):
    """Rows that all runs share: the first run that needs a part creates it."""

    folder: Path = Path()

    def make(self, lm: LoadedModel, part: int) -> tuple[list[Example], Counts]:
        """Read a part, or create it."""
        file = self.folder / f"{part:06d}.json"
        if not file.exists():
            rows, counts = super().make(lm, part)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, {"rows": rows, "counts": asdict(counts)})
        stored = json.loads(file.read_text())
        return stored["rows"], Counts(**stored["counts"])


def main() -> None:
    """Train the missing models, and write the tables of the existing ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the fine-tunings; existing ones continue")
    parser.add_argument("--arm", choices=ARMS, help="only this one")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="only this one")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--steps", type=int, default=COMMON["steps"])
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--held-out", type=int, default=24, help="prompts to measure on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet()
    with Progress(console=Console(stderr=True)) as bar:
        for seed in SEEDS if options.seed is None else (options.seed,):
            for arm in ARMS if options.arm is None else (options.arm,):
                _run(options, arm, seed, bar)
    folders = {(arm, seed): _folder(options.out, arm, seed) for arm in ARMS for seed in SEEDS}
    finished = {key: load_finetuning(folder) for key, folder in folders.items() if (folder / RECOMMENDATION).exists()}
    _write(options.results, finished)


def _folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm}-{seed}"


def _run(options: argparse.Namespace, arm: str, seed: int, bar: Progress) -> None:
    folder = _folder(options.out, arm, seed)
    if (folder / RECOMMENDATION).exists():
        return
    line = bar.add_task(f"{arm}-{seed}", total=None)
    prompts = load_data("builtin", examples=options.examples, without=HELD_OUT)
    finetune(
        load_model(options.model),
        Shared(prompts, "builtin", folder=options.out / "rows"),
        load_held_out(n_prompts=options.held_out, only=HELD_OUT),
        Settings(**(COMMON | ARMS[arm] | {"steps": options.steps}), seed=seed),
        out=folder,
        resume=folder.exists(),
        progress=lambda done, total, what: bar.update(
            line, completed=done, total=total, description=f"{arm}-{seed} {what}"
        ),
    )


def _write(results: Path, finished: dict[tuple[str, int], FineTuning]) -> None:
    """Write the means over held-out prompts: every measured step and cutoff, and a summary."""
    results.mkdir(parents=True, exist_ok=True)
    sweeps, outcomes = [], []
    for (arm, seed), finetuning in finished.items():
        means = finetuning.sweeps.groupby(["step", "cutoff"])[["kl", "top1_agreement", "nll"]].mean().reset_index()
        sweeps.append(means.assign(arm=arm, seed=seed))
        outcomes.append({"arm": arm, "seed": seed} | _outcome(finetuning))
    write_text(results / "sweeps.csv", pd.concat(sweeps).to_csv(index=False, float_format="%.5g"))
    write_text(results / "outcomes.csv", pd.DataFrame(outcomes).to_csv(index=False, float_format="%.5g"))
    finetuning = next(iter(finished.values()))
    about = {"command": "python analyses/study_finetuning.py --out FOLDER", "arms": ARMS, "settings": COMMON}
    write_json(
        results / "study.json",
        about | {name: finetuning.manifest[name] for name in ("data", "held_out", "hardware", "versions")},
    )
    print(pd.DataFrame(outcomes).round(3).to_string(index=False))
    print(json.dumps([str(path) for path in sorted(results.iterdir())], indent=1))


def _outcome(finetuning: FineTuning) -> dict[str, Any]:
    """Return the losses at the cutoff and at full depth, and the cutoffs recommended."""
    before, after = finetuning.curve(0), finetuning.curve()
    assert finetuning.path is not None
    kinds = by_category(finetuning, CUTOFF)
    return {
        "kl_before": before[CUTOFF],
        "kl_after": after[CUTOFF],
        "share_left": after[CUTOFF] / before[CUTOFF],
        "agreement_before": finetuning.curve(0, "top1_agreement")[CUTOFF],
        "agreement_after": finetuning.curve(None, "top1_agreement")[CUTOFF],
        "kl_full_depth_after": after.iloc[-1],
        **{f"kl_after_{kind}": kl for kind, kl in kinds["after"].items()},
        "train_loss_first": finetuning.steps["loss"].head(5).mean(),
        "train_loss_last": finetuning.steps["loss"].tail(5).mean(),
        "recommended": json.loads((finetuning.path / RECOMMENDATION).read_text())["cutoff"],
    }


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
