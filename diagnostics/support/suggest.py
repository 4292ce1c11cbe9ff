"""What a person may have meant by a name that is not there: for the one line that an error has."""

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# Names that a message lists at most.
MOST = 6
ALIKE = 0.7  # share of letters in common, as difflib counts them


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the known name that is most like ``name``, empty if none is like it."""
    meant = most_like(name, known)
    return "" if meant is None else f"; did you mean {meant!r}?"


def most_like(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like ``name``, whatever its case; None if none is like it."""
    names = {one.lower(): one for one in known}
    like = difflib.get_close_matches(name.strip().lower(), names, n=1, cutoff=ALIKE)
    return names[like[0]] if like else None


def whats_there(missing: str, wanted: Callable[[Path], bool], what: str) -> str:
    """Say what is there in place of a path that is not: the most similar one, else all ``what`` in the same folder.

    ``wanted`` tells whether something is one of ``what``. The text continues a sentence: it begins with a semicolon,
    and is empty if there is nothing to say. A name without a folder is also looked for in ``runs``.
    """
    path = Path(os.path.expanduser(missing))
    parent = path.parent
    found = {entry.name: entry for entry in _entries(parent, wanted)}
    if path.name == missing:
        found = {entry.name: entry for entry in _entries(Path("runs"), wanted)} | found
    if meant := most_like(path.name, found):
        return f"; did you mean {str(found[meant])!r}?"
    if not os.path.isdir(parent):
        return f"; {str(parent)!r} is not there either"
    names = [name for name in sorted(found) if found[name].parent == parent]
    if not names or path.name == missing:
        return ""
    more = f", ... ({len(names)} in all)" if len(names) > MOST else ""
    return f"; {what} there: {', '.join(names[:MOST])}{more}"


def _entries(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".") and wanted(entry)]
    except (OSError, ValueError):  # not there, not readable, or no possible name
        return []
