"""Writes a page to a file."""

import os
from pathlib import Path

from diagnostics.support.errors import UserError
from diagnostics.support.files import write_text


def write_report(path: str | Path, page: str) -> None:
    """Write a page atomically; raise UserError if that fails."""
    try:
        write_text(Path(path), page)
    except OSError as error:
        raise UserError(f"cannot write the report {os.fspath(path)!r}: {error.strerror or error}") from None
