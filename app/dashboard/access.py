"""Who may talk to the dashboard: an ASGI layer before all of it, pages, files, uploads and websockets alike.

The name by which it is addressed must be one of its own. Otherwise a foreign page whose name is made to lead to this
machine (DNS rebinding) would be of the same origin as the dashboard. A plain address is nobody's name: if others may
reach the dashboard, any will do. Where a request names the page that it comes from,
that page must be the dashboard's: not one of another port either. Ports of forwarded connections (``ssh -L``) differ
from the server's and are not looked at but for this.

With a token, a request must bring it: once in the address, thereafter in a cookie that is set then. Cookies know no
ports, so a browser shows it to whatever else the user opens on the same host; it is not the token itself.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
PARAMETER = "token"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Access:
    """Let through what may talk to ``app``, and answer 403 to the rest.

    Parameters
    ----------
    names
        Host names, without ports, by which the dashboard may be addressed.
    addresses
        Whether it may be addressed by any IP address, too.
    token
        What a visitor must bring; empty for none.
    cookie
        The cookie's name, which differs between dashboards of one host.
    path
        The path below which the dashboard is served; browsers show the cookie there.
    """

    def __init__(
        self,
        app: Application,
        *,
        names: Iterable[str] = LOCAL_NAMES,
        addresses: bool = False,
        token: str = "",
        cookie: str = "dashboard",
        path: str = "/",
    ) -> None:
        self.app, self.names, self.addresses = app, frozenset(names), addresses
        self.cookie, self.path = cookie, path
        self.token = token.encode()
        self.proof = hmac.new(self.token, b"cookie", hashlib.sha256).hexdigest() if token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            await self.app(scope, receive, send)
            return
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if len(hosts) != 1 or not self._is_own(_name(hosts[0])):
            await _refuse(scope, send, "This dashboard is not reached by that name: --allow-host would allow it.")
        elif any(not _is_of(origin, hosts[0]) for origin in origins):
            await _refuse(scope, send, "This dashboard answers its own pages only.")
        elif not self.token or self._has_cookie(scope):
            await self.app(_without_origin(scope), receive, send)
        elif scope["type"] == "http" and self._brings_token(scope):
            await self._welcome(scope, send)
        else:
            await _refuse(scope, send, "Open the address with the token that the dashboard's command printed.")

    def _is_own(self, name: str | None) -> bool:
        return name is not None and (name in self.names or (self.addresses and _is_address(name)))

    def _has_cookie(self, scope: Scope) -> bool:
        for text in _values(scope, b"cookie"):
            try:
                cookie = SimpleCookie(text).get(self.cookie)
            except CookieError:
                continue
            if cookie is not None and hmac.compare_digest(cookie.value.encode(), self.proof.encode()):
                return True
        return False

    def _brings_token(self, scope: Scope) -> bool:
        brought = [value for name, value in _query(scope) if name == PARAMETER]
        return len(brought) == 1 and hmac.compare_digest(brought[0].encode(), self.token)

    async def _welcome(self, scope: Scope, send: Send) -> None:
        """Set the cookie, and lead to the same page without the token, whatever path it is served under."""
        rest = urlencode([(name, value) for name, value in _query(scope) if name != PARAMETER])
        headers = {
            "location": f"?{rest}",
            "set-cookie": f"{self.cookie}={self.proof}; Path={self.path}; HttpOnly; SameSite=Lax",
            "cache-control": "no-store",
            "referrer-policy": "no-referrer",
        }
        await _answer(send, 303, headers, "")


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _without_origin(scope: Scope) -> Scope:
    """Leave out the page that a request names, which was looked at.

    Streamlit would compare it with names that it knows, and ask a server on the internet for one of them.
    """
    return {**scope, "headers": [header for header in scope["headers"] if header[0].lower() != b"origin"]}


def _query(scope: Scope) -> list[tuple[str, str]]:
    try:
        return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return []


def _name(host: str) -> str | None:
    """The name in a Host header, without its port; None if there is anything else in it."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises if it is none
        return parts.hostname if parts.netloc == host and "@" not in host else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_of(origin: str, host: str) -> bool:
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


async def _refuse(scope: Scope, send: Send, reason: str) -> None:
    if scope["type"] == "websocket":  # closed before it is accepted, which a server answers by 403
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, 403, {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}, reason)


async def _answer(send: Send, status: int, headers: dict[str, str], body: str) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body.encode()})
