"""Fine-tunings to test with: tables made by hand, their folders, and ways to damage these."""

import json

import numpy as np
import pandas as pd

from diagnostics import recommend
from diagnostics.finetune.finetuning_folder import AFTER, BEFORE, FINETUNING, STEPS, SWEEPS, FineTuning
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from tests.support.pages import edit_manifest
from tests.support.runs import make_run

N_LAYERS, TRAINED = 6, 3


def make_finetuning(
    *, n_steps=40, every=10, start=TRAINED, categories=("a", "b"), n_prompts=6, status="complete", seed=0, **settings
):
    """A fine-tuning of six layers: losses fall from cutoff 3 on, and those of full depth rise from 0."""
    rng = np.random.default_rng(seed)
    prompts = {f"p{i}": (categories[i % len(categories)], rng.uniform(0.5, 2)) for i in range(n_prompts)}
    rows = []
    for step in range(0, n_steps + 1, every):
        done = step / max(1, n_steps)
        for prompt_id, (category, harder) in prompts.items():
            for cutoff in range(1, N_LAYERS + 1):
                kl = 0.01 * done + harder * 2.0 ** (1 - cutoff) * (1 - 0.8 * done * (cutoff >= TRAINED))
                kl = 0.01 * done + 5e-6 if cutoff == N_LAYERS else kl  # with the rounding that a sweep has
                row = {"step": step, "prompt_id": prompt_id, "category": category, "cutoff": cutoff, "kl": kl}
                rows.append(row | {"top1_agreement": 1 - kl / 5, "nll": 2 + kl, "nll_full": 2.0})
    steps = pd.DataFrame({"step": np.arange(1, n_steps + 1), "loss": rng.uniform(0.5, 1.5, n_steps)})
    steps["cutoff"] = [max(TRAINED, start - step * 2 * (start - TRAINED + 1) // n_steps) for step in range(n_steps)]
    chosen = {"cutoff": TRAINED, "start_cutoff": start, "supervised": 0.0, "against": "base", "method": "lora"}
    chosen |= {"rank": 4, "steps": n_steps, "batch_size": 1, "accumulate": 8, "sweep_every": every} | settings
    manifest = {
        "status": status,
        "created": "2026-01-02T03:04:05+00:00",
        "model": "made-model",
        "n_layers": N_LAYERS,
        "settings": chosen,
        "source": "made.jsonl",
        "held_out": {"name": "builtin", "n_prompts": n_prompts},
        "hardware": "CPU",
        "versions": {"python": "3.11"},
        "arguments": {"max_kl": 0.2},
        "identity": {},
        "data": {"loaded": 10, "kept": 8, "cut": 1, "dropped_too_long": 2, "prompt_tokens": 1000, "target_tokens": 99},
    }
    return FineTuning(manifest, steps, pd.DataFrame(rows))


def save_finetuning(folder, finetuning, *, goals=None, runs=(BEFORE, AFTER)):
    """Write the folder of a fine-tuning, with its runs before and after; their losses are those of the sweeps."""
    folder.mkdir(parents=True)
    (folder / FINETUNING).write_text(json.dumps(finetuning.manifest))
    finetuning.steps.to_parquet(folder / STEPS, index=False)
    finetuning.sweeps.to_parquet(folder / SWEEPS, index=False)
    for name in runs:
        step = 0 if name == BEFORE else finetuning.sweeps["step"].max()
        at = finetuning.sweeps[finetuning.sweeps["step"] == step]
        run = make_run(at.pivot(index="prompt_id", columns="cutoff", values="kl").to_numpy(), model=name)
        (folder / name).mkdir()
        (folder / name / MANIFEST).write_text(json.dumps(run.manifest))
        for table, rows in run.tables.items():
            rows = rows.assign(selectivity=0.0) if table == "heads" else rows
            rows.to_parquet(folder / name / f"{table}.parquet", index=False)
        if name == AFTER:
            recommend(run, **goals or {"max_kl": 0.2}).save(folder / RECOMMENDATION)
    return folder


def change(table, how):
    def edit(folder):
        path = folder / table
        how(pd.read_parquet(path)).to_parquet(path, index=False)

    return edit


def with_manifest(**changes):
    return lambda folder: edit_manifest(folder, FINETUNING, **changes)


DAMAGE = {
    "manifest no JSON": lambda f: (f / FINETUNING).write_text("{"),
    "manifest a list": lambda f: (f / FINETUNING).write_text("[]"),
    "no settings": with_manifest(settings=None),
    "no cutoff": with_manifest(settings={}),
    "a cutoff too deep": with_manifest(settings={"cutoff": 7}),
    "a cutoff of words": with_manifest(settings={"cutoff": "three"}),
    "no parquet": lambda f: (f / SWEEPS).write_bytes(b"PAR1"),
    "no loss": change(STEPS, lambda t: t.drop(columns="loss")),
    "loss of words": change(STEPS, lambda t: t.assign(loss="low")),
    "loss missing": change(STEPS, lambda t: t.assign(loss=np.nan)),
    "no kl": change(SWEEPS, lambda t: t.drop(columns="kl")),
    "kl of words": change(SWEEPS, lambda t: t.assign(kl="low")),
    "no agreement": change(SWEEPS, lambda t: t.drop(columns="top1_agreement")),
    "no category": change(SWEEPS, lambda t: t.drop(columns="category")),
    "categories of numbers": change(SWEEPS, lambda t: t.assign(category=1)),
    "no rows": change(SWEEPS, lambda t: t[:0]),
    "no first measurement": change(SWEEPS, lambda t: t[t["step"] > 0]),
    "a row missing": change(SWEEPS, lambda t: t[1:]),
    "a row twice": change(SWEEPS, lambda t: pd.concat([t, t[:1]])),
    "a cutoff too many": change(SWEEPS, lambda t: t.assign(cutoff=t["cutoff"] + 1)),
}
