"""Caches the results of slow computations for a pack in the user's cache folder, never in the pack itself.

The name of a file depends on the pack's version, which is a hash of its manifest, so that packs cannot be
confused.
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

MOST_FILES = 100  # if there are more files, those unused for longest are deleted
Arrays = Mapping[str, NDArray[np.generic]]


def cache_folder() -> Path:
    """The folder ``xattn/photo-map`` in ``$XDG_CACHE_HOME`` or, if this is not set, in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xattn" / "photo-map"


def load_or_make(version: str, what: str, make: Callable[[], Arrays]) -> Arrays:
    """Read arrays from the cache, or call ``make`` and store its result if the cache does not contain them.

    Args:
        version: the pack's version.
        what: a text that describes everything else on which the arrays depend.
        make: computes the arrays.
    """
    digest = hashlib.sha256(f"{version} {what}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{digest}.npz"
    with suppress(OSError, ValueError, BadZipFile), np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
        os.utime(path)
        return found
    made = make()
    with suppress(OSError):  # if the cache is not writable, the arrays are computed again each time
        with atomic_file(path) as new, new.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **made)  # type: ignore[arg-type]
        for old in sorted(path.parent.glob("*.npz"), key=_age)[MOST_FILES:]:
            old.unlink(missing_ok=True)
    return made


def _age(path: Path) -> float:
    """A sort key by which files that were used more recently come first."""
    with suppress(OSError):
        return -path.stat().st_mtime
    return 0.0
