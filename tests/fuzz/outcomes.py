"""A table of outcomes: its index, its key, and the states of its rows."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from fuzz.engine import target
from fuzz.heads import network
from fuzz.labels import nasty_json
from fuzz.states import edited, files_of, photos, put
from xattn.training.outcomes import Outcomes, cache_outcomes, open_outcomes
from xattn.training.row_files import index_digest, key_digest


def _cached(folder: Path) -> Outcomes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few photos; what is damaged is named
        return cache_outcomes(
            network(), photos(folder / "photos"), folder / "table", masks=4, progress=False
        )


@functools.cache
def table_files() -> dict[str, bytes]:
    """A table of two photos."""
    with tempfile.TemporaryDirectory() as name:
        _cached(Path(name))
        return files_of(Path(name) / "table")


def _table(folder: Path) -> None:
    put(table_files(), folder / "table")


def _open(folder: Path) -> None:
    found = open_outcomes(folder / "table")
    batch = found.batch(range(len(found)))
    batch.log_odds(batch.top(2))


def _again(folder: Path) -> None:
    """Whatever was damaged, the numbers are those of the whole table."""
    _cached(folder)
    found = files_of(folder / "table")
    changed = [name for name, data in table_files().items() if found[name] != data]
    assert set(changed) <= {"outcomes.json", "key.json"}, changed  # of equal values


def _nasty_indexes() -> list[bytes]:
    whole = table_files()["outcomes.json"]
    values: dict[str, tuple[Any, ...]] = {
        "photos": (-1, 0, 10**6, 10**12, "2", None, 2.5, True),
        "classes": (0, -5, 4, 5.5, "x", None, 10**12, 10**400, 3000),
        "names": ([], None, "ab", [1, 2], {}, ["a"]),
        "skipped": ([[0, "x"]], [[5, "x"]], [[0, None]], {"0": "x"}, "ab", None, [[1e999, "x"]]),
        "files": ({}, None, [], {"../x": 1}),
    }
    changes = [{name: value} for name, found in values.items() for value in found]

    def sealed(change: dict[str, Any]) -> bytes:
        index = {**json.loads(whole), **change}
        return edited(json.dumps(index).encode(), lambda r: r.update(sha256=index_digest(index)))

    return [*map(sealed, changes), *nasty_json()]


def _nasty_keys() -> list[bytes]:
    whole = table_files()["key.json"]
    values: dict[str, tuple[Any, ...]] = {
        "masks": (0, -4, 3, "x", None, 10**12, 10**400), "crops": (0, 2, -1, 10**9, "x", None),
        "task": (5, None, "x"), "format": (0, 99, "x"), "seed": (1, None), "guide": (None, {}),
    }  # fmt: skip
    changes = [{name: value} for name, found in values.items() for value in found]
    return [*(edited(whole, lambda r, c=c: r.update(c)) for c in changes), *nasty_json()]


@target(
    "outcomes index", "table/outcomes.json", lambda: [table_files()["outcomes.json"]], _nasty_indexes,
    kind="json", template=_table, says="table: ", share=0.6,
)  # fmt: skip
def index(folder: Path) -> None:
    _open(folder)


@target(
    "outcomes key", "table/key.json", lambda: [table_files()["key.json"]], _nasty_keys,
    kind="json", template=_table, says="table: ", share=0.4,
)  # fmt: skip
def key(folder: Path) -> None:
    """With an index that belongs to it, so that it is read."""
    path = folder / "table/outcomes.json"
    try:
        digest = key_digest(json.loads((folder / "table/key.json").read_bytes()))
    except (ValueError, RecursionError):
        digest = ""
    record = {**json.loads(path.read_bytes()), "key": digest}
    path.write_text(json.dumps({**record, "sha256": index_digest(record)}))
    _open(folder)


for what, file, nasty in (
    ("index", "outcomes.json", _nasty_indexes),
    ("key", "key.json", _nasty_keys),
    ("states", "rows", lambda: ()),
    ("logits", "logits", lambda: ()),
):
    target(
        f"outcomes repaired after other {what}",
        f"table/{file}",
        functools.partial(lambda name: [table_files()[name]], file),
        nasty,
        template=_table,
        says="table: ",
        share=0.1,
    )(_again)
