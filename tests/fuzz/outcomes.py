"""A table of outcomes: its key and its shards."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

from fuzz.engine import target
from fuzz.heads import network
from fuzz.labels import nasty_json
from fuzz.states import edited, files_of, photos, put
from xattn.training.outcomes import Outcomes, cache_outcomes, open_outcomes

SHARD = "rows-00000000-00000002.safetensors"


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


def _nasty_keys() -> list[bytes]:
    whole = table_files()["key.json"]
    values: dict[str, tuple[Any, ...]] = {
        "masks": (0, -4, 3, "x", None, 10**12, 10**400), "crops": (0, 2, -1, 10**9, "x", None),
        "task": (5, None, "x"), "format": (0, 99, "x"), "seed": (1, None), "guide": (None, {}),
    }  # fmt: skip
    changes = [{name: value} for name, found in values.items() for value in found]
    return [*(edited(whole, lambda r, c=c: r.update(c)) for c in changes), *nasty_json()]


@target(
    "outcomes shard", f"table/{SHARD}", lambda: [table_files()[SHARD]], lambda: [],
    template=_table, says="table: ", share=0.6,
)  # fmt: skip
def shard(folder: Path) -> None:
    _open(folder)


@target(
    "outcomes key", "table/key.json", lambda: [table_files()["key.json"]], _nasty_keys,
    template=_table, says="table: ", share=0.4,
)  # fmt: skip
def key(folder: Path) -> None:
    _open(folder)
