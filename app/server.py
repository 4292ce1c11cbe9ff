"""The dashboard's server: what `speed-diagnostics dashboard` runs with Streamlit. The pages are those of main.py."""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import streamlit as st
from starlette.middleware import Middleware
from streamlit import cli_util

from dashboard.access import LOCAL_NAMES, Access
from diagnostics.cli.dashboard import HOSTS_VARIABLE, TOKEN_VARIABLE

PORT = int(st.get_option("server.port"))
ADDRESS = ipaddress.ip_address(str(st.get_option("server.address")))
PATH = f"/{st.get_option('server.baseUrlPath') or ''}"
START_SECONDS = 30


def open_browser() -> None:
    """Open a browser once the server answers."""
    host = "localhost" if ADDRESS.is_unspecified else str(ADDRESS)
    name = f"[{host}]" if ":" in host else host
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            socket.create_connection((host, PORT), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            cli_util.open_browser(f"http://{name}:{PORT}{PATH.rstrip('/')}")
            return


@asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[None]:
    """Open a browser with the start of the server, if one was asked for."""
    if not st.get_option("server.headless"):
        threading.Thread(target=open_browser, daemon=True).start()
    yield


# The token leaves the environment: jobs, which are started from here, have no use for it.
access = Middleware(
    Access,
    names=(*LOCAL_NAMES, *filter(None, os.environ.pop(HOSTS_VARIABLE, "").split(","))),
    addresses=not ADDRESS.is_loopback,
    token=os.environ.pop(TOKEN_VARIABLE, ""),
    cookie=f"speed-diagnostics-{PORT}",
    path=PATH,
)
app = st.App(Path(__file__).with_name("main.py"), middleware=[access], lifespan=lifespan)
