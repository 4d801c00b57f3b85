"""Stores tags, notes, ratings, selections and named slices of a pack's photos in one SQLite file.

Every change of a tag, note or rating is recorded in a journal, so that users can undo and redo their own
changes while others work on the same file. Each change is one transaction; while the file is locked, others
wait. The file is created by the first change. Since the file may come from anybody, a file with an unknown
layout is refused, values are cast to the type of their column when they are read, and SQL parameters are
bound. A step is everything that a user has changed at once, in one or many photos. The journal contains one
row for each changed field, with the values before and after. Undoing a step does not affect fields that
somebody else has changed in the meantime.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xattn.runtime.names import encodable, visible

JOURNAL_ROWS = 500_000  # largest number of rows; older steps can no longer be undone
MOST_AT_ONCE = 100_000  # largest number of photos that one step can change
DONE, UNDONE, LEFT = 0, 1, 2  # states of a step; LEFT means that it can no longer be redone
# The file's schema is checked, but the contents of its columns are not.
_RATING = "max(0, min(CAST(rating AS INTEGER), 5))"
_COUNTS = "SELECT CAST(tag AS TEXT) AS name, count(*) FROM tags GROUP BY name ORDER BY name"
_KEYS = "SELECT key, CAST(tag AS TEXT) FROM keys WHERE key BETWEEN 1 AND 9 ORDER BY key"
_SLICES = "SELECT CAST(name AS TEXT), CAST(view AS TEXT) FROM slices ORDER BY name"
_OLD_SETS = """DELETE FROM sets WHERE number IN (
    SELECT number FROM (
        SELECT number, row_number() OVER later AS place, sum(length(photos)) OVER later AS size
        FROM sets WINDOW later AS (ORDER BY number DESC)
    ) WHERE place > 1 AND (place > ? OR size > ?)
) AND NOT EXISTS (SELECT 1 FROM slices WHERE instr(view, digest))"""
_FEW = 500  # largest number of ids in one query


@dataclass(frozen=True)
class Mark:
    """The tags, note and rating of a photo; ``rating`` is 1 to 5, or 0 if there is none."""

    tags: tuple[str, ...] = ()
    note: str = ""
    rating: int = 0

    def __bool__(self) -> bool:
        return bool(self.tags or self.note or self.rating)


@dataclass(frozen=True)
class StepResult:
    """The result of :func:`undo_or_redo`.

    ``photos`` are the ids of the photos that were changed. ``n_kept`` is the number of photos that were
    left unchanged because somebody else had changed them in the meantime.
    """

    photos: tuple[str, ...]
    n_kept: int


class Change(NamedTuple):
    """A change of one field of a photo; ``field`` is "tag", "note" or "rating".

    ``name`` is the name of the tag, or "" for other fields. ``before`` and ``after`` are the text of a
    note, the digit of a rating, or "1" for a tag; "" means that there was none.
    """

    field: str
    image_id: str
    name: str
    before: str
    after: str


def revision(base: sqlite3.Connection) -> str:
    """A text that identifies the file and its state; it is different after every change."""
    query = "SELECT CAST(value AS TEXT) FROM about WHERE name IN ('file', 'revision') ORDER BY name"
    return "-".join(value for (value,) in base.execute(query))


def raise_revision(base: sqlite3.Connection) -> None:
    """Increase the revision number, which must be done with every change."""
    base.execute("UPDATE about SET value = CAST(value AS INTEGER) + 1 WHERE name = 'revision'")


def marks_of(base: sqlite3.Connection, image_ids: Sequence[str]) -> dict[str, Mark]:
    """The marks of the given photos, by id; photos without marks are left out."""
    tags: dict[str, list[str]] = {}
    for image_id, tag in _rows_of(base, "SELECT image_id, CAST(tag AS TEXT) FROM tags", image_ids):
        tags.setdefault(image_id, []).append(tag)
    notes = dict(_rows_of(base, "SELECT image_id, CAST(note AS TEXT) FROM notes", image_ids))
    ratings = dict(_rows_of(base, f"SELECT image_id, {_RATING} FROM ratings", image_ids))
    return {
        i: Mark(tuple(sorted(tags.get(i, ()))), notes.get(i, ""), ratings.get(i, 0))
        for i in dict.fromkeys(image_ids)
        if i in tags or i in notes or i in ratings
    }


def photos_with_tag(base: sqlite3.Connection, image_ids: Sequence[str], tag: str) -> set[str]:
    """Those of the given photos that have the tag."""
    query = "SELECT image_id FROM tags WHERE tag = ?"
    return {i for (i,) in base.execute(query, [tag])}.intersection(image_ids)


def _rows_of(
    base: sqlite3.Connection, select: str, image_ids: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the given photos, from queries with at most ``_FEW`` photos each."""
    ids = list(dict.fromkeys(image_ids))
    for start in range(0, len(ids), _FEW):
        part = ids[start : start + _FEW]
        yield from base.execute(f"{select} WHERE image_id IN ({', '.join('?' * len(part))})", part)


# ---------------------------------------------------------------------- changes


def apply_step(base: sqlite3.Connection, person: str, changes: Sequence[Change]) -> None:
    """Apply changes as one step, which can be undone; steps that were undone can no longer be redone."""
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


def undo_or_redo(base: sqlite3.Connection, person: str, undo: bool) -> StepResult | None:
    """Undo the last step of a person, or redo the step that this person undid last; None if there is none.

    Photos that somebody else has changed in the meantime are left unchanged.
    """
    which, state = ("max", DONE) if undo else ("min", UNDONE)
    query = f"SELECT {which}(step) FROM journal WHERE person = ? AND state = ?"
    (number,) = base.execute(query, [person, state]).fetchone()
    if number is None:
        return None
    query = (
        "SELECT field, image_id, name, before, after FROM journal WHERE step = ? ORDER BY number"
    )
    rows = [Change(*row) for row in base.execute(query, [number])]
    marks = marks_of(base, [row.image_id for row in rows])
    turned, n_kept = [], set()
    for row in rows:
        old, new = (row.after, row.before) if undo else (row.before, row.after)
        now = _value(marks.get(row.image_id, Mark()), row)
        if now == old:
            turned.append(row._replace(before=old, after=new))
        elif now != new:
            n_kept.add(row.image_id)
    _write(base, turned)
    state = UNDONE if undo else DONE
    base.execute("UPDATE journal SET state = ? WHERE step = ?", [state, number])
    raise_revision(base)
    return StepResult(tuple(dict.fromkeys(row.image_id for row in turned)), len(n_kept))


def _value(mark: Mark, change: Change) -> str:
    """The current value of the field to which a change refers."""
    if change.field == "tag":
        return "1" if change.name in mark.tags else ""
    return mark.note if change.field == "note" else str(mark.rating or "")


def _write(base: sqlite3.Connection, changes: Iterable[Change]) -> None:
    """Write the new values of the changes to the tables; an empty value deletes the row."""
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


TAG_LENGTH, NOTE_LENGTH, SLICE_LENGTH, VIEW_LENGTH = 60, 4000, 80, 8000  # largest lengths
MOST_TAGS, MOST_SLICES = 500, 200  # largest numbers of different tags and of slices in a file
BEST = 5  # stars
KEYS = tuple(range(1, 10))
DEFAULT_KEYS = {
    1: "look again",
    2: "wrong label",
    3: "looks elsewhere",
}  # used until the file exists
APPLICATION, LAYOUT = 0x78415447, 2  # application_id and user_version of the file
MOST_SETS = 200  # number of selections that are kept in addition to those used by slices
MOST_LETTERS = 50_000_000  # largest size of these selections; if they are larger, fewer are kept
DIGEST = re.compile("[0-9a-f]{10}")  # the form in which an address refers to a selection
PATIENCE = 5.0  # seconds to wait while somebody else is writing
_TABLES = {
    "about": "(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID, STRICT",
    "tags": "(image_id TEXT NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (image_id, tag)) "
    "WITHOUT ROWID, STRICT",
    "notes": "(image_id TEXT PRIMARY KEY, note TEXT NOT NULL) WITHOUT ROWID, STRICT",
    "ratings": "(image_id TEXT PRIMARY KEY, rating INTEGER NOT NULL) WITHOUT ROWID, STRICT",
    "keys": "(key INTEGER PRIMARY KEY, tag TEXT NOT NULL UNIQUE) STRICT",
    "slices": "(name TEXT PRIMARY KEY, view TEXT NOT NULL) WITHOUT ROWID, STRICT",
    "journal": "(number INTEGER PRIMARY KEY, step INTEGER NOT NULL, person TEXT NOT NULL, "
    "state INTEGER NOT NULL, field TEXT NOT NULL, image_id TEXT NOT NULL, name TEXT NOT NULL, "
    "before TEXT NOT NULL, after TEXT NOT NULL) STRICT",
}
_SETS = (  # selections; this table is missing in layout 1 and is added with the next change
    "CREATE TABLE sets (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, "
    "photos TEXT NOT NULL) STRICT"
)
_FIRST = {f"CREATE TABLE {name} {columns}" for name, columns in _TABLES.items()} | {
    "CREATE INDEX tag_photos ON tags (tag)",
    "CREATE INDEX steps ON journal (step)",
    "CREATE INDEX persons ON journal (person, step)",
}
_SCHEMAS = {1: _FIRST, 2: _FIRST | {_SETS}}


class TagsError(ValueError):
    """Raised for a problem with a tag file or a change; the message also tells the user what to do."""


def identity(image_ids: Iterable[str]) -> str:
    """The identity of a pack, which is the SHA-256 hash of its image ids in sorted order."""
    digest = hashlib.sha256()
    for image_id in sorted(image_ids):
        data = image_id.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


class Store:
    """The tag file of one pack. Every method opens the file again, so threads and processes can share it.

    Args:
        path: the path of the file, ``NAME.tags.sqlite``, which need not exist.
        pack: the :func:`identity` of the pack, or a function that returns it, which is called when the file
            is read or written.

    Raises (every method):
        TagsError: the file belongs to another pack, is damaged or not writable, or remains locked.
    """

    def __init__(self, path: Path, pack: str | Callable[[], str]) -> None:
        self.path, self._pack = path, pack

    # ------------------------------------------------------------------ reading

    def revision(self) -> str:
        """A text for cache keys, which is different after every change; "" if there is no file."""
        with self._reading() as base:
            return "" if base is None else revision(base)

    def marks(self, image_ids: Sequence[str]) -> dict[str, Mark]:
        """The marks of the given photos, by id; photos without marks are left out."""
        with self._reading() as base:
            return {} if base is None else marks_of(base, image_ids)

    def counts(self) -> dict[str, int]:
        """The number of photos of each tag, by name."""
        return self._pairs(_COUNTS, MOST_TAGS)

    def photos(
        self, tags: Sequence[str] = (), rating: int | None = None, note: bool = False
    ) -> set[str]:
        """The photos that have one of ``tags``, at least ``rating`` stars and, if ``note`` is True, a note.

        Conditions that are not given are ignored; without any condition, the result is empty.
        """
        asked: list[tuple[str, Sequence[object]]] = []
        if tags:
            marks = ", ".join("?" * len(tags))
            asked.append((f"SELECT image_id FROM tags WHERE tag IN ({marks})", tags))
        if rating:
            asked.append(("SELECT image_id FROM ratings WHERE rating >= ?", [rating]))
        if note:
            asked.append(("SELECT image_id FROM notes", []))
        with self._reading() as base:
            if base is None or not asked:
                return set()
            found = ({i for (i,) in base.execute(query, values)} for query, values in asked)
            return set.intersection(*found)

    def keys(self) -> dict[int, str]:
        """The tags that are assigned to the keys 1 to 9."""
        if not self._there():
            return dict(DEFAULT_KEYS)
        return self._pairs(_KEYS, len(KEYS))

    def slices(self) -> dict[str, str]:
        """The text of the view of each saved slice, by name."""
        return self._pairs(_SLICES, MOST_SLICES)

    def _pairs(self, query: str, most: int) -> dict[Any, Any]:
        """At most ``most`` rows of the result of a query with two columns, as a dictionary."""
        with self._reading() as base:
            return {} if base is None else dict(base.execute(f"{query} LIMIT ?", [most]))

    # ------------------------------------------------------------------ changing photos

    def toggle(self, person: str, image_ids: Sequence[str], tag: str) -> bool:
        """Add a tag to all given photos or, if all of them already have it, remove it from them.

        Returns whether the photos have the tag afterwards.
        """
        tag = tag_name(tag)
        with self._writing() as base:
            on = not set(image_ids) <= photos_with_tag(base, image_ids, tag)
            _change_tags(base, person, image_ids, [tag] if on else [], [] if on else [tag])
            return on

    def change_tags(
        self,
        person: str,
        image_ids: Sequence[str],
        add: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> None:
        """Add the tags ``add`` to the given photos, and remove the tags ``drop`` from them."""
        add, drop = list(map(tag_name, add)), list(map(tag_name, drop))
        with self._writing() as base:
            _change_tags(base, person, image_ids, add, drop)

    def set_note(self, person: str, image_id: str, note: str, was: str | None = None) -> bool:
        """Write the note of a photo; an empty text removes it.

        Args:
            was: the note that the person saw before writing. If somebody else has changed the note in the
                meantime, both texts are kept, one below the other, and the method returns False.
        """
        note = encodable(note).strip()
        with self._writing() as base:
            now = marks_of(base, [image_id]).get(image_id, Mark()).note
            alone = was is None or now in (was, note)
            if not alone:
                note = f"{now}\n\n{note}".strip()
            if len(note) > NOTE_LENGTH:
                raise TagsError(
                    f"The note has {len(note):,} characters; give at most {NOTE_LENGTH:,}. The note was "
                    f"not saved."
                )
            apply_step(
                base, person, [Change("note", image_id, "", now, note)] if now != note else []
            )
            return alone

    def set_rating(self, person: str, image_ids: Sequence[str], rating: int) -> None:
        """Give photos a rating of 1 to 5 stars; 0 removes the rating."""
        if rating not in range(BEST + 1):
            raise TagsError(f"A rating is a number from 0 to {BEST}; got {rating}.")
        _check_count(image_ids)
        with self._writing() as base:
            now = {i: mark.rating for i, mark in marks_of(base, image_ids).items()}
            changes = [
                Change("rating", i, "", str(now.get(i, 0) or ""), str(rating or ""))
                for i in dict.fromkeys(image_ids)
                if now.get(i, 0) != rating
            ]
            apply_step(base, person, changes)

    def undo(self, person: str) -> StepResult | None:
        """Undo the last step of a person; None if there is none."""
        with self._writing() as base:
            return undo_or_redo(base, person, undo=True)

    def redo(self, person: str) -> StepResult | None:
        """Redo the step that a person undid last; None if there is none, or if the person has made other
        changes since."""
        with self._writing() as base:
            return undo_or_redo(base, person, undo=False)

    # ------------------------------------------------------------------ keys and slices

    def set_keys(self, keys: dict[int, str]) -> None:
        """Assign tags to the keys 1 to 9; keys with an empty name, or that are not given, are cleared."""
        named = {key: tag_name(tag) for key, tag in keys.items() if key in KEYS and tag.strip()}
        double = [t for t in named.values() if list(named.values()).count(t) > 1]
        if double:
            raise TagsError(f"The tag {double[0]!r} is on two keys; give each key a different tag.")
        with self._writing() as base:
            base.execute("DELETE FROM keys")
            base.executemany("INSERT INTO keys VALUES (?, ?)", named.items())
            raise_revision(base)

    def save_slice(self, name: str, view: str, replace: bool = False) -> None:
        """Save a view of the gallery as a slice with this name.

        Raises:
            TagsError: as for every method; also if the name is taken and ``replace`` is False, or if there
                are too many slices.
        """
        name = slice_name(name)
        if len(view) > VIEW_LENGTH:
            raise TagsError(
                f"The address of this view has {len(view):,} characters, and the limit is "
                f"{VIEW_LENGTH:,}; choose fewer classes or tags."
            )
        with self._writing() as base:
            known = dict(base.execute("SELECT name, view FROM slices"))
            if name in known and not replace:
                raise TagsError(f"There is a slice {name!r} already; choose another name.")
            if name not in known and len(known) >= MOST_SLICES:
                raise TagsError(
                    f"There are already {MOST_SLICES} slices, which is the limit; delete one first."
                )
            base.execute("INSERT OR REPLACE INTO slices VALUES (?, ?)", [name, encodable(view)])
            raise_revision(base)

    def rename_slice(self, name: str, new: str) -> None:
        """Rename a slice."""
        new = slice_name(new)
        with self._writing() as base:
            known = dict(base.execute("SELECT name, view FROM slices"))
            if name not in known:
                raise TagsError(
                    f"The slice {name!r} no longer exists; somebody else has deleted or renamed it."
                )
            if new != name and new in known:
                raise TagsError(f"There is a slice {new!r} already; choose another name.")
            base.execute("UPDATE slices SET name = ? WHERE name = ?", [new, name])
            raise_revision(base)

    def delete_slice(self, name: str) -> None:
        """Delete a slice if it still exists."""
        with self._writing() as base:
            base.execute("DELETE FROM slices WHERE name = ?", [name])
            raise_revision(base)

    # ------------------------------------------------------------------ selections

    def keep_set(self, image_ids: Sequence[str]) -> str:
        """Store photos as the latest selection, and return its digest of 10 hexadecimal digits."""
        _check_count(image_ids)
        photos = list(dict.fromkeys(image_ids))
        digest = identity(photos)[:10]
        with self._writing() as base:
            row = [digest, json.dumps(photos)]
            base.execute("INSERT OR REPLACE INTO sets (digest, photos) VALUES (?, ?)", row)
            base.execute(_OLD_SETS, [MOST_SETS, MOST_LETTERS])
        return digest

    def set_of(self, digest: str | None = None) -> list[str] | None:
        """The photos of the selection with this digest, or of the latest one; None if it is not stored."""
        which, values = ("WHERE digest = ?", [digest]) if digest else ("", [])
        query = f"SELECT CAST(photos AS TEXT) FROM sets {which} ORDER BY number DESC LIMIT 1"
        with self._reading() as base:
            if base is None or base.execute("PRAGMA user_version").fetchone() != (LAYOUT,):
                return None
            found = base.execute(query, values).fetchone()
        try:
            ids = json.loads(found[0]) if found else None
        except (ValueError, RecursionError):  # the contents of the file are not checked
            return None
        if not isinstance(ids, list):
            return None
        return list(dict.fromkeys(encodable(str(image_id)) for image_id in ids))

    # ------------------------------------------------------------------ the file

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """Context manager with a connection for reading, or None if there is no file."""
        if not self._there():
            yield None
            return
        with self._opened("ro") as base:
            base.execute("BEGIN")
            self._check(base, self._identity())
            yield base

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Context manager with a connection for writing in one transaction.

        If an error is raised inside it, nothing is changed.
        """
        self._there()
        pack = (
            self._identity()
        )  # computed before the lock is taken, so that others need not wait for it
        with self._opened("rwc") as base:
            base.execute("BEGIN IMMEDIATE")
            try:
                if not base.execute("SELECT 1 FROM sqlite_master").fetchone():
                    self._create(base, pack)
                self._check(base, pack)
                if base.execute("PRAGMA user_version").fetchone() != (LAYOUT,):
                    base.execute(_SETS)
                    base.execute(f"PRAGMA user_version = {LAYOUT}")
                yield base
                base.execute("COMMIT")
            finally:
                if base.in_transaction:
                    base.execute("ROLLBACK")

    def _identity(self) -> str:
        return self._pack if isinstance(self._pack, str) else self._pack()

    def _there(self) -> bool:
        """Whether the file exists and is not empty; if the first change fails, SQLite leaves an empty file.

        Raises:
            TagsError: the file is a link or is not a regular file.
        """
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise TagsError(
                f"{self._name} is a link or not a regular file; replace it by the file itself, or move it "
                f"away."
            )
        return self.path.is_file() and self.path.stat().st_size > 0

    @contextmanager
    def _opened(self, mode: str) -> Iterator[sqlite3.Connection]:
        address = f"{Path(os.path.abspath(self.path)).as_uri()}?mode={mode}"
        try:
            base = sqlite3.connect(address, timeout=PATIENCE, isolation_level=None, uri=True)
            with closing(base):
                base.execute("PRAGMA trusted_schema = OFF")
                yield base
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise TagsError(self._what(str(error))) from None

    def _what(self, error: str) -> str:
        if "locked" in error:
            return f"Somebody else is writing {self._name}; try again. Nothing was changed."
        if re.search(r"full|read-?only|unable to open|disk I/O|permission", error):
            return (
                f"{self._name} cannot be read or written ({error}); free some space or allow writing. "
                f"Nothing was changed."
            )
        return (
            f"{self._name} is damaged ({visible(error)[:100]}); move it away and continue without it, or "
            f"restore a copy."
        )

    def _create(self, base: sqlite3.Connection, pack: str) -> None:
        base.execute(f"PRAGMA application_id = {APPLICATION}")
        base.execute(f"PRAGMA user_version = {LAYOUT}")
        for statement in sorted(_SCHEMAS[LAYOUT], reverse=True):  # tables before their indexes
            base.execute(statement)
        about = [("pack", pack), ("file", secrets.token_hex(8)), ("revision", "0")]
        base.executemany("INSERT INTO about VALUES (?, ?)", about)
        base.executemany("INSERT INTO keys VALUES (?, ?)", DEFAULT_KEYS.items())

    def _check(self, base: sqlite3.Connection, pack: str) -> None:
        (application,) = base.execute("PRAGMA application_id").fetchone()
        (layout,) = base.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION and layout > LAYOUT:
            raise TagsError(
                f"{self._name} was written by a later version of xattn; upgrade xattn to read it."
            )
        schema = {sql for (sql,) in base.execute("SELECT sql FROM sqlite_master") if sql}
        if application != APPLICATION or schema != _SCHEMAS.get(layout):
            raise TagsError(
                f"{self._name} is not a tag file of xattn; move it away, so that tags can be saved."
            )
        found = base.execute("SELECT value FROM about WHERE name = 'pack'").fetchone()
        if found != (pack,):
            raise TagsError(
                f"{self._name} contains the tags of a pack with other photos; move it next to that pack, "
                f"or anywhere else. The file was not changed."
            )

    @property
    def _name(self) -> str:
        return visible(self.path.name)


# ---------------------------------------------------------------------- names


def tag_name(text: str) -> str:
    """A tag in the form in which it is stored, which is one line without spaces at the ends.

    Raises:
        TagsError: the tag is empty or too long.
    """
    return _named(text, TAG_LENGTH, "tag")


def slice_name(text: str) -> str:
    """The name of a slice in the form in which it is stored, see :func:`tag_name`."""
    return _named(text, SLICE_LENGTH, "slice")


def _named(text: str, longest: int, what: str) -> str:
    name = encodable(" ".join(str(text).split()))
    if not 0 < len(name) <= longest:
        got = f"{len(name)} characters" if name else "nothing"
        raise TagsError(f"A {what} must have a name of 1 to {longest} characters; got {got}.")
    return name


# ---------------------------------------------------------------------- changes


def _change_tags(
    base: sqlite3.Connection,
    person: str,
    image_ids: Sequence[str],
    add: Sequence[str],
    drop: Sequence[str],
) -> None:
    _check_count(image_ids)
    known = {tag for (tag,) in base.execute("SELECT DISTINCT tag FROM tags")}
    if len(known.union(add)) > max(MOST_TAGS, len(known)):
        raise TagsError(
            f"This pack already has {MOST_TAGS} different tags, which is the limit; first remove "
            "one of them from all photos."
        )
    changes = []
    for names, before, after in ((drop, "1", ""), (add, "", "1")):
        for tag in dict.fromkeys(names):
            own = photos_with_tag(base, image_ids, tag)
            changes += [
                Change("tag", i, tag, before, after)
                for i in dict.fromkeys(image_ids)
                if (i in own) == bool(before)
            ]
    apply_step(base, person, changes)


def _check_count(image_ids: Sequence[str]) -> None:
    if len(image_ids) > MOST_AT_ONCE:
        raise TagsError(
            f"{len(image_ids):,} photos are selected, but at most {MOST_AT_ONCE:,} can be changed at once. "
            f"Use a filter to select fewer."
        )
