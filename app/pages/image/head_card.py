"""The model card of the head that made a map, found by the hash of the head's weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.app.library import Library

CARD = "README.md"
LONGEST = 20_000  # characters that are shown


def head_card(library: Library, head: Mapping[str, Any]) -> str | None:
    """The model card of the head recorded in a pack (name, sha256): the README.md in its folder, else its
    training record; None if it is neither a shipped head nor one below the root."""
    from xattn.runtime.head_files import shipped_heads

    folders = [*shipped_heads().values(), *(info.folder for info in library.heads())]
    for folder in folders:
        try:
            if _matches(folder, head):
                return _card(folder)
        except (ValueError, OSError):
            continue  # another head's files may be damaged
    return None


def _matches(folder: Path, head: Mapping[str, Any]) -> bool:
    from xattn.heads.base import read_config
    from xattn.runtime.head_files import WEIGHTS_FILE

    if read_config(folder)["head"] != head.get("name"):
        return False
    weights = folder / WEIGHTS_FILE
    return _sha256(weights, weights.stat().st_mtime_ns) == head.get("sha256")


@functools.lru_cache(maxsize=64)
def _sha256(weights: Path, changed: int) -> str:
    """The hash of the head as loaded: in single precision, whatever the file holds."""
    from xattn.backbone import state_sha256
    from xattn.models.weights import load_weight_file

    state = load_weight_file(weights)
    return state_sha256({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def _card(folder: Path) -> str:
    from xattn.heads.base import read_config

    card = folder / CARD
    if card.is_file() and card.resolve().is_relative_to(folder.resolve()):
        with card.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LONGEST)
    return json.dumps(read_config(folder).get("training", {}), indent=2)[:LONGEST]
