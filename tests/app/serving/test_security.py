"""The password, the wait after wrong ones, and that nothing is answered without the cookie."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("streamlit")
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from xattn.app.bench import free_port
from xattn.app.serving import guard, login, password
from xattn.app.serving.guard import HEADERS, Guard
from xattn.app.serving.login import FREE, FREE_IN_ALL, LOGIN, LOGOUT, Throttle, login_page, own_path
from xattn.app.serving.password import LIFETIME, read_password, write_password
from xattn.runtime.files import output_error

SECRET = "correct horse"
PAGE = {"accept": "text/html", "sec-fetch-dest": "document"}


@pytest.fixture(autouse=True)
def _cheap_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(password, "SCRYPT", {"n": 16, "r": 8, "p": 1})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_password(tmp_path / "password", SECRET)
    return tmp_path / "password"


def client(file: Path | None = None, base: str = "http://localhost", **options: Any) -> TestClient:
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
    guard = Guard(app, read_password(file) if file else None, **options)
    return TestClient(guard, base_url=base, follow_redirects=False)


def log_in(web: TestClient, given: str = SECRET, target: str = "/") -> Any:
    return web.post(login.login_url(target), data={"password": given})


# ---------------------------------------------------------------------- the file


def test_the_file_holds_a_hash_that_only_its_owner_reads(file: Path) -> None:
    assert SECRET not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = read_password(file)
    assert found.check(SECRET) and not found.check("correct horsf") and not found.check("")


def test_two_files_of_one_password_share_neither_hash_nor_key(tmp_path: Path) -> None:
    records = []
    for name in "ab":
        write_password(tmp_path / name, SECRET)
        records.append(json.loads((tmp_path / name).read_text()))
    assert all(records[0][name] != records[1][name] for name in ("salt", "hash", "key"))


def test_a_password_typed_with_other_code_points_is_the_same(tmp_path: Path) -> None:
    write_password(tmp_path / "p", "caf\u00e9 au lait")
    assert read_password(tmp_path / "p").check("cafe\u0301 au lait")


@pytest.mark.parametrize("wrong", ["", "short", "x" * 1025])
def test_passwords_of_a_bad_length_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ValueError, match="password: got"):
        write_password(tmp_path / "p", wrong)
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="not a file of"):
        write_password(tmp_path / "notes", SECRET)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"xattn": "password"}', "\xff"])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p").write_text(text, encoding="latin-1")
    (tmp_path / "p").chmod(0o600)
    with pytest.raises(ValueError, match="password_file"):
        read_password(tmp_path / "p")


def test_a_file_that_others_can_read_is_refused(file: Path) -> None:
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_password(file)


def test_a_cookie_ends_and_cannot_be_changed(file: Path) -> None:
    found = read_password(file)
    cookie = found.cookie(lambda: 1000.0)
    assert found.session(cookie, lambda: 1000.0 + LIFETIME - 1) is not None
    assert found.session(cookie, lambda: 1000.0 + LIFETIME) is None
    end, session, signature = cookie.split(".")
    for forged in (
        f"{int(end) + 1}.{session}.{signature}",
        f"{end}.x.{signature}",
        "",
        None,
        "é.é",
    ):
        assert found.session(forged, lambda: 1000.0) is None
    write_password(file, SECRET)  # set anew: all sessions end
    assert read_password(file).session(cookie, lambda: 1000.0) is None


@given(st.text(max_size=200))
def test_no_text_is_a_cookie(text: str) -> None:
    assert password.Password(b"s", b"h", b"k" * 32).session(text) is None


# ---------------------------------------------------------------------- the wait


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_doubles_with_each_wrong_password_and_ends() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    waits = []
    for _ in range(FREE + 4):
        assert throttle.begin("a") == 0
        wait = throttle.begin("a")
        waits.append(wait)
        clock.now += max(wait, 0)
    assert waits[0] == 0 < waits[-1]
    last = [w for w in waits if w > 0]
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(last))


def test_one_client_waits_and_another_does_not() -> None:
    throttle = Throttle(Clock())
    for _ in range(FREE):
        assert throttle.begin("1.2.3.4") == 0
    assert throttle.begin("1.2.3.4") > 0
    assert throttle.begin("1.2.3.5") == 0


def test_many_clients_wait_together_but_not_for_long() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    for i in range(FREE_IN_ALL):
        assert throttle.begin(f"10.0.0.{i}") == 0
    assert 0 < throttle.begin("10.9.9.9") <= login.LONGEST_IN_ALL
    for _ in range(50):
        clock.now += login.LONGEST_IN_ALL
        assert throttle.begin(f"10.1.{clock.now}.1") == 0
    assert throttle.begin("10.9.9.9") <= login.LONGEST_IN_ALL


def test_an_ipv6_client_counts_by_its_network() -> None:
    throttle = Throttle(Clock())
    for i in range(FREE):
        throttle.begin(f"2001:db8::{i}")
    assert throttle.begin("2001:db8::ffff") > 0
    assert throttle.begin("2001:db8:0:1::1") == 0


def test_the_right_password_takes_the_wait_back() -> None:
    throttle = Throttle(Clock())
    for _ in range(FREE - 1):
        throttle.begin("a")
    throttle.begin("a")
    throttle.right("a")
    assert throttle.begin("a") == 0


# ---------------------------------------------------------------------- where the login leads


@given(st.text(max_size=60) | st.builds("/{}".format, st.text(max_size=60)))
def test_the_login_only_leads_to_paths_of_this_server(text: str) -> None:
    found = own_path(text)
    assert found.startswith("/") and not found.startswith(("//", "/\\"))
    assert found.isascii() and not set(found) & set('\r\n\t \\"<>')
    parts = urlsplit(found)
    assert not parts.scheme and not parts.netloc


@pytest.mark.parametrize(
    "target",
    [
        *("https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"),
        *("evil", "/\t/evil.example", "\n//evil.example", LOGIN, LOGOUT, "", None),
    ],
)
def test_open_redirects_lead_to_the_start(target: str | None) -> None:
    assert own_path(target) == "/"


def test_a_view_is_kept_through_the_login(file: Path) -> None:
    web = client(file)
    address = "/image?pack=a-1&image=caf%C3%A9+x&class=3"
    answer = web.get(address, headers=PAGE)
    assert answer.status_code == 303
    assert web.get(answer.headers["location"]).status_code == 200
    answer = web.post(answer.headers["location"], data={"password": SECRET})
    assert answer.status_code == 303 and answer.headers["location"] == address


def test_text_of_the_address_is_not_html_on_the_login_page() -> None:
    assert "<script" not in login_page('/?x="><script>alert(1)</script>', "<script>")


# ---------------------------------------------------------------------- the guard


def test_without_a_password_the_guard_lets_in() -> None:
    assert client().get("/").text == "inside"


def test_a_cookie_opens_what_was_closed(file: Path) -> None:
    web = client(file)
    assert web.get("/media/x").status_code == 401
    answer = log_in(web)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "max-age=" in cookie
    assert "secure" not in cookie
    assert web.get("/media/x").text == "inside"


def test_behind_tls_the_cookie_is_for_tls_alone(file: Path) -> None:
    web = client(file, "https://view.example", names=("view.example",))
    assert "secure" in log_in(web).headers["set-cookie"].lower()


def test_a_wrong_password_opens_nothing_and_then_has_to_wait(file: Path) -> None:
    web = client(file, throttle=Throttle(Clock()))
    for _ in range(FREE):
        answer = log_in(web, "wrong")
        assert answer.status_code == 403 and "set-cookie" not in answer.headers
    answer = log_in(web)  # not even looked at
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert "wait" in answer.text and web.get("/").status_code == 401


def test_logging_out_ends_the_session_on_the_server(file: Path) -> None:
    web = client(file)
    log_in(web)
    cookie = dict(web.cookies)
    assert (
        web.get(LOGOUT).status_code == 200 and web.get("/").text == "inside"
    )  # a link does nothing
    assert web.post(LOGOUT).status_code == 303
    web.cookies.update(cookie)
    assert web.get("/").status_code == 401


def test_a_session_that_logged_out_stays_out_after_a_restart(file: Path) -> None:
    gone, stays = client(file), client(file)
    log_in(gone)
    log_in(stays)
    cookies = dict(gone.cookies), dict(stays.cookies)
    gone.post(LOGOUT)
    for cookie, status in zip(cookies, (401, 200), strict=True):
        restarted = client(file)
        restarted.cookies.update(cookie)
        assert restarted.get("/").status_code == status


def test_two_servers_of_one_password_forget_no_session_that_logged_out(file: Path) -> None:
    servers = client(file), client(file)
    cookies = []
    for web in servers:
        log_in(web)
        cookies.append(dict(web.cookies))
        web.post(LOGOUT)
    for cookie in cookies:
        restarted = client(file)
        restarted.cookies.update(cookie)
        assert restarted.get("/").status_code == 401


def test_ended_sessions_are_kept_as_long_as_their_cookies_and_for_the_owner_alone(
    file: Path,
) -> None:
    found = read_password(file)
    found.ended.add("old", int(time.time()) - 1)
    found.ended.add("new", int(time.time()) + 10_000)
    kept = file.with_name("password.ended")
    assert list(json.loads(kept.read_text())["sessions"]) == ["new"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sessions": {"a": "b"}}', '{"sessions": []}'])
def test_a_damaged_list_of_ended_sessions_is_refused_with_a_remedy_that_works(
    file: Path, text: str
) -> None:
    file.with_name("password.ended").write_text(text)
    with pytest.raises(ValueError, match=f"password_file: .*--set-password {file}'"):
        read_password(file)
    write_password(file, SECRET)
    assert read_password(file).check(SECRET)


def test_logging_out_counts_where_nothing_can_be_written(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *args: object, **options: object) -> None:
        error = OSError(28, "No space left on device")
        raise output_error("password_file", path, error) from error

    web = client(file)
    log_in(web)
    cookie = dict(web.cookies)
    monkeypatch.setattr(password, "write_json", full)
    assert web.post(LOGOUT).status_code == 303
    web.cookies.update(cookie)
    assert web.get("/").status_code == 401
    assert capsys.readouterr().err == (
        f"warning: cannot write {file}.ended (No space left on device); sessions that logged out stay "
        "logged out only until the server stops\n"
    )


@pytest.mark.parametrize("damage", ["file", "folder"])
def test_a_list_that_cannot_be_read_is_not_written_over(
    file: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    web = client(file)
    log_in(web)
    cookie = dict(web.cookies)
    kept = file.with_name("password.ended")
    kept.write_text("damaged") if damage == "file" else kept.mkdir()
    assert web.post(LOGOUT).status_code == 303
    web.cookies.update(cookie)
    assert web.get("/").status_code == 401
    assert kept.is_dir() or kept.read_text() == "damaged"
    said = "is damaged and was not changed" if damage == "file" else "Is a directory"
    assert f"{kept}" in (err := capsys.readouterr().err) and said in err


def test_two_servers_that_write_at_once_forget_no_session(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = read_password(file).ended, read_password(file).ended
    end = int(time.time()) + 10_000
    other = threading.Thread(target=two.add, args=("two", end))
    real = password.write_json

    def slow(*args: Any, **options: Any) -> None:
        if threading.current_thread() is not other:
            other.start()
            other.join(0.3)  # without a lock it reads and writes now
        real(*args, **options)

    monkeypatch.setattr(password, "write_json", slow)
    one.add("one", end)
    other.join()
    assert set(json.loads(file.with_name("password.ended").read_text())["sessions"]) == {
        "one",
        "two",
    }


def test_a_websocket_needs_the_cookie_and_ends_with_its_session(file: Path) -> None:
    web = client(file)
    with pytest.raises(WebSocketDisconnect), web.websocket_connect("ws://localhost/_stcore/stream"):
        pass
    log_in(web)
    with web.websocket_connect("ws://localhost/_stcore/stream") as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"
        web.post(LOGOUT)
        with pytest.raises(WebSocketDisconnect):
            socket.receive_text()


def test_a_websocket_ends_when_its_cookie_does(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web, over, given = client(file), threading.Event(), []

    async def wait(tasks: Any, timeout: float, return_when: str) -> Any:
        given.append(timeout)
        await asyncio.to_thread(over.wait)  # the time that was given is over when the test says so
        return set(), tasks

    monkeypatch.setattr(guard, "asyncio", SimpleNamespace(**{**vars(asyncio), "wait": wait}))
    log_in(web)
    with web.websocket_connect("ws://localhost/_stcore/stream") as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"
        over.set()
        with pytest.raises(WebSocketDisconnect):
            socket.receive_text()
    assert LIFETIME - 3600 < given[0] <= LIFETIME


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


def test_a_link_of_another_site_opens_the_page_once_more(file: Path) -> None:
    """The browser leaves a strict cookie out when the click was elsewhere."""
    answer = client(file).get("/compare?x=1", headers={**PAGE, "sec-fetch-site": "cross-site"})
    assert answer.status_code == 200 and 'url=/compare?x=1"' in answer.text


def test_every_answer_has_the_headers(file: Path) -> None:
    web = client(file)
    answers = [web.get("/"), web.get("/", headers=PAGE), web.get(LOGIN), log_in(web), web.get("/")]
    answers.append(web.get("/", headers={"host": "evil.example"}))
    for answer in answers:
        assert {n.lower(): answer.headers.get(n) for n in HEADERS} == {
            n.lower(): v for n, v in HEADERS.items()
        }
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_large_forms_are_refused(file: Path) -> None:
    assert client(file).post(LOGIN, content=b"password=" + b"x" * 10_000).status_code == 413


# ---------------------------------------------------------------------- the real server


def test_nothing_of_streamlit_is_served_without_the_cookie(tmp_path: Path) -> None:
    """Every route that Streamlit and the viewer have, asked in a running server."""
    secret = tmp_path / "password"
    command = [sys.executable, "-m", "xattn.cli", "app"]
    subprocess.run([*command, "--set-password", str(secret)], input=b"correct horse\n", check=True)
    port = free_port()
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [*command, str(tmp_path), "--port", str(port), "--password-file", str(secret)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        _wait(port, server)
        for method, path in _paths():
            assert _ask(port, method, path)[0] in (401, 403), (method, path)
            status, headers, _ = _ask(port, method, path, accept="text/html")
            if method == "GET":
                assert status == 303 and headers["location"].startswith(LOGIN), path
        assert _ask(port, "GET", "/", host="evil.example")[0] == 403
        assert _socket(port) == 403
        _, headers, _ = _ask(port, "POST", LOGIN, body=f"password={quote(SECRET)}")
        cookie = headers["set-cookie"].split(";")[0]
        assert _ask(port, "GET", "/_stcore/health", cookie=cookie)[0] == 200
        assert b"<title>xattn" in _ask(port, "GET", "/", cookie=cookie)[2]
        assert _socket(port, cookie) == 101
    finally:
        server.terminate()
        server.wait(600)
        log.close()
    printed = (tmp_path / "log").read_text().splitlines()
    assert len(printed) == 1 and printed[0].startswith("xattn app: http://127.0.0.1"), printed


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
            _ask(port, "GET", LOGIN)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not answer")


def _ask(
    port: int,
    method: str,
    path: str,
    accept: str = "*/*",
    host: str | None = None,
    cookie: str = "",
    body: str | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Accept": accept, "Host": host or f"127.0.0.1:{port}", "Cookie": cookie}
    connection.request(method, path, body, headers)
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
