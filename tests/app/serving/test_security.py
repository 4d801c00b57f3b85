"""The token, and that nothing is answered without it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("streamlit")
from hypothesis import given
from hypothesis import strategies as st
from served_viewer import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from xattn.app.serving.guard import HEADERS, LIFETIME, Guard
from xattn.app.serving.server import VARIABLE, Address, token_of

TOKEN = "correct-horse-battery-staple"
SOCKET = "ws://localhost/_stcore/stream"


def client(token: str | None = None, base: str = "http://localhost", **options: Any) -> TestClient:
    """A client of a guard before an application that answers everything."""

    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse("inside")

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app = Starlette(
        routes=[
            WebSocketRoute("/_stcore/stream", socket),
            Route("/{path:path}", page, methods=["GET", "PUT", "POST", "DELETE"]),
        ]
    )
    return TestClient(Guard(app, token, **options), base_url=base, follow_redirects=False)


# ---------------------------------------------------------------------- the token


def test_a_network_gets_a_token_of_its_own_and_this_machine_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert token_of(Address(), False) is None
    first, second = (token_of(Address("0.0.0.0"), False) for _ in range(2))
    assert first and second and first != second and len(first) >= 32
    assert not capsys.readouterr().err
    assert token_of(Address("0.0.0.0"), True) is None
    assert "warning" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, TOKEN)
    assert token_of(Address(), False) == token_of(Address("0.0.0.0"), False) == TOKEN
    with pytest.raises(ValueError, match="one of the two"):
        token_of(Address(), True)


@pytest.mark.parametrize("wrong", ["", "short", "x" * 201, "a b" * 10, "\u00e9" * 20, "a&b" * 10])
def test_a_token_that_can_be_guessed_or_is_no_part_of_an_address_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, wrong)
    with pytest.raises(ValueError, match=VARIABLE):
        token_of(Address(), False)


def test_without_a_token_the_guard_lets_in() -> None:
    assert client().get("/").text == "inside"


def test_the_token_is_exchanged_for_a_cookie_that_opens_what_was_closed() -> None:
    web = client(TOKEN)
    assert web.get("/media/x").status_code == 401
    answer = web.get(f"/image?pack=a-1&token={TOKEN}&image=caf%C3%A9+x")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/image?pack=a-1&image=caf%C3%A9+x"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and f"max-age={LIFETIME}" in cookie
    assert "secure" not in cookie and TOKEN not in cookie
    assert answer.headers["cache-control"] == "no-store"
    assert web.get("/media/x").text == "inside"
    assert web.get(f"/?token={TOKEN}").headers["location"] == "/"  # no history keeps the token


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "x", "\u00e9", TOKEN.upper()])
def test_another_token_opens_nothing(token: str) -> None:
    web = client(TOKEN)
    answer = web.get("/", params={"token": token})
    assert answer.status_code == 401 and "set-cookie" not in answer.headers
    assert "?token=" in answer.text and TOKEN not in answer.text


def test_a_token_is_taken_from_the_address_of_a_page_alone() -> None:
    web = client(TOKEN)
    for method in ("PUT", "POST", "DELETE"):
        assert web.request(method, f"/?token={TOKEN}").status_code == 401
    with pytest.raises(WebSocketDisconnect), web.websocket_connect(f"{SOCKET}?token={TOKEN}"):
        pass


@given(st.text(max_size=60))
def test_the_exchange_only_leads_to_paths_of_this_server(text: str) -> None:
    found = client(TOKEN).get(f"/{quote(text, safe='/')}?token={TOKEN}").headers["location"]
    parts = urlsplit(found)
    assert found.startswith("/") and not found.startswith(("//", "/\\"))
    assert found.isascii() and not set(found) & set('\r\n\t \\"<>')
    assert not parts.scheme and not parts.netloc


def test_behind_tls_the_cookie_is_for_tls_alone() -> None:
    web = client(TOKEN, "https://view.example", names=("view.example",))
    assert "secure" in web.get(f"/?token={TOKEN}").headers["set-cookie"].lower()


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=100))
def test_no_text_is_a_cookie(text: str) -> None:
    cookie = f"xattn_session={text}".encode("latin-1")
    assert client(TOKEN).get("/", headers=[(b"cookie", cookie)]).status_code == 401


def test_a_cookie_ends_with_its_token() -> None:
    web = client(TOKEN)
    web.get(f"/?token={TOKEN}")
    assert web.get("/").status_code == 200
    other = client(TOKEN + "x")
    other.cookies.update(dict(web.cookies))
    assert other.get("/").status_code == 401


def test_a_cookie_of_another_port_opens_nothing() -> None:
    web = client(TOKEN, cookie="xattn_session_1")
    web.get(f"/?token={TOKEN}")
    other = client(TOKEN, cookie="xattn_session_2")
    other.cookies.set("xattn_session_2", web.cookies["xattn_session_1"])
    assert other.get("/").status_code == 401


def test_a_websocket_needs_the_cookie() -> None:
    web = client(TOKEN)
    with pytest.raises(WebSocketDisconnect), web.websocket_connect(SOCKET):
        pass
    web.get(f"/?token={TOKEN}")
    with web.websocket_connect(SOCKET) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"


# ---------------------------------------------------------------------- names, origins, headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "a b"]
)
def test_foreign_names_are_refused(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8501", "[::1]:8501", "LOCALHOST:1"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 200


def test_on_a_network_addresses_and_given_names_are_answered() -> None:
    web = client(loopback=False, names=("view.example",))
    for host, status in (("192.168.1.7:8501", 200), ("view.example", 200), ("evil.example", 403)):
        assert web.get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://localhost:3000", "null", "http://["]
)
def test_pages_of_other_sites_reach_nothing(origin: str) -> None:
    web = client()
    assert web.put("/_stcore/upload_file/a/b", headers={"origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect):
        with web.websocket_connect("ws://localhost/_stcore/stream", headers={"origin": origin}):
            pass


def test_every_answer_has_the_headers() -> None:
    web = client(TOKEN)
    answers = [web.get("/"), web.get(f"/?token={TOKEN}"), web.get("/")]
    answers.append(web.get("/", headers={"host": "evil.example"}))
    for answer in answers:
        assert {n.lower(): answer.headers.get(n) for n in HEADERS} == {
            n.lower(): v for n, v in HEADERS.items()
        }
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_only_pages_that_are_named_may_show_it_in_a_frame() -> None:
    headers = client(frames=("https://a.example", "http://b:1")).get("/").headers
    assert "frame-ancestors https://a.example http://b:1" in headers["content-security-policy"]
    assert "x-frame-options" not in headers and "nosniff" in headers["x-content-type-options"]


# ---------------------------------------------------------------------- the real server


@pytest.mark.parametrize("source", ["printed", "environment"])
def test_nothing_of_streamlit_is_served_without_the_cookie(source: str, tmp_path: Path) -> None:
    """Every route that Streamlit and the viewer have, asked in a running server."""
    port = free_port()
    log = tmp_path / "log"
    given = {VARIABLE: TOKEN} if source == "environment" else {}
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "xattn", "app", str(tmp_path), "--port", str(port)]
            + ["--host", "0.0.0.0"] * (not given),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **given},
        )
    try:
        _wait(port, server)
        (printed,) = log.read_text().splitlines()
        assert printed.startswith(f"xattn app: http://127.0.0.1:{port}")
        found = re.search(r"\?token=(\S+)", printed)
        assert (found is None) == (source == "environment")
        token = TOKEN if found is None else found[1]
        for method, path in _paths() if given else [("GET", "/"), ("GET", "/xattn/csv")]:
            assert _ask(port, method, path)[0] in (401, 403), (method, path)
        assert _ask(port, "GET", "/", host="evil.example")[0] == 403
        assert _socket(port) == 403
        status, headers, _ = _ask(port, "GET", f"/?token={token}")
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"].split(";")[0]
        assert _ask(port, "GET", "/_stcore/health", cookie=cookie)[0] == 200
        assert b"<title>xattn" in _ask(port, "GET", "/", cookie=cookie)[2]
        assert _socket(port, cookie) == 101
    finally:
        server.terminate()
        server.wait(600)
    assert log.read_text().splitlines() == [printed]  # no request is written there


def _paths() -> list[tuple[str, str]]:
    """Methods and paths of all routes of the application, with something in the place of parameters."""
    code = (
        "import json, re\n"
        "from xattn.app import state\nfrom xattn.app.serving.server import Address, application\n"
        "from pathlib import Path\n"
        "state.configure(state.Settings(root=Path('.')))\n"
        "routes = application(Address())._build_starlette_app().routes\n"
        "paths = [(m, re.sub(r'{[^}]*}', 'x', r.path or '/')) for r in routes"
        " for m in (getattr(r, 'methods', None) or {'GET'}) if type(r).__name__ != 'WebSocketRoute']\n"
        "print(json.dumps(paths))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    found = [tuple(pair) for pair in json.loads(done.stdout)]
    seen = {path.split("/")[1] for _, path in found}
    assert {"media", "component", "_stcore", "xattn", "gallery"} <= seen, seen
    return [(m, p) for m, p in found if m in ("GET", "PUT", "POST", "DELETE")]


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        assert server.poll() is None
        try:
            _ask(port, "GET", "/")
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not answer")


def _ask(
    port: int,
    method: str,
    path: str,
    host: str | None = None,
    cookie: str = "",
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Host": host or f"127.0.0.1:{port}", "Cookie": cookie}
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def _socket(port: int, cookie: str = "") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
        "Cookie": cookie,
    }
    connection.request("GET", "/_stcore/stream", headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status
