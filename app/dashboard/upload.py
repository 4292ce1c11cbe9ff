"""Results from elsewhere, as a zip file: checked before anything is written, and unpacked all or nothing.

A folder of one kind: a run, an evaluation, a benchmark, or a fine-tuning with its runs before and after.
"""

import io
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diagnostics.evaluate.evaluation_folder import EVALUATION, ITEMS, SUMMARY, SUMMARY_TEXT
from diagnostics.finetune.finetuning_folder import AFTER, BEFORE, EXAMPLES, FINETUNING, STEPS, SWEEPS
from diagnostics.generation.benchmark_folder import BENCHMARK_MANIFEST
from diagnostics.runs.places import BENCHMARK, MANIFEST, RECOMMENDATION
from diagnostics.runs.untrusted import LOAD_RUN, require_harmless
from diagnostics.support.errors import UserError
from diagnostics.support.files import SCRATCH

MAX_MEGABYTES = 200
MAX_FILES = 4096
MAX_NAME = 200
# What a run folder, whole or interrupted, is made of.
RUN_FILES = r"[a-z_]+\.(json|parquet)|parts/[0-9]{6}(-[0-9]{6})?/[a-z_]+\.parquet"


@dataclass(frozen=True)
class Kind:
    """One kind of results: the file that tells it, the files that it is made of, and what reads it."""

    name: str
    manifest: str
    allowed: str
    reader: str
    left_out: str = "(?!)"  # files that belong to it, but not into the dashboard
    runs: tuple[str, ...] = ()

    @property
    def article(self) -> str:
        """``a`` or ``an``, for messages."""
        return "an" if self.name[0] in "aeiou" else "a"


def _names(*files: str) -> str:
    return "|".join(map(re.escape, files))


# The first that fits: a fine-tuning has the files of runs inside, and a run may have a benchmark beside it.
KINDS = (
    Kind(
        "fine-tuning",
        FINETUNING,
        f"{_names(FINETUNING, EXAMPLES, STEPS, SWEEPS, RECOMMENDATION)}|({BEFORE}|{AFTER})/({RUN_FILES})",
        "diagnostics.finetune.finetuning_folder:load_finetuning",
        # The trained weights with what loads them, and checkpoints: the dashboard shows what was measured.
        r"[^/]+\.(safetensors|json|md|jinja|txt|model|sha256)|checkpoints/.*|parts/.*",
        (BEFORE, AFTER),
    ),
    Kind("run", MANIFEST, RUN_FILES, LOAD_RUN),
    Kind(
        "evaluation",
        EVALUATION,
        _names(EVALUATION, ITEMS, SUMMARY, SUMMARY_TEXT),
        "diagnostics.evaluate.evaluation_folder:load_evaluation",
    ),
    Kind(
        "benchmark",
        BENCHMARK_MANIFEST,
        _names(BENCHMARK_MANIFEST, BENCHMARK),
        "diagnostics.generation.benchmark_folder:load_benchmark",
    ),
)


def import_zip(data: bytes, filename: str, runs: Path) -> str:
    """Unpack a zipped folder of results into ``runs`` and return its name there.

    The files lie at the top of the archive or in one folder. Raises UserError, with nothing written, for what is no
    zip file, has other files, links or paths that lead out, is too large, or holds no results.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        kind, top, members = _members(archive)
        name = _stem(filename, top)
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
        require_harmless(folder, kind.reader)
        for run in kind.runs:
            if (folder / run).exists():
                require_harmless(folder / run)
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


def _members(archive: zipfile.ZipFile) -> tuple[Kind, str, list[tuple[zipfile.ZipInfo, str]]]:
    """Return the kind, its folder in the archive, and the files with their places in it; raise UserError for others."""
    files = [info for info in archive.infolist() if not info.filename.endswith("/") and not _litter(info.filename)]
    if len(files) > MAX_FILES:
        raise UserError(f"the archive has {len(files)} files, more than {MAX_FILES}: it is no run folder")
    kind, top = _kind([info.filename for info in files])
    paths: dict[str, zipfile.ZipInfo] = {}
    for info in files:
        path = info.filename.removeprefix(top)
        inside = info.filename.startswith(top) and path not in paths
        if inside and not re.fullmatch(kind.allowed, path) and re.fullmatch(kind.left_out, path):
            continue
        linked = stat.S_ISLNK(info.external_attr >> 16)
        if linked or not inside or not re.fullmatch(kind.allowed, path):
            alone = f"zip the {kind.name} folder alone"
            raise UserError(
                f"the archive has {info.filename!r}, which is no part of {kind.article} {kind.name}: {alone}"
            )
        # Of the other methods a small file can unpack to gigabytes before its size is looked at.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError("the archive is compressed in an unusual way: zip the run folder with the usual deflate")
        paths[path] = info
    if sum(info.file_size for info in paths.values()) > MAX_MEGABYTES << 20:
        raise UserError(f"the archive unpacks to more than {MAX_MEGABYTES} MB: copy the run into the folder by hand")
    return kind, top, [(info, path) for path, info in paths.items()]


def _kind(names: list[str]) -> tuple[Kind, str]:
    """Return what kind of results files are, and the folder that they lie in."""
    for kind in KINDS:
        manifests = [name for name in names if PurePosixPath(name).name == kind.manifest]
        if len(manifests) > 1:
            raise UserError(f"the archive has {len(manifests)} {kind.manifest}: zip one {kind.name} folder")
        if manifests:
            return kind, manifests[0].removesuffix(kind.manifest)
    others = ", ".join(f"{kind.manifest} ({kind.name})" for kind in KINDS if kind.manifest != MANIFEST)
    raise UserError(f"the archive has no {MANIFEST} (run), and no {others} either: zip one folder of results")


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


def _stem(filename: str, top: str) -> str:
    """Name the results by their folder in the archive, or by the file."""
    name = PurePosixPath(top).name or Path(filename).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:MAX_NAME] or "run"


def _free_name(runs: Path, name: str) -> str:
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not (runs / candidate).exists())
