"""Tests whether the effect of fine-tuning on prompts of 256 tokens holds on longer ones.

    python analyses/study_finetuning_longer.py --out FOLDER                 # after study_finetuning.py
    python analyses/study_finetuning_longer.py --out FOLDER --only speed-0  # one model, to share them among cores

Run it again to continue. It measures every cutoff of the stock model, and of every adapter of the study in FOLDER,
against full depth of the stock model, on prompts of 1024 tokens in categories without training prompts. The means go to
``analyses/results/finetuning/longer.csv``.
"""

import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import Progress

from diagnostics import UserError, load_model
from diagnostics.diagnosis.teacher import observe_teacher
from diagnostics.finetune import Settings, load_held_out
from diagnostics.finetune.sources import HELD_OUT
from diagnostics.finetune.sweeps import sweep_cutoffs
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.prompts.encoding import encode_for_diagnosis
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.support.console import fail, quiet
from diagnostics.support.files import write_text
from study_finetuning import RESULTS

STOCK, MEASURED = "stock", "longer"


def main() -> None:
    """Measure the missing models, and write the table of the existing results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--only", help=f"this one only: {STOCK}, or a folder in there")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--context-length", type=int, default=1024, help="tokens per prompt")
    parser.add_argument("--held-out", type=int, default=24, help="prompts to measure on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet()
    names = [STOCK, *sorted(found.parent.name for found in options.out.glob(f"*/{RECOMMENDATION}"))]
    if options.only and options.only not in names:
        raise UserError(f"there is no {options.only!r} in {str(options.out)!r}: {', '.join(names)}")
    tables = {name: options.out / MEASURED / f"{name}_{options.context_length}.csv" for name in names}
    left = [name for name in names if options.only in (None, name) and not tables[name].exists()]
    if left:
        _measure(options, {name: tables[name] for name in left})
    rows = [pd.read_csv(table).assign(run=name) for name, table in tables.items() if table.exists()]
    every = pd.concat(rows).groupby(["run", "cutoff"])[["kl", "top1_agreement", "nll"]].mean().reset_index()
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.results / "longer.csv", every.to_csv(index=False, float_format="%.5g"))
    print(every.pivot(index="cutoff", columns="run", values="kl").round(3).to_string())


def _measure(options: argparse.Namespace, tables: dict[str, Path]) -> None:
    """Measure every cutoff of some models on the same prompts; write a table per model, a row per prompt and cutoff."""
    stock = load_model(options.model)
    prompts = load_held_out(n_prompts=options.held_out, context_length=options.context_length, only=HELD_OUT)
    decode_tokens = Settings.decode_tokens
    encoded = encode_for_diagnosis(prompts, stock.tokenizer, stock.anatomy.max_positions, decode_tokens)
    teacher = observe_teacher(stock, prompts, decode_tokens=decode_tokens)
    with Progress(console=Console(stderr=True)) as bar:
        for name, table in bar.track(tables.items()):
            lm = stock if name == STOCK else load_model(options.out / name)
            table.parent.mkdir(exist_ok=True)
            write_text(table, sweep_cutoffs(lm, encoded, teacher).to_csv(index=False))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
