"""Recommends cutoffs for many models and prompt sets, in one table.

    python analyses/select_cutoffs.py analyses/select_cutoffs.toml     # or a .yaml file; [--out FOLDER] [--json]

Every model of the config is measured on every prompt set of the config. The output folder then has:

    recommendations.csv, .parquet, .html   one row per pair, rewritten after every pair
    runs/MODEL_PROMPTS_HASH/               the run of a pair, with its recommendation.json

Run the same command again to continue after a kill, to retry failed pairs, or with another goal. A finished run is
reused, without its model, if settings and prompts and the model's files or hub commit are the same. If that is unknown,
the model is loaded and its weights decide. Other settings or weights give a run of another name; nothing is deleted.
`seconds` in the table are those of the session that finished the run. Exit status: 0, 1 if a pair failed, 2 for an
invalid config, 130 after Ctrl-C.

The config has the keys `out`, `goal`, `lengths` (prompt tokens to predict savings for), `defaults`, `models` and
`prompts`; `analyses/select_cutoffs.toml` is an example. Its paths are relative to the config; a model name that is no
path from there is taken as the command takes it.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from cutoff_selection.config import read_config
from cutoff_selection.runs import select
from cutoff_selection.tables import TABLE, show
from diagnostics import UserError
from diagnostics.runs.places import MANIFEST
from diagnostics.support.console import INTERRUPTED, fail, quiet
from diagnostics.support.folders import require_writable


class Parser(argparse.ArgumentParser):
    """Prints an error in one line, as the commands of the package do."""

    def error(self, message: str) -> NoReturn:
        """End with exit status 2."""
        fail(message)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end with its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help=".toml, .yaml or .yml file")
    parser.add_argument("--out", type=Path, help="output folder  [`out` of the config, or runs/CONFIG]")
    parser.add_argument("--json", action="store_true", help="print the rows alone, as JSON")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    quiet()
    try:
        plan = read_config(options.config, options.out)
        require_writable(plan.out)
        if (plan.out / MANIFEST).exists():
            raise UserError(f"{str(plan.out)!r} is a run folder: choose another --out")
        rows = select(plan)
        if options.json:
            print(json.dumps([{name: row.get(name) for name in plan.columns} for row in rows], indent=1))
        else:
            show(plan, rows, Console(highlight=False))
            print(f"Tables: {plan.out / TABLE}.csv, .parquet, .html")
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except OSError as error:  # such as a full disk, maybe below stdout: what is in its buffer has no place to go
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept: run the same command again to go on", INTERRUPTED)
    sys.exit(int(any(row["status"] == "failed" for row in rows)))


if __name__ == "__main__":
    main()
