"""``dashboard``: the Streamlit app over a folder of runs, for this machine alone."""

import os
import secrets
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from diagnostics.cli.common import RUNS
from diagnostics.support.errors import UserError

HOST = "127.0.0.1"
RUNS_VARIABLE = "SPEED_DIAGNOSTICS_RUNS"  # tells the app which folder
TOKEN_VARIABLE = "SPEED_DIAGNOSTICS_TOKEN"  # tells the server; other users see a command's arguments
FIRST_PORT, LAST_PORT = 8501, 8600
SETTINGS = {
    "server.address": HOST,
    "browser.gatherUsageStats": "false",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "200",
    "logger.hideWelcomeMessage": "true",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "full",
    "theme.light.primaryColor": "#0072B2",
    "theme.dark.primaryColor": "#56B4E9",
}


def dashboard(
    runs: Annotated[Path, typer.Argument(help="folder of runs, or one run")] = RUNS,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port  [the first free one from 8501]")] = None,
    browser: Annotated[bool, typer.Option(help="open a browser")] = True,
    token: Annotated[
        bool, typer.Option("--token", help="ask for a token, for a machine with other users; opens no browser")
    ] = False,
) -> None:
    """Show runs in a browser, try policies, and start diagnoses. Only this machine can reach it; Ctrl-C ends it.

    Every user of this machine can reach it; with --token only those who have the printed address.
    """
    try:
        folder = str(runs.expanduser().absolute())
    except RuntimeError as error:  # ~nobody
        raise UserError(f"there is no folder {str(runs)!r}: {error}") from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{str(runs)!r} is not a folder of runs")
    missing = [name for name in ("streamlit", "plotly", "psutil") if find_spec(name) is None]
    if missing:
        raise UserError(f"the dashboard needs {missing[0]}: pip install 'speed-diagnostics[app]'")
    port = _free_port(port)
    # A browser would be started with the token among its arguments, for all to see.
    headless = token or not browser
    command = [sys.executable, "-m", "streamlit", "run", str(_program()), f"--server.port={port}"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    command.append(f"--server.headless={str(headless).lower()}")
    environment = os.environ | {RUNS_VARIABLE: folder}
    environment.pop(TOKEN_VARIABLE, None)
    address = f"http://{HOST}:{port}"
    if token:
        environment[TOKEN_VARIABLE] = secrets.token_urlsafe(32)
        address += f"/?token={environment[TOKEN_VARIABLE]}"
    print(f"dashboard: {address}", flush=True)
    if os.name == "posix":  # replaces this process: what ends it ends the server
        os.execve(command[0], command, environment)
    sys.exit(subprocess.call(command, env=environment))


def _program() -> Path:
    """Return the path of the app: beside this package in a checkout, else in its own installed package."""
    checkout = Path(__file__).parents[2] / "app" / "server.py"
    if checkout.is_file() and (checkout.parent / "dashboard").is_dir():
        return checkout
    installed = find_spec("speed_diagnostics_app")
    folders = list(installed.submodule_search_locations or []) if installed else []
    if not folders:
        raise UserError("this installation has no dashboard: install speed-diagnostics anew")
    return Path(folders[0]) / "server.py"


def _free_port(asked: int | None) -> int:
    for port in [asked] if asked else range(FIRST_PORT, LAST_PORT + 1):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((HOST, port))
                return port
            except OSError as error:
                reason = error.strerror
    if asked:
        raise UserError(f"port {asked} cannot be used ({reason}): choose another --port")
    raise UserError(f"no port from {FIRST_PORT} to {LAST_PORT} is free: choose a --port")
