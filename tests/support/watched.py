"""A page of a real browser whose console must stay free of errors, and which must ask nobody but this machine."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from browsing import available

# Streamlit's client looks for its server below the address of a page first.
PROBES = re.compile(r"/_stcore/(health|host-config)$")


def require_browser() -> None:
    """Skip a module of tests where there is no browser, and say what is missing."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: make test-browser", allow_module_level=True)
    if not available():
        pytest.skip("there is no Chromium: make test-browser", allow_module_level=True)


@contextmanager
def watched(browser: Any, address: str, width: int = 1400) -> Iterator[Any]:
    """Yield a new page; when it is left, fail if anything went wrong on it."""
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.set_default_timeout(60_000)
    troubles = []

    def answered(response: Any) -> None:
        if response.status >= 400 and not PROBES.search(response.url):
            troubles.append(f"{response.status} {response.url}")

    def said(message: Any) -> None:
        if message.type == "error" and "404 (Not Found)" not in message.text:
            troubles.append(message.text)

    def asked(request: Any) -> None:
        if not request.url.startswith((address, address.replace("http", "ws"), "data:", "blob:")):
            troubles.append(f"asked {request.url}")

    page.on("response", answered)
    page.on("console", said)
    page.on("request", asked)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    yield page
    shown = page.get_by_test_id("stException").all_inner_texts()
    page.close()
    assert not troubles
    assert not shown
