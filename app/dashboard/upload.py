"""A run folder from elsewhere, as a zip file: checked before anything is written, and unpacked all or nothing."""

import io
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from diagnostics.runs.places import MANIFEST
from diagnostics.runs.untrusted import require_harmless
from diagnostics.support.errors import UserError
from diagnostics.support.files import SCRATCH

MAX_MEGABYTES = 200
MAX_FILES = 4096
MAX_NAME = 200
# What a run folder, whole or interrupted, is made of; nothing else is unpacked.
ALLOWED = re.compile(r"[a-z_]+\.(json|parquet)|parts/[0-9]{6}(-[0-9]{6})?/[a-z_]+\.parquet")


def import_zip(data: bytes, filename: str, runs: Path) -> str:
    """Unpack a zipped run folder into ``runs`` and return its name there.

    The run's files lie at the top of the archive or in one folder. Raises UserError, with nothing written, for what
    is no zip file, has other files, links or paths that lead out, is too large, or is no run.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = _members(archive)
        name = _stem(filename, members)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise UserError(f"{filename!r} is not a zip file that can be read ({error})") from None
    try:
        runs.mkdir(parents=True, exist_ok=True)
        name = _free_name(runs, name)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=runs))
    except OSError as error:
        raise UserError(f"cannot write to {str(runs)!r}: {error.strerror or error}") from None
    folder = scratch / name
    try:
        left = MAX_MEGABYTES << 20
        for info, path in members:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            left -= _unpack(archive, info, target, left)
        require_harmless(folder)
        folder.rename(runs / name)
    except UserError as error:
        raise UserError(_said(error, folder, filename)) from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{filename!r} cannot be unpacked: {_said(error, folder, filename)}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return name


def _said(error: Exception, folder: Path, filename: str) -> str:
    """Return what is wrong in one line, of the file and not of the folder that was there for a moment."""
    return " ".join(str(error).replace(str(folder), filename).split())


def _members(archive: zipfile.ZipFile) -> list[tuple[zipfile.ZipInfo, str]]:
    """Return the files with their places in the run folder; raise UserError for anything that has no place there."""
    files = [info for info in archive.infolist() if not info.filename.endswith("/") and not _litter(info.filename)]
    if len(files) > MAX_FILES:
        raise UserError(f"the archive has {len(files)} files, more than {MAX_FILES}: it is no run folder")
    if sum(info.file_size for info in files) > MAX_MEGABYTES << 20:
        raise UserError(f"the archive unpacks to more than {MAX_MEGABYTES} MB: copy the run into the folder by hand")
    manifests = [info.filename for info in files if PurePosixPath(info.filename).name == MANIFEST]
    if len(manifests) != 1:
        raise UserError(f"the archive has {len(manifests) or 'no'} {MANIFEST}: zip one run folder")
    top = manifests[0].removesuffix(MANIFEST)
    paths: dict[str, zipfile.ZipInfo] = {}
    for info in files:
        path = info.filename.removeprefix(top)
        linked = stat.S_ISLNK(info.external_attr >> 16)
        if linked or not info.filename.startswith(top) or not ALLOWED.fullmatch(path) or path in paths:
            raise UserError(f"the archive has {info.filename!r}, which is no part of a run: zip the run folder alone")
        # Of the other methods a small file can unpack to gigabytes before its size is looked at.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError("the archive is compressed in an unusual way: zip the run folder with the usual deflate")
        paths[path] = info
    return [(info, path) for path, info in paths.items()]


def _litter(name: str) -> bool:
    """Whether a file is what a system leaves in folders, or a killed process in a run."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or ".DS_Store" in parts[-1:] or any(part.startswith(SCRATCH) for part in parts)


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, most: int) -> int:
    """Write one file and return its size; a header may lie about it."""
    size = 0
    with archive.open(info) as source, target.open("xb") as sink:
        while block := source.read(1 << 20):
            size += len(block)
            if size > most:
                raise UserError(f"the archive unpacks to more than {MAX_MEGABYTES} MB")
            sink.write(block)
    return size


def _stem(filename: str, members: list[tuple[zipfile.ZipInfo, str]]) -> str:
    """Name the run by its folder in the archive, or by the file."""
    top = next(PurePosixPath(info.filename).parent.name for info, path in members if path == MANIFEST)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", top or Path(filename).stem).strip(".-")[:MAX_NAME] or "run"


def _free_name(runs: Path, name: str) -> str:
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not (runs / candidate).exists())
