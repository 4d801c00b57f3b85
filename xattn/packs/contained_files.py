"""Files of a folder that somebody else may have filled: opened inside that folder, or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

AGAIN = "make the pack again"


class PackError(ValueError):
    """What is wrong with a pack, and what to do about it, in words for the person who opens it."""


def open_inside(folder: Path, name: str) -> IO[bytes]:
    """Open a regular file of ``folder`` (a resolved path) for reading; links that lead out are refused.

    Raises:
        PackError: it is missing, leads out of the folder, is not a regular file, or may not be read.
    """
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        raise PackError(f"{name} is missing; copy the pack again, or {AGAIN}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PackError(f"{name!r:.60} cannot be found ({why(error)}); {AGAIN}") from None
    if not path.is_relative_to(folder):
        raise PackError(f"{name} is a link that leads out of the folder; put the file itself there")
    try:
        stream = open(path, "rb", opener=_open_without_waiting)
    except OSError as error:
        raise PackError(f"{name} cannot be read ({why(error)}); check its permissions") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise PackError(f"{name} is no regular file; copy the pack again, or {AGAIN}")
    return stream


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise block until somebody writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a file of ``folder``, at most ``limit``.

    Raises:
        PackError: as :func:`open_inside`, or the file is larger.
    """
    with open_inside(folder, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise PackError(f"{name} has {size:,} bytes, over the limit of {limit:,}")
        try:
            return stream.read(limit + 1)
        except OSError as error:
            raise PackError(f"{name} cannot be read ({why(error)}); try again") from None


def why(error: BaseException) -> str:
    """The reason in an error, on one line and without a path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200] or type(error).__name__
