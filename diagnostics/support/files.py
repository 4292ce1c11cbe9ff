"""Files of results: each appears at once or not at all, survives a power cut, and reveals damage to it.

*Atomic.* A file is written under another name, flushed to the disk, and renamed.

*Sealed.* JSON files and tables carry the SHA-256 of their own bytes, computed with zeros in its place. A reader refuses
a file whose seal does not fit. A file without a seal is read as it is: one of an earlier version, or one that somebody
wrote with other tools. To change a sealed JSON file by hand, delete its line ``"seal"``; a table written again, as
with ``DataFrame.to_parquet``, has none.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.support.errors import UserError

SCRATCH = ".writing-"
SEAL = "seal"  # name of the field in JSON, and of the metadata in other formats
MARK = "speed-diagnostics:sha256:"
BLANK = MARK + "0" * 64
DAMAGED = f'it changed after it was written: its SHA-256 differs (changed by hand? then delete its "{SEAL}")'
SUMS = "speed-diagnostics.sha256"  # in the format of sha256sum


# --- Writing ---


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    _write(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; raise UserError if a number in it is not finite."""
    write_text(path, dump_json(content, path.name) + "\n")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with its seal as the last field."""
    content = {name: value for name, value in content.items() if name != SEAL} | {SEAL: BLANK}
    _write(path, sealed((dump_json(content, path.name) + "\n").encode("utf-8")))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a parquet table atomically, with a seal and a checksum for each of its pages."""
    _write(path, _table_bytes(table))


def write_folder(path: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write a new folder of parquet tables, which appear together or not at all."""
    with scratch_folder(path.parent) as scratch:
        for name, table in tables.items():
            _flushed(scratch / f"{name}.parquet", _table_bytes(table))
        flush_folder(scratch)
        scratch.rename(path)
    flush_folder(path.parent)


def _table_bytes(table: pd.DataFrame) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.Table.from_pandas(table, preserve_index=False)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, content.schema, write_page_checksum=True) as writer:
        writer.write_table(content)
        writer.add_key_value_metadata({SEAL: BLANK})
    return sealed(sink.getvalue().to_pybytes())


def dump_json(content: Any, what: str) -> str:
    """Return JSON text; raise UserError that names the first number that JSON cannot hold (NaN or infinite)."""
    try:
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        location = next(_not_numbers(content, ""), None)
        if location is None:
            raise
        raise UserError(f"{what} would not be JSON: {location} is not a finite number") from None


def _not_numbers(content: Any, location: str) -> Iterator[str]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _not_numbers(value, f"{location}.{name}" if location else str(name))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _not_numbers(value, f"{location}[{index}]")
    elif isinstance(content, float) and not math.isfinite(content):
        yield location


def _write(path: Path, data: bytes) -> None:
    with scratch_folder(path.parent) as scratch:
        _flushed(scratch / path.name, data)
        os.replace(scratch / path.name, path)
    flush_folder(path.parent)


def _flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a folder on the file system of ``parent``, so that a rename out of it is atomic; remove it afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    scratch.chmod(0o755)  # mkdtemp makes it private, and a renamed part would stay so
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_problem(error: Exception) -> str | None:
    """Return in a few words what keeps a file from being written, None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    text = " ".join(str(error).split())
    # Errors of libraries that write tensors to a full disk.
    if type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in text or "write failed" in text:
        return text[:200]
    return None


def remove_scratch(folder: Path) -> None:
    """Remove what killed processes left in a folder; the caller holds the folder's lock."""
    for leftover in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)


# --- Reading ---


def read_json(path: Path) -> Any:
    """Read a JSON file, without its seal; raise OSError, or ValueError for what is damaged or no JSON."""
    data = path.read_bytes()
    require_seal(data)
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(content, dict) and SEAL in content:
        if MARK.encode() not in data:
            raise ValueError(DAMAGED)
        del content[SEAL]
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet table; raise OSError, or ValueError for what is damaged or no table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = path.read_bytes()
    require_seal(data)
    try:
        # A file without a seal may still have checksums of its pages.
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        metadata = file.metadata.metadata or {}
        table = file.read()
        for index, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):  # other writers store repeated texts so
                table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
        frame = table.to_pandas()
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise ValueError("it does not fit the memory") from None
    except Exception as error:  # damaged metadata reaches pyarrow and pandas in many ways, as errors of any type
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from None
    if SEAL.encode() in metadata and MARK.encode() not in data:
        raise ValueError(DAMAGED)
    return frame


# --- Seals ---


def sealed(data: bytes) -> bytes:
    """Seal the content of a file with `BLANK` in it: the last one becomes the SHA-256 of the content."""
    at = data.rindex(BLANK.encode()) + len(MARK)
    return b"".join((data[:at], hashlib.sha256(data).hexdigest().encode(), data[at + 64 :]))


def require_seal(data: bytes | mmap.mmap) -> None:
    """Raise ValueError if a seal does not fit the bytes around it; accept data without one."""
    at = data.rfind(MARK.encode())
    if at < 0:
        return
    at += len(MARK)
    digest = hashlib.sha256()
    with memoryview(data) as view, view[:at] as before, view[at + 64 :] as after:
        digest.update(before)
        digest.update(b"0" * 64)
        digest.update(after)
    if digest.hexdigest().encode() != data[at : at + 64]:
        raise ValueError(DAMAGED)


def seal_file(path: Path) -> None:
    """Seal in place a file with `BLANK` in it that a library wrote, and flush it to the disk."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at = content.find(BLANK.encode()) + len(MARK)
        content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
        content.flush()
        os.fsync(file.fileno())


def require_sealed_file(path: Path) -> None:
    """Raise ValueError if the seal of a large file does not fit, OSError if it cannot be read."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            require_seal(content)


# --- Sums of files that other libraries write ---


def write_sums(folder: Path) -> None:
    """Write the sums of the files in a folder, and flush them all to the disk."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != SUMS and not path.name.startswith("."):
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
                os.fsync(file.fileno())
    write_text(folder / SUMS, "".join(lines))


def require_sums(folder: Path) -> None:
    """Raise UserError that names the first file that differs from its sum; accept a folder without sums."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder / SUMS)!r} cannot be read ({error})") from None
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).name != name or not name.isprintable():
            raise UserError(f"{str(folder / SUMS)!r} is damaged: it has a line that is no sum of a file; delete it")
        path = folder / name
        try:
            with path.open("rb") as file:
                fits = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except (OSError, ValueError) as error:
            raise UserError(f"{str(path)!r}, named in {SUMS}, cannot be read ({error})") from None
        if not fits:
            raise UserError(f"{str(path)!r} is damaged: its SHA-256 is not that in {SUMS}; delete {SUMS} to use it")
