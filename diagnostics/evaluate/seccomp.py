"""A filter of system calls for the sandbox: it refuses those that lead out of it, past its limits, or to no use.

The filter is a list of refusals, built here for this machine and installed by the child (`sandbox_child`), which
cannot take it off again. It needs no rights, so it also works where namespaces are not permitted.
"""

import platform
import struct
import sys

# Codes of <linux/bpf_common.h>: load a word of the call, jump if equal, jump if any bit is set, mask, return.
LOAD, EQUAL, GREATER_OR_EQUAL, ANY_BIT, MASK, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
# Actions of <linux/seccomp.h>; EPERM and ENOSYS are error numbers, and ENOSYS makes libc fall back to ``clone``.
ALLOW, KILL_PROCESS, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
# Offsets in struct seccomp_data; the lower half of the first and second argument (both machines are little-endian).
NUMBER, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24
X32_BIT = 0x40000000  # of x86_64's second table of calls, with 32-bit pointers
NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* that `clone` takes
SOCK_STREAM, SOCK_KIND = 1, 0xF

# AUDIT_ARCH_* of <linux/audit.h>, and the numbers of calls by machine.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
# Calls refused with any arguments. From 424 on the numbers are the same on every machine.
REFUSED = {
    # Ways out: sockets (of tmux, ssh-agent, X11, D-Bus), other programs, other processes, files by handle.
    "socket": {"x86_64": 41, "aarch64": 198},
    "execve": {"x86_64": 59, "aarch64": 221},
    "execveat": {"x86_64": 322, "aarch64": 281},
    "ptrace": {"x86_64": 101, "aarch64": 117},
    "process_vm_readv": {"x86_64": 310, "aarch64": 270},
    "process_vm_writev": {"x86_64": 311, "aarch64": 271},
    "pidfd_open": {"x86_64": 434, "aarch64": 434},
    "pidfd_getfd": {"x86_64": 438, "aarch64": 438},
    "name_to_handle_at": {"x86_64": 303, "aarch64": 264},
    "open_by_handle_at": {"x86_64": 304, "aarch64": 265},
    "add_key": {"x86_64": 248, "aarch64": 217},
    "request_key": {"x86_64": 249, "aarch64": 218},
    "keyctl": {"x86_64": 250, "aarch64": 219},
    # Memory that is not in the address space, and so not in its limit.
    "shmget": {"x86_64": 29, "aarch64": 194},
    "semget": {"x86_64": 64, "aarch64": 190},
    "msgget": {"x86_64": 68, "aarch64": 186},
    "mq_open": {"x86_64": 240, "aarch64": 180},
    "memfd_create": {"x86_64": 319, "aarch64": 279},
    "memfd_secret": {"x86_64": 447, "aarch64": 447},
    # Namespaces and mounts: rights of a root of one's own.
    "unshare": {"x86_64": 272, "aarch64": 97},
    "setns": {"x86_64": 308, "aarch64": 268},
    "mount": {"x86_64": 165, "aarch64": 40},
    "umount2": {"x86_64": 166, "aarch64": 39},
    "pivot_root": {"x86_64": 155, "aarch64": 41},
    "chroot": {"x86_64": 161, "aarch64": 51},
    "open_tree": {"x86_64": 428, "aarch64": 428},
    "move_mount": {"x86_64": 429, "aarch64": 429},
    "fsopen": {"x86_64": 430, "aarch64": 430},
    "fsconfig": {"x86_64": 431, "aarch64": 431},
    "fsmount": {"x86_64": 432, "aarch64": 432},
    "fspick": {"x86_64": 433, "aarch64": 433},
    "mount_setattr": {"x86_64": 442, "aarch64": 442},
    # Wide parts of the kernel; io_uring would make the calls above behind the filter's back.
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "io_uring_enter": {"x86_64": 426, "aarch64": 426},
    "io_uring_register": {"x86_64": 427, "aarch64": 427},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
    "init_module": {"x86_64": 175, "aarch64": 105},
    "finit_module": {"x86_64": 313, "aarch64": 273},
    "delete_module": {"x86_64": 176, "aarch64": 106},
    "kexec_load": {"x86_64": 246, "aarch64": 104},
}


def filter_program(machine: str | None = None) -> bytes:
    """Return the filter as an array of struct sock_filter; empty where there is none for this system or machine."""
    machine = machine or platform.machine()
    if sys.platform != "linux" or sys.byteorder != "little" or machine not in ARCHITECTURES:
        return b""
    steps = [
        # A process may call by another machine's numbers (32 bits): it is killed, for they mean other calls.
        _step(LOAD, ARCHITECTURE),
        _step(EQUAL, ARCHITECTURES[machine], 1, 0),
        _step(RETURN, KILL_PROCESS),
        _step(LOAD, NUMBER),
    ]
    if machine == "x86_64":
        steps += [_step(GREATER_OR_EQUAL, X32_BIT, 0, 1), _step(RETURN, KILL_PROCESS)]
    for numbers in REFUSED.values():
        steps += [_step(EQUAL, numbers[machine], 0, 1), _step(RETURN, EPERM)]
    steps += [
        # Its flags lie in memory, where a filter cannot look.
        *[_step(EQUAL, CLONE3, 0, 1), _step(RETURN, ENOSYS)],
        *[_step(EQUAL, CLONE[machine], 0, 4), _step(LOAD, FIRST)],
        *[_step(ANY_BIT, NEW_NAMESPACES, 0, 1), _step(RETURN, EPERM), _step(RETURN, ALLOW)],
        # asyncio needs a connected pair; a pair of datagrams could send to any address.
        *[_step(EQUAL, SOCKETPAIR[machine], 0, 4), _step(LOAD, SECOND), _step(MASK, SOCK_KIND)],
        *[_step(EQUAL, SOCK_STREAM, 1, 0), _step(RETURN, EPERM)],
        _step(RETURN, ALLOW),
    ]
    return b"".join(steps)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
