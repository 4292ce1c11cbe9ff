"""Files with one JSON object per line, plain or compressed, and which line is wrong."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from diagnostics.errors import UserError
from diagnostics.fields import parse_object


def read_records(path: Path, what: str, take: Callable[[dict[str, Any], int], None]) -> None:
    """Give every object of a file, plain or as ``.gz``, to ``take`` with the number of its line; blank lines are none.

    Raises UserError if the file cannot be read or a line is no object, naming ``what`` is in the file, and passes on
    those of ``take`` with the line before them.
    """
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        take(parse_object(line), number)
                    except UserError as error:
                        raise UserError(f"{path}:{number}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file: {what} are one JSON object per line") from None
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {str(path)!r}: {said}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")
