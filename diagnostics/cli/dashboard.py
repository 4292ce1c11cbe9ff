"""``dashboard``: the Streamlit app over a folder of runs, for this machine alone unless asked otherwise."""

import errno
import ipaddress
import os
import re
import secrets
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from diagnostics.cli.common import RUNS, announce, warn
from diagnostics.cli.options import option
from diagnostics.support.errors import UserError

LOOPBACK = "127.0.0.1"
RUNS_VARIABLE = "SPEED_DIAGNOSTICS_RUNS"  # tells the app which folder
TOKEN_VARIABLE = "SPEED_DIAGNOSTICS_TOKEN"  # tells the server; other users see a command's arguments
HOSTS_VARIABLE = "SPEED_DIAGNOSTICS_HOSTS"  # names by which the server may be addressed, separated by commas
SHOWN, NETWORK = "Dashboard", "Network"  # headings of options
FIRST_PORT, LAST_PORT = 8501, 8600
LAST_OF_ALL = 65535
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
SETTINGS = {
    "browser.gatherUsageStats": "false",
    "server.showEmailPrompt": "false",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "200",
    "logger.hideWelcomeMessage": "true",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "full",
    "theme.light.primaryColor": "#0072B2",
    "theme.dark.primaryColor": "#56B4E9",
}


def dashboard(
    runs: Annotated[Path | None, typer.Argument(help="folder of runs, or one run  [runs]", show_default=False)] = None,
    example: Annotated[bool, option(SHOWN, "--example", help="show the finished example of the package")] = False,
    browser: Annotated[bool, option(SHOWN, help="open a browser")] = True,
    port: Annotated[
        int | None, option(NETWORK, min=1, max=LAST_OF_ALL, help=f"port  [the first free one from {FIRST_PORT}]")
    ] = None,
    host: Annotated[
        str, option(NETWORK, metavar="ADDRESS", help="address to listen at; 0.0.0.0 for all, as containers need it")
    ] = LOOPBACK,
    allow_host: Annotated[
        list[str] | None,
        option(
            NETWORK, metavar="NAME", help="a name by which it may be addressed, such as that of a proxy; repeatable"
        ),
    ] = None,
    base_path: Annotated[
        str, option(NETWORK, metavar="PATH", help="path before its pages, where a proxy serves it below one: /speed")
    ] = "",
    token: Annotated[
        bool | None, option(NETWORK, help="ask visitors for a token; opens no browser  [if others can reach it]")
    ] = None,
) -> None:
    """Show runs in a browser, try policies, and start diagnoses; Ctrl-C ends it.

    Only this machine can reach it, and there every user; with --token only those who have the printed address. With
    --host or --allow-host others can reach it, too, and it has a token unless you say --no-token.
    """
    folder = _folder(runs, example)
    missing = [name for name in ("streamlit", "plotly", "psutil") if find_spec(name) is None]
    if missing:
        raise UserError(f"the dashboard needs {missing[0]}: pip install 'speed-diagnostics[app]'")
    names = _require_names(allow_host or [])
    path = _require_path(base_path)
    address = _require_address(host)
    port = _free_port(address, port)
    closed = address.is_loopback and not names
    guarded = token if token is not None else not closed
    # A browser would be started with the token among its arguments, for all to see.
    headless = guarded or not browser
    command = [sys.executable, "-m", "streamlit", "run", str(_program())]
    command += [f"--server.address={address}", f"--server.port={port}", f"--server.headless={str(headless).lower()}"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    command += [f"--server.baseUrlPath={path}"] if path else []
    environment = os.environ | {RUNS_VARIABLE: folder, HOSTS_VARIABLE: ",".join(names)}
    environment.pop(TOKEN_VARIABLE, None)
    query = ""
    if guarded:
        environment[TOKEN_VARIABLE] = secrets.token_urlsafe(32)
        query = f"/?token={environment[TOKEN_VARIABLE]}"
    if not os.path.exists(folder):
        announce(f"There is no folder {folder} yet: the first run makes it, and until then there is an example.")
    if not closed and not guarded:
        warn(f"everyone who reaches it can read the runs, run models and write to {folder}")
    shown = "the example" if example else f"{runs or RUNS}/"
    place = f"http://{_address_to_visit(address)}:{port}{'/' if path else ''}{path}{query}"
    print(f"Dashboard of {shown}: {place} (Ctrl-C ends it)", flush=True)
    if os.name == "posix":  # replaces this process: what ends it ends the server
        os.execve(command[0], command, environment)
    sys.exit(subprocess.call(command, env=environment))


def _folder(runs: Path | None, example: bool) -> str:
    """Return the folder to show, absolute; it need not be there yet."""
    if example:
        if runs is not None:
            raise UserError("--example shows a folder of its own: leave the folder out")
        from diagnostics.runs.example import example_folder

        return str(example_folder())
    runs = RUNS if runs is None else runs
    try:
        folder = str(runs.expanduser().absolute())
    except RuntimeError as error:  # ~nobody
        raise UserError(f"there is no folder {str(runs)!r}: {error}") from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{str(runs)!r} is not a folder of runs")
    return folder


def _require_names(names: list[str]) -> list[str]:
    """Return host names in lower case; raise UserError for what can be none, such as a pattern or an address."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", name):
            raise UserError(f"--allow-host {name!r} is not a host name: give one without scheme, port and *")
    return [name.lower() for name in names]


def _require_path(path: str) -> str:
    """Return a path without its outer slashes; raise UserError for what is none."""
    path = path.strip("/")
    if path and not re.fullmatch(r"[A-Za-z0-9_~-][A-Za-z0-9_.~-]*(/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)*", path):
        raise UserError(f"--base-path {path!r} is not a path such as /speed")
    return path


def _require_address(host: str) -> Address:
    """Return the address to listen at; raise UserError for a name, which could be of several."""
    try:
        return ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
    except ValueError:
        raise UserError(f"--host {host!r} is not an IP address, such as 127.0.0.1 or 0.0.0.0") from None


def _address_to_visit(address: Address) -> str:
    """Return an address as it stands in a URL; one of all addresses where it listens at all."""
    if address.is_unspecified:
        return LOOPBACK
    return f"[{address}]" if address.version == 6 else str(address)


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


def _free_port(address: Address, asked: int | None) -> int:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    reason = None
    for port in [asked] if asked else range(FIRST_PORT, LAST_PORT + 1):
        try:
            with socket.socket(family) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((str(address), port))
                return port
        except OSError as error:
            reason = error
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise UserError(f"--host {address} is not an address of this machine") from None
    if asked and reason:
        raise UserError(f"port {asked} cannot be used ({reason.strerror}): choose another --port")
    raise UserError(f"no port from {FIRST_PORT} to {LAST_PORT} is free: choose a --port")
