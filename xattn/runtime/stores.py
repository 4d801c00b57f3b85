"""Files and folders of object stores by URL (``s3://``, ``gs://``, ``hf://``, ...), through fsspec.

A :class:`StorePath` reads by range, lists what is below it, and accepts files. Every request is repeated a
few times with growing pauses; if a store still does not respond, a :class:`StoreError` is raised. Each call
asks fsspec for its file system again. This costs nothing and keeps forked processes separate, because
fsspec keeps one file system for each process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

ATTEMPTS = 4
PAUSE = 0.5  # seconds after the first attempt, doubled after each
PATIENCE = 15.0  # seconds without an answer before a request counts as failed
SLOWEST = 200_000  # bytes per second; anything slower counts as no answer
BLOCK = 8 << 20  # bytes per request
LIBRARIES = {"s3": '"xattn[remote]"', "s3a": '"xattn[remote]"', "gs": "gcsfs", "gcs": "gcsfs"}
LIBRARIES |= {"hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # a Path has one slash left
_LOCAL = ("file", "local")
# How the libraries' errors begin if a permission is missing.
_REFUSED = re.compile("Forbidden|Unauthorized|Access ?Denied|Anonymous caller|40[13] Client Error")
_FINAL = (ValueError, TypeError, NotImplementedError, NotADirectoryError, IsADirectoryError)
# Names that the file systems use for a file's version and date.
_MARKS = "ETag etag md5Hash blob_id mtime LastModified updated created".split()
_DATES = ("LastModified", "created", "mtime")
Result = TypeVar("Result")


class StoreError(OSError):
    """Raised if an object store does not respond or denies access."""


@dataclass(frozen=True)
class StorePath:
    """A file or folder of an object store, with an interface like :class:`~pathlib.Path`.

    Attributes:
        url: in fsspec's form, without a slash at the end.
        size: size of a file in bytes, if a listing has reported it.
        mark: a value that changes when the file is replaced, if a listing has reported it.
        modified: when the file was written, in Unix seconds, if a listing has reported it.
    """

    url: str
    size: int | None = field(default=None, compare=False)
    mark: str = field(default="", compare=False)
    modified: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self.url}/{name}")

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def store(self) -> str:
        """The store's scheme and bucket (for ``hf://``, the repository), for error messages."""
        return "/".join(self.url.split("/")[: 5 if self.scheme == "hf" else 3])

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> StorePath:
        return StorePath(self.url.rpartition("/")[0])

    def below(self, folder: StorePath) -> str | None:
        """The name of this file relative to ``folder``; None if it is elsewhere."""
        start = f"{folder.url}/"
        return self.url[len(start) :] if self.url.startswith(start) else None

    # ------------------------------------------------------------------ reading

    def info(self) -> StorePath | None:
        """This file with its size; None if there is no file of this name.

        Raises:
            StoreError: as in all methods below.
        """
        found = self._info()
        return self._described(found) if found is not None and found["type"] == "file" else None

    def is_file(self) -> bool:
        """Whether there is a file of this name."""
        return self.info() is not None

    def exists(self) -> bool:
        """Whether there is a file or folder of this name."""
        return self._info() is not None

    def is_dir(self) -> bool:
        """Whether there is anything below this path."""
        found = self._info()
        return found is not None and found["type"] == "directory"

    def _info(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._ask(lambda fs, path, wait: _fresh(fs).info(path, **wait))
            return found
        except FileNotFoundError:
            return None

    def read_bytes(self) -> bytes:
        """The whole file; raises the same errors as :meth:`read`."""
        return self.read(0, self.known_size())

    def read(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive).

        Raises:
            FileNotFoundError: no such file.
        """
        parts = [self._range(at, min(at + BLOCK, end)) for at in range(start, end, BLOCK)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def known_size(self) -> int:
        """Size of this file in bytes, requested unless a listing has reported it; FileNotFoundError if
        there is no file."""
        found = self if self.size is not None else self.info()
        if found is None or found.size is None:
            raise FileNotFoundError(f"no file {self}")
        return found.size

    def _range(self, start: int, end: int) -> bytes:
        def cut(fs: Any, path: str, wait: dict[str, Any]) -> bytes:
            try:
                data: bytes = fs.cat_file(path, start=start, end=end, **wait)
                return data
            except OSError as error:
                if "not satisfiable" in str(error):  # the file ends earlier
                    return b""
                raise

        return self._ask(cut, end - start)

    # ------------------------------------------------------------------ listing

    def files(self, depth: int | None = None) -> list[StorePath]:
        """All files below, sorted like the paths of a local folder, without hidden ones.

        Args:
            depth: how many levels of folders are listed, 1 for this one only; all by default.
        """
        found = self._ask(
            lambda fs, path, wait: (
                path,
                _fresh(fs).find(path, maxdepth=depth, detail=True, **wait),
            ),
            1 << 27,
        )
        root, below = found[0].strip("/"), found[1]
        files: list[tuple[list[str], StorePath]] = []
        for path, about in below.items():
            parts = path.strip("/").removeprefix(root).strip("/").split("/")
            if about.get("type") == "file" and not any(p.startswith(".") or not p for p in parts):
                files.append((parts, (self / "/".join(parts))._described(about)))
        return [file for _, file in sorted(files, key=lambda pair: pair[0])]

    def entries(self) -> tuple[dict[str, StorePath], list[str]]:
        """The files directly in this folder by name, and the names of its subfolders, without hidden
        ones."""
        try:
            found = self._ask(
                lambda fs, path, wait: _fresh(fs).ls(path, detail=True, **wait), 1 << 27
            )
        except FileNotFoundError:
            return {}, []
        named = [(about["name"].rstrip("/").rpartition("/")[2], about) for about in found]
        shown = [(name, about) for name, about in named if name and not name.startswith(".")]
        files = {n: (self / n)._described(about) for n, about in shown if about["type"] == "file"}
        return files, sorted(n for n, about in shown if about["type"] == "directory")

    def _described(self, about: dict[str, Any]) -> StorePath:
        mark = next((str(about[name]) for name in _MARKS if about.get(name)), "")
        dates = [about[name] for name in _DATES if isinstance(about.get(name), datetime)]
        modified = dates[0].timestamp() if dates else 0.0
        return StorePath(self.url, about.get("size"), mark, modified)

    # ------------------------------------------------------------------ writing

    def put(self, file: Path) -> None:
        """Upload a file; it appears completely or not at all."""
        size = file.stat().st_size
        self._ask(lambda fs, path, wait: fs.put_file(str(file), path, **wait), size)

    def write(self, data: bytes) -> None:
        """Write a small file."""
        self._ask(lambda fs, path, wait: fs.pipe_file(path, data, **wait), len(data))

    def remove(self) -> None:
        """Remove a file, if it is there."""
        try:
            self._ask(lambda fs, path, wait: fs.rm_file(path))
        except FileNotFoundError:
            pass

    def _ask(self, call: Callable[[Any, str, dict[str, Any]], Result], size: int = 0) -> Result:
        """The result of ``call(file system, path, options of waiting)``, repeated until the store answers.

        Args:
            size: number of bytes that are transferred, which extends the waiting time.
        """
        fs = file_system(self.scheme)
        path: str = fs._strip_protocol(self.url)
        wait = {"timeout": PATIENCE + size / SLOWEST} if fs.async_impl else {}
        started, error = time.monotonic(), Exception()
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                return call(fs, path, wait)
            except FileNotFoundError:
                raise FileNotFoundError(f"no file or folder {self}") from None
            except _FINAL as final:
                raise StoreError(f"{self} cannot be used ({_reason(final)})") from final
            except Exception as other:  # each library has its own errors
                if _is_refusal(other):
                    raise StoreError(
                        f"{self.store} refuses access ({_reason(other)}); check the name and the "
                        f"credentials"
                    ) from other
                error = other
        raise StoreError(
            f"{self.store} does not answer ({_reason(error)}; {ATTEMPTS} attempts in "
            f"{time.monotonic() - started:.0f} s); check the network and the address of the store, then "
            f"try again"
        ) from error


def resolve_place(given: str | Path | StorePath, argument: str = "path") -> Path | StorePath:
    """The place that a path or URL names: a path in a store, or a local path (also for a ``file://`` URL).

    Raises:
        ValueError: the URL has another form, or the library for it is not installed.
    """
    if isinstance(given, StorePath):
        return given
    match = _URL.fullmatch(given if isinstance(given, str) else given.as_posix())
    if match is None:
        return Path(given)
    scheme, rest = match[1].lower(), match[2]
    if scheme in _LOCAL:
        from urllib.request import url2pathname  # imports http, ssl and email

        return Path(url2pathname(f"/{rest}"))
    import fsspec

    if scheme == "data" or scheme not in fsspec.available_protocols():
        kept = isinstance(given, str) and "://" not in given
        if kept or Path(f"{match[1]}:").exists():  # a local folder whose name contains a colon
            return Path(given)
        raise ValueError(
            f"{argument}: got {scheme}://{rest}, whose store {scheme}:// is not known; give s3://, gs://, "
            f"hf://, or a local path"
        )
    if "::" in rest or not rest.strip("/"):
        raise ValueError(f"{argument}: got {given}; give {scheme}://BUCKET/FOLDER")
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        library = LIBRARIES.get(scheme, "its fsspec library")
        raise ValueError(
            f"{argument}: {scheme}:// needs a library that is not installed; run: pip install {library}"
        ) from None
    return StorePath(f"{scheme}://{rest.strip('/')}")


def is_remote(given: Any, argument: str = "path") -> bool:
    """Whether a path or URL names something in a store; raises as :func:`resolve_place`."""
    return isinstance(given, StorePath) or (
        isinstance(given, str | Path)
        and _URL.fullmatch(str(given)) is not None
        and isinstance(resolve_place(given, argument), StorePath)
    )


def file_system(scheme: str) -> Any:
    """The fsspec file system of a store; it does not repeat failed requests, because :class:`StorePath`
    does."""
    import fsspec
    from fsspec.config import conf

    if scheme not in ("s3", "s3a"):
        return fsspec.filesystem(scheme)
    own = {"connect_timeout": 5, "read_timeout": PATIENCE, "retries": {"total_max_attempts": 1}}
    fs = fsspec.filesystem(
        "s3", config_kwargs={**own, **conf.get("s3", {}).get("config_kwargs", {})}
    )
    fs.retries = 1
    return fs


def _fresh(fs: Any) -> Any:
    """The file system without its cached listings."""
    fs.invalidate_cache()
    return fs


def _is_refusal(error: BaseException) -> bool:
    named = "Credential" in type(error).__name__
    return isinstance(error, PermissionError) or named or _REFUSED.match(str(error)) is not None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
