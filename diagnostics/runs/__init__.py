"""Runs: the results of a diagnosis on disk."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.runs.run import Run, load_run

_HOMES = {
    "run": (
        "Run",
        "load_run",
    ),
}

__all__ = [
    "Run",
    "load_run",
]

find_on_demand(__name__, _HOMES)
