"""Diagnoses in processes of their own: they outlive a page, and what is known of them is in files beside the runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from diagnostics.runs.manifest import RUN_FOLDER
from diagnostics.runs.parts import PARTS, count_finished
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from diagnostics.support.errors import UserError
from diagnostics.support.files import write_json

JOBS = ".jobs"
# Seconds that a diagnosis has to end by itself when it is cancelled; its finished prompts are kept either way.
PATIENCE = 3.0


@dataclass(frozen=True)
class Job:
    """One diagnosis: its name and run folder, the command's arguments, and the process that works on it."""

    name: str
    runs: str
    arguments: list[str]
    pid: int
    process_started: float
    started: str
    cancelled: bool = False

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name

    @property
    def log(self) -> Path:
        """What the command says."""
        return _place(Path(self.runs), self.name, "log")

    @property
    def running(self) -> bool:
        """Whether the process is still at work."""
        return _process(self) is not None

    @property
    def state(self) -> str:
        """``running``, ``complete``, ``cancelled`` or ``failed``."""
        if self.running:
            return "running"
        if _status(self.out) == "complete" and (self.out / RECOMMENDATION).exists():
            return "complete"
        return "cancelled" if self.cancelled else "failed"

    @property
    def progress(self) -> tuple[int, int] | None:
        """Prompts finished, and in all; None before the first has finished."""
        try:
            manifest = RUN_FOLDER.read(self.out)
            total = int(manifest["n_prompts"])
            if manifest["status"] == "complete":
                return total, total
            return count_finished(part.name for part in (self.out / PARTS).iterdir()), total
        except (UserError, OSError):
            return None

    @property
    def lines(self) -> list[str]:
        """The lines that the command said, oldest first."""
        try:
            return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return []

    @property
    def message(self) -> str:
        """The last line that the command said; its last error, where there is one."""
        errors = [line for line in self.lines if line.startswith("error: ")]
        return (errors or self.lines or [""])[-1].removeprefix("error: ")


def start_job(runs: Path, name: str, arguments: Sequence[str]) -> Job:
    """Start ``recommend`` with the arguments; its run folder is ``runs/name``, continued if it exists already.

    Raises UserError if another job is running, or nothing can be written to ``runs``.
    """
    if any(job.running for job in list_jobs(runs)):
        raise UserError("a diagnosis is running: two at a time would only slow each other down")
    out = runs / name
    command = [sys.executable, "-m", "diagnostics.cli", "recommend", *arguments, "--out", str(out.absolute())]
    try:
        if (out / MANIFEST).exists():
            command.append("--resume")
        (runs / JOBS).mkdir(parents=True, exist_ok=True)
        with _place(runs, name, "log").open("wb") as log:
            # A session of its own: Ctrl-C in the dashboard's terminal is not for it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        started = psutil.Process(process.pid).create_time()
        job = Job(
            name, str(runs), list(arguments), process.pid, started, datetime.now(UTC).isoformat(timespec="seconds")
        )
        _save(job)
    except OSError as error:
        raise UserError(f"cannot start a diagnosis in {str(runs)!r}: {error.strerror or error}") from None
    return job


def list_jobs(runs: Path) -> list[Job]:
    """Return the jobs of a folder of runs, newest first."""
    jobs = []
    for path in (runs / JOBS).glob("*.json"):
        try:
            job = replace(Job(**json.loads(path.read_text(encoding="utf-8"))), runs=str(runs))
        except (OSError, ValueError, TypeError, RecursionError):  # being written, or not ours
            continue
        kinds = {field.name: field.type for field in fields(Job) if field.name != "arguments"}
        texts = isinstance(job.arguments, list) and job.arguments and all(isinstance(a, str) for a in job.arguments)
        # Its name decides which files are its own.
        typed = texts and all(type(getattr(job, name)) is kind for name, kind in kinds.items())
        if typed and job.name == path.stem and 0 < job.pid < 1 << 31:
            jobs.append(job)
    return sorted(jobs, key=lambda job: job.started, reverse=True)


def cancel_job(job: Job) -> None:
    """End a job; what it has finished is kept."""
    _save(replace(job, cancelled=True))
    process = _process(job)
    if process is None:
        return
    try:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        if not _ended(job):
            process.kill()
            _ended(job)
    except psutil.NoSuchProcess:
        pass


def _ended(job: Job) -> bool:
    """Wait for a job's end; that of another process's child shows in its state only, it is not ours to wait for."""
    until = time.monotonic() + PATIENCE
    while _process(job) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def resume_job(job: Job) -> Job:
    """Start a job again where it stopped."""
    return start_job(Path(job.runs), job.name, job.arguments)


def forget_job(job: Job) -> None:
    """Take a job off the list; its run folder stays."""
    for kind in ("json", "log", "jsonl"):
        _place(Path(job.runs), job.name, kind).unlink(missing_ok=True)


def option_of(job: Job, option: str) -> str | None:
    """Return the value that a job gave an option of the command; None where it did not."""
    found = [word.removeprefix(f"{option}=") for word in job.arguments if word.startswith(f"{option}=")]
    return found[-1] if found else None


def saved_prompts(runs: Path, name: str) -> Path | None:
    """Return the file of prompts that a job read; None where it read none."""
    path = _place(runs, name, "jsonl")
    return path if name and path.is_file() else None


def save_prompts(runs: Path, name: str, data: bytes) -> Path:
    """Keep the prompts that a job reads beside it."""
    try:
        (runs / JOBS).mkdir(parents=True, exist_ok=True)
        path = _place(runs, name, "jsonl")
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write to {str(runs)!r}: {error.strerror or error}") from None
    return path.absolute()


def _process(job: Job) -> psutil.Process | None:
    """The job's process if it lives; another one may have got its number."""
    try:
        process = psutil.Process(job.pid)
        if abs(process.create_time() - job.process_started) > 1:
            return None
        if process.status() == psutil.STATUS_ZOMBIE:
            with suppress(psutil.TimeoutExpired):  # of a child of another process
                process.wait(0)
            return None
        return process
    except psutil.Error:
        return None


def _status(out: Path) -> str | None:
    try:
        return str(RUN_FOLDER.read(out)["status"])
    except (UserError, OSError):
        return None


def _save(job: Job) -> None:
    write_json(_place(Path(job.runs), job.name, "json"), asdict(job))


def _place(runs: Path, name: str, kind: str) -> Path:
    return runs / JOBS / f"{name}.{kind}"
