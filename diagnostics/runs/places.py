"""The files of a run folder.

    runs/NAME/manifest.json             what was run, on what, with which versions
              prompts.parquet           one row per prompt
              layers.parquet            one row per prompt and layer
              heads.parquet             one row per prompt, layer and head
              cutoffs.parquet           one row per prompt and cutoff 1..L
              tokens.parquet            one row per token of the prompts that are kept in detail
              lens.parquet              one row per first decode position and layer of these prompts
              head_tokens.parquet       the tokens that each of their heads attends to most
              recommendation.json       written by `recommend`
              benchmark.parquet         a run folder may hold a benchmark, too
              parts/                    the finished prompts, until the run is complete: see `diagnostics.runs.parts`

Everything appears atomically and sealed: see `diagnostics.support.files`. A killed run keeps the prompts it finished.
"""

from pathlib import Path

MANIFEST = "manifest.json"
RECOMMENDATION = "recommendation.json"
BENCHMARK = "benchmark.parquet"


def table_file(name: str) -> str:
    """Return the file name of a table."""
    return f"{name}.parquet"


def table_path(folder: Path, name: str) -> Path:
    """Return the path of a table of a run, or of one of its parts."""
    return folder / table_file(name)
