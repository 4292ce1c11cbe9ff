"""What lies in a folder of runs, each with its state: runs, benchmarks, evaluations, fine-tunings, and what is none.

The two runs of a fine-tuning are listed beside it, as ``NAME/before`` and ``NAME/after``.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.cutoffs.goals import GOALS, saved_goals
from diagnostics.cutoffs.regions import RegionRules
from diagnostics.evaluate.evaluation_folder import EVALUATION
from diagnostics.finetune.finetuning_folder import AFTER, BEFORE, FINETUNING
from diagnostics.runs.manifest import RUN_FOLDER
from diagnostics.runs.parts import PARTS, count_finished, prompts_of
from diagnostics.runs.places import BENCHMARK, MANIFEST, RECOMMENDATION
from diagnostics.support.errors import UserError

# Name, size and time of every file that a folder's content depends on.
Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Entry:
    """One folder: its manifest if it is a run, and else what is wrong with it; what else it holds."""

    path: Path
    name: str
    manifest: dict[str, Any] | None
    problem: str | None
    has_benchmark: bool
    has_evaluation: bool
    has_finetuning: bool
    signature: Signature

    @property
    def status(self) -> str:
        """``complete``, ``3 of 28 prompts``, what else the folder is, or ``not a run``."""
        if self.manifest is None:
            return self.kind or "not a run"
        if self.manifest["status"] == "complete":
            return "complete"
        return f"{self.finished_prompts} of {self.manifest['n_prompts']} prompts"

    @property
    def kind(self) -> str | None:
        """What the folder has besides or in place of a run: ``benchmark``, ``evaluation``, ``fine-tuning`` or None."""
        kinds = {"benchmark": self.has_benchmark, "evaluation": self.has_evaluation, "fine-tuning": self.has_finetuning}
        return next((kind for kind, is_there in kinds.items() if is_there), None)

    @property
    def finished_prompts(self) -> int:
        """Prompts whose rows are written."""
        if self.manifest is None or self.manifest["status"] == "complete":
            return 0 if self.manifest is None else int(self.manifest["n_prompts"])
        return count_finished(name.removeprefix(f"{PARTS}/") for name, *_ in self.signature)

    @property
    def readable(self) -> bool:
        """Whether there is something of a run to look at."""
        return self.manifest is not None and self.finished_prompts > 0

    @property
    def goals(self) -> dict[str, Any] | None:
        """Goals of the recommendation saved with the run; empty where there is none, None where it is damaged."""
        saved = self._saved
        return saved and {name: float(value) for name, value in saved.items() if name != "rules"}

    @property
    def region_rules(self) -> RegionRules | None:
        """Thresholds of the regions of the recommendation saved with the run; None for the default ones."""
        return (self._saved or {}).get("rules")

    @property
    def _saved(self) -> dict[str, Any] | None:
        try:
            saved = saved_goals(self.path)
        except UserError:
            return None
        has_one = os.path.lexists(self.path / RECOMMENDATION)
        return None if has_one and not set(GOALS) & set(saved) else saved


def find_runs(folder: Path) -> list[Entry]:
    """List the folders in ``folder``, newest first, or ``folder`` itself if it is one; nothing if it is missing."""
    # os.path, unlike pathlib, takes what cannot be looked into for something that is not there.
    if any(os.path.exists(folder / name) for name in (MANIFEST, BENCHMARK, EVALUATION, FINETUNING)):
        return _entries(folder)
    try:
        inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except (OSError, ValueError):
        return []
    entries = [entry for path in inside for entry in _entries(path)]
    return sorted(
        entries, key=lambda entry: (max((f[2] for f in entry.signature), default=0), entry.name), reverse=True
    )


def _entries(path: Path) -> list[Entry]:
    """The entry of a folder, and of the runs that a fine-tuning has in it."""
    entry = _entry(path, path.name)
    inside = (BEFORE, AFTER) if entry.has_finetuning else ()
    return [entry] + [
        _entry(path / name, f"{path.name}/{name}") for name in inside if os.path.exists(path / name / MANIFEST)
    ]


def _entry(path: Path, name: str) -> Entry:
    manifest: dict[str, Any] | None = None
    problem = None
    has = {file: os.path.exists(path / file) for file in (BENCHMARK, EVALUATION, FINETUNING)}
    try:
        manifest = RUN_FOLDER.read(path)
    except UserError as error:
        problem = None if any(has.values()) and not os.path.exists(path / MANIFEST) else str(error)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    return Entry(
        path, name, manifest, problem, has[BENCHMARK], has[EVALUATION], has[FINETUNING], tuple(_signature(path))
    )


def _signature(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        files = [f for f in path.iterdir() if f.is_file()]
        parts = [f for f in (path / PARTS).iterdir() if prompts_of(f.name)] if (path / PARTS).is_dir() else []
        for file in sorted([*files, *parts]):
            status = file.stat()
            yield str(file.relative_to(path)), status.st_size, status.st_mtime_ns
    except OSError:  # written to, or gone, at this moment
        return
