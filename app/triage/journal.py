"""What a tag file holds of photos, and the journal of its changes, in SQL.

A step is what a person did at once, perhaps to many photos: a row of the journal for each field that it
changed, with the value before and after. Undoing a step leaves alone what somebody else has changed since.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

JOURNAL_ROWS = 500_000  # that are kept; older steps can no longer be undone
MOST_AT_ONCE = 100_000  # photos that one step changes
DONE, UNDONE, LEFT = 0, 1, 2  # states of a step; one that is left can no longer be redone
_FEW = 500  # photos that are asked for by their ids


@dataclass(frozen=True)
class Mark:
    """What people said of a photo; ``rating`` is 0 for none, or 1 to 5."""

    tags: tuple[str, ...] = ()
    note: str = ""
    rating: int = 0

    def __bool__(self) -> bool:
        return bool(self.tags or self.note or self.rating)


@dataclass(frozen=True)
class Undone:
    """What :func:`turn` did: the photos that it changed, and how many stayed as they are because somebody
    else has changed them since."""

    photos: tuple[str, ...]
    stayed: int


class Change(NamedTuple):
    """A field of a photo, "tag", "note" or "rating", before and after; ``name`` is the tag's, else "".

    A tag is "1" or "", a rating its digit or "".
    """

    field: str
    image_id: str
    name: str
    before: str
    after: str


def revision(base: sqlite3.Connection) -> str:
    """The file's own name and a number that every change raises."""
    query = "SELECT value FROM about WHERE name IN ('file', 'revision') ORDER BY name"
    return "-".join(_text(value) for (value,) in base.execute(query))


def raise_revision(base: sqlite3.Connection) -> None:
    """Say that something has changed."""
    base.execute("UPDATE about SET value = CAST(value AS INTEGER) + 1 WHERE name = 'revision'")


def marks_of(base: sqlite3.Connection, image_ids: Sequence[str]) -> dict[str, Mark]:
    """The marks of these photos, those that have any."""
    tags: dict[str, list[str]] = {}
    for image_id, tag in _rows_of(base, "SELECT image_id, tag FROM tags", image_ids):
        tags.setdefault(image_id, []).append(_text(tag))
    notes = dict(_rows_of(base, "SELECT image_id, note FROM notes", image_ids))
    ratings = dict(_rows_of(base, "SELECT image_id, rating FROM ratings", image_ids))
    return {
        i: Mark(tuple(sorted(tags.get(i, ()))), _text(notes.get(i)), _whole(ratings.get(i)))
        for i in dict.fromkeys(image_ids)
        if i in tags or i in notes or i in ratings
    }


def having(base: sqlite3.Connection, image_ids: Sequence[str], tag: str) -> set[str]:
    """Those of these photos that have a tag."""
    query = "SELECT image_id FROM tags WHERE tag = ?"
    return {i for (i,) in base.execute(query, [tag])}.intersection(image_ids)


def _rows_of(
    base: sqlite3.Connection, select: str, image_ids: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """The rows of these photos, a few hundred photos a question."""
    ids = list(dict.fromkeys(image_ids))
    for start in range(0, len(ids), _FEW):
        part = ids[start : start + _FEW]
        yield from base.execute(f"{select} WHERE image_id IN ({', '.join('?' * len(part))})", part)


def _text(value: Any) -> str:
    """A text of the file, which may hold anything, "" if it is none."""
    return value if isinstance(value, str) else ""


def _whole(value: Any) -> int:
    """A number of the file, 0 if it is none."""
    return int(value) if str(value).isdecimal() and len(str(value)) < 16 else 0


# ---------------------------------------------------------------------- changes


def step(base: sqlite3.Connection, person: str, changes: Sequence[Change]) -> None:
    """Make changes, as one step that can be undone; earlier steps that were undone are left behind."""
    if not changes:
        return
    left = "UPDATE journal SET state = ? WHERE person = ? AND state = ?"
    base.execute(left, [LEFT, person, UNDONE])
    (last,) = base.execute("SELECT coalesce(max(step), 0) FROM journal").fetchone()
    base.executemany(
        "INSERT INTO journal (step, person, state, field, image_id, name, before, after) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        ((last + 1, person, DONE, *change) for change in changes),
    )
    _write(base, changes)
    (newest,) = base.execute("SELECT max(number) FROM journal").fetchone()
    base.execute(
        "DELETE FROM journal WHERE step <= "
        "(SELECT step FROM journal WHERE number <= ? ORDER BY number DESC LIMIT 1)",
        [newest - JOURNAL_ROWS],
    )
    raise_revision(base)


def turn(base: sqlite3.Connection, person: str, undo: bool) -> Undone | None:
    """Undo a person's last step, or redo the one that they undid last, where photos are as it left them;
    None if there is none."""
    which, state = ("max", DONE) if undo else ("min", UNDONE)
    query = f"SELECT {which}(step) FROM journal WHERE person = ? AND state = ?"
    (number,) = base.execute(query, [person, state]).fetchone()
    if number is None:
        return None
    query = (
        "SELECT field, image_id, name, before, after FROM journal WHERE step = ? ORDER BY number"
    )
    rows = [Change(*map(_text, row)) for row in base.execute(query, [number])]
    marks = marks_of(base, [row.image_id for row in rows])
    turned, stayed = [], set()
    for row in rows:
        old, new = (row.after, row.before) if undo else (row.before, row.after)
        now = _value(marks.get(row.image_id, Mark()), row)
        if now == old:
            turned.append(row._replace(before=old, after=new))
        elif now != new:
            stayed.add(row.image_id)
    _write(base, turned)
    state = UNDONE if undo else DONE
    base.execute("UPDATE journal SET state = ? WHERE step = ?", [state, number])
    raise_revision(base)
    return Undone(tuple(dict.fromkeys(row.image_id for row in turned)), len(stayed))


def _value(mark: Mark, change: Change) -> str:
    """What a photo has now in the field of a change."""
    if change.field == "tag":
        return "1" if change.name in mark.tags else ""
    return mark.note if change.field == "note" else str(mark.rating or "")


def _write(base: sqlite3.Connection, changes: Iterable[Change]) -> None:
    """Put the values after these changes into the tables; an empty one deletes the row."""
    rows: dict[tuple[str, bool], list[tuple[str, ...]]] = {}
    for change in changes:
        row = (change.image_id, change.name if change.field == "tag" else change.after)
        rows.setdefault((change.field, bool(change.after)), []).append(row)
    for (field, kept), found in rows.items():
        if kept:
            base.executemany(f"INSERT OR REPLACE INTO {field}s VALUES (?, ?)", found)
        elif field == "tag":
            base.executemany("DELETE FROM tags WHERE image_id = ? AND tag = ?", found)
        else:
            gone = ((image_id,) for image_id, _ in found)
            base.executemany(f"DELETE FROM {field}s WHERE image_id = ?", gone)
