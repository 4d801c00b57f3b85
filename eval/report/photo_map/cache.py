"""Caches slow computations for a pack in the user's cache folder, never in the pack.

Files are named by the pack's version, a hash of its manifest, so that packs cannot be confused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from xattn.runtime.files import atomic_file

MOST_FILES = 100  # beyond this, the oldest are deleted
Arrays = Mapping[str, NDArray[np.generic]]


def cache_folder() -> Path:
    """The folder ``xattn/photo-map`` in ``$XDG_CACHE_HOME``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xattn" / "photo-map"


def load_or_make(version: str, what: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that ``make`` returns, read from the cache if they are there.

    Args:
        version: the pack's version.
        what: everything else that the arrays depend on.
    """
    digest = hashlib.sha256(f"{version} {what}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{digest}.npz"
    with suppress(OSError, ValueError, BadZipFile), np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
        os.utime(path)
        return found
    made = make()
    with suppress(OSError):  # without a writable cache, only time is lost
        with atomic_file(path) as new, new.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **made)  # type: ignore[arg-type]
        for old in sorted(path.parent.glob("*.npz"), key=_age)[MOST_FILES:]:
            old.unlink(missing_ok=True)
    return made


def _age(path: Path) -> float:
    """The sort key of a file: smaller if it was used more recently."""
    with suppress(OSError):
        return -path.stat().st_mtime
    return 0.0
