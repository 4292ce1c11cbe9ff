"""Opens the dashboard in a headless Chromium: starts its command, drives the browser, and waits for pages."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

START_SECONDS = 60
# Chromium draws the page and sends no requests of its own.
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


def chromium() -> str | None:
    """Return the path of a Chromium of the system; with None Playwright uses its own."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def available() -> bool:
    """Whether there is a Chromium: one of the system, or one that Playwright installed."""
    installed = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache/ms-playwright"))
    return chromium() is not None or any(installed.glob("chromium*"))


@contextmanager
def serving(runs: Path) -> Iterator[str]:
    """Run the dashboard's command over a folder of runs, yield its address, and end it."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diagnostics.cli", "dashboard", str(runs), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("the dashboard does not start") from None
                time.sleep(0.02)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def browsing() -> Iterator[Any]:
    """Yield a headless Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        yield browser
        browser.close()


def settled(page: Any) -> None:
    """Wait until the server has finished with a page."""
    page.wait_for_function("!document.querySelector('[data-testid=stApp][data-test-script-state=running]')")


def go(page: Any, title: str) -> None:
    """Go to another page of the dashboard by its name in the sidebar, and wait for it."""
    before = page.locator("h1").first.inner_text()
    page.get_by_test_id("stSidebarNav").get_by_text(title, exact=True).click()
    page.wait_for_function("b => (document.querySelector('h1')?.innerText ?? b) !== b", arg=before)
    settled(page)
