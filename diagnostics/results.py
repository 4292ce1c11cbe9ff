"""The run folder: what a diagnosis leaves behind, and how it survives being killed.

    runs/NAME/manifest.json             what was run, on what, with which versions
              prompts.parquet           one row per prompt
              layers.parquet            one row per prompt and layer
              heads.parquet             one row per prompt, layer and head
              cutoffs.parquet           one row per prompt and cutoff 1..L
              tokens.parquet            one row per token of the prompts that are kept in detail
              lens.parquet              one row per first decode position and layer of these prompts
              recommendation.json       written by `recommend`
              parts/000007/*.parquet    one folder per finished prompt, until the run is complete

Everything appears atomically: a file or folder is written beside its place and renamed into it. A killed run keeps the
prompts it finished.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.errors import UserError
from diagnostics.sameness import difference
from diagnostics.schema import COLUMNS, DETAIL_TABLES, TABLES, Tables, manifest_problem, tables_problem

MANIFEST = "manifest.json"
RECOMMENDATION = "recommendation.json"
BENCHMARK = "benchmark.parquet"  # a run folder may hold one too
PARTS = "parts"
SCRATCH = ".writing-"


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
    if manifest["status"] == "complete":
        tables = _read_tables(path)
    else:
        parts = sorted(p for p in (path / PARTS).glob("[0-9]*") if p.is_dir())
        if not parts:
            raise UserError(f"run {str(path)!r} has no finished prompt yet; continue it with --resume")
        tables = merge([_read_tables(part) for part in parts])
    run = Run(manifest, tables, path)
    if problem := tables_problem(run.manifest, tables):
        raise UserError(f"run {str(path)!r} is damaged: {problem}")
    return run


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check ``manifest.json`` of a run folder."""
    if not os.path.isdir(path):
        raise UserError(f"there is no run folder {str(path)!r}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"folder {str(path)!r} is not a run: it has no {MANIFEST}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"run {str(path)!r} has a damaged {MANIFEST} ({error})") from None
    if problem := manifest_problem(manifest):
        raise UserError(f"run {str(path)!r} {problem}")
    return manifest


def require_place(path: Path, *, resume: bool) -> None:
    """Raise UserError unless a run can be written to ``path``, or continued there; leave nothing behind."""
    with _reporting(path):
        if (path / MANIFEST).exists():
            if not resume:
                raise UserError(f"run folder {str(path)!r} exists; add --resume to continue it or choose another --out")
            return
        # A process that was killed may have left a scratch folder and nothing else.
        if path.exists() and (not path.is_dir() or any(not p.name.startswith(SCRATCH) for p in path.iterdir())):
            raise UserError(f"{str(path)!r} exists and is not a run folder; choose another --out")
        require_writable(path)


def require_writable(path: Path) -> None:
    """Raise OSError unless a folder can be made at ``path``, or written to; leave nothing behind."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    with _scratch_folder(nearest):
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
        return there
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{str(path)!r} exists and is no {kind}: choose another --out")
    try:
        require_writable(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / name, manifest)
    except OSError as error:
        raise UserError(f"cannot write to {str(path)!r}: {error.strerror or error}") from None
    return None


class RunWriter:
    """Writes one run folder, prompt by prompt; the folder appears with the first finished prompt."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

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
        return cls(path, found)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.manifest["status"] == "complete"

    def is_done(self, index: int) -> bool:
        """Whether the prompt at this place of the set has finished."""
        return self.complete or self._part(index).is_dir()

    def write(self, index: int, tables: Tables) -> None:
        """Write the rows of one finished prompt; they appear together or not at all."""
        with _reporting(self.path):
            if not (self.path / MANIFEST).exists():
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self.path / MANIFEST, self.manifest)
            (self.path / PARTS).mkdir(exist_ok=True)
            with _scratch_folder(self.path / PARTS) as scratch:
                for name, table in tables.items():
                    table.to_parquet(scratch / f"{name}.parquet", index=False)
                scratch.rename(self._part(index))

    def finish(self, **additions: Any) -> Run:
        """Merge the prompts into the run's tables, in the order of the set, and mark the run complete."""
        if not self.complete:
            with _reporting(self.path):
                parts = [_read_tables(part) for part in sorted((self.path / PARTS).glob("[0-9]*"))]
                for name, table in merge(parts).items():
                    write_table(self.path / f"{name}.parquet", table)
                self.manifest = self.manifest | additions | {"status": "complete"}
                write_json(self.path / MANIFEST, self.manifest)
        # Also what a process that was killed left behind.
        for leftover in (self.path / PARTS, *self.path.glob(f"{SCRATCH}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        return load_run(self.path)

    def _part(self, index: int) -> Path:
        return self.path / PARTS / f"{index:06d}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with _scratch_folder(path.parent) as scratch:
        (scratch / path.name).write_text(text, encoding="utf-8")
        os.replace(scratch / path.name, path)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a parquet table atomically."""
    with _scratch_folder(path.parent) as scratch:
        table.to_parquet(scratch / path.name, index=False)
        os.replace(scratch / path.name, path)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turn what the file system says of a run folder into one line, and say that nothing finished is lost."""
    try:
        yield
    except OSError as error:
        started = os.path.isdir(path / PARTS)
        after = "what is finished is kept, continue with --resume" if started else "choose another --out"
        raise UserError(f"cannot write run folder {str(path)!r}: {error.strerror or error}; {after}") from None


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder on the same file system as ``parent``, so that a rename out of it is atomic; gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    scratch.chmod(0o755)  # mkdtemp makes it private, and a renamed part would stay so
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def merge(parts: Sequence[Tables]) -> Tables:
    """Join the tables of prompts, in their order; a table that no prompt has is not there."""
    names = [name for name in (*TABLES, *DETAIL_TABLES) if any(name in part for part in parts)]
    return {name: pd.concat([part[name] for part in parts if name in part], ignore_index=True) for name in names}


def _read_tables(folder: Path) -> Tables:
    there = [name for name in DETAIL_TABLES if (folder / f"{name}.parquet").exists()]
    return {name: _read_table(folder / f"{name}.parquet") for name in (*TABLES, *there)}


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"run {str(path.parent)!r} is damaged: {path.name} is missing") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"run {str(path.parent)!r} is damaged: {path.name} cannot be read ({error})") from None
