"""Choose and check output folders; earlier results are never replaced unless the user asks for it.

Results for an object store are written to a local folder, then uploaded with the manifest last, so that
readers never see incomplete results.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from xattn.cli.printing import note
from xattn.runtime.files import check_output
from xattn.runtime.process import launch_rank
from xattn.runtime.stores import StoreError, StorePath, resolve_place

AT_ONCE = 8  # number of parallel uploads
_WRITING = ".xattn-writing"  # exists while an upload runs, and after one that failed


@contextmanager
def upload_when_done(
    place: StorePath, last: str, owned: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Yield a local folder whose files are uploaded to ``place`` when the block ends, see :func:`upload`.

    If the block or the upload fails, the files stay in the local folder, and a warning or the error
    message gives its path.

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
                f"output: nothing was written to {place}; the files made so far are in {above}",
                stacklevel=3,
            )
        raise
    shutil.rmtree(above)


def upload(folder: Path, place: StorePath, last: str, owned: Callable[[str], bool]) -> None:
    """Upload the files of a folder, ``last`` after all others; if an earlier version of ``last`` exists,
    it is removed first.

    Args:
        owned: takes the first part of the name of an existing file and returns whether the file belongs to
            earlier results. Such files are removed unless they are replaced; all other files are left
            alone.

    Raises:
        StoreError: the store does not respond; the message names the local folder, which is kept.
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
            f"output: {place} is incomplete, since {error}; the files are kept in {folder}; copy "
            f"them to {place} yourself, {last} last"
        ) from error


def check_remote_output(place: StorePath, last: str, overwrite: bool, begins: bytes = b"") -> None:
    """Reject an unusable output place in a store before the work starts rather than after it has ended.

    Args:
        last: the name of the file that completes the results.
        begins: text that every file ``last`` written by xattn contains near its beginning.

    Raises:
        ValueError: the place is a file, is a folder that holds results or other content, or is in a store
            that accepts only complete commits. StoreError: nothing can be written there.
    """
    if place.scheme == "hf":
        raise ValueError(
            f"output: got {place}; write to a local folder, then upload it with the command hf "
            "upload"
        )
    if place.is_file():
        raise ValueError(f"output: {place} is a file; give a folder")
    there = {file.name for file in place.files(depth=1)}
    if last in there and not overwrite:
        raise ValueError(
            f"output: {place} already holds results; give another folder, or --overwrite to "
            "replace them"
        )
    ours = begins in (place / last).read(0, 4096) if last in there else not place.is_dir()
    unfinished = (place / _WRITING).is_file()
    if not ours and not unfinished:
        raise ValueError(
            f"output: {place} is not empty and was not written by xattn; nothing was "
            "overwritten, choose a new folder"
        )
    try:
        (place / _WRITING).write(b"xattn is writing here")
        if not unfinished:
            (place / _WRITING).remove()
    except OSError as error:
        raise StoreError(f"output: {place} cannot be written, since {error}") from error


def _each(work: Callable[[str], object], names: Sequence[str]) -> None:
    """``work(name)`` for all names, several at once; the first error ends it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload") as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


class Output(NamedTuple):
    """The local ``folder`` that a command writes to, and the place where its results finally go."""

    folder: Path
    place: Path | StorePath


@contextmanager
def output_folder(
    given: Path | None,
    default: str,
    overwrite: bool,
    whole: str,
    begins: bytes = b"",
    owned: Callable[[str], bool] = lambda name: False,
) -> Iterator[Output]:
    """Yield the folder to write to: ``given``, or ``default`` with a number added if it already holds
    results.

    Results for a URL are written to a local folder and uploaded when the block ends.

    Args:
        whole: the name of a file that exists only if results are complete.
        begins: text that every such file written by xattn contains near its beginning.
        owned: see :func:`xattn.cli.outputs.upload`.

    Raises:
        ValueError: ``given`` is a file, or holds results and ``overwrite`` is not set.
    """
    place = None if given is None else resolve_place(given, "output")
    if not isinstance(place, StorePath):
        folder = _local_folder(place, default, overwrite, whole)
        yield Output(folder, folder)
        return
    if launch_rank()[0] > 1:
        raise ValueError(
            f"output: got {place}; several processes write to one folder that they share, so "
            "give a local one"
        )
    check_remote_output(place, whole, overwrite, begins)
    with upload_when_done(place, whole, owned) as local:
        yield Output(local, place)


def pack_output(
    given: Path | None, default: str, overwrite: bool
) -> AbstractContextManager[Output]:
    """Return the :func:`output_folder` of a command that writes a pack."""
    from xattn.packs.format import FORMAT, MANIFEST, is_pack_file

    begins = f'"{FORMAT}"'.encode()
    return output_folder(given, default, overwrite, MANIFEST, begins, is_pack_file)


def refuse_remote(command: str, output: Path | None) -> None:
    """Raise a one-line error if ``output`` is a URL, for a command that can be resumed from its output
    folder and so needs it on disk."""
    place = None if output is None else resolve_place(output, "output")
    if isinstance(place, StorePath):
        raise ValueError(
            f"output: got {place}, but xattn {command} writes to disk while it runs; give a "
            "local folder, and copy it to the store afterwards"
        )


def _local_folder(given: Path | None, default: str, overwrite: bool, whole: str) -> Path:
    first = given or Path(default)
    check_output(first)
    if overwrite or not (first / whole).is_file():
        return first
    if given is not None:
        raise ValueError(
            f"output: {given} already holds results; give another folder, or --overwrite to "
            "replace them"
        )
    names = (first.with_name(f"{first.name}-{number}") for number in count(2))
    free = next(folder for folder in names if not folder.exists())
    note(f"output: {first} holds earlier results; the new ones go to {free}")
    return free
