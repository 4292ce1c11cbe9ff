"""The dashboard's command, run on a free port and asked by raw requests."""

import base64
import os
import re
import socket
import subprocess
import sys
import time

from tests.support.paths import ROOT

KEY = base64.b64encode(b"0123456789abcdef").decode()


class Server:
    """The dashboard's command on a free port."""

    def __init__(self, folder, *options, address="127.0.0.1"):
        self.address = address
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "diagnostics.cli", "dashboard", os.fspath(folder), "--no-browser"]
        root = os.fspath(ROOT)
        self.process = subprocess.Popen(
            [*command, f"--port={self.port}", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": root},
        )
        self.said = re.search(r"http\S+", self.process.stdout.readline().decode())[0]
        until = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < until:
            try:
                socket.create_connection((self.address, self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        self.close()
        raise RuntimeError("the dashboard does not start")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()

    def ask(self, path="/", *headers, method="GET", host=None):
        """Send one raw request, and return the status and the head and body of the answer."""
        host = f"127.0.0.1:{self.port}" if host is None else host
        lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host else []), *headers]
        with socket.create_connection((self.address, self.port), 10) as there:
            there.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            there.settimeout(10)
            found = there.recv(65536).decode("latin-1")
        return int(found.split()[1]), found

    def websocket(self, *headers, host=None, path="/_stcore/stream"):
        """Return the status of asking for the websocket; 101 is that it was opened."""
        upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
        return self.ask(path, *upgrade, f"Sec-WebSocket-Key: {KEY}", *headers, host=host)[0]
