"""A table of outcomes: its key and its shards."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from fuzz.engine import target
from fuzz.heads import network
from fuzz.labels import nasty_json
from fuzz.states import edited, files_of, photos, put
from xattn.training.outcomes import OutcomeBatch, Outcomes, cache_outcomes

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


@functools.cache
def _numbers() -> OutcomeBatch:
    with tempfile.TemporaryDirectory() as name:
        return _cached(Path(name)).batch([0, 1])


def _again(folder: Path) -> None:
    """Whatever was damaged, the numbers are those of the whole table."""
    found, whole = _cached(folder).batch([0, 1]), _numbers()
    assert torch.equal(found.logits, whole.logits) and torch.equal(found.masks, whole.masks)


def _nasty_keys() -> list[bytes]:
    whole = table_files()["key.json"]
    values: dict[str, tuple[Any, ...]] = {
        "masks": (0, -4, 3, "x", None, 10**12, 10**400), "crops": (0, 2, -1, 10**9, "x", None),
        "task": (5, None, "x"), "format": (0, 99, "x"), "seed": (1, None), "guide": (None, {}),
    }  # fmt: skip
    changes = [{name: value} for name, found in values.items() for value in found]
    return [*(edited(whole, lambda r, c=c: r.update(c)) for c in changes), *nasty_json()]


for what, file, nasty in (("key", "key.json", _nasty_keys), ("shard", SHARD, lambda: ())):
    target(
        f"outcomes repaired after another {what}",
        f"table/{file}",
        functools.partial(lambda name: [table_files()[name]], file),
        nasty,
        template=_table,
        says="table: ",
        share=0.6,
    )(_again)
