"""The run folder: what a diagnosis leaves behind, and how it survives being killed.

    runs/NAME/manifest.json             what was run, on what, with which versions
              prompts.parquet           one row per prompt
              layers.parquet            one row per prompt and layer
              heads.parquet             one row per prompt, layer and head
              cutoffs.parquet           one row per prompt and cutoff 1..L
              recommendation.json       written by `recommend`
              parts/000007/*.parquet    one folder per finished prompt, until the run is complete

Everything appears atomically: a file or folder is written beside its place and renamed into it. A killed run keeps the
prompts it finished.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.errors import UserError

SCHEMA_VERSION = 1
TABLES = ("prompts", "layers", "heads", "cutoffs")
MANIFEST = "manifest.json"
RECOMMENDATION = "recommendation.json"
PARTS = "parts"

Tables = dict[str, pd.DataFrame]


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
        return Run(manifest, {name: _read_table(path / f"{name}.parquet") for name in TABLES}, path)
    parts = sorted(p for p in (path / PARTS).glob("[0-9]*") if p.is_dir())
    if not parts:
        raise UserError(f"run {str(path)!r} has no finished prompt yet; continue it with --resume")
    return Run(manifest, _merge(parts), path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check ``manifest.json`` of a run folder."""
    if not path.is_dir():
        raise UserError(f"there is no run folder {str(path)!r}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, status = manifest["schema_version"], manifest["status"]
    except FileNotFoundError:
        raise UserError(f"folder {str(path)!r} is not a run: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"run {str(path)!r} has a damaged {MANIFEST} ({error})") from None
    if version != SCHEMA_VERSION or status not in ("running", "complete"):
        raise UserError(
            f"run {str(path)!r} was written by another version (schema {version}, this is {SCHEMA_VERSION}); "
            "run it again"
        )
    return manifest


class RunWriter:
    """Writes one run folder, prompt by prompt."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path, manifest: dict[str, Any], *, resume: bool) -> "RunWriter":
        """Start a run folder, or continue one that asks for the same thing.

        What must be the same is ``manifest["identity"]``. Raises UserError when the folder is in the way, holds another
        diagnosis, or cannot be written.
        """
        if (path / MANIFEST).exists():
            if not resume:
                raise UserError(f"run folder {str(path)!r} exists; add --resume to continue it or choose another --out")
            found = read_manifest(path)
            for key, asked in manifest["identity"].items():
                there = found.get("identity", {}).get(key)
                if there != asked:
                    raise UserError(
                        f"run folder {str(path)!r} holds another diagnosis "
                        f"({key} is {_short(there)}, not {_short(asked)}); choose another --out"
                    )
            return cls(path, found)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{str(path)!r} exists and is not a run folder; choose another --out")
        writer = cls(path, manifest)
        with writer._reporting():
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / MANIFEST, manifest)
        return writer

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.manifest["status"] == "complete"

    def is_done(self, index: int) -> bool:
        """Whether the prompt at this place of the set has finished."""
        return self.complete or self._part(index).is_dir()

    def write(self, index: int, tables: Tables) -> None:
        """Write the rows of one finished prompt; they appear together or not at all."""
        with self._reporting():
            (self.path / PARTS).mkdir(exist_ok=True)
            with _scratch_folder(self.path / PARTS) as scratch:
                for name, table in tables.items():
                    table.to_parquet(scratch / f"{name}.parquet", index=False)
                scratch.rename(self._part(index))

    def finish(self, **additions: Any) -> Run:
        """Merge the prompts into the run's tables, in the order of the set, and mark the run complete."""
        if not self.complete:
            with self._reporting():
                for name, table in _merge(sorted((self.path / PARTS).glob("[0-9]*"))).items():
                    with _scratch_folder(self.path) as scratch:
                        table.to_parquet(scratch / name, index=False)
                        (scratch / name).rename(self.path / f"{name}.parquet")
                self.manifest = self.manifest | additions | {"status": "complete"}
                write_json(self.path / MANIFEST, self.manifest)
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
        return load_run(self.path)

    def _part(self, index: int) -> Path:
        return self.path / PARTS / f"{index:06d}"

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn what the file system says into one line, and say that nothing finished is lost."""
        try:
            yield
        except OSError as error:
            started = (self.path / PARTS).is_dir()
            after = "what is finished is kept, continue with --resume" if started else "choose another --out"
            raise UserError(f"cannot write run folder {str(self.path)!r}: {error.strerror or error}; {after}") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with _scratch_folder(path.parent) as scratch:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (scratch / path.name).write_text(text + "\n", encoding="utf-8")
        os.replace(scratch / path.name, path)


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder on the same file system as ``parent``, so that a rename out of it is atomic; gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
    scratch.chmod(0o755)  # mkdtemp makes it private, and a renamed part would stay so
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _merge(parts: list[Path]) -> Tables:
    return {
        name: pd.concat([_read_table(part / f"{name}.parquet") for part in parts], ignore_index=True) for name in TABLES
    }


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"run {str(path.parent)!r} is damaged: {path.name} is missing") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"run {str(path.parent)!r} is damaged: {path.name} cannot be read ({error})") from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
