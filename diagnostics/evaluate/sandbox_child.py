"""The inner side of the sandbox: run as a script by `diagnostics.evaluate.sandbox`, never imported by it.

It gives up what it can (`isolate`), forks, and in the child runs the program and then the tests, each compiled on its
own, so that nothing left open in the program can swallow the tests. Uses the standard library alone: it is started
without site-packages. Order matters throughout: every step needs rights that a later one gives up.
"""

import ctypes
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

NOBODY = 65534
# Of <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>.
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID_NODEV_NOEXEC, MS_PRIVATE_RECURSIVE = 2 | 4 | 8, (1 << 18) | (1 << 14)
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
SIGKILL = 9
# Nothing there is for the program: other processes' environments, sockets of services.
COVERED = ("/proc", "/run")

LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def isolate(folder: str, folder_bytes: int) -> dict[str, bool]:
    """Give up the network, other processes and the files outside ``folder``; return what could be given up.

    Other processes are out of sight for children alone: the program must be run in one.
    """
    root = os.geteuid() == 0
    uid, gid = (NOBODY, NOBODY) if root else (os.geteuid(), os.getegid())
    if root:
        _tried(lambda: os.chown(folder, uid, gid))
    # A user may make the other namespaces in a namespace of users alone; root needs none, and could not leave it.
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNS | (0 if root else CLONE_NEWUSER)
    spaces = LIBC is not None and LIBC.unshare(flags) == 0
    mapped = spaces and (root or _tried(lambda: _map_user(uid, gid)))
    options = f"size={folder_bytes},mode=700,uid={uid},gid={gid}"
    private_files = mapped and _cover_files(folder, options)
    return {
        "no network": spaces,
        "no sight of other processes": spaces,
        "no writing outside its folder": private_files,
    }


def _tried(step: Callable[[], None]) -> bool:
    try:
        step()
    except OSError:
        return False
    return True


def _map_user(uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _cover_files(folder: str, options: str) -> bool:
    """Make every file read-only, and put an empty file system in memory over the folder."""
    # struct mount_attr: to set, to clear, propagation, user namespace
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    if (
        LIBC.mount(None, b"/", None, MS_PRIVATE_RECURSIVE, None)
        or LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size)
        or LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, options.encode())
    ):
        return False
    os.chdir(folder)
    return all(
        LIBC.mount(b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, b"size=4k,mode=500") == 0
        for place in COVERED
        if os.path.isdir(place)
    )


def drop_rights() -> bool:
    """Give up root's rights, and those that a namespace of users grants, such as to undo its mounts.

    Root becomes nobody: it is bound by no limit on processes, and owns what matters. Returns whether this is so.
    """
    keep = 0
    if os.geteuid() == 0:
        readable = _readable_by_nobody()
        # A Python in root's own folder can import nothing unless it keeps the right to read all files.
        keep = 0 if readable else _permitted() & CAP_DAC_READ_SEARCH
        if not (readable or keep) or not _tried(_become_nobody):
            # It stays root but loses the right to write everywhere: it must own its folder again.
            _tried(lambda: os.chown(".", 0, 0))
    if LIBC is not None:
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # Two sets of 32 bits, the lower ones first: effective, permitted, inheritable.
        LIBC.capset(_header(), (ctypes.c_uint32 * 6)(keep, keep))
        # A change of rights undoes this, so it comes last.
        LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    return os.geteuid() != 0


def _readable_by_nobody() -> bool:
    def read() -> None:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        with open(os.__file__, "rb"):
            pass

    try:
        return _tried(read)
    finally:
        os.seteuid(0)
        os.setegid(0)


def _become_nobody() -> None:
    if LIBC is not None:
        LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _permitted() -> int:
    sets = (ctypes.c_uint32 * 6)()
    return 0 if LIBC is None or LIBC.capget(_header(), sets) else sets[1]


def _header() -> Any:
    return (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)


def limit(memory_bytes: int, cpu_s: int, file_bytes: int, n_processes: int) -> dict[str, bool]:
    """Bound what this process may use; return which bounds could be set."""
    wanted = {
        "memory": (resource.RLIMIT_AS, memory_bytes),
        "processor time": (resource.RLIMIT_CPU, cpu_s),
        "file size": (resource.RLIMIT_FSIZE, file_bytes),
        "open files": (resource.RLIMIT_NOFILE, 64),
        "new processes": (resource.RLIMIT_NPROC, n_processes),
        "core dumps": (resource.RLIMIT_CORE, 0),
    }
    return {f"limit: {name}": _set_limit(which, value) for name, (which, value) in wanted.items()}


def _set_limit(which: int, value: int) -> bool:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):
        return False
    return True


def run(parts: list[str], tell: Callable[[bool, str], None]) -> None:
    """Run sources one after the other in one module, and tell whether they came to their end."""
    # Not "__main__", as in the original harness of HumanEval: what a script does when started is not asked for.
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

    in_force = isolate(task["folder"], task["file_bytes"])
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        leave(status if status >= 0 else 128 - status)
    in_force["no root rights"] = drop_rights()
    in_force |= limit(task["memory_bytes"], task["cpu_s"], task["file_bytes"], task["n_processes"])
    if task["program"] is None:
        # Root goes by no limit on processes.
        in_force["limit: new processes"] &= in_force["no root rights"]
        tell(True, json.dumps(in_force))
    run([task["program"], task["tests"]], tell)


if __name__ == "__main__":
    main()
