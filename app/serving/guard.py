"""The middleware before every request of the viewer: host names, origins, the password, headers.

Streamlit serves ``/media``, ``/component``, ``/_stcore/upload_file`` and more without looking at a
session, so this ASGI middleware decides before any of its routes is reached, websockets included:

* ``Host`` has to be a name of this server, or another site could reach it under a name of its own (DNS
  rebinding); ``Origin`` has to be the same, or another site's page could open the websocket.
* With a password every path but the login page needs the cookie. Pages redirect to the login page, all
  else is answered 401; a session that ends takes its open websockets with it.
* Every answer gets the headers that keep it out of frames, caches of others and sniffed types.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xattn.app.serving.login import (
    LOGIN,
    LOGOUT,
    POLICY,
    Throttle,
    again_page,
    login_page,
    login_url,
    logout_page,
    own_path,
)
from xattn.app.serving.password import LIFETIME, Password
from xattn.app.serving.start_page import policy

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
FORM_BYTES = 8192

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
        password: None lets everybody in who passes the checks of names and origins.
        loopback: the server listens on this machine's own address alone.
        names: further host names, of a proxy.
        cookie: name of the cookie; cookies are shared by all ports of a host, so it holds the port.
    """

    def __init__(
        self,
        app: ASGIApp,
        password: Password | None = None,
        loopback: bool = True,
        names: Collection[str] = (),
        cookie: str = "xattn_session",
        throttle: Throttle | None = None,
    ) -> None:
        self.app, self.password, self.loopback, self.cookie = app, password, loopback, cookie
        self.names = {name.lower().rstrip(".") for name in names} | LOCAL
        if not loopback:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.throttle = throttle or Throttle()
        self._open: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = _with_headers(send)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(PlainTextResponse(refusal, 403), scope, receive, send)
        elif self.password is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == LOGIN:
            await (await self._login(scope, headers, receive))(scope, receive, send)
        else:
            session = self._session(headers)
            if session is None:
                await _answer(self._closed(scope, headers), scope, receive, send)
            elif scope["type"] == "websocket":
                await self._websocket(session, scope, receive, send)
            elif scope["path"] == LOGOUT:
                await (await self._logout(session, scope))(scope, receive, send)
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

    def _session(self, headers: Headers) -> tuple[str, int] | None:
        assert self.password is not None
        for line in headers.getlist("cookie"):
            found = self.password.session(cookie_parser(line).get(self.cookie))
            if found is not None:
                return found
        return None

    def _closed(self, scope: Scope, headers: Headers) -> Response:
        """The answer without a session: the login page for a page, 401 for all else."""
        is_page = (
            scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
            and "text/html" in headers.get("accept", "")
            and headers.get("sec-fetch-dest", "document") == "document"
        )
        if not is_page:
            return _private(PlainTextResponse("Log in first.", 401))
        target = _target(scope)
        if headers.get("sec-fetch-site") == "cross-site":
            return _private(HTMLResponse(again_page(target)))
        return _private(RedirectResponse(login_url(target), 303))

    async def _login(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        assert self.password is not None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        target = own_path(query.get("next", ["/"])[0])
        if scope["method"] in ("GET", "HEAD"):
            if self._session(headers) is not None:
                return _private(RedirectResponse(target, 303))
            return _private(HTMLResponse(login_page(target)))
        if scope["method"] != "POST":
            return _no_method()
        form = await _form(receive)
        if form is None:
            return _private(PlainTextResponse("That is more than a password.", 413))
        client = scope["client"][0] if scope.get("client") else ""
        wait = self.throttle.begin(client)
        if wait > 0:
            seconds = math.ceil(wait)
            told = f"{seconds} seconds" if seconds < 120 else f"{math.ceil(seconds / 60)} minutes"
            page = login_page(target, f"Too many wrong passwords; wait {told}, then try again.")
            return _private(HTMLResponse(page, 429, {"Retry-After": str(seconds)}))
        if not await asyncio.to_thread(self.password.check, form.get("password", [""])[0]):
            return _private(HTMLResponse(login_page(target, "That is not the password."), 403))
        self.throttle.right(client)
        response = RedirectResponse(target, 303)
        self._set_cookie(response, scope, self.password.cookie(), LIFETIME)
        return _private(response)

    async def _logout(self, session: tuple[str, int], scope: Scope) -> Response:
        assert self.password is not None
        if scope["method"] in ("GET", "HEAD"):
            return _private(HTMLResponse(logout_page()))
        if scope["method"] != "POST":
            return _no_method()
        try:
            await asyncio.to_thread(self.password.ended.add, session[0], session[1])
        except OSError as error:
            print(
                f"warning: {error.strerror}; sessions that logged out stay logged out only until the "
                "server stops",
                file=sys.stderr,
            )
        for ended in self._open.pop(session[0], ()):
            ended.set()
        response = RedirectResponse(LOGIN, 303)
        self._set_cookie(response, scope, "", 0)
        return _private(response)

    def _set_cookie(self, response: Response, scope: Scope, value: str, seconds: int) -> None:
        response.set_cookie(
            self.cookie,
            value,
            max_age=seconds,
            httponly=True,
            secure=scope["scheme"] == "https",
            samesite="strict",
        )

    async def _websocket(
        self, session: tuple[str, int], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """A connection that ends with its session, be it by time or by logging out."""
        ended = asyncio.Event()
        self._open[session[0]].add(ended)
        page = asyncio.ensure_future(self.app(scope, receive, send))
        end = asyncio.ensure_future(ended.wait())
        try:
            await asyncio.wait(
                {page, end},
                timeout=session[1] - time.time(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if page.done():
                page.result()
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": "logged out"})
        finally:
            for task in (page, end):
                task.cancel()
            await asyncio.gather(page, end, return_exceptions=True)
            if events := self._open.get(session[0]):
                events.discard(ended)
                if not events:
                    del self._open[session[0]]


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


def _private(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    response.headers["Content-Security-Policy"] = POLICY
    return response


def _no_method() -> Response:
    return _private(PlainTextResponse("GET or POST.", 405, {"Allow": "GET, HEAD, POST"}))


async def _answer(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """An answer instead of the page; a websocket is refused before it opens, which a client sees as 403."""
    if scope["type"] == "http":
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


async def _form(receive: Receive) -> dict[str, list[str]] | None:
    """The fields of a small form; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return {}
        body += message.get("body", b"")
        if len(body) > FORM_BYTES:
            return None
        if not message.get("more_body"):
            break
    try:
        return parse_qs(body.decode("ascii"), max_num_fields=8)
    except ValueError:
        return {}


def _target(scope: Scope) -> str:
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope["query_string"]
    return (path + (b"?" + query if query else b"")).decode("latin-1")


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
