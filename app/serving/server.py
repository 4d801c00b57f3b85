"""The server of ``xattn app``: one process with our routes in front of Streamlit's ASGI application."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import ipaddress
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from xattn.runtime.names import reason

BACKLOG = 128
VARIABLE = "XATTN_APP_TOKEN"
STOP_SECONDS = 3  # how long open pages may hold up the end of the server


@dataclass(frozen=True)
class Address:
    """Where to listen; ``port`` 0 takes any free port."""

    host: str = "127.0.0.1"
    port: int = 8501

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_installed() -> None:
    """Raise a one-line ValueError if a package is missing, without importing Streamlit."""
    if sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"app: Streamlit's server needs Python 3.11 or newer; this is {version}")
    needed = ("streamlit", "altair", "pandas", "pyarrow", "duckdb")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'app: {", ".join(missing)} missing; run: pip install "xattn[app]"')
    if importlib.util.find_spec("streamlit.starlette") is None:
        raise ValueError('app: this streamlit is too old; run: pip install -U "xattn[app]"')


def token_of(address: Address, no_token: bool) -> str | None:
    """The access token: the token in the environment, else a random one if the viewer is open to a
    network, else None."""
    given = os.environ.get(VARIABLE)
    if given is not None and no_token:
        raise ValueError(f"no_token: got together with {VARIABLE}; give one of the two")
    if given is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{20,200}", given):
        raise ValueError(
            f"{VARIABLE}: got {len(given)} characters; give 20 to 200 letters and digits, such as "
            f"{secrets.token_urlsafe(24)}"
        )
    if no_token and not address.loopback:
        print(
            f"warning: host: everybody who can reach {address.host}:{address.port} sees all packs of the "
            "root; training is off",
            file=sys.stderr,
        )
    return given or (None if no_token or address.loopback else secrets.token_urlsafe(24))


def bind(address: Address) -> socket.socket:
    """A listening socket; a taken port or an address of another machine is a one-line ``ValueError``."""
    if not 0 <= address.port <= 65535:
        raise ValueError(f"port: got {address.port}; give 1 to 65535, or 0 for any free one")
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" serves IPv4, too
        return socket.create_server(where, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port: {address.port} is taken, perhaps by another xattn app; give another --port"
            ) from None
        why, *_ = reason(error).partition(" (while")  # create_server adds the address once more
        raise ValueError(
            f"host: cannot listen on {address.host!r}, port {address.port} ({why}); give "
            f"127.0.0.1, or another --port"
        ) from None


def url(host: str, port: int) -> str:
    """The URL that a browser on this machine opens."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def streamlit_options(address: Address, upload_mb: int, framed: bool = False) -> dict[str, Any]:
    """Streamlit's configuration, which overrides a user's own ``config.toml``."""
    from xattn.app.components.theme import CONFIG

    return {
        **CONFIG,
        "server.address": address.host,
        "server.port": address.port,
        "server.baseUrlPath": "",
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        # Frames of other sites get no cookies; the guard's check of origins is left.
        "server.enableXsrfProtection": not framed,
        "server.enableCORS": True,  # cross-origin requests are refused
        "server.xsrfCookieSameSite": "strict",
        "server.enableStaticServing": False,
        "server.enableAgentApi": False,
        "server.scriptHealthCheckEnabled": False,
        "server.maxUploadSize": upload_mb,
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": False,
        "client.showSidebarNavigation": True,
        "logger.level": "error",
        "logger.hideWelcomeMessage": True,
        "global.developmentMode": False,
    }


def application(
    address: Address, upload_mb: int = 50, ready: Callable[[], None] = lambda: None, **options: Any
) -> Any:
    """The ASGI application; ``state.configure`` has to come first.

    Args:
        ready: called once the application runs and the server handles Ctrl-C.
        options: options of ``guard.Guard``: ``token``, ``names``, ``frames``.
    """
    from starlette.middleware import Middleware
    from streamlit.starlette import App
    from streamlit.web.bootstrap import load_config_options

    from xattn.app import main, scratch, state
    from xattn.app.serving import guard, routes

    load_config_options(streamlit_options(address, upload_mb, bool(options.get("frames"))))
    before = Middleware(
        guard.Guard, loopback=address.loopback, cookie=f"xattn_session_{address.port}", **options
    )

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(_quiet)
        ready()
        try:
            yield
        finally:
            scratch.clean()

    room = Middleware(guard.UploadRoom, largest=upload_mb << 20)
    return App(
        state.SCRIPT,
        routes=[*guard.routes(), *routes.routes()],
        middleware=[before, room],
        lifespan=lifespan,
        on_script_error=main.show_error,
    )


def _quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Do not log browsers that disconnect in the middle of a response."""
    if not isinstance(context.get("exception"), ConnectionError):
        loop.default_exception_handler(context)


def serve(
    settings: Any,
    address: Address,
    upload_mb: int = 50,
    token: str | None = None,
    names: tuple[str, ...] = (),
    frames: tuple[str, ...] = (),
) -> None:
    """Run until Ctrl-C or SIGTERM; prints the address once the server responds.

    Args:
        settings: ``state.Settings`` for the pages.
        token: the access token; one from the environment is not printed.
        names: host names of a proxy before this server, whose ``X-Forwarded-*`` headers are then trusted.
        frames: origins whose pages may show the viewer in a frame.
    """
    import uvicorn

    from xattn.app import main, scratch, state
    from xattn.app.pages import demo_offer

    scratch.sweep()
    with bind(address) as listener:
        port = listener.getsockname()[1]
        state.configure(settings)
        if settings.demo:
            demo_offer.make_demo()

        def ready() -> None:
            printed = token is not None and VARIABLE not in os.environ
            way = f"/?token={token}" if printed else ""
            print(
                f"xattn app: {url(address.host, port)}{way}  (root {settings.root}; Ctrl-C stops)"
            )
            sys.stdout.flush()

        guarding = {"token": token, "names": names, "frames": frames}
        app = application(Address(address.host, port), upload_mb, ready, **guarding)
        # Only when everything is imported, since modules cannot be imported from two threads at once.
        threading.Thread(target=main.preload, name="xattn-warm", daemon=True).start()
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                server_header=False,
                proxy_headers=bool(names),
                ws_max_size=64 << 20,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        if hasattr(signal, "SIGHUP"):  # the terminal was closed; uvicorn knows the other signals
            signal.signal(signal.SIGHUP, lambda *_: setattr(server, "should_exit", True))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after its clean end
            return
    if not server.started:
        raise OSError(errno.EIO, "app: the server did not start, see the lines above")
