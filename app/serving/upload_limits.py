"""Limits on the uploads that are kept in memory, for each session and for all sessions together.

Streamlit limits the size of a file but not the number of files, and a page sees them only once all of
them have arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from xattn.app.live.uploads import MAX_CLIP_BYTES, MAX_TOTAL

PATH = "/_stcore/upload_file/"
OF_ONE = MAX_TOTAL + MAX_CLIP_BYTES  # bytes of a session: what the live page takes
OF_ALL = 4 * OF_ONE
FILES = 200  # of a session; empty ones take room, too


class UploadRoom:
    """ASGI middleware that refuses an upload (413) for which there is no room.

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
        length = Headers(scope=scope).get("content-length", "")
        size = min(int(length), self.largest) if _is_size(length) else self.largest
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


def _is_size(length: str) -> bool:
    return length.isascii() and length.isdigit() and len(length) < 20
