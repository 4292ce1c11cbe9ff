"""Checks a folder of results from elsewhere in a separate process, with bounded memory and time.

A parquet file of a few kilobytes can hold columns of gigabytes, types nested a thousand deep, or bytes that crash the
reader. The process checks the files' metadata (rows, columns, types) before it reads them as `load_run` does, or
whatever reads such a folder; if it dies, the process that started it goes on.

    python -m diagnostics.runs.untrusted FOLDER READER    prints what is wrong, in JSON; null if nothing is
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

from diagnostics.support.errors import UserError

MEGABYTES = 1500  # of memory that the process may take
SECONDS = 60
READER = [sys.executable, "-m", "diagnostics.runs.untrusted"]
LOAD_RUN = "diagnostics.runs.run:load_run"
# Numbers and texts in all tables together; a run of 5,000 prompts, 32 layers and 32 heads has 60 million.
MAX_CELLS = 100_000_000


def require_harmless(folder: Path, reader: str = LOAD_RUN) -> None:
    """Raise UserError, in one line, unless a folder can be read in bounded memory and time.

    ``reader`` names the function that reads it, as ``module:function``.
    """
    # One thread and the system's own allocator: pools of threads and memory would count as memory taken.
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    search_path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    try:
        completed = subprocess.run(
            [*READER, str(folder), reader],
            env=os.environ | quiet | {"PYTHONPATH": search_path},
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        problem = json.loads(completed.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise UserError(
            f"what is in {str(folder)!r} cannot be read within {MEGABYTES} MB and {SECONDS} s: copy it by hand"
        ) from None
    if problem is not None:
        raise UserError(str(problem))


def describe_problem(folder: Path, reader: str = LOAD_RUN) -> str | None:
    """Say what is wrong with a folder of results; None if nothing is."""
    from diagnostics.runs.run import Run
    from diagnostics.support.files import read_table

    try:
        read = resolve_name(reader)
        cells = 0
        for path in sorted(folder.rglob("*.parquet")):
            cells += _cells(path)
            if cells > MAX_CELLS:
                return f"the tables of {str(folder)!r} hold more than {MAX_CELLS // 10**6} million values"
        loaded = read(folder)
        tables = loaded.tables if isinstance(loaded, Run) else {}
        # Other tables that pages of the dashboard read, such as a benchmark.
        tables |= {path.stem: read_table(path) for path in folder.glob("*.parquet") if path.stem not in tables}
        size = sum(int(table.memory_usage(deep=True).sum()) for table in tables.values())
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the folder {str(folder)!r} is damaged: {error}"
    except MemoryError:
        return f"what is in {str(folder)!r} takes more than {MEGABYTES} MB of memory: copy it by hand"
    if size > MEGABYTES << 20:
        return f"what is in {str(folder)!r} takes {size >> 20} MB of memory, more than {MEGABYTES}: copy it by hand"
    return None


def _cells(path: Path) -> int:
    """Count the values of a table by its metadata; raise UserError for columns that no run has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # The leaves come first: converting a schema that is nested very deep overflows the stack.
        metadata = pq.read_metadata(path)
        depth = max((metadata.schema.column(i).max_definition_level for i in range(metadata.num_columns)), default=0)
        schema = metadata.schema.to_arrow_schema() if depth <= 3 else None
    except Exception as error:  # damaged metadata
        raise UserError(f"{path.name} in {str(path.parent)!r} is damaged ({type(error).__name__})") from None
    plain = (
        *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string),
        *(pa.types.is_large_string, pa.types.is_null),
    )
    for field in schema or ():
        kind = field.type
        kind = kind.value_type if pa.types.is_dictionary(kind) or pa.types.is_list(kind) else kind
        if not any(is_kind(kind) for is_kind in plain):
            raise UserError(f"{path.name} in {str(path.parent)!r} has a column of {field.type}, which no run has")
    if schema is None:
        raise UserError(f"{path.name} in {str(path.parent)!r} has columns nested {depth} deep, which no run has")
    # For lists the number of entries counts, not that of rows.
    columns = (
        max(metadata.row_group(group).column(i).num_values for i in range(metadata.num_columns)) * metadata.num_columns
        for group in range(metadata.num_row_groups)
        if metadata.num_columns
    )
    return max(sum(columns), metadata.num_rows * max(1, metadata.num_columns))


def _limit() -> None:
    """Bound memory to `MEGABYTES` above what the interpreter holds by now, and bound processor time."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    import pandas  # noqa: F401  # before the limit: what libraries map is not what the files take
    import pyarrow.parquet  # noqa: F401

    place, name_of_reader = sys.argv[1:]
    resolve_name(name_of_reader)
    _limit()
    print(json.dumps(describe_problem(Path(place), name_of_reader)))
