"""The finished prompts of a run that is not complete: one folder each, and one for every 64 of them.

    parts/000000-000063/    the tables of prompts 0 to 63
    parts/000064/           the tables of prompt 64

A folder appears at once or not at all. The folders of single prompts are removed once that of the 64 exists; where a
kill left both, that of the 64 counts.
"""

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from diagnostics.runs.manifest import RUN_FOLDER
from diagnostics.runs.places import table_file, table_path
from diagnostics.runs.schema import DETAIL_TABLES, TABLES, Tables
from diagnostics.support.files import remove_scratch, write_folder

PARTS = "parts"
BATCH = 64
NAME = re.compile(r"([0-9]{6})(?:-([0-9]{6}))?")


def prompts_of(name: str) -> range:
    """Return which prompts of the set a folder of this name holds; none for any other name."""
    match = NAME.fullmatch(name)
    if match is None:
        return range(0)
    first = int(match[1])
    return range(first, int(match[2] or first) + 1)


def find_parts(run: Path) -> list[Path]:
    """Return the folders that together hold every finished prompt once, in the order of the prompts."""
    candidates = sorted(
        (path for path in (run / PARTS).glob("[0-9]*") if prompts_of(path.name) and path.is_dir()),
        key=lambda path: (prompts_of(path.name).start, -len(prompts_of(path.name))),
    )
    parts: list[Path] = []
    reached = 0
    for path in candidates:
        prompts = prompts_of(path.name)
        if prompts.start >= reached:
            parts.append(path)
            reached = prompts.stop
    return parts


def count_finished(names: Iterable[str]) -> int:
    """Return how many prompts folders of these names hold together."""
    return len({index for name in names for index in prompts_of(name)})


class Parts:
    """Writes the parts of one run."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.finished = {index for path in find_parts(run) for index in prompts_of(path.name)}

    def write(self, index: int, tables: Tables) -> None:
        """Write the tables of one prompt, and join every 64 prompts."""
        (self.run / PARTS).mkdir(exist_ok=True)
        write_folder(self._part(index), tables)
        self.finished.add(index)
        if (index + 1) % BATCH == 0:
            self._join(index // BATCH * BATCH)

    def tidy(self) -> None:
        """Remove what a killed process left: half-written folders, and prompts that a folder of 64 holds too."""
        remove_scratch(self.run)
        remove_scratch(self.run / PARTS)
        kept = set(find_parts(self.run))
        for path in (self.run / PARTS).glob("[0-9]*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _join(self, first: int) -> None:
        singles = [self._part(index) for index in range(first, first + BATCH)]
        if all(path.is_dir() for path in singles):
            joined = merge([read_tables(path) for path in singles])
            write_folder(self.run / PARTS / f"{first:06d}-{first + BATCH - 1:06d}", joined)
            for path in singles:
                shutil.rmtree(path, ignore_errors=True)

    def _part(self, index: int) -> Path:
        return self.run / PARTS / f"{index:06d}"


def merge(parts: Sequence[Tables]) -> Tables:
    """Join the tables of prompts, in their order; a table that no prompt has is left out."""
    names = [name for name in (*TABLES, *DETAIL_TABLES) if any(name in part for part in parts)]
    return {name: pd.concat([part[name] for part in parts if name in part], ignore_index=True) for name in names}


def read_tables(folder: Path) -> Tables:
    """Read the tables of a run, or of one of its parts; raise UserError where one is missing or damaged."""
    details = [name for name in DETAIL_TABLES if table_path(folder, name).exists()]
    return {name: RUN_FOLDER.read_table(folder, table_file(name)) for name in (*TABLES, *details)}
