"""The viewer's own HTTP routes, which return photos and overlays as JPEG and a selection as CSV.

The routes are ``GET /xattn/picture?pack&image[&side][&crop]``, ``GET /xattn/overlay?pack&entry[&look]``,
``GET /xattn/frame?pack&frame[&side]`` and ``GET /xattn/csv?pack[&view]``; packs, images and entries are
given by their ids. The response to an invalid parameter is a 400, and to an unknown id a 404, both with one
line of text.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from xattn.app import state
from xattn.app.pictures import film, rendering
from xattn.app.pictures.rendering import Look
from xattn.app.triage import selection, selection_files, tag_files
from xattn.app.triage.selection import Selection
from xattn.app.triage.store import Store
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

# For drawing, so that it does not block the event loop; more threads would not be faster.
THREADS = 2
LONGEST_ID = 1000  # largest number of characters in an id
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LOG = logging.getLogger(__name__)
_DRAWING = ThreadPoolExecutor(THREADS, "xattn-drawing")


def routes() -> list[Route]:
    """The routes, for ``streamlit.starlette.App(routes=...)``."""
    return [
        Route(rendering.PICTURE, _answer(photo_request), methods=["GET"]),
        Route(rendering.OVERLAY, _answer(overlay_request), methods=["GET"]),
        Route(film.FRAME, _answer(frame_request), methods=["GET"]),
        Route(selection_files.CSV, csv_endpoint, methods=["GET"]),
    ]


Draw = Callable[["Pack"], bytes]


def photo_request(query: Mapping[str, str]) -> tuple[str, tuple[object, ...], Draw]:
    """Parse a request to ``/xattn/picture``.

    Returns:
        The id of the pack, a key that identifies the picture in it, and a function that draws the picture.

    Raises:
        ValueError: a parameter is missing or invalid.
    """
    image_id = _id(query, "image")
    side = rendering.check_side(rendering.parse_whole(query.get("side", "240"), "side"))
    crop = _id(query, "crop") if "crop" in query else None
    return (
        _id(query, "pack"),
        (image_id, side, crop),
        lambda p: rendering.photo_bytes(p, image_id, side, crop),
    )


def overlay_request(query: Mapping[str, str]) -> tuple[str, tuple[object, ...], Draw]:
    """Parse a request to ``/xattn/overlay``; the result has the same form as for :func:`photo_request`."""
    entry_id, look = _id(query, "entry"), Look.from_query(query)
    if look.minus is not None:
        _id(query, "minus")
    return (
        _id(query, "pack"),
        (entry_id, look),
        lambda p: rendering.overlay_bytes(p, entry_id, look),
    )


def frame_request(query: Mapping[str, str]) -> tuple[str, tuple[object, ...], Draw]:
    """Parse a request to ``/xattn/frame``; the result has the same form as for :func:`photo_request`."""
    index = rendering.parse_whole(query.get("frame", "0"), "frame")
    side = rendering.check_side(rendering.parse_whole(query.get("side", "960"), "side"))
    key = ("frame", index, side)
    return _id(query, "pack"), key, lambda p: film.frame_bytes(p, index, side)


def _id(query: Mapping[str, str], name: str) -> str:
    value = query.get(name, "")
    if not 0 < len(value) <= LONGEST_ID:
        raise ValueError(f"{name}: got {value[:40]!r}; give an id of up to {LONGEST_ID} characters")
    return value


def _answer(parse: Callable[[Mapping[str, str]], tuple[str, tuple[object, ...], Draw]]):
    async def endpoint(request: Request) -> Response:
        try:
            pack_id, key, draw = parse(request.query_params)
        except ValueError as error:
            return _text(400, error)
        loop = asyncio.get_running_loop()
        try:
            library = state.library()
            pack = await loop.run_in_executor(_DRAWING, lambda: library.open(pack_id, passing=True))
            digest = hashlib.sha256(repr((pack.id, pack.version, key)).encode()).hexdigest()
            fresh = request.query_params.get("v") == pack.version
            headers = {
                **SAFE,
                "ETag": f'"{digest[:32]}"',
                # A URL with another version of the pack must not be cached.
                "Cache-Control": f"private, {'max-age=3600' if fresh else 'no-cache'}",
            }
            if headers["ETag"] in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            data = await loop.run_in_executor(_DRAWING, lambda: draw(pack))
        except PackError as error:
            return _text(404, error)
        except ValueError as error:
            return _text(400, error)
        except Exception:
            _LOG.exception("a picture could not be drawn")
            return _text(404, "This picture cannot be drawn; see the log of the server.")
        return Response(data, media_type="image/jpeg", headers=headers)

    return endpoint


async def csv_endpoint(request: Request) -> Response:
    """The maps of a gallery view as a CSV file, which is sent in parts while it is made."""
    try:
        pack_id = _id(request.query_params, "pack")
    except ValueError as error:
        return _text(400, error)
    text = request.query_params.get("view", "")

    def found() -> tuple[Selection, Store | None]:
        pack = state.library().open(pack_id)
        view = selection.from_text(text, selection.table(pack).choices)
        return selection.select(pack, view), tag_files.usable_store(pack)

    try:
        lines = selection_files.selection_csv(*await asyncio.to_thread(found))
    except PackError as error:
        return _text(404, error)
    name = f'attachment; filename="{pack_id}.csv"'  # ids consist of letters, digits, "-" and "_"
    headers = {**SAFE, "Content-Disposition": name, "Cache-Control": "no-store"}
    return StreamingResponse(lines, media_type="text/csv", headers=headers)


def _text(status: int, message: object) -> Response:
    headers = {**SAFE, "Cache-Control": "no-store"}
    return PlainTextResponse(f"{message}\n", status, headers=headers)
