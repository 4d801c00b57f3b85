"""The middleware before every request of the viewer: host names, origins, the token, headers, uploads.

Streamlit serves ``/media``, ``/component``, ``/_stcore/upload_file`` and more without looking at a
session, so this ASGI middleware decides before any of its routes is reached, websockets included:

* ``Host`` has to be a name of this server, or another site could reach it under a name of its own (DNS
  rebinding); ``Origin`` has to be the same, or another site's page could open the websocket.
* With a token every path needs the cookie, which an address with ``?token=...`` is exchanged for once: the
  answer leads to the same address without it. All else is answered 401.
* Every answer gets the headers that keep it out of frames, caches of others and sniffed types.

The start page is Streamlit's own, with our title, colours and address.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import ipaddress
import re
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xattn.app.live.uploads import MAX_CLIP_BYTES, MAX_TOTAL
from xattn.app.state import PAGES
from xattn.pictures.design import DARK, LIGHT

# Without it the front end of a page like /train asks for /train/_stcore/health first, a 404 each time.
_ADDRESS = (
    'window.__streamlit = {BACKEND_BASE_URL: location.origin + "/", '
    'MAIN_PAGE_BASE_URL: location.origin + "/"}'
)
# One action of a person is one entry of the history. For one click Streamlit may push two: another page's
# parameters and then its address, or a menu's address and then the page's own parameters.
_HISTORY = """(() => {
  let acted = false;
  for (const kind of ["pointerdown", "click", "keydown"])
    addEventListener(kind, () => (acted = true), true);
  addEventListener("popstate", () => (acted = false), true);
  const push = history.pushState.bind(history);
  history.pushState = (...entry) => {
    acted ? push(...entry) : history.replaceState(...entry);
    acted = false;
  };
})()"""
_HEAD = f"""<title>xattn</title>
    <meta name="color-scheme" content="light dark" />
    <style>
      body {{ background: {LIGHT.ground}; color: {LIGHT.text}; }}
      @media (prefers-color-scheme: dark) {{
        body {{ background: {DARK.ground}; color: {DARK.text}; }}
      }}
    </style>
    <script>{_ADDRESS}</script>
    <script>{_HISTORY}</script>"""


@functools.cache
def _streamlit() -> str:
    import streamlit

    return (Path(streamlit.__file__).parent / "static" / "index.html").read_text(encoding="utf-8")


@functools.cache
def page() -> str:
    """The HTML; where another version of Streamlit has other marks, they are left as they are."""
    html = re.sub(r"\s*<link rel=\"service-desc\"[^>]*>", "", _streamlit())
    # Or a phone leaves room beside its rounded corners, and tells the bar of pages of none below.
    html = html.replace("shrink-to-fit=no", "shrink-to-fit=no, viewport-fit=cover")
    return html.replace("<title>Streamlit</title>", _HEAD)


def source(text: str) -> str:
    """What a content security policy calls an inline script or style, by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def policy() -> str:
    """The content security policy of pages: nothing is loaded from or sent to another server.

    Scripts are Streamlit's files, the inline ones of the page by their hashes, and components, which come
    as blobs. Streamlit's styles are inline ones.
    """
    scripts = re.findall(r"<script>(.*?)</script>", _streamlit() + page(), flags=re.DOTALL)
    hashes = " ".join(map(source, dict.fromkeys(scripts)))
    return (
        f"default-src 'self'; script-src 'self' blob: {hashes}; "
        "style-src 'self' 'unsafe-inline' blob:; img-src 'self' data: blob:; "
        "media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
        "worker-src 'self' blob:; frame-src 'self' blob: data:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    )


def routes() -> list[Route]:
    """The start page and the pages of ``app/pages``, by their names."""
    from xattn.app.state import DEFAULT_PAGE

    names = sorted(name for name in PAGES if name != DEFAULT_PAGE)
    default = Route(f"/{DEFAULT_PAGE}", _default)
    return [*(Route(f"/{name}", _serve) for name in ("", *names)), default]


def _serve(request: Request) -> HTMLResponse:
    return HTMLResponse(page(), headers={"Cache-Control": "no-cache"})


def _default(request: Request) -> RedirectResponse:
    """Streamlit knows its first page by the address ``/`` alone."""
    query = request.url.query
    return RedirectResponse(f"/?{query}" if query else "/")


LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
LIFETIME = 12 * 3600  # seconds that a browser keeps the cookie
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
        frames: origins whose pages may show the viewer in a frame; without any, no page may.
        cookie: name of the cookie; cookies are shared by all ports of a host, so it holds the port.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None = None,
        loopback: bool = True,
        names: Collection[str] = (),
        cookie: str = "xattn_session",
        frames: Collection[str] = (),
    ) -> None:
        self.app, self.token, self.loopback, self.cookie = app, token, loopback, cookie
        self.frames = frames
        self.names = {name.lower().rstrip(".") for name in names} | LOCAL
        if not loopback:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.value = hmac.new((token or "").encode(), cookie.encode(), hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = _with_headers(send, self.frames)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(PlainTextResponse(refusal, 403), scope, receive, send)
        elif self.token is None:
            await self.app(scope, receive, send)
        elif (entry := self._entry(scope)) is not None:
            await entry(scope, receive, send)
        elif self._known(headers):
            await self.app(scope, receive, send)
        else:
            closed = PlainTextResponse(CLOSED, 401, {"Cache-Control": "no-store"})
            await _answer(closed, scope, receive, send)

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
        if not _same(given, self.token):
            return None
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        path = "/" + scope["path"].lstrip("/\\")  # of this server
        response = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        response.set_cookie(
            self.cookie,
            self.value,
            max_age=LIFETIME,
            httponly=True,
            secure=scope["scheme"] == "https",
            samesite="lax",  # a strict one would be left out behind a link of another site
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    def _known(self, headers: Headers) -> bool:
        """Whether the request has our cookie."""
        found = (cookie_parser(line).get(self.cookie, "") for line in headers.getlist("cookie"))
        return any(_same(value, self.value) for value in found)


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _with_headers(send: Send, frames: Collection[str]) -> Send:
    """``send`` that adds the headers; a policy that a route has set itself stays."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in HEADERS.items():
                headers[name] = value
            text = policy()
            if frames:
                del headers["X-Frame-Options"]  # it can name no origin
                text = text.replace("frame-ancestors 'none'", f"frame-ancestors {' '.join(frames)}")
            headers.setdefault("Content-Security-Policy", text)
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


# ---------------------------------------------------------------------- uploads


PATH = "/_stcore/upload_file/"
OF_ONE = MAX_TOTAL + MAX_CLIP_BYTES  # bytes of a session: what the live page takes
OF_ALL = 4 * OF_ONE
FILES = 200  # of a session; empty ones take room, too


class UploadRoom:
    """ASGI middleware that refuses an upload (413) for which there is no room.

    Streamlit limits the size of a file but not the number of files, and a page sees them only once all of
    them have arrived.

    Args:
        largest: bytes of a file, which one without a length counts as.
    """

    def __init__(
        self, app: ASGIApp, largest: int, of_one: int = OF_ONE, of_all: int = OF_ALL
    ) -> None:
        self.app, self.largest = app, largest
        self.of_one, self.of_all = max(of_one, largest), max(of_all, largest)
        self._coming: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "PUT" or PATH not in scope["path"]:
            await self.app(scope, receive, send)
            return
        session = scope["path"].rpartition(PATH)[2].partition("/")[0]
        length = Headers(scope=scope).get("content-length", str(self.largest))
        size = min(int(length), self.largest)  # the server takes no other length than digits
        with self._taken(session, size) as fits:
            if fits:
                await self.app(scope, receive, send)
                return
        refusal = "There is no room for more files now; remove some, or try again later."
        await PlainTextResponse(refusal, 413)(scope, receive, send)

    @contextmanager
    def _taken(self, session: str, size: int) -> Iterator[bool]:
        """Hold room while a file comes; False if there is none."""
        with self._lock:
            held = _held()
            sizes = {
                name: [*held.get(name, ()), *self._coming.get(name, ())]
                for name in {*held, *self._coming, session}
            }
            own = sizes[session]
            total = sum(map(sum, sizes.values()))
            fits = len(own) < FILES and sum(own) + size <= self.of_one
            fits = fits and total + size <= self.of_all
            if fits:
                self._coming.setdefault(session, []).append(size)
        try:
            yield fits
        finally:
            if fits:
                with self._lock:
                    self._coming[session].remove(size)
                    if not self._coming[session]:
                        del self._coming[session]


def _held() -> dict[str, list[int]]:
    """Bytes of the files that are there, by session."""
    from streamlit.runtime import Runtime, exists

    if not exists():
        return {}
    storage = getattr(Runtime.instance().uploaded_file_mgr, "file_storage", {})
    return {
        name: [len(f.data) for f in list(files.values())] for name, files in list(storage.items())
    }
