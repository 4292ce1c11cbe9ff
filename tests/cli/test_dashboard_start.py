"""The first start of the dashboard, as a new user meets it: nothing is asked, and one line is printed."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

from diagnostics.runs.example import example_folder
from tests.support.paths import ROOT

pytest.importorskip("streamlit")

PATIENCE_S = 60


def answers(address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(f"{address}/_stcore/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


class Start:
    """The command in an empty home folder, on a terminal of its own or without standard input."""

    def __init__(self, home, *arguments, terminal):
        # A browser of the tests: a page that nobody looks at.
        environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "BROWSER": "true", "TERM": "xterm"}
        command = [sys.executable, "-m", "diagnostics.cli", "dashboard", *arguments]
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self.screen, self.said = ours, ""
        self.process = subprocess.Popen(
            command if terminal else ["bash", "-c", 'exec "$@" <&-', "bash", *command],
            cwd=home,
            env=environment,
            stdin=theirs if terminal else None,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)

    def read(self, seconds):
        """Add what is printed within some seconds to what was said."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and select.select([self.screen], [], [], left)[0]:
            try:
                self.said += os.read(self.screen, 4096).decode()
            except OSError:  # of a terminal whose other side has closed
                return

    def wait_for_answer(self):
        """Return the printed address once the server answers; nothing is ever typed."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self.process.poll() is None:
            self.read(0.1)
            if (found := re.search(r"http://\S+", self.said)) and answers(found[0]):
                self.read(1)
                return found[0]
        raise AssertionError(f"no server: {self.process.poll()} {self.said!r}")

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.screen)


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(*arguments, terminal=True):
        started.append(Start(tmp_path, *arguments, terminal=terminal))
        return started[-1]

    yield begin
    for one in started:
        one.close()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "stdin closed"])
def test_nothing_is_asked_and_one_line_is_printed(start, tmp_path, terminal):
    (tmp_path / "runs").mkdir()
    begun = start(terminal=terminal)
    address = begun.wait_for_answer()
    assert begun.said.splitlines() == [f"Dashboard of runs/: {address} (Ctrl-C ends it)"]
    assert not (tmp_path / ".streamlit").exists()


def test_a_folder_that_is_not_there_is_named(start, tmp_path):
    begun = start("nowhere", "--no-browser")
    begun.wait_for_answer()
    first, second = begun.said.splitlines()
    nowhere = tmp_path / "nowhere"
    assert first == f"There is no folder {nowhere} yet: the first run makes it, and until then there is an example."
    assert second.startswith("Dashboard of nowhere/: http://127.0.0.1:")
    assert not (tmp_path / "nowhere").exists()


def test_the_example_can_be_opened(start):
    begun = start("--example", "--no-browser")
    begun.wait_for_answer()
    assert begun.said.startswith("Dashboard of the example: http://127.0.0.1:")
    environment = psutil.Process(begun.process.pid).environ()
    assert environment["SPEED_DIAGNOSTICS_RUNS"] == str(example_folder())
