"""Attacks the sandbox for code that a model wrote: every attack must fail.

python analyses/check_sandbox.py    # exit status 1 if one does

An attack ends without an exception only if it succeeds. Attacks that need something outside (a socket, a private file,
a process) are in tests/evaluate/test_sandbox.py, which also checks from outside whether anything arrived.
"""

import json
import sys
import time

from diagnostics.evaluate.sandbox import isolation, run_python

C = "import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
OPENED = ("/proc/1/environ", "/etc/shadow", "/root/.ssh/id_rsa", "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/tty")
WRITTEN = ("/f", "/etc/f", "/usr/f", "/tmp/f", "/var/tmp/f", "/dev/shm/f", "/run/f", "/root/f", "/home/f", "/proc/f")
CALLED = {
    "SysV memory": "libc.shmget(0, 100 * 2**20, 0o1600)",
    "SysV semaphores": "libc.semget(0, 100, 0o1600)",
    "SysV queue": "libc.msgget(0, 0o1600)",
    "memory file": "os.memfd_create('x')",
    "own users": "libc.unshare(1 << 28)",
    "own mounts": "libc.unshare(1 << 17)",
    "own network": "libc.unshare(1 << 30)",
    "another namespace": "libc.setns(0, 0)",
    "mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "remount": "libc.mount(None, b'/', None, 32 | 4096, None)",
    "umount": "libc.umount2(b'/tmp', 2)",
    "chroot": "os.chroot('.') or 0",
    "tracing itself": "libc.ptrace(0, 0, 0, 0)",
    "memory of another": "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    "io_uring": "libc.syscall(425, 1, bytes(120))",
    "key ring": "libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1)",
    "become root": "os.setuid(0) or 0",
    "more priority": "os.nice(-5) - 100",
    "reboot": "libc.reboot(0)",
    "set the clock": "__import__('time').clock_settime(0, 0) or 0",
    "host name": "libc.sethostname(b'x', 1)",
}
SOCKETS = ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG")
PROGRAMS = ("/bin/true", "/bin/sh", "/usr/bin/tmux", "/usr/bin/env", "/usr/bin/python3")
OTHER = {
    "datagrams to any address": "socket.socketpair(type=socket.SOCK_DGRAM)",
    "fork": "os.fork()",
    "fork bomb": "while True:\n    os.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "kill the outside": "os.kill(os.getppid() or 10**6, 9)",
    "kill everything": "os.kill(-1, 9)",
    "1 GB": "x = bytes(2**30)",
    "1 GB in parts": "x = []\nfor _ in range(1000):\n    x.append(bytes(10**6))",
    "1 GB mapped and shared": "import mmap\nx = mmap.mmap(-1, 2**30)",
    "large file": "open('f', 'wb').write(bytes(2**28))",
    "many files": "for i in range(40):\n    open(str(i), 'wb').write(bytes(10**6))",
    "many open files": "x = [open(str(i), 'w') for i in range(100)]",
    "busy": "while True:\n    pass",
    "asleep": "import time\ntime.sleep(60)",
    "larger limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "crash": "ctypes.string_at(0)",
    "exit": "os._exit(0)",
    "forged verdict": "for fd in range(64):\n    try:\n        os.write(fd, b'0' * 32 + b'+')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "link to a private file": "os.symlink('/etc/shadow', 's')\nopen('s').read()",
    "hard link": "os.link('/etc/passwd', 's')",
    "device file": "os.mknod('d', 0o20666, os.makedev(1, 1))\nopen('d', 'rb').read(1)",
    "set-user-id file": "open('s', 'w').close()\nos.chmod('s', 0o4755)\nos.chown('s', 0, 0)",
}


def attacks() -> dict[str, str]:
    """Return programs by name."""
    programs = {f"read {path}": f"open({path!r}, 'rb').read(1)" for path in OPENED}
    programs |= {f"write {path}": f"open({path!r}, 'w')" for path in WRITTEN}
    programs |= {f"socket {kind}": f"socket.socket(socket.{kind}, socket.SOCK_RAW)" for kind in SOCKETS[3:]}
    programs |= {f"socket {kind}": f"socket.socket(socket.{kind})" for kind in SOCKETS[:3]}
    programs |= {f"run {path}": f"os.execv({path!r}, ['x'])" for path in PROGRAMS}
    programs |= {what: f"assert ({call}) >= 0" for what, call in CALLED.items()}
    return programs | OTHER


def main() -> int:
    """Run all attacks, and print their results."""
    came_through, start = [], time.monotonic()
    tried = attacks()
    for what, program in tried.items():
        if run_python(C + program, timeout_s=2).passed:
            came_through.append(what)
    figures = {"attacks": len(tried), "came through": came_through, "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(figures | {"in force": isolation()}, indent=2))
    return int(bool(came_through))


if __name__ == "__main__":
    sys.exit(main())
