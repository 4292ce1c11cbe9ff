"""The inner side of the sandbox: run as a script by `diagnostics.evaluate.sandbox`, never imported by it.

It gives up what it can (`isolate`), forks, and in the child runs the program and then the tests, each compiled on its
own, so that nothing left open in the program can swallow the tests. It uses the standard library alone, since it is
started without site-packages. Order matters: every step needs rights that a later one gives up. At the end `probe`
tests what is in force by trying what must fail; a step that succeeded proves nothing.
"""

import contextlib
import ctypes
import json
import os
import resource
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

NOBODY = 65534
# Constants of <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>.
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID_NODEV_NOEXEC, MS_PRIVATE_RECURSIVE = 2 | 4 | 8, (1 << 18) | (1 << 14)
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
MS_BIND_RECURSIVE = 4096 | 16384
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522
SIGKILL, MFD_CLOEXEC, IPC_PRIVATE = 9, 1, 0
# All that a program sees of the machine, beside Python and its own folder: the rest has private files, sockets of
# services, other processes. (Nix and Guix keep the system's libraries in folders of their own.)
SHOWN = ("bin", "etc", "gnu", "lib", "lib32", "lib64", "libx32", "nix", "sbin", "usr")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def isolate(folder: str, folder_bytes: int) -> None:
    """Give up the network, other processes and the files outside ``folder``, as far as this is permitted.

    Only children lose sight of other processes: the program must run in one.
    """
    root = os.geteuid() == 0
    uid, gid = (NOBODY, NOBODY) if root else (os.geteuid(), os.getegid())
    if root:
        _succeeds(lambda: os.chown(folder, uid, gid))
    # Without root the other namespaces need a user namespace; root needs none, and could not leave it.
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNS | (0 if root else CLONE_NEWUSER)
    if LIBC is None or LIBC.unshare(flags) or not (root or _succeeds(lambda: _map_user(uid, gid))):
        return
    _succeeds(lambda: _cover_files(folder, f"size={folder_bytes},mode=700,uid={uid},gid={gid}"))


def _succeeds(step: Callable[[], None]) -> bool:
    try:
        step()
    except OSError:
        return False
    return True


def _map_user(uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _cover_files(folder: str, options: str) -> None:
    """Show `SHOWN`, `DEVICES` and Python, read-only, and an empty file system in memory at the folder; cover the rest.

    Raises OSError at the first step that is not permitted.
    """
    _require(LIBC.mount(None, b"/", None, MS_PRIVATE_RECURSIVE, None))
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    covered = [f"/{name}" for name in os.listdir("/") if name not in SHOWN]
    covered = [path for path in covered if os.path.isdir(path) and not os.path.islink(path)]
    # A descriptor opened now still reaches what a cover will hide.
    kept = [path for path in (*prefixes, *DEVICES) if os.path.exists(path) and path.split("/")[1] not in SHOWN]
    descriptors = {path: os.open(path, os.O_PATH) for path in kept}
    for path in covered:
        if path != "/proc":  # descriptors are mounted through it, so it comes last
            _mount_memory(path, "size=64k,mode=755")
    for path, descriptor in descriptors.items():
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT))
        source = f"/proc/self/fd/{descriptor}".encode()
        _require(LIBC.mount(source, path.encode(), None, MS_BIND_RECURSIVE, None))
        os.close(descriptor)
    # struct mount_attr: to set, to clear, propagation, user namespace
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    if os.path.isdir("/proc"):
        _mount_memory("/proc", "size=4k,mode=555")
    os.makedirs(folder, exist_ok=True)
    _require(LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)))
    _mount_memory(folder, options)
    os.chdir(folder)


def _mount_memory(path: str, options: str) -> None:
    _require(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, options.encode()))


def _require(status: int) -> None:
    if status:
        raise OSError("not permitted")


def drop_rights() -> None:
    """Give up root's rights, and those that a namespace of users grants, such as to undo its mounts.

    Root becomes nobody, since no limit on processes binds root and it owns what matters. Where the files are not
    covered, nobody could not import from a Python in root's own folder; then it stays root, and `probe` reports that.
    """
    if os.geteuid() == 0 and not (_readable_by_nobody() and _succeeds(_become_nobody)):
        _succeeds(lambda: os.chown(".", 0, 0))  # it loses the right to write everywhere
    if LIBC is not None:
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # Two sets of 32 bits, the lower ones first: effective, permitted, inheritable.
        LIBC.capset(_header(), (ctypes.c_uint32 * 6)())
        # A change of rights undoes this, so it comes last.
        LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def _readable_by_nobody() -> bool:
    def read() -> None:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        with open(os.__file__, "rb"):
            pass

    try:
        return _succeeds(read)
    finally:
        os.seteuid(0)
        os.setegid(0)


def _become_nobody() -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _header() -> Any:
    return (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)


def filter_calls(program: bytes) -> None:
    """Have the kernel refuse system calls by a filter of `diagnostics.evaluate.seccomp`, for good."""
    if LIBC is None or not program:
        return
    steps = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of steps, and where they are
    about = (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(steps))
    LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, about, 0, 0)


def limits(memory_bytes: int, cpu_s: int, file_bytes: int, n_processes: int) -> dict[str, tuple[int, int]]:
    """Return the limits by name: the resource to bound and its value."""
    return {
        "memory": (resource.RLIMIT_AS, memory_bytes),
        "processor time": (resource.RLIMIT_CPU, cpu_s),
        "file size": (resource.RLIMIT_FSIZE, file_bytes),
        "open files": (resource.RLIMIT_NOFILE, 64),
        "new processes": (resource.RLIMIT_NPROC, n_processes),
        "core dumps": (resource.RLIMIT_CORE, 0),
    }


def set_limit(which: int, value: int) -> None:
    """Bound what this process may use of a resource, if that is permitted."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (value, value))


def probe(bounds: dict[str, tuple[int, int]], witness: str, parent: int) -> dict[str, bool]:
    """Try what must be impossible, and return for each attempt whether it failed.

    ``witness`` is a file outside that the starting user alone may read, in a folder where all may write; ``parent`` is
    the process outside. The process must end afterwards, since the attempts change it.
    """
    in_force = {f"limit: {name}": _is_bound(*bound) for name, bound in bounds.items()}
    in_force["limit: new processes"] &= not _succeeds(_fork)
    return in_force | {
        "limit: memory outside the address space": not (_succeeds(_share_memory) or _succeeds(_make_memory_file)),
        "no network": not _succeeds(_reach_network),
        "no sockets of services": not _succeeds(lambda: socket.socket(socket.AF_UNIX).close()),
        "no sight of other processes": not _is_alive(parent),
        "no writing outside its folder": not _succeeds(lambda: open(witness + ".new", "w").close()) and _is_read_only(),
        "no reading of private files": not _succeeds(lambda: open(witness).close()),
        "no root rights": os.geteuid() != 0 and not _rights(),
        "no other programs": _starts_no_program(),
        "no further namespaces": LIBC is not None and LIBC.unshare(CLONE_NEWUSER) != 0,
    }


def _is_bound(which: int, value: int) -> bool:
    soft, hard = resource.getrlimit(which)
    return 0 <= hard <= value and 0 <= soft <= value


def _fork() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def _share_memory() -> None:
    if LIBC is None or LIBC.shmget(IPC_PRIVATE, 4096, 0o600) < 0:
        raise OSError


def _make_memory_file() -> None:
    if not hasattr(os, "memfd_create"):
        raise OSError
    os.close(os.memfd_create("x", MFD_CLOEXEC))


def _reach_network() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        datagram.connect(("127.0.0.1", 9))  # nothing is sent; even that fails in a network without devices


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _is_read_only() -> bool:
    """Whether Python's files, which the starting user may own, are read-only."""
    return bool(os.statvfs(os.__file__).f_flag & os.ST_RDONLY)


def _starts_no_program() -> bool:
    try:
        os.execv("absent", ["absent"])
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _rights() -> bool:
    sets = (ctypes.c_uint32 * 6)()
    return LIBC is not None and (LIBC.capget(_header(), sets) != 0 or any(sets))


def run(parts: list[str], tell: Callable[[bool, str], None]) -> None:
    """Run sources one after the other in one module, and tell whether they came to their end."""
    # Not "__main__", as in the original harness of HumanEval: what a script does when started must not run.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    del sys.modules["__main__"]
    try:
        for part, name in zip(parts, ("<program>", "<tests>"), strict=True):
            exec(compile(part, name, "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        tell(False, "memory")
    except BaseException as error:
        text = " ".join(str(error).split())[:200]
        tell(False, f"{type(error).__name__}: {text}" if text else type(error).__name__)
    else:
        tell(True, "")


def main() -> None:
    """Read what to do from the standard input; the verdict goes to the pipe whose number is the argument."""
    pipe = int(sys.argv[1])
    task = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    token = task["token"].encode()
    write, leave = os.write, os._exit

    def tell(passed: bool, reason: str) -> None:
        write(pipe, token + (b"+" if passed else b"-") + reason.encode(errors="replace"))
        leave(0)

    isolate(task["folder"], task["file_bytes"])
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        leave(status if status >= 0 else 128 - status)
    drop_rights()
    bounds = limits(task["memory_bytes"], task["cpu_s"], task["file_bytes"], task["n_processes"])
    for bound in bounds.values():
        set_limit(*bound)
    filter_calls(bytes.fromhex(task["filter"]))
    if task["program"] is None:
        tell(True, json.dumps(probe(bounds, task["witness"], task["parent"])))
    run([task["program"], task["tests"]], tell)


if __name__ == "__main__":
    main()
