"""Who reaches the dashboard: the real server, attacked by raw requests over loopback."""

import re
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.server import Server

pytest.importorskip("streamlit")

from dashboard.access import Access


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("runs"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("runs"), "--token")
    yield running
    running.close()


def test_its_own_pages_are_answered(server):
    assert server.said == f"http://127.0.0.1:{server.port}"
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        host = f"{name}:{server.port}"
        assert server.ask(host=host)[0] == 200
        assert server.websocket(f"Origin: http://{host}", host=host) == 101
    assert server.websocket() == 101  # a program of this machine, which names no page
    forwarded = "localhost:9000"  # by ssh -L 9000:localhost:PORT
    assert server.websocket(f"Origin: http://{forwarded}", host=forwarded) == 101


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_it_listens_at_one_address(server):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), 2)


@pytest.mark.parametrize(
    "name",
    [
        "evil.com",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "evil.com@localhost",
        "localhost@evil.com",
        "0.0.0.0",
        "*",
    ],
)
def test_foreign_names_are_refused(server, name):
    """DNS rebinding: the page and the dashboard are of one name, which is not the dashboard's."""
    host = f"{name}:{server.port}"
    assert server.websocket(f"Origin: http://{host}", host=host) == 403
    for path in ("/", "/quality", "/_stcore/health", "/_stcore/host-config", "/static/x"):
        assert server.ask(path, host=host)[0] == 403
    assert server.ask("/_stcore/upload_file/a/b", f"Origin: http://{host}", method="PUT", host=host)[0] == 403


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:1", "http://127.0.0.1", "http://evil.com", "null", "file://", "http://localhost", ""],
)
def test_other_pages_are_refused(server, origin):
    assert server.websocket(f"Origin: {origin}") == 403
    assert server.ask("/", f"Origin: {origin}")[0] == 403


def test_requests_that_do_not_say_one_name_are_refused(server):
    own = f"Host: 127.0.0.1:{server.port}"
    assert server.ask("/", own, "Host: evil.com")[0] in (400, 403)
    assert server.websocket(own, host="evil.com") in (400, 403)
    assert server.ask(host="")[0] in (400, 403)
    assert server.ask(host="localhost:x")[0] == 403
    assert server.websocket("Origin: http://evil.com", f"Origin: http://127.0.0.1:{server.port}") in (400, 403)


def test_without_its_token_nothing_is_shown_or_done(guarded):
    for path in ("/", "/quality", "/_stcore/health", "/_stcore/host-config", "/media/x", "/?token=", "/?token=x"):
        status, text = guarded.ask(path)
        assert status == 403
        assert "streamlit" not in text.lower()
    token = guarded.said.partition("?token=")[2]
    for cookie in ("", "x", token):
        assert guarded.websocket(f"Cookie: speed-diagnostics-{guarded.port}={cookie}") == 403
    assert guarded.websocket() == 403
    assert guarded.websocket(path=f"/_stcore/stream?token={token}") == 403
    assert guarded.ask("/_stcore/upload_file/a/b", method="PUT")[0] == 403
    assert guarded.ask(f"/?token={token}", host=f"evil.com:{guarded.port}")[0] == 403


def test_with_its_token_it_is_as_without(guarded):
    token = guarded.said.partition("?token=")[2]
    assert len(token) >= 43
    status, text = guarded.ask(f"/quality?run=a%20b&token={token}")
    assert status == 303
    assert "\r\nlocation: ?run=a+b\r\n" in text
    assert token not in text
    cookie = re.search(r"\r\nset-cookie: ([^;]+); (.*)\r\n", text)
    assert {"HttpOnly", "SameSite=Lax"} <= set(cookie[2].split("; "))
    kept = f"Cookie: other=1; {cookie[1]}"
    assert guarded.ask("/quality?run=a+b", kept)[0] == 200
    assert guarded.websocket(kept, f"Origin: http://127.0.0.1:{guarded.port}") == 101
    assert guarded.websocket(kept, "Origin: http://localhost:1") == 403


def test_other_users_do_not_see_the_token(guarded):
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("there is no /proc")
    token = guarded.said.partition("?token=")[2]
    assert token.encode() not in Path(f"/proc/{guarded.process.pid}/cmdline").read_bytes()


def test_tokens_differ():
    def proof(token):
        return Access(None, token=token).proof

    assert proof("a") != proof("b")
    assert proof("") == ""


# --- For others than this machine ---


def own_address():
    """An address of this machine by which others reach it."""
    found = [a.address for one in psutil.net_if_addrs().values() for a in one if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), None)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """For all, below a path, by one name; without a token, whose work others test."""
    options = ("--host=0.0.0.0", "--no-token", "--allow-host=Box.example", "--base-path=/speed")
    running = Server(tmp_path_factory.mktemp("runs"), *options)
    yield running
    running.close()


def test_by_any_address_and_by_the_names_given(opened):
    for name in ("127.0.0.1", "localhost", "[::1]", "10.1.2.3", "[fe80::1]", "box.example", "BOX.example"):
        host = f"{name}:{opened.port}"
        assert opened.ask("/speed/", host=host)[0] == 200
        assert opened.websocket(f"Origin: http://{host}", host=host, path="/speed/_stcore/stream") == 101
    # Behind a proxy that has the certificate.
    proxied = {"host": "box.example", "path": "/speed/_stcore/stream"}
    assert opened.websocket("Origin: https://box.example", **proxied) == 101


@pytest.mark.parametrize("name", ["evil.com", "box.example.evil.com", "10.1.2.3.evil.com", "0x7f.1", "1234", "*", ""])
def test_by_no_other_name(opened, name):
    """Names can be made to lead here; an address cannot."""
    host = f"{name}:{opened.port}"
    assert opened.ask("/speed/", host=host)[0] == 403
    assert opened.websocket(f"Origin: http://{host}", host=host, path="/speed/_stcore/stream") == 403


def test_pages_of_others_are_refused_there_too(opened):
    host = f"10.1.2.3:{opened.port}"
    for origin in ("http://evil.com", f"http://10.1.2.4:{opened.port}", "http://10.1.2.3", "null"):
        assert opened.websocket(f"Origin: {origin}", host=host, path="/speed/_stcore/stream") == 403


def test_others_reach_it(opened):
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but its own")
    opened.address = address
    try:
        assert opened.ask("/speed/", host=f"{address}:{opened.port}")[0] == 200
    finally:
        opened.address = "127.0.0.1"


def test_below_a_path(opened):
    assert opened.said == f"http://127.0.0.1:{opened.port}/speed"
    assert opened.ask("/speed/quality")[0] == 200
    assert opened.ask("/quality")[0] == 404
    assert opened.ask("/speed/_stcore/health")[0] == 200


def test_others_need_a_token_unless_it_was_declined(tmp_path):
    server = Server(tmp_path, "--host=0.0.0.0", "--base-path=speed")
    try:
        assert server.ask("/speed/")[0] == 403
        address, _, token = server.said.partition("?token=")
        assert address == f"http://127.0.0.1:{server.port}/speed/"
        status, text = server.ask(f"/speed/?token={token}")
        assert status == 303
        assert "\r\nlocation: ?\r\n" in text
        cookie = re.search(r"\r\nset-cookie: ([^;]+); (.*)\r\n", text)
        assert "Path=/speed" in cookie[2].split("; ")
        kept = f"Cookie: {cookie[1]}"
        assert server.ask("/speed/", kept)[0] == 200
        assert server.websocket(kept, path="/speed/_stcore/stream") == 101
        assert server.websocket(path="/speed/_stcore/stream") == 403
    finally:
        server.close()
