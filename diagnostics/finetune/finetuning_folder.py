"""The folder of a fine-tuning: what it leaves behind, and how it goes on after a kill.

- ``finetuning.json``: what was asked, on what, with which versions; what became of the data
- ``examples.parquet``: the rows trained on, as token ids; ``parts/`` until all are made
- ``steps.parquet``: loss, learning rate, gradient norm and cutoff of every step
- ``sweeps.parquet``: every cutoff on every held-out prompt, before, during and after
- the adapter, or the whole model, as `load_model` takes it; ``speed-diagnostics.sha256``: sums of its files
- ``before/``, ``after/``: diagnoses of the held-out prompts
- ``recommendation.json``: of the trained model
- ``checkpoints/``: until all is finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.finetune.examples import Counts, Example
from diagnostics.runs.parts import PARTS
from diagnostics.runs.run import claim_folder
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

FINETUNING, EXAMPLES, STEPS, SWEEPS = "finetuning.json", "examples.parquet", "steps.parquet", "sweeps.parquet"
CHECKPOINTS, BEFORE, AFTER = "checkpoints", "before", "after"
TRAINER_STATE = "trainer_state.json"
CARD = "README.md"


@dataclass(frozen=True, eq=False)
class FineTuning:
    """A finished fine-tuning, or what there is of one.

    ``steps``: one row per step, with ``step`` (1, 2, ...), ``loss`` in nats per target, ``learning_rate``,
    ``grad_norm``, ``cutoff``. ``sweeps``: one row per held-out prompt and cutoff at each measured step, 0 before
    training: ``step``, ``prompt_id``, ``category``, ``cutoff``, ``kl``, ``top1_agreement``, ``nll``, ``nll_full``, as
    in a run's table of cutoffs.
    """

    manifest: dict[str, Any]
    steps: pd.DataFrame = field(repr=False)
    sweeps: pd.DataFrame = field(repr=False)
    path: Path | None = None

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
    folder = Path(path)
    manifest = load_manifest(folder)
    tables: dict[str, pd.DataFrame] = {}
    for name in (STEPS, SWEEPS):
        try:
            tables[name] = read_table(folder / name)
        except FileNotFoundError:
            raise UserError(f"fine-tuning {str(path)!r} has not measured anything yet") from None
        except (OSError, ValueError) as error:
            raise UserError(f"fine-tuning {str(path)!r} is damaged: {name} cannot be read ({error})") from None
    made = FineTuning(manifest, tables[STEPS], tables[SWEEPS], folder)
    if problem := _problem(made):
        raise UserError(f"fine-tuning {str(path)!r} is damaged: {problem}")
    return made


def load_manifest(path: Path) -> dict[str, Any]:
    """Read ``finetuning.json``; raise UserError where it is missing or damaged."""
    try:
        manifest = read_json(path / FINETUNING)
    except (OSError, ValueError) as error:
        raise UserError(f"no fine-tuning can be read in {str(path)!r}: {FINETUNING}: {error}") from None
    fields = {"model": str, "status": str, "n_layers": int, "settings": dict, "identity": dict}
    for name, kind in fields.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(name), kind):
            raise UserError(f"the fine-tuning in {str(path)!r} is damaged: field {name} is missing or wrong")
    return manifest


class FineTuningFolder:
    """Writes the folder of one fine-tuning."""

    def __init__(self, path: Path, manifest: dict[str, Any], *, resume: bool) -> None:
        there = claim_folder(path, FINETUNING, manifest, "fine-tuning", load_manifest, resume=resume)
        self.path, self.manifest = path, there or manifest

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.manifest["status"] == "complete")

    def examples(
        self, n_parts: int, make: Callable[[int], tuple[list[Example], Counts]]
    ) -> tuple[list[Example], Counts]:
        """Return the rows to train on: those that are there, and those of the parts that ``make`` has to make."""
        place = self.path / EXAMPLES
        if place.exists():
            return _read_rows(place), Counts(**self.manifest["data"])
        rows: list[Example] = []
        counts = Counts()
        parts = self.path / PARTS
        parts.mkdir(exist_ok=True)
        for number in range(n_parts):
            part, counted = parts / f"{number:06d}.parquet", parts / f"{number:06d}.json"
            if not counted.exists():  # written after its rows
                made, these = make(number)
                write_table(part, pd.DataFrame(made, columns=list(Example.__annotations__)))
                write_sealed(counted, asdict(these))
            rows += _read_rows(part)
            try:
                counts += Counts(**read_json(counted))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{str(counted)!r} is damaged ({error}): remove it, its rows are made anew") from None
        self.note(data=asdict(counts))
        write_table(place, pd.DataFrame(rows, columns=list(Example.__annotations__)))
        shutil.rmtree(parts)
        return rows, counts

    def checkpoint(self) -> Path | None:
        """Return the last checkpoint that was written whole."""
        found = {int(path.name.rpartition("-")[2]): path for path in (self.path / CHECKPOINTS).glob("checkpoint-*")}
        for _, path in sorted(found.items(), reverse=True):
            try:
                json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))  # the last file of one
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
        self.manifest = self.manifest | additions
        write_sealed(self.path / FINETUNING, self.manifest)

    def discard(self) -> None:
        """Remove the folder: nothing can come of it."""
        shutil.rmtree(self.path)

    def finish(self, **additions: Any) -> FineTuning:
        """Say that all is done; checkpoints go."""
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


def _problem(made: FineTuning) -> str | None:
    """Say what is wrong with the tables; None if nothing is."""
    n_layers, trained = made.manifest["n_layers"], made.manifest["settings"].get("cutoff")
    if not isinstance(trained, int) or not 1 <= trained <= n_layers:
        return f"its cutoff is {trained!r}, not 1 to {n_layers}"
    numbers = {"steps": ("step", "loss", "cutoff"), "sweeps": ("step", "cutoff", "kl", "top1_agreement", "nll")}
    for table, columns in numbers.items():
        frame = getattr(made, table)
        for column in columns:
            if column not in frame or not pd.api.types.is_numeric_dtype(frame[column]) or frame[column].isna().any():
                return f"{table} has no column {column}, or not numbers in it"
    sweeps = made.sweeps
    texts = ("prompt_id", "category")
    if not all(name in sweeps and sweeps[name].map(lambda text: isinstance(text, str)).all() for name in texts):
        return "sweeps has no names of prompts or categories"
    counted = sweeps.groupby(["step", "prompt_id"])["cutoff"].agg(["size", "nunique", "min", "max"])
    whole = counted.eq([n_layers, n_layers, 1, n_layers]).all(axis=None)
    if not whole or 0 not in counted.index.get_level_values("step"):
        return "rows of sweeps are missing, or there twice"
    return None
