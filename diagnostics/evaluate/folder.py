"""The folder of an evaluation: what it left behind, and how it goes on after a kill.

- ``evaluation.json``: what was asked, on what, with which versions; what failed
- ``items.parquet``: one row per task, policy and item
- ``parts/TASK__POLICY.parquet``: what is finished, until all is
"""

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.errors import UserError
from diagnostics.evaluate.items import Task
from diagnostics.policies.base import Policy
from diagnostics.results import PARTS, require_writable, write_json, write_table

ITEMS, EVALUATION = "items.parquet", "evaluation.json"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of one model: ``items`` has one row per task, policy and item.

    Columns: task, policy, item_id, category, n_prompt (tokens of the prompt), score (0..1); of choice items ``chosen``
    and ``gold``; of generated answers ``answer``, ``n_tokens`` and the ways to fail, NaN elsewhere.
    """

    manifest: dict[str, Any]
    items: pd.DataFrame = field(repr=False)
    path: Path | None = None


def load_evaluation(path: str | Path) -> Evaluation:
    """Read an evaluation from its folder; raise UserError where there is none."""
    folder = Path(path)
    manifest = load_manifest(folder)
    try:
        items = pd.read_parquet(folder / ITEMS)
    except (OSError, ValueError) as error:
        raise UserError(f"no finished evaluation can be read in {str(path)!r}: {error}") from None
    missing = {"task", "policy", "item_id", "score"} - set(items)
    if missing or not isinstance(manifest.get("model"), str):
        raise UserError(f"the evaluation in {str(path)!r} is damaged")
    return Evaluation(manifest, items, folder)


class EvaluationFolder:
    """The folder of an evaluation: one file for each task and policy that is finished."""

    def __init__(self, path: Path, manifest: dict[str, Any], *, resume: bool) -> None:
        self.path, self.manifest = path, manifest
        found = path / EVALUATION
        if found.exists():
            if not resume:
                raise UserError(f"folder {str(path)!r} holds an evaluation: add --resume or choose another --out")
            there = load_manifest(path)
            for key, asked in manifest["identity"].items():
                if there.get("identity", {}).get(key) != asked:
                    raise UserError(
                        f"folder {str(path)!r} holds another evaluation ({key} differ): choose another --out"
                    )
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{str(path)!r} exists and is no evaluation: choose another --out")
        try:
            require_writable(path)
            path.mkdir(parents=True, exist_ok=True)
            (path / PARTS).mkdir(exist_ok=True)
            write_json(found, manifest | {"errors": []})
        except OSError as error:
            raise UserError(f"cannot write to {str(path)!r}: {error.strerror or error}") from None

    def read(self, task: Task, policy: Policy) -> pd.DataFrame | None:
        """Return what is finished of a task under a policy."""
        try:
            return pd.read_parquet(self._part(task, policy))
        except FileNotFoundError:
            pass
        try:
            whole = pd.read_parquet(self.path / ITEMS)
        except FileNotFoundError:
            return None
        rows = whole[(whole["task"] == task.name) & (whole["policy"] == policy.spec)]
        return rows if len(rows) else None

    def write(self, task: Task, policy: Policy, rows: pd.DataFrame) -> None:
        """Keep a task that is finished under a policy."""
        (self.path / PARTS).mkdir(exist_ok=True)
        write_table(self._part(task, policy), rows)

    def finish(self, made: Evaluation) -> Evaluation:
        """Join the parts into one table; parts stay until then."""
        write_table(self.path / ITEMS, made.items)
        write_json(self.path / EVALUATION, made.manifest)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        return replace(made, path=self.path)

    def _part(self, task: Task, policy: Policy) -> Path:
        name = re.sub(r"[^A-Za-z0-9.@=-]+", "-", f"{task.name}__{policy.spec}")
        return self.path / PARTS / f"{name}.parquet"


def load_manifest(path: Path) -> dict[str, Any]:
    """Read ``evaluation.json``; raise UserError where it is damaged."""
    try:
        manifest = json.loads((path / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"no evaluation can be read in {str(path)!r}: {error}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"the evaluation in {str(path)!r} is damaged")
    return manifest
