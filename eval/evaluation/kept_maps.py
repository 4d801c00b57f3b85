"""The maps that the state of an evaluation keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval.evaluation.database import Database, damaged


class KeptImage(NamedTuple):
    """An image of a finished state: ``number`` counts the scored images, ``top`` are the first classes,
    ``maps`` (h, w) float32 by method."""

    number: int
    position: int
    id: str
    target: int
    target_name: str
    score: float
    top: list[list[Any]]
    maps: dict[str, NDArray[np.float32]]


def kept_images(path: Path, count: int | None, limit: int) -> Iterator[KeptImage]:
    """Yield the images of a state with their kept maps, up to image ``limit`` of the run's ``count``.

    Raises:
        ValueError: the file is damaged, or not an SQLite file. OSError: it cannot be read.
    """
    with closing(Database(path, read_only=True)) as database:
        query = "SELECT * FROM images WHERE skipped IS NULL ORDER BY position"
        for number, row in enumerate(map(database.image, database.rows(query))):
            position = row.position
            if position >= limit or (count is not None and position >= count):
                break
            found = database.rows("SELECT top FROM tops WHERE position = ?", (position,))
            top = _top(database, found[0][0]) if found else []
            query = "SELECT method, height, width, data FROM maps WHERE position = ?"
            maps = dict(_kept_map(database, kept) for kept in database.each(query, (position,)))
            assert row.target is not None and row.target_name is not None and row.score is not None
            image = (number, position, row.id, row.target, row.target_name, row.score)
            yield KeptImage(*image, top, maps)


def _top(database: Database, text: Any) -> list[list[Any]]:
    top = database.value(text)
    if not isinstance(top, list):
        raise damaged(database.path, "top classes that are not a list")
    for item in top:
        row = tuple(item) if isinstance(item, list) else ()
        database.checked(row, (int, str, (int, float)))
    return top


def _kept_map(database: Database, row: tuple[Any, ...]) -> tuple[str, NDArray[np.float32]]:
    method, height, width, data = database.checked(row, (str, int, int, bytes))
    if min(height, width) < 1 or len(data) != 4 * height * width:
        raise damaged(database.path, f"a map of {method!r:.60} that is cut short")
    values = np.frombuffer(data, "<f4").reshape(height, width)
    if not np.isfinite(values).all():
        raise damaged(database.path, f"a map of {method!r:.60} that is not finite")
    return method, values


def grey_maps(
    path: Path, identities: Sequence[str], wanted: Iterable[tuple[str, int]]
) -> Iterator[tuple[str, int, bytes]]:
    """Yield (method, i, small grey PNG) for each ``wanted`` (method, i) that a state has.

    i counts ``identities``, the ids of a run's images in their order.

    Raises:
        ValueError: the file is damaged, or not an SQLite file. OSError: it cannot be read.
    """
    with closing(Database(path, read_only=True)) as database:
        positions: dict[str, list[int]] = {}
        query = "SELECT * FROM images WHERE skipped IS NULL ORDER BY position DESC"
        for row in map(database.image, database.rows(query)):
            positions.setdefault(row.id, []).append(row.position)
        # One photo can be listed twice: its first record has the first of its positions.
        ordered = [positions[i].pop() if positions.get(i) else None for i in identities]
        query = "SELECT map FROM results WHERE position = ? AND method = ? AND map IS NOT NULL"
        for method, i in wanted:
            for found in database.rows(query, (ordered[i], method)):
                (png,) = database.checked(found, (bytes,))
                yield method, i, png
