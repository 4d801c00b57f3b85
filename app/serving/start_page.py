"""The page that starts Streamlit's front end: Streamlit's own, with our title, colours and address."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Route

from xattn.app.pages import PAGES
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
_NOSCRIPT = "<noscript><p>The viewer needs JavaScript.</p></noscript>"


@functools.cache
def _streamlit() -> str:
    import streamlit

    return (Path(streamlit.__file__).parent / "static" / "index.html").read_text(encoding="utf-8")


@functools.cache
def page() -> str:
    """The HTML; where another version of Streamlit has other marks, they are left as they are."""
    html = re.sub(r"<!--.*?-->", "", _streamlit(), flags=re.DOTALL)
    html = re.sub(r"\s*<link rel=\"service-desc\"[^>]*>", "", html)
    html = re.sub(r"<noscript>.*?</noscript>", _NOSCRIPT, html, flags=re.DOTALL)
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
