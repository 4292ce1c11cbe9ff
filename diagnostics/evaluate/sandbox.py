"""Runs Python that a model wrote in a separate process that is limited, isolated and always killed.

What holds on every system: an isolated interpreter without site-packages (``-I -S``) in its own session, an empty
temporary folder, no environment but that folder's name, no input, no output, and limits on time, memory, file size,
open files and core dumps; no further process or thread may be started. On Linux (x86_64 and aarch64), a filter of
system calls: no sockets, no other program, no memory beside the address space, no new namespaces (`seccomp`). On Linux,
where namespaces may be made: no other process in sight, no files but the system's and Python's, and these read-only, a
small file system in memory over the folder, and nothing survives the program. Root first becomes nobody. `isolation`
tries out and returns what is in force on this machine; a step that is not permitted is left out.

It is no substitute for a container or a virtual machine. The program talks to the same kernel; where the files
are not covered it can read every file that its user can. Nor is a verdict proof against an adversary: tests run in the
program's own interpreter, so a program that sets out to cheat them can, say with objects that equal everything. It is
meant for the code of models, which crashes, hangs, exits early and deletes things.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diagnostics.evaluate.seccomp import filter_program
from diagnostics.support.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
TIMEOUT_S = 10.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 16 * 2**20
# Processes and threads that a program may start.
N_PROCESSES = 0
# Enough for a token and a reason; less than a pipe holds, so that writing it never waits.
MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class Verdict:
    """Whether a program and its tests came to their end; if not, why.

    ``reason`` is empty, ``timeout``, ``memory``, the exception in a line, ``killed: SIGNAL``, or that it exited early.
    """

    passed: bool
    reason: str = ""


def run_python(
    program: str, *, tests: str = "", timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES
) -> Verdict:
    """Run a program, then its tests in the same module, and say whether both came to their end without an exception.

    Parameters
    ----------
    program, tests
        Sources of Python; each is compiled on its own.
    timeout_s
        Seconds of wall time, the start of the interpreter (about 0.05 s) included.
    memory_bytes
        Limit of the address space.

    Raises
    ------
    UserError
        On Windows, which lacks these means.
    """
    message, status = _run(program, tests, timeout_s, memory_bytes)
    if message is not None:
        passed, reason = message
        return Verdict(passed, reason)
    if status is None:
        return Verdict(False, "timeout")
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        return Verdict(False, f"killed: {signal.Signals(number).name}")
    return Verdict(False, f"exited with status {status} before its end")


@functools.cache
def isolation() -> dict[str, bool]:
    """Return each restriction and whether it is in force on this machine; it is tried out once."""
    message, status = _run(None, "", TIMEOUT_S, MEMORY_BYTES)
    if message is None:
        raise RuntimeError(f"the sandbox does not start here: it ended with status {status}")
    in_force: dict[str, bool] = json.loads(message[1])
    return in_force


def check_supported() -> None:
    """Raise UserError where there is no sandbox."""
    if os.name != "posix":
        raise UserError("code that a model wrote is not run on Windows: use Linux, macOS or WSL")


def _run(
    program: str | None, tests: str, timeout_s: float, memory_bytes: int
) -> tuple[tuple[bool, str] | None, int | None]:
    """Return the message of the harness in the child, None without one, and the exit status, None if time ran out.

    The harness authenticates itself by a token that the program does not get: exiting early or writing to every
    descriptor gives no verdict.
    """
    check_supported()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as outer:
        folder, witness = os.path.join(outer, "folder"), os.path.join(outer, "witness")
        os.mkdir(folder, 0o700)
        if program is None:  # the child tries to read it, and to write beside it
            os.close(os.open(witness, os.O_CREAT | os.O_WRONLY, 0o600))
        # User nobody must reach the folder, and in a trial may write beside it.
        os.chmod(outer, 0o777 if program is None else 0o711)
        task = {
            "token": token,
            "program": program,
            "tests": tests,
            "folder": folder,
            "memory_bytes": memory_bytes,
            "cpu_s": math.ceil(timeout_s) + 1,
            "file_bytes": FILE_BYTES,
            "n_processes": N_PROCESSES,
            "filter": filter_program().hex(),
            "witness": witness,
            "parent": os.getpid(),
        }
        reading, writing = os.pipe()
        try:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", str(CHILD), str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={"HOME": folder, "TMPDIR": folder},
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            status = _wait(process, json.dumps(task).encode(), timeout_s)
            os.set_blocking(reading, False)
            try:
                message = os.read(reading, MESSAGE_BYTES)
            except BlockingIOError:
                message = b""
        finally:
            os.close(reading)
    head, body = message[: len(token)], message[len(token) :].decode(errors="replace")
    # A message after the time limit does not count.
    if status is None or head != token.encode() or body[:1] not in ("+", "-"):
        return None, status
    return (body[0] == "+", body[1:]), status


def _wait(process: subprocess.Popen[bytes], task: bytes, timeout_s: float) -> int | None:
    """Wait for the exit status, None if time runs out; in any case kill the whole group."""
    try:
        process.communicate(task, timeout=timeout_s)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        # macOS permits no signal to a group without live processes.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
