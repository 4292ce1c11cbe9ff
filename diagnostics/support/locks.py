"""One process at a time writes a folder of results; a second one gets an error that names the first.

The lock is the system's own (``flock``) on a small file beside the folder, so it ends with its process, however that
ends. Where the file system has no locks or cannot be written, there is no lock, and a later error says why.
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from diagnostics.support.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock-"

P = ParamSpec("P")
R = TypeVar("R")

# Folder that this process holds -> the thread that holds it, and how many times: it may hold one again.
_held: dict[str, tuple[int, int]] = {}
_guard = threading.Lock()


@contextmanager
def hold_folder(path: str | Path) -> Iterator[None]:
    """Hold a folder, existing or not, against other processes and threads; raise UserError if one holds it."""
    real_path, this_thread = os.path.realpath(path), threading.get_ident()
    with _guard:
        holder, times = _held.get(real_path, (this_thread, 0))
        if holder != this_thread:
            raise UserError(f"another thread of this process writes to {str(path)!r}: choose another folder")
        _held[real_path] = this_thread, times + 1
    try:
        with contextlib.nullcontext() if times else _locked(Path(real_path), str(path)):
            yield
    finally:
        with _guard:
            if times:
                _held[real_path] = this_thread, times
            else:
                del _held[real_path]


def one_writer(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function hold the folder that it gets as ``out=`` until it returns."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        out = kwargs.get("out")
        if not isinstance(out, str | os.PathLike):
            return function(*args, **kwargs)
        with hold_folder(os.fspath(out)):
            return function(*args, **kwargs)

    return alone


@contextmanager
def _locked(folder_path: Path, name: str) -> Iterator[None]:
    """Hold the lock file of a folder, and remove it afterwards with the folders that were made for it."""
    file, created = _acquire(folder_path, name)
    try:
        yield
    finally:
        if file is not None:
            handle, path = file
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)
        for folder in created:
            with contextlib.suppress(OSError):  # in use by now
                folder.rmdir()


def _acquire(folder_path: Path, name: str) -> tuple[tuple[int, Path] | None, list[Path]]:
    """Return the open lock file with its path, None where there can be no lock; and the folders made, deepest first."""
    if fcntl is None:
        return None, []
    missing = [folder for folder in folder_path.parents if not os.path.exists(folder)]
    created: list[Path] = []
    # By a digest: a name of 255 bytes leaves no room for more. Inside the folder if its parent cannot be written.
    lock = LOCK + hashlib.sha256(os.fsencode(folder_path)).hexdigest()[:16]
    for parent in (folder_path.parent, folder_path):
        try:
            for folder in reversed(missing):
                folder.mkdir()
                created.insert(0, folder)
            while True:
                handle = os.open(parent / lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _same(handle, parent / lock):
                        break
                except BlockingIOError:
                    owner = _owner(handle)
                    os.close(handle)
                    raise UserError(
                        f"another process ({owner}) writes to {name!r}: wait for its end, or choose another folder"
                    ) from None
                except BaseException:
                    os.close(handle)
                    raise
                os.close(handle)  # its process ended in between and removed the file: try again
            about = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            with contextlib.suppress(OSError):  # a full disk: the lock itself holds
                os.truncate(handle, 0)
                os.pwrite(handle, json.dumps(about).encode(), 0)
            return (handle, parent / lock), created
        except (OSError, ValueError):
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            created = []
    return None, []


def _same(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    try:
        about = json.loads(os.pread(handle, 4096, 0))
        return f"pid {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has just begun"
