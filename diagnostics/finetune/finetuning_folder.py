"""The folder of a fine-tuning: its files, and how it resumes after a kill.

- ``finetuning.json``: what was asked, on what, with which versions; what became of the data
- ``examples.parquet``: the rows trained on, as token ids; ``parts/`` until all are made
- ``steps.parquet``: loss, learning rate, gradient norm and cutoff of every step
- ``sweeps.parquet``: every cutoff on every held-out prompt, before, during and after
- the adapter, or the whole model, as `load_model` takes it; ``speed-diagnostics.sha256``: sums of its files
- ``before/``, ``after/``: diagnoses of the held-out prompts
- ``recommendation.json``: of the trained model
- ``checkpoints/``: until the fine-tuning is finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Required, cast

import pandas as pd

from diagnostics.finetune.examples import Counts, Example
from diagnostics.runs.parts import PARTS
from diagnostics.support.errors import UserError
from diagnostics.support.files import (
    SUMS,
    read_json,
    read_table,
    require_sums,
    scratch_folder,
    write_sealed,
    write_sums,
    write_table,
)
from diagnostics.support.folders import FolderKind, Head
from diagnostics.support.overview import Overview, Readable

FINETUNING, EXAMPLES, STEPS, SWEEPS = "finetuning.json", "examples.parquet", "steps.parquet", "sweeps.parquet"
CHECKPOINTS, BEFORE, AFTER = "checkpoints", "before", "after"
TRAINER_STATE = "trainer_state.json"
CARD = "README.md"


class FineTuningManifest(Head, total=False):
    """The content of ``finetuning.json``."""

    status: Required[str]  # running, complete
    revision: str | None
    n_layers: Required[int]
    settings: Required[dict[str, Any]]
    source: str
    held_out: dict[str, Any]
    notes: list[str]
    identity: Required[dict[str, Any]]
    data: dict[str, Any]  # what became of the rows, as `Counts` has it
    held_out_dropped: int  # rows left out since they begin with a held-out prompt


FINETUNING_FOLDER: FolderKind[FineTuningManifest] = FolderKind("fine-tuning", FINETUNING, FineTuningManifest)


@dataclass(frozen=True, eq=False, repr=False)
class FineTuning(Readable):
    """A fine-tuning, finished or not.

    ``steps``: one row per step, with ``step`` (1, 2, ...), ``loss`` in nats per target, ``learning_rate``,
    ``grad_norm``, ``cutoff``. ``sweeps``: one row per held-out prompt and cutoff at each measured step, 0 before
    training: ``step``, ``prompt_id``, ``category``, ``cutoff``, ``kl``, ``top1_agreement``, ``nll``, ``nll_full``, as
    in a run's table of cutoffs.
    """

    manifest: FineTuningManifest
    steps: pd.DataFrame
    sweeps: pd.DataFrame
    path: Path | None = None

    def overview(self) -> Overview:
        """How it was trained, and what it loses at its cutoff."""
        settings, n_layers = self.manifest["settings"], self.manifest["n_layers"]
        cutoff, last = int(settings["cutoff"]), int(self.sweeps["step"].max())
        before, after = self.curve(0)[cutoff], self.curve()[cutoff]
        facts = {
            "KL at that cutoff": f"{before:.3f} before, {after:.3f} after {last} steps, nats per token",
            "status": None if self.complete else f"not finished: {last} of {settings['steps']} steps measured",
            "folder": self.path,
        }
        return Overview(f"Fine-tuning of {self.manifest['model']} for cutoff {cutoff} of {n_layers}", facts=facts)

    @property
    def complete(self) -> bool:
        """Whether it ran to its end."""
        return bool(self.manifest["status"] == "complete")

    def curve(self, step: int | None = None, column: str = "kl") -> pd.Series:
        """Return the mean of a column over held-out prompts by cutoff, at a measured step; the last if None."""
        step = int(self.sweeps["step"].max()) if step is None else step
        return self.sweeps[self.sweeps["step"] == step].groupby("cutoff")[column].mean()


def load_finetuning(path: str | Path) -> FineTuning:
    """Read a fine-tuning, finished or not; before its first checkpoint ``steps`` is empty.

    Raises UserError where there is none, or it is damaged, or nothing is measured yet.
    """
    manifest = FINETUNING_FOLDER.read(path)
    if not all((Path(path) / name).exists() for name in (STEPS, SWEEPS)):
        raise UserError(f"fine-tuning {str(path)!r} has not measured anything yet: continue it with `resume=True`")
    steps, sweeps = (FINETUNING_FOLDER.read_table(path, name) for name in (STEPS, SWEEPS))
    finetuning = FineTuning(manifest, steps, sweeps, Path(path))
    if problem := _problem(finetuning):
        raise FINETUNING_FOLDER.damaged(path, problem)
    return finetuning


class FineTuningWriter:
    """Writes the folder of one fine-tuning."""

    def __init__(self, path: Path, manifest: FineTuningManifest, *, resume: bool) -> None:
        kept = FINETUNING_FOLDER.claim(path, manifest, resume=resume)
        if kept is None:
            FINETUNING_FOLDER.start(path, manifest)
        self.path, self.manifest = path, kept or manifest

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.manifest["status"] == "complete")

    def examples(
        self, n_parts: int, make: Callable[[int], tuple[list[Example], Counts]]
    ) -> tuple[list[Example], Counts]:
        """Return the rows to train on; ``make`` makes those of a part that is not written yet."""
        file = self.path / EXAMPLES
        if file.exists():
            return _read_rows(file), Counts(**self.manifest["data"])
        rows: list[Example] = []
        counts = Counts()
        parts = self.path / PARTS
        parts.mkdir(exist_ok=True)
        for number in range(n_parts):
            part, counted = parts / f"{number:06d}.parquet", parts / f"{number:06d}.json"
            if not counted.exists():  # written after its rows
                new_rows, new_counts = make(number)
                write_table(part, pd.DataFrame(new_rows, columns=list(Example.__annotations__)))
                write_sealed(counted, asdict(new_counts))
            rows += _read_rows(part)
            try:
                counts += Counts(**read_json(counted))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{str(counted)!r} is damaged ({error}): remove it, its rows are made anew") from None
        self.note(data=asdict(counts))
        write_table(file, pd.DataFrame(rows, columns=list(Example.__annotations__)))
        shutil.rmtree(parts)
        return rows, counts

    def checkpoint(self) -> Path | None:
        """Return the last complete checkpoint; None if there is none."""
        checkpoints = {
            int(path.name.rpartition("-")[2]): path for path in (self.path / CHECKPOINTS).glob("checkpoint-*")
        }
        for _, path in sorted(checkpoints.items(), reverse=True):
            try:
                json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))  # written last
            except (OSError, ValueError):
                continue
            require_sums(path)
            return path
        return None

    def write(self, name: str, table: pd.DataFrame) -> None:
        """Write ``steps.parquet`` or ``sweeps.parquet``."""
        write_table(self.path / name, table)

    def save_weights(self, model: Any, tokenizer: Any | None) -> None:
        """Write the adapter, or the whole model with its tokenizer, and the sums by which `load_model` checks them."""
        with scratch_folder(self.path) as scratch:
            for saved in filter(None, (model, tokenizer)):
                saved.save_pretrained(scratch)
            (scratch / CARD).unlink(missing_ok=True)  # peft's own
            write_sums(scratch)
            (self.path / SUMS).unlink(missing_ok=True)
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == SUMS):  # the sums last
                os.replace(file, self.path / file.name)

    def note(self, **additions: Any) -> None:
        """Add to the manifest."""
        self.manifest = cast(FineTuningManifest, {**self.manifest, **additions})
        write_sealed(self.path / FINETUNING, self.manifest)

    def discard(self) -> None:
        """Remove the folder of a fine-tuning that cannot go on."""
        shutil.rmtree(self.path)

    def finish(self, **additions: Any) -> FineTuning:
        """Mark the fine-tuning complete, and remove its checkpoints."""
        self.note(status="complete", **additions)
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        return load_finetuning(self.path)


def _read_rows(path: Path) -> list[Example]:
    try:
        return [
            Example(id=row["id"], input_ids=[*map(int, row["input_ids"])], labels=[*map(int, row["labels"])])
            for row in read_table(path).to_dict("records")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the rows to train on in {str(path)!r} are damaged: {error}") from None


def _problem(finetuning: FineTuning) -> str | None:
    """Say what is wrong with the tables; None if nothing is."""
    manifest = finetuning.manifest
    n_layers, trained = manifest["n_layers"], manifest["settings"].get("cutoff")
    if not isinstance(trained, int) or not 1 <= trained <= n_layers:
        return f"its cutoff is {trained!r}, not 1 to {n_layers}"
    numbers = {"steps": ("step", "loss", "cutoff"), "sweeps": ("step", "cutoff", "kl", "top1_agreement", "nll")}
    for table, columns in numbers.items():
        frame = getattr(finetuning, table)
        for column in columns:
            if column not in frame or not pd.api.types.is_numeric_dtype(frame[column]) or frame[column].isna().any():
                return f"{table} has no column {column}, or not numbers in it"
    sweeps = finetuning.sweeps
    texts = ("prompt_id", "category")
    if not all(name in sweeps and sweeps[name].map(lambda text: isinstance(text, str)).all() for name in texts):
        return "sweeps has no names of prompts or categories"
    counted = sweeps.groupby(["step", "prompt_id"])["cutoff"].agg(["size", "nunique", "min", "max"])
    every_cutoff_once = counted.eq([n_layers, n_layers, 1, n_layers]).all(axis=None)
    if not every_cutoff_once or 0 not in counted.index.get_level_values("step"):
        return "rows of sweeps are missing or doubled"
    return None
