"""Writes a run, prompt by prompt, and continues one that was killed."""

import shutil
from pathlib import Path
from typing import Any, cast

from diagnostics.runs.manifest import RUN_FOLDER, RunManifest
from diagnostics.runs.parts import PARTS, Parts, find_parts, merge, read_tables
from diagnostics.runs.places import MANIFEST, table_path
from diagnostics.runs.run import Run, load_run
from diagnostics.runs.schema import Tables
from diagnostics.support.files import remove_scratch, write_sealed, write_table


class RunWriter:
    """Writes one run folder, prompt by prompt; the folder appears with the first finished prompt."""

    def __init__(self, path: Path, manifest: RunManifest) -> None:
        self.path, self.manifest = path, manifest
        self.parts = Parts(path)

    @classmethod
    def open(cls, path: Path, manifest: RunManifest, *, resume: bool) -> "RunWriter":
        """Start a run folder, or continue one that asks for the same thing; raises what `FolderKind.claim` does."""
        kept = RUN_FOLDER.claim(path, manifest, resume=resume)
        writer = cls(path, kept or manifest)
        if kept:
            writer.parts.tidy()
        return writer

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.manifest["status"] == "complete"

    def is_done(self, index: int) -> bool:
        """Whether the prompt at this index of the set has finished."""
        return self.complete or index in self.parts.finished

    def write(self, index: int, tables: Tables) -> None:
        """Write the rows of one finished prompt; they appear together or not at all."""
        if not (self.path / MANIFEST).exists():
            RUN_FOLDER.start(self.path, self.manifest)
        with RUN_FOLDER.writing(self.path):
            self.parts.write(index, tables)

    def finish(self, **additions: Any) -> Run:
        """Merge the prompts into the run's tables, in the order of the set, and mark the run complete."""
        if not self.complete:
            with RUN_FOLDER.writing(self.path):
                parts = [read_tables(part) for part in find_parts(self.path)]
                for name, table in merge(parts).items():
                    write_table(table_path(self.path, name), table)
                self.manifest = cast(RunManifest, {**self.manifest, **additions, "status": "complete"})
                write_sealed(self.path / MANIFEST, self.manifest)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        remove_scratch(self.path)  # what a process that was killed left behind
        return load_run(self.path)
