"""What takes long is computed once for a pack and kept as a file of the user's cache, never in the pack.

The file is named by the pack's version, a hash of its manifest, so that another pack is never taken for it.
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

MOST_FILES = 100  # the oldest go first
Arrays = Mapping[str, NDArray[np.generic]]


def cache_folder() -> Path:
    """``xattn/photo-map`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xattn" / "photo-map"


def kept(version: str, what: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that ``make`` gives, read from the cache if they are there.

    Args:
        version: of the pack; ``what``: everything else that the arrays depend on.
    """
    digest = hashlib.sha256(f"{version} {what}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{digest}.npz"
    with suppress(OSError, ValueError, BadZipFile), np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
        os.utime(path)
        return found
    made = make()
    with suppress(OSError):  # a cache that cannot be written only costs time
        with atomic_file(path) as new, new.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **made)  # type: ignore[arg-type]
        for old in sorted(path.parent.glob("*.npz"), key=_age)[MOST_FILES:]:
            old.unlink(missing_ok=True)
    return made


def _age(path: Path) -> float:
    """Less for a file that was used later."""
    with suppress(OSError):
        return -path.stat().st_mtime
    return 0.0
