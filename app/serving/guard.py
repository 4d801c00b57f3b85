"""The middleware before every request of the viewer: host names, origins, the token, headers.

Streamlit serves ``/media``, ``/component``, ``/_stcore/upload_file`` and more without looking at a
session, so this ASGI middleware decides before any of its routes is reached, websockets included:

* ``Host`` has to be a name of this server, or another site could reach it under a name of its own (DNS
  rebinding); ``Origin`` has to be the same, or another site's page could open the websocket.
* With a token every path needs the cookie, which an address with ``?token=...`` is exchanged for once: the
  answer leads to the same address without it. All else is answered 401.
* Every answer gets the headers that keep it out of frames, caches of others and sniffed types.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Collection
from urllib.parse import parse_qsl, urlencode, urlsplit

from itsdangerous import BadSignature, TimestampSigner
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xattn.app.serving.start_page import policy

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
LIFETIME = 12 * 3600  # seconds that a cookie is good for
CLOSED = (
    "This viewer opens by the address with ?token=... that xattn app printed when it started, once in "
    "each browser."
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


class Guard:
    """The middleware.

    Args:
        token: None lets everybody in who passes the checks of names and origins.
        loopback: the server listens on this machine's own address alone.
        names: further host names, of a proxy.
        cookie: name of the cookie; cookies are shared by all ports of a host, so it holds the port.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None = None,
        loopback: bool = True,
        names: Collection[str] = (),
        cookie: str = "xattn_session",
    ) -> None:
        self.app, self.token, self.loopback, self.cookie = app, token, loopback, cookie
        self.names = {name.lower().rstrip(".") for name in names} | LOCAL
        if not loopback:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.signer = TimestampSigner(token or "", salt=cookie, digest_method=hashlib.sha256)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = _with_headers(send)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(PlainTextResponse(refusal, 403), scope, receive, send)
        elif self.token is None:
            await self.app(scope, receive, send)
        elif (entry := self._entry(scope)) is not None:
            await entry(scope, receive, send)
        elif (left := self._left(headers)) <= 0:
            closed = PlainTextResponse(CLOSED, 401, {"Cache-Control": "no-store"})
            await _answer(closed, scope, receive, send)
        elif scope["type"] == "websocket":  # it ends with its cookie
            try:
                await asyncio.wait_for(self.app(scope, receive, send), left)
            except asyncio.TimeoutError:
                await send({"type": "websocket.close", "code": 1008, "reason": "the cookie is old"})
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> str | None:
        """Why a request that names another host, or comes from another site, is not answered."""
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self.names or (not self.loopback and _is_address(name))):
            return (
                "This server is not known by that name. Start xattn app with --allow-host NAME if "
                "a proxy uses it."
            )
        origin = headers.get("origin")
        foreign = origin is not None and _netloc(origin) != hosts[0].lower()
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        site = headers.get("sec-fetch-site", "none")
        if foreign or (changes and site not in ("none", "same-origin")):
            return "Requests from pages of other sites are refused."
        return None

    def _entry(self, scope: Scope) -> Response | None:
        """The cookie for an address with the token, and the way to the same address without it."""
        assert self.token is not None
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = "".join(value for name, value in query if name == "token")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode()):
            return None
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        path = "/" + scope["path"].lstrip("/\\")  # of this server
        response = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        response.set_cookie(
            self.cookie,
            self.signer.sign(b"in").decode(),
            max_age=LIFETIME,
            httponly=True,
            secure=scope["scheme"] == "https",
            samesite="lax",  # a strict one would be left out behind a link of another site
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    def _left(self, headers: Headers) -> float:
        """Seconds that the request's cookie is still good for; 0 without one of ours."""
        for line in headers.getlist("cookie"):
            value = cookie_parser(line).get(self.cookie, "").encode("utf-8", "replace")
            try:
                _, made = self.signer.unsign(value, max_age=LIFETIME, return_timestamp=True)
            except BadSignature:
                continue
            return made.timestamp() + LIFETIME - time.time()
        return 0.0


def _with_headers(send: Send) -> Send:
    """``send`` that adds the headers; a policy that a route has set itself stays."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Content-Security-Policy", policy())
            message["headers"] = headers.raw
        await send(message)

    return sending


async def _answer(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """An answer instead of the page; a websocket is refused before it opens, which a client sees as 403."""
    if scope["type"] == "http":
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _netloc(origin: str) -> str | None:
    """Host and port of an Origin header, lower case; None if it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _host_name(host: str) -> str | None:
    """The name in a Host header, lower case and without port; None if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
        name = parts.hostname
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or "@" in host or not name:
        return None
    return name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
