"""The dashboard in a browser, as others reach it: below a path, and with its token."""

import re

import pytest

from diagnostics.runs.example import example_folder
from tests.support.server import Server

pytest.importorskip("playwright")
browsing = pytest.importorskip("browsing")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not browsing.available(), reason="there is no Chromium"),
]

# Opened at one of its pages, Streamlit tries whether that is its root.
TRIED = tuple(f"/speed/cutoff/_stcore/{name}" for name in ("health", "host-config"))


def test_below_a_path_and_with_a_token_every_page_works():
    server = Server(example_folder(), "--host=0.0.0.0", "--base-path=/speed")
    troubles, failed = [], []
    try:
        with browsing.browsing() as browser:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
            page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
            page.goto(server.said)
            page.locator("h1").first.wait_for()
            browsing.settled(page)
            assert re.fullmatch(rf"http://127.0.0.1:{server.port}/speed/?(\?.*)?", page.url)
            assert "token" not in page.url
            browsing.go(page, "Cutoff")
            assert page.url.partition("?")[0] == f"http://127.0.0.1:{server.port}/speed/cutoff"
            page.locator(".js-plotly-plot .main-svg").first.wait_for()
            page.reload()
            page.locator(".js-plotly-plot .main-svg").first.wait_for()
            browsing.settled(page)
    finally:
        server.close()
    assert [url for url in failed if not url.endswith(TRIED)] == []
    assert [text for text in troubles if "the server responded with a status of 404" not in text] == []
