"""The server of ``xattn app``, one process with the viewer's routes in front of Streamlit's application."""

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
STOP_SECONDS = 3  # how long the server waits for open pages when it is stopped


@dataclass(frozen=True)
class Address:
    """The address on which to listen; with ``port`` 0, any free port is used."""

    host: str = "127.0.0.1"
    port: int = 8501

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect to the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_installed() -> None:
    """Raise a one-line ValueError if a package is missing or too old; Streamlit is not imported."""
    if sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(
            f"app: Streamlit's server needs Python 3.11 or newer, but this is Python {version}"
        )
    needed = ("streamlit", "altair", "pandas", "pyarrow", "duckdb")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'app: packages are missing: {", ".join(missing)}; run: pip install "xattn[app]"'
        )
    if importlib.util.find_spec("streamlit.starlette") is None:
        raise ValueError(
            'app: this version of streamlit is too old; run: pip install -U "xattn[app]"'
        )


def token_of(address: Address, no_token: bool) -> str | None:
    """The access token: the one in the environment or, if other machines can connect, a random one.

    It is None if there is neither, or if ``no_token`` is True.

    Raises:
        ValueError: the token in the environment is not valid, or ``no_token`` was given together with it.
    """
    given = os.environ.get(VARIABLE)
    if given is not None and no_token:
        raise ValueError(
            f"no_token: it cannot be combined with {VARIABLE}; give only one of the two"
        )
    if given is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{20,200}", given):
        raise ValueError(
            f"{VARIABLE}: the token with {len(given)} characters is not valid; give 20 to 200 letters and "
            f"digits, such as {secrets.token_urlsafe(24)}"
        )
    if no_token and not address.loopback:
        print(
            f"warning: host: everybody who can reach {address.host}:{address.port} can see all packs in "
            "the root; training is disabled",
            file=sys.stderr,
        )
    return given or (None if no_token or address.loopback else secrets.token_urlsafe(24))


def bind(address: Address) -> socket.socket:
    """A listening socket for an address.

    Raises:
        ValueError: the port is not valid or already used, or this machine does not have the address.
    """
    if not 0 <= address.port <= 65535:
        raise ValueError(f"port: got {address.port}; give 1 to 65535, or 0 for any free port")
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" includes IPv4
        return socket.create_server(where, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port: {address.port} is already used, perhaps by another xattn app; give another --port"
            ) from None
        why, *_ = reason(error).partition(" (while")  # create_server repeats the address here
        raise ValueError(
            f"host: cannot listen on {address.host!r}, port {address.port} ({why}); give "
            f"127.0.0.1, or another --port"
        ) from None


def url(host: str, port: int) -> str:
    """The URL by which a browser on this machine can open the viewer."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def streamlit_options(address: Address, upload_mb: int, framed: bool = False) -> dict[str, Any]:
    """The configuration of Streamlit, which overrides the user's ``config.toml``."""
    from xattn.app.components.theme import CONFIG

    return {
        **CONFIG,
        "server.address": address.host,
        "server.port": address.port,
        "server.baseUrlPath": "",
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        # In a frame of another site, the cookie for this check is not sent; the guard still checks origins.
        "server.enableXsrfProtection": not framed,
        "server.enableCORS": True,  # despite its name, this makes Streamlit refuse cross-origin requests
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
    """Create the ASGI application; ``state.configure`` must be called first.

    Args:
        address: the address on which the server listens.
        upload_mb: the largest size of an uploaded file in MB.
        ready: called when the application runs and the server handles Ctrl-C.
        options: the options ``token``, ``names`` and ``frames`` of ``guard.Guard``.
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
    """Handle exceptions of the event loop, but do not log browsers that disconnect during a response."""
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
    """Run the server until Ctrl-C or SIGTERM, and print the address when it is ready.

    Args:
        settings: ``state.Settings`` for the pages.
        address: the address on which to listen.
        upload_mb: the largest size of an uploaded file in MB.
        token: the access token. It is printed, unless it comes from the environment.
        names: the host names of a proxy in front of this server, whose ``X-Forwarded-*`` headers are then
            trusted.
        frames: origins whose pages may show the viewer in a frame.

    Raises:
        ValueError: the port is already used, or the address is not valid.
        OSError: the server did not start.
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
                f"xattn app: {url(address.host, port)}{way}  (root {settings.root}; Ctrl-C to stop)"
            )
            sys.stdout.flush()

        guarding = {"token": token, "names": names, "frames": frames}
        app = application(Address(address.host, port), upload_mb, ready, **guarding)
        # Not earlier, since two threads must not import the same modules at the same time.
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
        if hasattr(
            signal, "SIGHUP"
        ):  # sent when the terminal is closed; uvicorn handles other signals
            signal.signal(signal.SIGHUP, lambda *_: setattr(server, "should_exit", True))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after it has shut down
            return
    if not server.started:
        raise OSError(errno.EIO, "app: the server did not start; see the messages above")
