"""Reads files with one JSON object per line, plain or compressed; errors name the line."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from diagnostics.support.errors import UserError
from diagnostics.support.fields import parse_object

# A line longer than this, in characters, is no record: a device or a damaged file would fill the memory.
MAX_LINE = 1 << 27


def read_records(
    path: Path, what: str, take: Callable[[dict[str, Any], int], None], *, most: int | None = None
) -> None:
    """Call ``take(record, line_number)`` for every object of a file, plain or as ``.gz``, and skip blank lines.

    Reading stops after ``most`` objects. Raises UserError if the file cannot be read or a line is no object, and names
    ``what`` the file holds. Errors of ``take`` are raised again with the line in front.
    """
    count = 0
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise UserError(f"cannot read {what} {str(path)!r}: it is a device or a pipe, not a file")
        with _open(path) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), start=1):
                if len(line) == MAX_LINE:
                    raise UserError(f"{path}:{number}: the line has {MAX_LINE} characters or more")
                if line.strip():
                    try:
                        take(parse_object(line), number)
                    except UserError as error:
                        raise UserError(f"{path}:{number}: {error}") from None
                    count += 1
                    if count == most:
                        return
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file: {what} are one JSON object per line") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {str(path)!r}: {reason}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")
