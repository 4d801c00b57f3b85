"""The login page, and how long a client has to wait after wrong passwords."""

from __future__ import annotations

import html
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from xattn.app.serving.start_page import source
from xattn.pictures.design import FONT, VARIABLES

LOGIN, LOGOUT = "/xattn/login", "/xattn/logout"
FREE, FREE_IN_ALL = 3, 20  # wrong tries before the first wait, of one client and of all together
LONGEST, LONGEST_IN_ALL = 900.0, 30.0  # seconds; the second holds up everybody, so it stays short
FORGET = 3600.0  # seconds without a wrong try after which they are forgotten
CLIENTS = 10_000  # remembered at most


@dataclass
class _Tries:
    wrong: int = 0
    last: float = 0.0

    def wait(self, now: float, free: int, longest: float) -> float:
        """Seconds until the next try; doubles with each wrong one."""
        if self.wrong < free:
            return 0.0
        return self.last + min(2.0 ** min(self.wrong - free, 60), longest) - now


@dataclass
class Throttle:
    """Counts wrong passwords by client address and in all.

    A try counts as wrong from its start, so that many at once do not get around the wait; the right
    password takes it back. IPv6 clients count by their network of 64 bits.
    """

    now: Callable[[], float] = time.monotonic
    _clients: OrderedDict[str, _Tries] = field(default_factory=OrderedDict)
    _all: _Tries = field(default_factory=_Tries)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, client: str) -> float:
        """0 if the client may try now, which then counts; else the seconds to wait."""
        with self._lock:
            now, name = self.now(), _network(client)
            self._forget(now)
            tries = self._clients.get(name) or _Tries()
            wait = max(
                tries.wait(now, FREE, LONGEST),
                self._all.wait(now, FREE_IN_ALL, LONGEST_IN_ALL),
            )
            if wait > 0:
                return wait
            for counted in (tries, self._all):
                counted.wrong, counted.last = counted.wrong + 1, now
            self._clients[name] = tries
            self._clients.move_to_end(name)
            return 0.0

    def right(self, client: str) -> None:
        """The try just begun had the right password: it and the client's wrong ones are forgotten."""
        with self._lock:
            tries = self._clients.pop(_network(client), None)
            self._all.wrong = max(0, self._all.wrong - (tries.wrong if tries else 1))

    def _forget(self, now: float) -> None:
        while self._clients:
            oldest = next(iter(self._clients))
            if len(self._clients) < CLIENTS and now - self._clients[oldest].last < FORGET:
                break
            del self._clients[oldest]
        if now - self._all.last >= FORGET:
            self._all.wrong = 0


def _network(client: str) -> str:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if address.version == 6:
        return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return client


def own_path(target: str | None) -> str:
    """``target`` if it is a path and query of this server, else "/": nobody is sent elsewhere."""
    if not target or not target.startswith("/") or len(target) > 4096:
        return "/"
    if target.startswith(("//", "/\\", LOGIN, LOGOUT)) or not target.isprintable():
        return "/"
    try:
        parts = urlsplit(target)
    except ValueError:
        return "/"
    if parts.scheme or parts.netloc or "\\" in parts.path:
        return "/"
    return quote(target, safe="/?&=%+~!*'(),;:@$-._[]")


def login_url(target: str) -> str:
    """The login page that leads back to ``target``, a path and query."""
    target = own_path(target)
    return LOGIN if target == "/" else f"{LOGIN}?next={quote(target, safe='')}"


_STYLE = f"""
:root {{ color-scheme: light dark; {VARIABLES}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem;
  background: var(--ground); color: var(--text); font: 1rem/1.5 {FONT}; }}
main {{ width: 100%; max-width: 22rem; margin-bottom: 12vh; }}
h1 {{ font-size: 1.375rem; font-weight: 600; line-height: 1.25; margin: 0 0 .375rem; }}
p {{ margin: 0 0 1.5rem; }}
label {{ display: block; font-weight: 600; font-size: .875rem; margin-bottom: .375rem; }}
input, button {{ width: 100%; min-height: var(--touch); font: inherit; border-radius: var(--corner); }}
input {{ padding: 0 .75rem; color: inherit; background: var(--panel); border: 1px solid var(--line); }}
input[aria-invalid] {{ border-color: var(--wrong); }}
button {{ margin-top: 1rem; border: 0; background: var(--accent); color: var(--on-accent);
  font-weight: 600; cursor: pointer; }}
button:hover {{ filter: brightness(1.08); }}
input:focus-visible, button:focus-visible, a:focus-visible {{
  outline: 2px solid var(--accent); outline-offset: 2px; }}
a {{ color: inherit; }}
.after {{ margin: 1.25rem 0 0; }}
.wrong {{ color: var(--wrong); margin: .5rem 0 0; font-size: .9375rem; }}
"""
POLICY = (
    f"default-src 'none'; style-src {source(_STYLE)}; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


def _page(title: str, body: str, head: str = "") -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,">{head}<title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def login_page(target: str, problem: str = "") -> str:
    """The form; ``problem`` says why the last try did not count."""
    wrong = f'<p class="wrong" id="wrong" role="alert">{html.escape(problem)}</p>'
    marks = ' aria-invalid="true" aria-describedby="wrong"' if problem else ""
    return _page(
        "Log in - xattn",
        "<h1>xattn viewer</h1><p>This viewer asks for a password.</p>"
        f'<form method="post" action="{html.escape(login_url(target))}">'
        '<label for="password">Password</label>'
        '<input id="password" name="password" type="password" required autofocus '
        f'autocomplete="current-password" maxlength="1024"{marks}>'
        f'{wrong if problem else ""}<button type="submit">Log in</button></form>',
    )


def logout_page() -> str:
    """A button, since a mere link must not end a session."""
    return _page(
        "Log out - xattn",
        "<h1>Log out?</h1><p>This browser then needs the password again. Jobs go on running.</p>"
        f'<form method="post" action="{LOGOUT}"><button type="submit">Log out</button></form>'
        '<p class="after"><a href="/">Back to the viewer</a></p>',
    )


def again_page(target: str) -> str:
    """Opens ``target`` once more from this site: a link elsewhere does not bring the cookie along."""
    target = html.escape(own_path(target))
    return _page(
        "xattn",
        f'<p><a href="{target}">Open the viewer</a></p>',
        f'<meta http-equiv="refresh" content="0; url={target}">',
    )
