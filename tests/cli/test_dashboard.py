"""The command that starts the dashboard: what it starts, what it refuses, and the installed copy."""

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.runs import contents, run_command

# The module: `from diagnostics.cli import dashboard` would be the function.
command = importlib.import_module("diagnostics.cli.dashboard")


@pytest.fixture
def replaced(monkeypatch):
    """What the command would become."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(subprocess, "call", lambda *call, **more: 0)
    return calls


def refuse(monkeypatch, capfd, *arguments):
    status, out, err = run_command(monkeypatch, capfd, "dashboard", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def test_a_file_is_no_folder_of_runs(monkeypatch, capfd, tmp_path, replaced):
    (tmp_path / "file").write_text("x")
    assert f"{str(tmp_path / 'file')!r} is not a folder of runs" in refuse(monkeypatch, capfd, tmp_path / "file")
    assert not replaced


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use(monkeypatch, capfd, tmp_path, replaced, address):
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        err = refuse(monkeypatch, capfd, tmp_path, "--port", port)
    assert f"port {port} cannot be used (Address already in use): choose another --port" in err
    assert not replaced


def test_a_port_just_left_can_be_used(monkeypatch, capfd, tmp_path, replaced):
    """In TIME_WAIT: the dashboard is started anew right after it ended."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Streamlit's
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()
        client.close()
    run_command(monkeypatch, capfd, "dashboard", tmp_path, "--port", port)
    assert f"--server.port={port}" in replaced[0][1]


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999999999999999999", "http", "80.5", ""])
def test_a_port_out_of_range(monkeypatch, capfd, tmp_path, replaced, port):
    assert "--port" in refuse(monkeypatch, capfd, tmp_path, f"--port={port}")
    assert not replaced


def test_the_first_free_port(monkeypatch, capfd, tmp_path, replaced):
    with contextlib.ExitStack() as stack:
        first = 8501
        while True:  # one that is free, taken here
            taken = stack.enter_context(socket.socket())
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("127.0.0.1", first))
                taken.listen()
                break
            except OSError:
                first += 1
        run_command(monkeypatch, capfd, "dashboard", tmp_path)
        (port,) = [int(word.partition("=")[2]) for word in replaced[0][1] if word.startswith("--server.port=")]
        assert first < port < 8600


def test_no_port_is_free(monkeypatch, capfd, tmp_path, replaced):
    class Taken(socket.socket):
        def bind(self, address):
            raise OSError(98, "Address already in use")

    monkeypatch.setattr(command.socket, "socket", Taken)
    assert "choose a --port" in refuse(monkeypatch, capfd, tmp_path)
    assert "port 9999 cannot be used" in refuse(monkeypatch, capfd, tmp_path, "--port=9999")


@pytest.mark.parametrize("name", ["streamlit", "plotly", "psutil"])
def test_what_the_dashboard_needs_is_missing(monkeypatch, capfd, tmp_path, replaced, name):
    monkeypatch.setattr(command, "find_spec", lambda asked: None if asked == name else importlib.util.find_spec(asked))
    err = refuse(monkeypatch, capfd, tmp_path)
    assert f"the dashboard needs {name}: pip install 'speed-diagnostics[app]'" in err
    assert not replaced


@pytest.mark.parametrize("browser", [True, False])
def test_what_is_started(monkeypatch, capfd, tmp_path, replaced, browser):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEPT", "yes")
    port = free_port()
    arguments = ["dashboard", "my runs", f"--port={port}", *([] if browser else ["--no-browser"])]
    run_command(monkeypatch, capfd, *arguments)
    ((program, words, environment),) = replaced
    assert program == words[0] == sys.executable
    assert words[1:4] == ["-m", "streamlit", "run"]
    assert Path(words[4]) == ROOT / "app" / "server.py"
    options = dict(word.removeprefix("--").split("=", 1) for word in words[5:])
    assert options["server.address"] == "127.0.0.1"
    assert options["browser.gatherUsageStats"] == "false"
    assert options["server.port"] == str(port)
    assert options["server.headless"] == ("false" if browser else "true")
    assert not {"server.enableCORS", "server.enableXsrfProtection"} & set(options)
    from streamlit import config

    for name in options:
        config.get_option(name)  # an unknown one is an error of Streamlit's
    assert environment["SPEED_DIAGNOSTICS_RUNS"] == str(tmp_path / "my runs")
    assert environment["KEPT"] == "yes"
    assert "SPEED_DIAGNOSTICS_RUNS" not in os.environ
    assert not (tmp_path / "my runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--allow-host", "*"), "--allow-host '*' is not a host name"),
        (("--allow-host", "http://box"), "--allow-host 'http://box' is not a host name"),
        (("--allow-host", "box:8501"), "--allow-host 'box:8501' is not a host name"),
        (("--allow-host", ""), "--allow-host '' is not a host name"),
        (("--host", "box"), "--host 'box' is not an IP address"),
        (("--host", "203.0.113.1"), "--host 203.0.113.1 is not an address of this machine"),
        (("--base-path", "a b"), "--base-path 'a b' is not a path"),
        (("--base-path", "/a/../b"), "--base-path 'a/../b' is not a path"),
        (("--base-path", "a?b"), "--base-path 'a?b' is not a path"),
        (("--example", "runs"), "--example shows a folder of its own: leave the folder out"),
    ],
)
def test_places_that_it_cannot_be_at(monkeypatch, capfd, replaced, arguments, said):
    assert said in refuse(monkeypatch, capfd, *arguments)
    assert not replaced


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        ((), False),
        (("--token",), True),
        (("--host", "127.0.0.1"), False),
        (("--host", "localhost"), False),
        (("--host", "::1"), False),
        (("--host", "0.0.0.0"), True),
        (("--allow-host", "box"), True),
        (("--host", "0.0.0.0", "--no-token"), False),
        (("--allow-host", "box", "--no-token"), False),
    ],
)
def test_who_else_can_reach_it_needs_a_token_or_a_word(monkeypatch, capfd, tmp_path, replaced, arguments, token):
    if "::1" in arguments and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    _, out, err = run_command(monkeypatch, capfd, "dashboard", tmp_path, *arguments)
    ((_, words, environment),) = replaced
    assert ("SPEED_DIAGNOSTICS_TOKEN" in environment) == token
    assert ("?token=" in out) == token
    assert ("--server.headless=true" in words) == token
    warning = f"warning: everyone who reaches it can read the runs, run models and write to {tmp_path}\n"
    assert err == (warning if "--no-token" in arguments else "")


def test_names_and_path_reach_the_server(monkeypatch, capfd, tmp_path, replaced):
    arguments = ("--allow-host", "Box.example", "--allow-host", "other", "--base-path", "/a/b/")
    _, out, _ = run_command(monkeypatch, capfd, "dashboard", tmp_path, *arguments, "--no-token")
    ((_, words, environment),) = replaced
    assert environment["SPEED_DIAGNOSTICS_HOSTS"] == "box.example,other"
    assert "--server.baseUrlPath=a/b" in words
    assert re.search(r"http://127.0.0.1:\d+/a/b \(Ctrl-C ends it\)$", out.strip())


def test_the_folder_of_runs_is_absolute_also_by_default_and_from_home(monkeypatch, capfd, tmp_path, replaced):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for argument, expected in ((None, "runs"), ("~/mine", "home/mine"), (tmp_path / "x", "x"), ("a/../b", "a/../b")):
        run_command(monkeypatch, capfd, "dashboard", *([] if argument is None else [argument]))
        assert replaced.pop()[2]["SPEED_DIAGNOSTICS_RUNS"] == str(tmp_path / expected)


# --- The installed copy ---


def install(place):
    """Copy what a wheel would hold, as pyproject.toml says."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in wheel["packages"]:
        target = wheel["sources"].get(name, name)
        shutil.copytree(ROOT / name, place / target, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def program_of(place):
    """(output, error) of the program that the package in a folder would start."""
    code = "from diagnostics.cli.dashboard import _program; print(_program())"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=place.parent, env=os.environ | {"PYTHONPATH": str(place)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_the_installed_copy_is_found_and_whole(tmp_path):
    site = install(tmp_path / "site")
    # Another package of this name is none of ours.
    (site / "app").mkdir()
    (site / "app" / "main.py").write_text("")
    done = program_of(site)
    assert done.stdout.strip() == str(site / "speed_diagnostics_app" / "server.py"), done.stderr
    there = set(contents(site / "speed_diagnostics_app"))
    assert {str(p.relative_to(ROOT / "app")) for p in (ROOT / "app").rglob("*.py")} | {"icon.svg"} <= there


def test_an_installation_without_the_app_says_so(tmp_path):
    site = install(tmp_path / "site")
    shutil.rmtree(site / "speed_diagnostics_app")
    done = program_of(site)
    assert done.stderr.strip().endswith("this installation has no dashboard: install speed-diagnostics anew")


def test_the_wheel_holds_the_app(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    assert program_of(site).stdout.strip() == str(site / "speed_diagnostics_app" / "server.py")


def test_an_editable_installation_has_no_copy_of_the_app():
    """A copy would be used, and be old, wherever the checkout is not found."""
    assert importlib.util.find_spec("speed_diagnostics_app") is None


# --- A real start ---


def get(address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=5) as answer:
        return answer.status, answer.read().decode()


def own_addresses():
    """Addresses of this machine other than the loopback's."""
    found = [a.address for one in psutil.net_if_addrs().values() for a in one if a.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_real_start_and_end(tmp_path, end):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "diagnostics.cli", "dashboard", tmp_path, f"--port={port}", "--no-browser"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert get(f"http://127.0.0.1:{port}/_stcore/health") == (200, "ok")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        server = psutil.Process(process.pid)
        family = [server, *server.children(recursive=True)]
        listening = {c.laddr.ip for one in family for c in one.net_connections("inet") if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        for address in own_addresses():
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=2)
        process.send_signal(end)
        out, _ = process.communicate(timeout=20)
        assert "Traceback" not in out
        assert not psutil.wait_procs(family, timeout=5)[1]
        with socket.socket() as trial, pytest.raises(OSError, match="refused"):
            trial.connect(("127.0.0.1", port))
    finally:
        process.kill()
        process.wait()
    assert contents(tmp_path) == {}


def test_a_home_that_nobody_has(monkeypatch, capfd, replaced):
    """RuntimeError of `expanduser`: a traceback instead of one line."""
    assert "nobody-has-this" in refuse(monkeypatch, capfd, "~nobody-has-this/runs")


def test_a_file_at_home_is_no_folder_of_runs(monkeypatch, capfd, tmp_path, replaced):
    """`~` reaches the command as it is from `make`, `env` and Python; it is checked before it is expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("x")
    assert "is not a folder of runs" in refuse(monkeypatch, capfd, "~/file")
    assert not replaced
