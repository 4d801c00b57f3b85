"""Middleware that checks the host name, origin, token and upload size of every request to the viewer.

Streamlit serves ``/media``, ``/component``, ``/_stcore/upload_file`` and other paths without checking that
the request belongs to a session. Therefore, this ASGI middleware checks every request, including
websockets, before it reaches a route:

* ``Host`` must be a name of this server. Otherwise, a foreign site could access the server under its own
  name (DNS rebinding). ``Origin`` must match. Otherwise, a page of a foreign site could open the websocket.
* If there is a token, every path requires a cookie. An address with ``?token=...`` sets the cookie and
  redirects to the same address without the token. All other requests get a 401.
* Headers are added to every response that forbid framing, shared caching and type sniffing.

The start page is Streamlit's own page with the title, colours and address of the viewer.
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

# Without this, the front end of a page such as /train first requests /train/_stcore/health, which is a 404.
_ADDRESS = (
    'window.__streamlit = {BACKEND_BASE_URL: location.origin + "/", '
    'MAIN_PAGE_BASE_URL: location.origin + "/"}'
)
# Each action of the user should add one entry to the history. For one click, Streamlit may add two: the
# parameters of another page and then its address, or the address of a menu and then the page's own
# parameters.
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
def start_page() -> str:
    """The HTML of the start page; parts that are not found in this version of Streamlit are not changed."""
    html = re.sub(r"\s*<link rel=\"service-desc\"[^>]*>", "", _streamlit())
    # Without this, phones leave margins at rounded corners and report no inset for the bar at the bottom.
    html = html.replace("shrink-to-fit=no", "shrink-to-fit=no, viewport-fit=cover")
    return html.replace("<title>Streamlit</title>", _HEAD)


def hash_source(text: str) -> str:
    """The expression that allows an inline script or style, by its hash, in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def policy() -> str:
    """The content security policy of pages, which does not allow loading from or sending to another server.

    The allowed scripts are Streamlit's files, the inline scripts of the page (by their hashes), and
    components, which are loaded as blobs. Inline styles are allowed because Streamlit uses them.
    """
    scripts = re.findall(r"<script>(.*?)</script>", _streamlit() + start_page(), flags=re.DOTALL)
    hashes = " ".join(map(hash_source, dict.fromkeys(scripts)))
    return (
        f"default-src 'self'; script-src 'self' blob: {hashes}; "
        "style-src 'self' 'unsafe-inline' blob:; img-src 'self' data: blob:; "
        "media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
        "worker-src 'self' blob:; frame-src 'self' blob: data:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    )


def routes() -> list[Route]:
    """The routes of the start page and of the pages in ``app/pages``."""
    from xattn.app.state import DEFAULT_PAGE

    names = sorted(name for name in PAGES if name != DEFAULT_PAGE)
    default = Route(f"/{DEFAULT_PAGE}", _default)
    return [*(Route(f"/{name}", _serve) for name in ("", *names)), default]


def _serve(request: Request) -> HTMLResponse:
    return HTMLResponse(start_page(), headers={"Cache-Control": "no-cache"})


def _default(request: Request) -> RedirectResponse:
    """Redirect to ``/``, since Streamlit serves its first page only under this address."""
    query = request.url.query
    return RedirectResponse(f"/?{query}" if query else "/")


LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
LIFETIME = 12 * 3600  # seconds that a browser keeps the cookie
CLOSED = (
    "To open this viewer, use the address with ?token=... that xattn app printed when it started. You need "
    "it only once in each browser."
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
    """The ASGI middleware that checks host name, origin and token, and adds the headers.

    Args:
        token: the access token; with None, every request with a valid host name and origin is accepted.
        loopback: whether the server listens only on the loopback address of this machine.
        names: further valid host names, such as those of a proxy.
        cookie: the name of the cookie. It should contain the port, since all ports of a host share cookies.
        frames: origins whose pages may show the viewer in a frame; none by default.
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
        """The reason why a request is refused because of its host name or origin; None if it is not."""
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self.names or (not self.loopback and _is_address(name))):
            return (
                "This is not a name of this server. If a proxy uses this name, start xattn app with "
                "--allow-host NAME."
            )
        origin = headers.get("origin")
        foreign = origin is not None and _netloc(origin) != hosts[0].lower()
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        site = headers.get("sec-fetch-site", "none")
        if foreign or (changes and site not in ("none", "same-origin")):
            return "Requests from pages of other sites are not allowed."
        return None

    def _entry(self, scope: Scope) -> Response | None:
        """For an address with the token, a redirect that sets the cookie and drops the token; else None."""
        assert self.token is not None
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = "".join(value for name, value in query if name == "token")
        if not _same(given, self.token):
            return None
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        path = "/" + scope["path"].lstrip(
            "/\\"
        )  # so that the redirect cannot lead to another server
        response = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        response.set_cookie(
            self.cookie,
            self.value,
            max_age=LIFETIME,
            httponly=True,
            secure=scope["scheme"] == "https",
            samesite="lax",  # a strict cookie is not sent when the user follows a link from another site
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    def _known(self, headers: Headers) -> bool:
        """Whether the request contains the viewer's cookie."""
        found = (cookie_parser(line).get(self.cookie, "") for line in headers.getlist("cookie"))
        return any(_same(value, self.value) for value in found)


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _with_headers(send: Send, frames: Collection[str]) -> Send:
    """Wrap ``send`` so that it adds the headers; a content security policy set by a route is kept."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in HEADERS.items():
                headers[name] = value
            text = policy()
            if frames:
                del headers["X-Frame-Options"]  # this header cannot allow specific origins
                text = text.replace("frame-ancestors 'none'", f"frame-ancestors {' '.join(frames)}")
            headers.setdefault("Content-Security-Policy", text)
            message["headers"] = headers.raw
        await send(message)

    return sending


async def _answer(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send ``response`` instead of a page. A websocket is refused before it opens, so clients get a 403."""
    if scope["type"] == "http":
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _netloc(origin: str) -> str | None:
    """The host and port of an Origin header in lower case; None if the header is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _host_name(host: str) -> str | None:
    """The name in a Host header, in lower case and without the port; None if the header is malformed."""
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
OF_ONE = MAX_TOTAL + MAX_CLIP_BYTES  # most bytes per session, as much as the live page accepts
OF_ALL = 4 * OF_ONE  # most bytes of all sessions
FILES = 200  # most files per session, since even empty files need memory


class UploadRoom:
    """ASGI middleware that refuses an upload with a 413 if the files of a session, or of all sessions,
    would become too large.

    Streamlit limits the size of a file but not the number of files, and a page can only check the files
    after all of them have arrived.

    Args:
        largest: the largest size of a file in bytes; it is also assumed for an upload without a length.
        of_one: the largest number of bytes per session.
        of_all: the largest number of bytes of all sessions together.
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
        size = min(int(length), self.largest)  # the server accepts only digits as a length
        with self._taken(session, size) as fits:
            if fits:
                await self.app(scope, receive, send)
                return
        refusal = "There is currently no room for more files; remove some, or try again later."
        await PlainTextResponse(refusal, 413)(scope, receive, send)

    @contextmanager
    def _taken(self, session: str, size: int) -> Iterator[bool]:
        """Context manager that reserves room while a file is uploaded; it yields False if there is none."""
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
    """The sizes in bytes of the uploaded files that Streamlit holds, by session."""
    from streamlit.runtime import Runtime, exists

    if not exists():
        return {}
    storage = getattr(Runtime.instance().uploaded_file_mgr, "file_storage", {})
    return {
        name: [len(f.data) for f in list(files.values())] for name, files in list(storage.items())
    }
