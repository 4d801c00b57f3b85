"""Results written to an object store: made in a local folder, uploaded file by file, the one last that
makes them whole, so that no reader takes a part for the whole."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from xattn.runtime.stores import StoreError, StorePath

AT_ONCE = 8  # files that are uploaded at the same time
_WRITING = ".xattn-writing"  # there while an upload runs, and after one that failed


@contextmanager
def uploaded(
    place: StorePath, last: str, owned: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Yield a local folder whose files are uploaded to ``place`` when the block ends, see :func:`upload`.

    If the block or the upload fails, what there is stays in the local folder, and a warning or the error
    says where.

    Raises:
        StoreError: see :func:`upload`.
    """
    above = Path(tempfile.mkdtemp(prefix="xattn-"))
    folder = above / place.name
    try:
        folder.mkdir()
        yield folder
        upload(folder, place, last, owned)
    except BaseException as error:
        if not any(file.is_file() for file in above.rglob("*")):
            shutil.rmtree(above)
        elif not isinstance(error, StoreError) or str(folder) not in str(error):
            warnings.warn(
                f"output: {place} is not written; what there is lies in {above}", stacklevel=3
            )
        raise
    shutil.rmtree(above)


def upload(folder: Path, place: StorePath, last: str, owned: Callable[[str], bool]) -> None:
    """Upload the files of a folder, ``last`` after all others; first of all an earlier one is removed.

    Args:
        owned: tells by the first part of its name whether a file that is there is of earlier results:
            those that nothing replaces are removed; others are left alone.

    Raises:
        StoreError: the store does not answer; the line names the local folder, which stays.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    try:
        (place / _WRITING).write(b"xattn is writing here")
        (place / last).remove()
        there = [file.below(place) or "" for file in place.files()]
        stale = [n for n in there if n not in names and owned(n.partition("/")[0])]
        others = [name for name in names if name != last]
        _each(lambda name: (place / name).put(folder / name), others)
        _each(lambda name: (place / name).remove(), stale)
        (place / last).put(folder / last)
        (place / _WRITING).remove()
    except OSError as error:
        raise StoreError(
            f"output: {place} is not whole, since {error}; the files are kept in {folder}, copy them "
            f"there, {last} last"
        ) from error


def check_remote_output(place: StorePath, last: str, overwrite: bool, begins: bytes = b"") -> None:
    """Refuse an output in a store now rather than after the work.

    Args:
        last: the file that makes results whole.
        begins: what stands near the beginning of ``last`` if xattn wrote it.

    Raises:
        ValueError: a file, a folder with results or with other things, or a store that takes whole commits
            only. StoreError: nothing can be written.
    """
    if place.scheme == "hf":
        raise ValueError(
            f"output: got {place}; write to a local folder, then upload it with the command hf upload"
        )
    if place.info() is not None:
        raise ValueError(f"output: {place} is a file; name a folder")
    there = {file.name for file in place.files(depth=1)}
    if last in there and not overwrite:
        raise ValueError(
            f"output: {place} holds results already; give another folder, or --overwrite to replace them"
        )
    ours = begins in (place / last).read(0, 4096) if last in there else not place.is_folder()
    unfinished = (place / _WRITING).exists()
    if not ours and not unfinished:
        raise ValueError(
            f"output: {place} is not empty and was not written by xattn; choose a new folder, nothing was "
            f"overwritten"
        )
    try:
        (place / _WRITING).write(b"xattn is writing here")
        if not unfinished:
            (place / _WRITING).remove()
    except OSError as error:
        raise StoreError(f"output: {place} cannot be written, since {error}") from error


def _each(work: Callable[[str], object], names: Sequence[str]) -> None:
    """``work(name)`` for all names, several at once; the first error ends it."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload") as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
