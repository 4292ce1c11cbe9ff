"""A run: its manifest and tables, read from its folder or kept in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.runs.manifest import RUN_FOLDER, RunManifest
from diagnostics.runs.parts import find_parts, merge, read_tables
from diagnostics.runs.schema import COLUMNS, Tables, tables_problem
from diagnostics.support.errors import UserError
from diagnostics.support.overview import Overview, Readable


@dataclass(frozen=True, eq=False, repr=False)
class Run(Readable):
    """One diagnosis: its manifest and tables, in a folder (``path``) or in memory only.

    The tables of an interrupted run hold the prompts that finished.
    """

    manifest: RunManifest
    tables: Tables
    path: Path | None = None

    def overview(self) -> Overview:
        """What was measured, and where it is."""
        n, asked = len(self.prompts), self.manifest["n_prompts"]
        categories = ", ".join(dict.fromkeys(map(str, self.prompts["category"])))
        lengths = self.prompts["n_prompt"]
        done = f"{n} prompts" if self.complete else f"{n} of {asked} prompts so far"
        facts = {
            "model": f"{self.manifest['model']}, {self.n_layers} layers, {self.manifest['n_heads']} heads",
            "prompts": f"{lengths.min():,} to {lengths.max():,} tokens; {categories}",
            "tables": ", ".join(f"{name} ({len(table):,} rows)" for name, table in self.tables.items()),
            "folder": self.path,
        }
        return Overview(f"Run {self.name}: {done}", facts=facts)

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
        """One row per prompt and cutoff 1..L: kl, top1_agreement, nll, nll_full; NaN in a run without a sweep."""
        return self.tables["cutoffs"]

    @property
    def has_sweep(self) -> bool:
        """Whether the loss of every cutoff was measured."""
        return self.manifest.get("sweep", True)

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token of the prompts kept in detail: position, text, segment, evidence, attention, selectivity.

        The last two have one number per layer for tokens of the prompt segment, else None. Runs of earlier versions
        have no selectivity.
        """
        return self._detail("tokens")

    @property
    def lens(self) -> pd.DataFrame:
        """One row per first decode position and layer of the prompts kept in detail: lens_text, lens_probability."""
        return self._detail("lens")

    @property
    def head_tokens(self) -> pd.DataFrame:
        """The prompt tokens that a head attends to most, up to 32 per layer and head of the prompts kept in detail.

        Columns: prompt_id, layer, head, position, attention (mean over decode queries, 0..1), the first one first. Runs
        of earlier versions have none.
        """
        return self._detail("head_tokens")

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
    folder = Path(path)
    manifest = RUN_FOLDER.read(folder)
    tables = read_tables(folder) if manifest["status"] == "complete" else _read_parts(folder)
    if problem := tables_problem(manifest, tables):
        raise RUN_FOLDER.damaged(folder, problem)
    return Run(manifest, tables, folder)


def _read_parts(folder: Path) -> Tables:
    """Read the finished prompts, also while another process joins them."""
    while True:
        parts = find_parts(folder)
        if not parts:
            raise UserError(f"run {str(folder)!r} has no finished prompt yet: continue it with `resume=True`")
        try:
            return merge([read_tables(part) for part in parts])
        except UserError:
            if find_parts(folder) == parts:
                raise
