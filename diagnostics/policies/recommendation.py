"""Reads the files that `recommend` writes, for the policies that follow them."""

import os
from pathlib import Path
from typing import Any

from diagnostics.runs.places import RECOMMENDATION
from diagnostics.support.errors import UserError
from diagnostics.support.files import read_json


def recommended_cutoff(path: str | Path) -> int:
    """Return the recommended cutoff; raise UserError where there is none."""
    return integer_of(read_recommendation(path).get("cutoff"), "cutoff", path)


def integer_of(value: Any, name: str, path: str | Path) -> int:
    """Return ``value`` if it is an integer; else raise a UserError that names the field."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{str(path)!r} is not a recommendation: its {name} is {value!r}, not a whole number")
    return value


def read_recommendation(path: str | Path) -> dict[str, Any]:
    """Read a recommendation file, or the one in a run folder; raise UserError where there is none."""
    # os.path, unlike pathlib, treats a name that is too long as one that does not exist.
    file = Path(path) / RECOMMENDATION if os.path.isdir(path) else Path(path)
    try:
        data = read_json(file)
    except OSError as error:
        raise UserError(f"no recommendation in {str(path)!r} ({error.strerror}): make one with `recommend`") from None
    except ValueError as error:
        raise UserError(f"{str(file)!r} is not a recommendation, or damaged ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{str(file)!r} is not a recommendation: it is not a JSON object")
    return data
