"""Models converted once into the cache folder.

A converted model is complete or absent. If two processes convert the same model, the first to finish wins.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from diagnostics.support.errors import UserError, one_line


def cache_folder() -> Path:
    """Folder for converted models: ``$SPEED_DIAGNOSTICS_CACHE``, else ``speed-diagnostics`` in the user's cache."""
    if chosen := os.environ.get("SPEED_DIAGNOSTICS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speed-diagnostics"


def convert_once(target: Path, convert: Callable[[Path], None], what: str, room: str) -> Path:
    """Return the folder ``target``, filled by ``convert`` in a scratch folder beside it if it does not exist.

    ``what`` names the model and ``room`` its size on disk, for messages. Raises UserError where nothing can be written;
    a UserError of ``convert`` passes unchanged.
    """
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the converted {what} to {target.parent} ({error.strerror}); "
            f"set SPEED_DIAGNOSTICS_CACHE to a folder with {room} free"
        ) from None
    try:
        try:
            convert(scratch)
        except UserError:
            raise
        except Exception as error:  # a full disk raises different errors in different libraries
            raise UserError(
                f"the {what} cannot be converted in {target.parent} ({one_line(error)}); "
                f"it takes {room} there, or set SPEED_DIAGNOSTICS_CACHE to another folder"
            ) from error
        try:
            scratch.rename(target)
        except OSError as error:
            # Another process may have finished the same conversion first: its result is as good.
            if not (target / "config.json").is_file():
                raise UserError(
                    f"the converted {what} cannot be put at {target} ({error.strerror}); remove what is there"
                ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
