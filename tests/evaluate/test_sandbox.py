"""Attacks on the sandbox: what must not pass, must not outlast it, and must not leave it."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from diagnostics import UserError
from diagnostics.evaluate import sandbox, seccomp
from diagnostics.evaluate.sandbox import Verdict, isolation, run_python

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no sandbox on Windows")

SPACES = "no sight of other processes"
NEW_PROCESSES = "limit: new processes"


def needs(what):
    if not isolation()[what]:
        pytest.skip(f"this machine does not permit it: {what}")


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A copy of the inner side at a place of its own, by which its processes can be found."""
    copy = tmp_path / "child.py"
    copy.write_text(sandbox.CHILD.read_text())
    monkeypatch.setattr(sandbox, "CHILD", copy)
    return copy


@pytest.fixture
def bare(child):
    """A machine on which nothing but limits can be had."""
    text = child.read_text()
    child.write_text(text.replace('ctypes.CDLL(None) if sys.platform == "linux" else None', "None"))
    assert child.read_text() != text


@pytest.fixture
def outside():
    """A folder in which everybody may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


# --- What passes ---

GOOD = {
    "empty": "",
    "library": "import collections, dataclasses, heapq, json, math, random, re, typing",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'\nassert A(2).x == 2",
    "prints": "print('x' * 10**6)",
    "closed output": "import os, sys\nsys.stdout.close()\nsys.stderr.close()\nos.close(2)",
    "not started as a script": "if __name__ == '__main__':\n    1 / 0",
    "a file of its own": "open('f', 'w').write('x')\nassert open('f').read() == 'x'",
}


@pytest.mark.parametrize("program", GOOD.values(), ids=GOOD)
def test_what_comes_to_its_end_passes(program):
    assert run_python(program, tests="import sys\nassert 'x' < 'y'") == Verdict(True)


def test_tests_see_the_program_and_nothing_else():
    assert run_python("def f(x):\n    return x + 1", tests="assert f(1) == 2").passed
    assert run_python("", tests="task").reason.startswith("NameError")
    assert run_python("import torch").reason.startswith("ModuleNotFoundError")


# --- What does not ---

BAD = {
    "assertion": ("assert 1 == 2, 'no\\nway'", "AssertionError: no way"),
    "bare assertion": ("assert False", "AssertionError"),
    "syntax": ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
    "exit": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "raise exit": ("raise SystemExit", "SystemExit"),
    "hard exit": ("import os\nos._exit(0)", "exited with status 0 before its end"),
    "input": ("input()", "EOFError: EOF when reading a line"),
    "recursion": ("def f():\n    f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    "crash": ("import ctypes\nctypes.string_at(0)", "killed: SIGSEGV"),
    "one large object": ("x = [0] * 10**10", "memory"),
    "large file": (f"open('f', 'wb').write(bytes({2 * sandbox.FILE_BYTES}))", "OSError: [Errno 27] File too large"),
    "null byte": ("x = '\0'", "source code string cannot contain null bytes"),
    "half a character": ("x = '\ud800'", "UnicodeEncodeError"),
    "error that cannot be told": (
        "class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E",
        "exited with status 1 before its end",
    ),
    "no handlers": ("import builtins\nbuiltins.BaseException = None\n1 / 0", "exited with status 1 before its end"),
    "all descriptors closed": ("import os\nos.closerange(0, 64)", "before its end"),
    "more rights": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "ValueError: not allowed to raise maximum limit",
    ),
}


@pytest.mark.parametrize(("program", "reason"), BAD.values(), ids=BAD)
def test_what_does_not_come_to_its_end_fails(program, reason):
    verdict = run_python(program, tests="assert True")
    assert not verdict.passed
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


@pytest.mark.parametrize("forged", [b"+", b"0" * 32 + b"+", b"passed"], ids=["bare", "as long as a token", "words"])
@pytest.mark.parametrize("end", ["", "os._exit(0)"], ids=["goes on", "exits"])
def test_verdicts_cannot_be_written_by_the_program(forged, end):
    # Each alone, and first: what comes later stands at another place than a verdict does.
    program = f"""
import os
for fd in range(64):
    try:
        os.write(fd, {forged!r})
    except OSError:
        pass
"""
    assert run_python(program + end) == Verdict(False, "exited with status 0 before its end")


def test_a_verdict_after_the_time_does_not_count(monkeypatch):
    wait = sandbox._wait

    def late(process, *arguments):
        """The child ends well, and the clock says that it was too late."""
        assert wait(process, *arguments) == 0
        return None

    monkeypatch.setattr(sandbox, "_wait", late)
    assert run_python("x = 1") == Verdict(False, "timeout")


def test_an_open_string_does_not_swallow_the_tests():
    tests = "assert False\n'''#'''"
    program = "x = 1\n'''"
    compile(program + "\n" + tests, "joined", "exec")  # as one text there would be nothing to fail
    assert "SyntaxError" in run_python(program, tests=tests).reason


# --- What it may use ---


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(60)",
        "import signal, time\nfor number in (1, 2, 14, 15, 24):\n    signal.signal(number, 1)\ntime.sleep(60)",
    ],
    ids=["busy", "asleep", "deaf"],
)
def test_time_is_bounded(program):
    start = time.monotonic()
    assert run_python(program, timeout_s=0.8) == Verdict(False, "timeout")
    assert time.monotonic() - start < 5


def test_memory_is_bounded():
    needs("limit: memory")
    program = "x = []\nwhile True:\n    x.append(bytes(10**6))"
    assert run_python(program, memory_bytes=128 * 2**20) == Verdict(False, "memory")
    assert run_python("x = bytes(200 * 2**20)", memory_bytes=128 * 2**20) == Verdict(False, "memory")
    assert run_python("x = bytes(200 * 2**20)").passed


def test_many_files_are_bounded():
    needs("no writing outside its folder")
    program = f"for i in range(4):\n    open(str(i), 'wb').write(bytes({sandbox.FILE_BYTES // 2}))"
    assert "No space left" in run_python(program).reason


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import threading\nthreading.Thread(target=print).start()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
    ],
    ids=["fork", "thread", "program"],
)
def test_no_process_or_thread_is_started(program):
    needs(NEW_PROCESSES)
    verdict = run_python(program)
    assert not verdict.passed
    assert "temporarily unavailable" in verdict.reason or "can't start new thread" in verdict.reason


# --- What outlasts it ---


def alive(child):
    """Processes that were started with this file; a fork has the command line of its parent."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [process.name] * (os.fsencode(child) in (process / "cmdline").read_bytes())
    return found


def none_left(child):
    for _ in range(100):  # the kernel takes a moment
        if not alive(child):
            return True
        time.sleep(0.02)
    return False


ESCAPE = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
"""
BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("program", "verdict"),
    [(ESCAPE, Verdict(True)), (BOMB, Verdict(False, "timeout")), ("while True: pass", Verdict(False, "timeout"))],
    ids=["grandchild in a session of its own", "fork bomb", "loop"],
)
def test_nothing_survives_where_processes_are_allowed(child, monkeypatch, program, verdict):
    needs(SPACES)
    needs(NEW_PROCESSES)
    monkeypatch.setattr(sandbox, "N_PROCESSES", 12)
    assert run_python(program, timeout_s=1.5) == verdict
    assert none_left(child)


def test_nothing_survives_an_interrupt(child, monkeypatch):
    started = []

    def interrupted(process, *_, **__):
        started.append(process)
        assert process.poll() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_python("while True: pass")
    started[0].stdin.close()
    assert started[0].returncode == -signal.SIGKILL
    assert none_left(child)


def test_folders_are_empty_and_removed():
    verdict = run_python("import os\nopen('f', 'w')\nos.mkdir('d')\nassert 0, os.getcwd()")
    folder = Path(verdict.reason.removeprefix("AssertionError: "))
    assert folder.is_absolute()
    assert not folder.exists()
    assert run_python("import os\nassert os.listdir() == [] and os.environ['HOME'] == os.getcwd()").passed


# --- What leaves it ---


def test_the_environment_is_not_seen(monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    # The last two are made by the interpreter and by macOS.
    known = {"HOME", "TMPDIR", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}
    assert run_python(f"import os\nassert not set(os.environ) - {known}, os.environ").passed


def test_other_processes_are_not_seen():
    needs("no writing outside its folder")
    for place in ("/proc", "/run"):
        assert run_python(f"import os\nassert not os.listdir({place!r}), os.listdir({place!r})").passed
        assert not run_python(f"import os\nassert os.path.exists('{place}/1/environ')").passed


def test_other_processes_are_not_killed():
    needs(SPACES)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        try:
            assert run_python(f"import os\nos.kill({victim.pid}, 9)").reason.startswith("ProcessLookupError")
            assert run_python("import os\nos.kill(-1, 9)").reason.startswith("ProcessLookupError")
            assert not run_python("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(60)", timeout_s=1).passed
            assert victim.poll() is None
        finally:
            victim.kill()


def test_nothing_is_written_outside(outside):
    needs("no writing outside its folder")
    (outside / "there").write_text("x")
    os.chmod(outside / "there", 0o666)
    absent = "No such file or directory"
    assert absent in run_python(f"open('{outside}/f', 'w')").reason
    assert absent in run_python(f"import os\nos.remove('{outside}/there')").reason
    assert "Read-only file system" in run_python("open('/f', 'w')").reason
    # Nor by undoing what makes it so, in this namespace or in another one.
    undo = f"""
import ctypes
libc = ctypes.CDLL(None)
libc.unshare(1 << 28 | 1 << 17)
libc.mount(None, b"/", None, 1 << 5 | 1 << 12, None)
libc.syscall(442, -100, b"/", 0x8000, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32)
for place in (b"/proc", b"/tmp", b"/var"):
    libc.umount2(place, 2)
open("{outside}/f", "w")
"""
    assert absent in run_python(undo).reason
    assert os.listdir(outside) == ["there"]


def assert_only_reached_from_here(server, program):
    """Nothing has connected to the server so far; the program would, outside the sandbox."""
    with pytest.raises(TimeoutError):
        server.accept()
    exec(program, {})
    server.accept()[0].close()


def test_the_network_is_not_reached():
    needs("no network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1).send(b'x')"
        assert not run_python(program).passed
        assert_only_reached_from_here(server, program)


def test_root_becomes_nobody():
    needs("no root rights")
    assert run_python("import os\nassert 0 not in os.getresuid() + os.getresgid()").passed


FILTER = "no sockets of services"


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp", os.fspath(Path(__file__).parent)])
def test_sockets_of_services_are_not_reached(place):
    """Those of tmux, ssh-agent, editors: whoever talks to them runs programs outside."""
    needs(FILTER)
    with tempfile.TemporaryDirectory(dir=place) as folder, socket.socket(socket.AF_UNIX) as server:
        os.chmod(folder, 0o777)
        address = f"{folder}/s"
        server.bind(address)
        os.chmod(address, 0o777)
        server.listen()
        server.settimeout(0.1)
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect({address!r})"
        assert "PermissionError" in run_python(program).reason
        pair = f"import socket\na, _ = socket.socketpair(type=socket.SOCK_DGRAM)\na.sendto(b'x', {address!r})"
        assert "PermissionError" in run_python(pair).reason
        assert_only_reached_from_here(server, program)


def test_no_other_program_takes_its_place():
    needs("no other programs")
    tmux = "import os\nos.execv('/usr/bin/tmux', ['tmux', 'run-shell', 'id > $HOME/escaped'])"
    assert run_python(tmux).reason.startswith("PermissionError")
    assert run_python("import os\nos.execv('/bin/true', ['true'])").reason.startswith("PermissionError")


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
SHARED = """
for _ in range(12):
    n = libc.shmget(0, 100 * 2**20, 0o1600)
    assert n >= 0, os.strerror(ctypes.get_errno())
    libc.shmat.restype = ctypes.c_void_p
    libc.shmdt(ctypes.c_void_p(libc.shmat(n, None, 0)))
"""
REFUSED_CALLS = {
    "SysV memory": SHARED,
    "memory files": "for i in range(60):\n    os.write(os.memfd_create(str(i)), bytes(16 * 2**20))",
    "own namespace of users": "assert libc.unshare(1 << 28) == 0, os.strerror(ctypes.get_errno())",
    "io_uring": "assert libc.syscall(425, 1, bytes(120)) >= 0, os.strerror(ctypes.get_errno())",
    "key ring": "assert libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1) >= 0, "
    "os.strerror(ctypes.get_errno())",
    "tracing": "assert libc.ptrace(0, 0, 0, 0) >= 0, os.strerror(ctypes.get_errno())",
}


@pytest.mark.parametrize("program", REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_calls_past_the_limits_are_refused(program):
    needs(FILTER)
    assert "Operation not permitted" in run_python(LIBC + program).reason


def test_a_new_namespace_is_not_made_by_clone():
    needs("no further namespaces")
    if os.uname().machine != "x86_64":
        pytest.skip("the number of clone")
    program = LIBC + "assert libc.syscall(56, 1 << 28 | 17, 0, 0, 0, 0) >= 0, os.strerror(ctypes.get_errno())"
    assert "Operation not permitted" in run_python(program).reason


def test_calls_by_another_table_end_the_program():
    needs(FILTER)
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 has a second table of calls")
    program = LIBC + "libc.syscall(0x40000000 | 41, 1, 1, 0)"
    assert run_python(program) == Verdict(False, f"killed: {signal.SIGSYS.name}")


def test_private_files_are_not_read(tmp_path):
    needs("no reading of private files")
    secret = tmp_path / "secret"
    secret.touch(0o600)
    for place in (secret, Path("/etc/shadow")):
        found = run_python(f"open('{place}').read()")
        assert not found.passed
        assert "PermissionError" in found.reason or "FileNotFoundError" in found.reason


def test_nobody_keeps_no_right():
    needs("no root rights")
    program = (
        LIBC + "sets = (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets) == 0\nassert not any(sets), list(sets)"
    )
    assert run_python(program).passed


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_whole(machine):
    """Every jump of the filter ends inside it, and it ends with an answer."""
    if sys.platform != "linux":
        assert seccomp.filter_program(machine) == b""
        return
    steps = list(struct.iter_unpack("=HBBI", seccomp.filter_program(machine)))
    for i, (code, if_true, if_false, _) in enumerate(steps):
        if code & 7 == 5:
            assert i + 1 + max(if_true, if_false) < len(steps)
    assert steps[-1][0] == seccomp.RETURN
    assert len({numbers[machine] for numbers in seccomp.REFUSED.values()}) == len(seccomp.REFUSED)
    assert seccomp.filter_program("riscv64") == b""


# --- What is said ---


def test_what_is_in_force_is_said():
    assert isolation()["limit: core dumps"]
    if sys.platform == "linux":
        assert isolation()["limit: memory"]
        assert isolation()["limit: file size"]


@pytest.mark.usefixtures("bare")
def test_without_namespaces_the_limits_are_left(child, outside):
    in_force = isolation.__wrapped__()
    of_user = {"no root rights", "no reading of private files"}  # of a root that became nobody, all the same
    assert not any(value for name, value in in_force.items() if name.startswith("no ") and name not in of_user)
    unfiltered = {NEW_PROCESSES, "limit: memory outside the address space"}
    assert all(value for name, value in in_force.items() if name.startswith("limit") and name not in unfiltered)
    assert run_python(f"open('{outside}/f', 'w')").passed  # it says no writing is kept from there
    assert run_python("x = 1", tests="assert x == 1") == Verdict(True)
    assert run_python("import os\nos._exit(0)") == Verdict(False, "exited with status 0 before its end")
    assert run_python("import os\nos.abort()") == Verdict(False, f"killed: {signal.SIGABRT.name}")
    assert run_python("x = [0] * 10**10") == Verdict(False, "memory")
    assert run_python("while True: pass", timeout_s=0.8) == Verdict(False, "timeout")
    assert none_left(child)


@pytest.mark.parametrize(
    ("step", "lost"),
    [
        ("filter_calls", {FILTER, "no other programs", "limit: memory outside the address space"}),
        ("isolate", {SPACES, "no writing outside its folder"}),
        ("drop_rights", {"no root rights"}),
    ],
)
def test_a_step_left_out_is_not_claimed(child, step, lost):
    if step == "drop_rights" and os.geteuid():
        pytest.skip("only root has root's rights")
    text = child.read_text()
    assert text.count(f"\n    {step}(") == 1
    child.write_text(text.replace(f"\n    {step}(", "\n    (lambda *_: None)("))
    in_force = isolation.__wrapped__()
    assert not any(in_force[name] for name in lost), in_force


def test_a_sandbox_that_does_not_start_is_no_answer(child):
    child.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="does not start here: it ended with status 3"):
        isolation.__wrapped__()


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "os", SimpleNamespace(name="nt"))
    with pytest.raises(UserError, match="not run on Windows"):
        run_python("")
