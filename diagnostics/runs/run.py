"""The run folder: what a diagnosis leaves behind, and how it survives being killed.

    runs/NAME/manifest.json             what was run, on what, with which versions
              prompts.parquet           one row per prompt
              layers.parquet            one row per prompt and layer
              heads.parquet             one row per prompt, layer and head
              cutoffs.parquet           one row per prompt and cutoff 1..L
              tokens.parquet            one row per token of the prompts that are kept in detail
              lens.parquet              one row per first decode position and layer of these prompts
              recommendation.json       written by `recommend`
              parts/                    the finished prompts, until the run is complete: see `diagnostics.runs.parts`

Everything appears atomically and sealed: see `diagnostics.support.files`. A killed run keeps the prompts it finished.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.runs.parts import PARTS, Parts, find_parts, merge
from diagnostics.runs.schema import COLUMNS, DETAIL_TABLES, TABLES, Tables, manifest_problem, tables_problem
from diagnostics.support.errors import UserError
from diagnostics.support.files import (
    SCRATCH,
    read_json,
    read_table,
    remove_scratch,
    scratch_folder,
    write_problem,
    write_sealed,
    write_table,
)
from diagnostics.support.locks import LOCK
from diagnostics.support.sameness import difference

MANIFEST = "manifest.json"
RECOMMENDATION = "recommendation.json"
BENCHMARK = "benchmark.parquet"  # a run folder may hold one too


@dataclass(frozen=True, eq=False)
class Run:
    """One diagnosis: its manifest and tables, whether it has a folder (``path``) or lives in memory only.

    A run that was interrupted can be looked at too: its tables hold the prompts that finished.
    """

    manifest: dict[str, Any]
    tables: Tables = field(repr=False)
    path: Path | None = None

    @property
    def prompts(self) -> pd.DataFrame:
        """One row per prompt: prompt_id, category, n_prompt, n_decode, ..."""
        return self.tables["prompts"]

    @property
    def layers(self) -> pd.DataFrame:
        """One row per prompt and layer: the probes' columns, described in ``manifest["columns"]``."""
        return self.tables["layers"]

    @property
    def heads(self) -> pd.DataFrame:
        """One row per prompt, layer and head."""
        return self.tables["heads"]

    @property
    def cutoffs(self) -> pd.DataFrame:
        """One row per prompt and cutoff 1..L: kl, top1_agreement, nll, nll_full."""
        return self.tables["cutoffs"]

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token of the prompts kept in detail: position, text, segment, evidence, attention [L] or None."""
        return self._detail("tokens")

    @property
    def lens(self) -> pd.DataFrame:
        """One row per first decode position and layer of the prompts kept in detail: lens_text, lens_probability."""
        return self._detail("lens")

    def select(self, prompt_ids: Sequence[str]) -> "Run":
        """Return the run of some of the prompts, in the order of ``prompts``; raise UserError if none is left."""
        tables = {name: t[t["prompt_id"].isin(prompt_ids)].reset_index(drop=True) for name, t in self.tables.items()}
        if tables["prompts"].empty:
            raise UserError(f"run {self.name!r} has none of these prompts")
        return replace(self, tables=tables)

    def _detail(self, name: str) -> pd.DataFrame:
        return self.tables.get(name, pd.DataFrame(columns=COLUMNS[name].split()))

    def array(self, column: str) -> np.ndarray:
        """Return one measure as an array, prompts in the order of ``prompts``, of its finest table.

        float64 [prompt, layer, head] where it is measured per head, [prompt, layer] where per layer, and [prompt, L]
        where per cutoff: entry k - 1 for cutoff k. Means over heads are in ``layers``. Raises UserError for a column
        that no table has.
        """
        index = {"heads": ["layer", "head"], "layers": ["layer"], "cutoffs": ["cutoff"]}
        for name, axes in index.items():
            table = self.tables[name]
            if column in table and column not in (*axes, "prompt_id"):
                wide = table.pivot(index="prompt_id", columns=axes, values=column).sort_index(axis=1)
                rows = wide.loc[self.prompts["prompt_id"]].to_numpy(float)
                return rows.reshape(-1, *(table[axis].nunique() for axis in axes))
        measures = sorted(
            {str(c) for name in index for c in self.tables[name]} - {"prompt_id", "layer", "head", "cutoff"}
        )
        raise UserError(f"no column {column!r}; there are: {', '.join(measures)}")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L of the model."""
        return int(self.manifest["n_layers"])

    @property
    def complete(self) -> bool:
        """Whether every prompt of the set was diagnosed."""
        return self.manifest["status"] == "complete"

    @cached_property
    def name(self) -> str:
        """Name of the folder, or of the model for a run in memory."""
        return self.path.name if self.path else str(self.manifest["model"])


def load_run(path: str | Path) -> Run:
    """Read a run folder, complete or interrupted; raise UserError, in one line, for anything that is not one."""
    path = Path(path)
    manifest = read_manifest(path)
    tables = _read_tables(path) if manifest["status"] == "complete" else _read_parts(path)
    run = Run(manifest, tables, path)
    if problem := tables_problem(run.manifest, tables):
        raise UserError(f"run {str(path)!r} is damaged: {problem}")
    return run


def _read_parts(path: Path) -> Tables:
    """Read what is finished, also while the process that writes it joins prompts."""
    while True:
        parts = find_parts(path)
        if not parts:
            raise UserError(f"run {str(path)!r} has no finished prompt yet; continue it with --resume")
        try:
            return merge([_read_tables(part) for part in parts])
        except UserError:
            if find_parts(path) == parts:
                raise


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check ``manifest.json`` of a run folder."""
    if not os.path.isdir(path):
        raise UserError(f"there is no run folder {str(path)!r}")
    try:
        manifest = read_json(path / MANIFEST)
    except FileNotFoundError:
        raise UserError(f"folder {str(path)!r} is not a run: it has no {MANIFEST}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"run {str(path)!r} has a damaged {MANIFEST} ({error})") from None
    if problem := manifest_problem(manifest):
        raise UserError(f"run {str(path)!r} {problem}")
    return manifest


def require_place(path: Path, *, resume: bool) -> None:
    """Raise UserError unless a run can be written to ``path``, or continued there; leave nothing behind."""
    with reporting(path):
        if (path / MANIFEST).exists():
            if not resume:
                raise UserError(f"run folder {str(path)!r} exists; add --resume to continue it or choose another --out")
            return
        if path.exists() and (not path.is_dir() or not is_unused(path)):
            raise UserError(f"{str(path)!r} exists and is not a run folder; choose another --out")
        require_writable(path)


def is_unused(path: Path) -> bool:
    """Whether a folder is empty but for what a process that was killed may have left: scratch folders, a lock."""
    return all(inside.name.startswith((SCRATCH, LOCK)) for inside in path.iterdir())


def require_writable(path: Path) -> None:
    """Raise OSError unless a folder can be made at ``path``, or written to; leave nothing behind."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    with scratch_folder(nearest):
        pass


def claim_folder(
    path: Path, name: str, manifest: dict[str, Any], kind: str, read: Callable[[Path], dict[str, Any]], *, resume: bool
) -> dict[str, Any] | None:
    """Make ``path`` the folder of a ``kind`` of result, with its manifest in the file ``name``, or go on with one.

    Returns the manifest that ``read`` finds, None for a new folder. Raises UserError if the folder is in the way,
    cannot be written, or holds another one: what must be the same is ``manifest["identity"]``.
    """
    article = "an" if kind[0] in "aeiou" else "a"
    if (path / name).exists():
        if not resume:
            raise UserError(f"folder {str(path)!r} holds {article} {kind}: add --resume or choose another --out")
        there = read(path)
        if differs := difference(there, manifest):
            raise UserError(f"folder {str(path)!r} holds another {kind} ({differs}): choose another --out")
        remove_scratch(path)
        return there
    if path.exists() and (not path.is_dir() or not is_unused(path)):
        raise UserError(f"{str(path)!r} exists and is no {kind}: choose another --out")
    try:
        require_writable(path)
        path.mkdir(parents=True, exist_ok=True)
        remove_scratch(path)
        write_sealed(path / name, manifest)
    except OSError as error:
        raise UserError(f"cannot write to {str(path)!r}: {error.strerror or error}") from None
    return None


class RunWriter:
    """Writes one run folder, prompt by prompt; the folder appears with the first finished prompt."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.parts = Parts(path, _read_tables)

    @classmethod
    def open(cls, path: Path, manifest: dict[str, Any], *, resume: bool) -> "RunWriter":
        """Start a run folder, or continue one that asks for the same thing.

        What must be the same is ``manifest["identity"]``. Raises UserError when the folder is in the way, holds another
        diagnosis, or cannot be written.
        """
        require_place(path, resume=resume)
        if not (path / MANIFEST).exists():
            return cls(path, manifest)
        found = read_manifest(path)
        if differs := difference(found, manifest):
            raise UserError(f"run folder {str(path)!r} holds another diagnosis ({differs}); choose another --out")
        writer = cls(path, found)
        writer.parts.tidy()
        return writer

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.manifest["status"] == "complete"

    def is_done(self, index: int) -> bool:
        """Whether the prompt at this place of the set has finished."""
        return self.complete or index in self.parts.finished

    def write(self, index: int, tables: Tables) -> None:
        """Write the rows of one finished prompt; they appear together or not at all."""
        with reporting(self.path):
            if not (self.path / MANIFEST).exists():
                self.path.mkdir(parents=True, exist_ok=True)
                write_sealed(self.path / MANIFEST, self.manifest)
            self.parts.write(index, tables)

    def finish(self, **additions: Any) -> Run:
        """Merge the prompts into the run's tables, in the order of the set, and mark the run complete."""
        if not self.complete:
            with reporting(self.path):
                parts = [_read_tables(part) for part in find_parts(self.path)]
                for name, table in merge(parts).items():
                    write_table(self.path / f"{name}.parquet", table)
                self.manifest = self.manifest | additions | {"status": "complete"}
                write_sealed(self.path / MANIFEST, self.manifest)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        remove_scratch(self.path)  # what a process that was killed left behind
        return load_run(self.path)


@contextmanager
def reporting(path: Path, kind: str = "run") -> Iterator[None]:
    """Turn what the file system says of a folder into one line, and say that nothing finished is lost."""
    try:
        yield
    except Exception as error:
        reason = write_problem(error)
        if reason is None:
            raise
        started = kind != "run" or os.path.isdir(path / PARTS)
        after = (
            "what is finished is kept, continue with --resume"
            if started
            else "choose another --out, or continue with --resume when it can be written"
        )
        raise UserError(f"cannot write {kind} folder {str(path)!r}: {reason}; {after}") from None


def _read_tables(folder: Path) -> Tables:
    there = [name for name in DETAIL_TABLES if (folder / f"{name}.parquet").exists()]
    return {name: _read_table(folder / f"{name}.parquet") for name in (*TABLES, *there)}


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return read_table(path)
    except FileNotFoundError:
        raise UserError(f"run {str(path.parent)!r} is damaged: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"run {str(path.parent)!r} is damaged: {path.name} cannot be read ({error})") from None
