"""Breaks the code on purpose, one seeded fault at a time, and lists the faults that no test notices.

    python analyses/mutate.py [NAME ...] [--jobs N] [--timeout SECONDS] [--list]      # all of them: make mutate

The faults are in `seeded_faults.toml` beside this file. Each has a name in words, the file to break, the old and the
new text, and the tests that should notice. A fault is

    killed           one of these tests fails with the fault, and passes without it
    SURVIVED         they all pass: a test is missing, or the fault changes nothing
    does not apply   the text no longer occurs exactly once: the fault must be rewritten
    NO VERDICT       the tests do not run to their end, or fail without the fault

Everything happens in a temporary copy of the tree, including uncommitted changes; the checkout is never touched. Give
the names of faults, or parts of them, to run only these. Exit status: 0 if all are killed, else 1.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
FAULTS = Path(__file__).with_name("seeded_faults.toml")
KILLED, SURVIVED, STALE, UNCLEAR = "killed", "SURVIVED", "does not apply", "NO VERDICT"
TIMED_OUT = -1


@dataclass(frozen=True)
class Fault:
    """One fault: in ``file``, ``old`` becomes ``new``; ``tests`` are pytest's arguments, files and -k."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def occurs(self, root: Path) -> int:
        """Count how often the old text occurs; it must occur once."""
        path = root / self.file
        return path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0


@dataclass(frozen=True)
class Verdict:
    """The result of a fault; ``test`` is the test that noticed it, ``why`` explains any other result."""

    fault: Fault
    result: str
    test: str = ""
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        said = self.test or self.why
        return f"{self.result:<14}  {self.fault.name}" + (f"  ({said})" if said else "") + f"  {self.seconds:.0f} s"


def read_faults(path: Path = FAULTS) -> list[Fault]:
    faults = [Fault(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]]
    twice = [name for name, n in Counter(fault.name for fault in faults).items() if n > 1]
    if twice:
        raise SystemExit(f"error: two faults are called {twice[0]!r}")
    return faults


def copy_tree(target: Path) -> Path:
    """Copy what git tracks, or would, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a deleted file is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    found = _run([sys.executable, "-c", "import diagnostics; print(diagnostics.__file__)"], target, 60)[1]
    if Path(found.strip()).parent != target / "diagnostics":
        raise SystemExit(f"error: tests in the copy would import {found.strip()!r}, not the copy's own code")
    return target


def _run(command: Sequence[str], tree: Path, timeout: float) -> tuple[int, str]:
    """Run a command on a copy; return its exit status, `TIMED_OUT` if it took too long, and what it printed."""
    # No byte code: Python would not notice a change within a second that leaves the file's size the same.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        out = process.communicate(timeout=timeout)[0]
        return process.returncode, out
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that a test has started
            process.wait()


def run_tests(tree: Path, tests: Sequence[str], timeout: float) -> tuple[int, list[str], str]:
    """Run tests on a copy; return pytest's exit status, the tests that failed, and its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "--cache-clear", *tests]
    status, out = _run(command, tree, timeout)
    failed = tree / ".pytest_cache" / "v" / "cache" / "lastfailed"
    names = list(json.loads(failed.read_text(encoding="utf-8"))) if status == 1 and failed.exists() else []
    return status, names, (out.strip().splitlines() or [""])[-1]


@contextmanager
def broken(tree: Path, fault: Fault):
    """Apply the fault to the copy inside the block."""
    path = tree / fault.file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(right, encoding="utf-8")


def judge(tree: Path, fault: Fault, timeout: float) -> Verdict:
    if (n := fault.occurs(tree)) != 1:
        return Verdict(fault, STALE, why=f"its text is {n} times in {fault.file}: write the fault anew")
    begun = time.monotonic()
    with broken(tree, fault):
        status, failed, last = run_tests(tree, ["-x", *shlex.split(fault.tests)], timeout)
    seconds = time.monotonic() - begun
    if status == 0:
        return Verdict(fault, SURVIVED, why=fault.tests, seconds=seconds)
    if status == 1 and failed:
        return Verdict(fault, KILLED, failed[0], seconds=seconds)
    why = f"no end within {timeout:.0f} s" if status == TIMED_OUT else f"pytest ended with {status}: {last}"
    return Verdict(fault, UNCLEAR, why=why, seconds=seconds)


def without_red_ones(tree: Path, verdicts: list[Verdict], timeout: float) -> list[Verdict]:
    """Withdraw the verdicts whose test also fails without the fault."""
    tests = sorted({verdict.test for verdict in verdicts if verdict.result == KILLED})
    status, red, last = run_tests(tree, tests, timeout * len(tests)) if tests else (0, [], "")
    if status not in (0, 1):
        raise SystemExit(f"error: the tests that noticed a fault do not run without one: {last}")
    return [
        Verdict(v.fault, UNCLEAR, why=f"{v.test} is red without the fault, too") if v.test in red else v
        for v in verdicts
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults to run, by their name or a part of it; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each on a copy of its own")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one fault")
    parser.add_argument("--list", action="store_true", help="print the faults and whether they apply, and run nothing")
    options = parser.parse_args(arguments)
    faults = [f for f in read_faults() if not options.names or any(name in f.name for name in options.names)]
    if not faults:
        parser.error("no fault has such a name; see --list")
    if options.list:
        for fault in faults:
            print(f"{fault.file}: {fault.name}" + ("" if fault.occurs(ROOT) == 1 else f"  ({STALE})"))
        return int(any(fault.occurs(ROOT) != 1 for fault in faults))
    verdicts: list[Verdict] = []
    with ExitStack() as stack:
        trees: Queue[Path] = Queue()
        for _ in range(max(1, options.jobs)):
            trees.put(copy_tree(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutate-"))).resolve()))

        def on_a_copy(fault: Fault) -> Verdict:
            tree = trees.get()
            try:
                return judge(tree, fault, options.timeout)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(trees.qsize()) as pool:
            try:
                for done in as_completed([pool.submit(on_a_copy, fault) for fault in faults]):
                    verdicts.append(done.result())
                    print(verdicts[-1], flush=True)
            except BaseException:  # Ctrl-C ends it after the faults that are being tried
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        verdicts = without_red_ones(trees.get(), verdicts, options.timeout)
    counts = Counter(verdict.result for verdict in verdicts)
    print(f"\n{len(verdicts)} faults: " + ", ".join(f"{n} {result}" for result, n in counts.items()))
    for verdict in verdicts:
        if verdict.result != KILLED:
            print(verdict)
    return int(counts[KILLED] < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
