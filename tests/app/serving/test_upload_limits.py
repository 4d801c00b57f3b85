"""Uploads that are kept in memory: so many of a session, so many of all."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("streamlit")
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from xattn.app.serving import guard
from xattn.app.serving.guard import UploadRoom

MAX = 100


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What Streamlit keeps, by session and file."""
    kept: dict[str, dict[str, Any]] = {}
    runtime = SimpleNamespace(uploaded_file_mgr=SimpleNamespace(file_storage=kept))
    monkeypatch.setattr("streamlit.runtime.exists", lambda: True)
    monkeypatch.setattr("streamlit.runtime.Runtime.instance", lambda: runtime)
    return kept


@pytest.fixture
def web(storage: dict[str, dict[str, Any]]) -> TestClient:
    async def put(request: Request) -> PlainTextResponse:
        session, file = request.path_params["session"], request.path_params["file"]
        storage.setdefault(session, {})[file] = SimpleNamespace(data=await request.body())
        return PlainTextResponse("")

    path = guard.PATH + "{session}/{file}"
    inner = Starlette(routes=[Route(path, put, methods=["PUT", "GET"])])
    return TestClient(UploadRoom(inner, largest=MAX, of_one=250, of_all=400))


def put(web: TestClient, session: str, file: object, content: Any) -> int:
    return web.put(f"{guard.PATH}{session}/{file}", content=content).status_code


def test_a_session_has_its_share(web: TestClient, storage: dict[str, dict[str, Any]]) -> None:
    assert [put(web, "a", i, b"x" * MAX) for i in range(4)] == [200, 200, 413, 413]
    assert put(web, "a", 9, b"x" * 50) == 200 and put(web, "b", 1, b"x" * MAX) == 200
    del storage["a"]["0"]
    assert put(web, "a", 10, b"x" * MAX) == 200


def test_all_sessions_have_theirs_together(web: TestClient) -> None:
    assert [put(web, str(i), 1, b"x" * MAX) for i in range(6)] == [200] * 4 + [413] * 2


def test_empty_files_are_counted(web: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "FILES", 3)
    assert [put(web, "a", i, b"") for i in range(4)] == [200, 200, 200, 413]


def test_a_file_without_a_length_counts_as_the_largest(web: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"

    assert put(web, "a", 1, b"x" * MAX) == put(web, "a", 2, b"x" * 60) == 200
    assert put(web, "a", 3, chunks()) == 413 and put(web, "a", 3, b"x") == 200


def test_what_is_on_its_way_holds_room() -> None:
    room = UploadRoom(Starlette(), largest=MAX, of_one=250, of_all=400)
    with room._taken("a", 100) as one, room._taken("a", 100) as two, room._taken("a", 100) as three:
        assert (one, two, three) == (True, True, False)
    with room._taken("a", 100) as again:
        assert again
    assert not room._coming
