"""The viewer's password: a file with its scrypt hash, and the signed cookies of those who gave it."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import hmac
import os
import secrets
import stat
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn.runtime import strict_json
from xattn.runtime.files import write_json

SHORTEST, LONGEST = 8, 1024  # characters; the longest bounds the work of one try
SCRYPT = {"n": 1 << 15, "r": 8, "p": 3}  # 32 MiB and about 0.2 s a try
MEMORY = 64 << 20
LIFETIME = 12 * 3600  # seconds until the password is asked for again
ENDED = ".ended"  # behind the name of the password's file


class Ended:
    """Sessions that logged out before their time, kept in a file so that they stay logged out after a
    restart.

    Args:
        path: the file, which need not be there; None keeps them in memory.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._sessions = self._read()  # {id: end in Unix seconds}

    def __contains__(self, session: str) -> bool:
        return session in self._sessions

    def add(self, session: str, end: int) -> None:
        """Let a session count as ended, from now on and after a restart.

        Raises:
            OSError: the file is damaged or cannot be written; the session has ended all the same.
        """
        with self._lock:
            self._sessions[session] = end
            try:
                with self._alone():
                    self._write(self._read())
            except ValueError:
                raise OSError(0, f"{self._path} is damaged and was not changed") from None
            except OSError as error:
                cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
                raise OSError(
                    error.errno, f"cannot write {self._path} ({cause.strerror})"
                ) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other server of the same password reads or writes the file until the block ends."""
        if self._path is None:
            yield
            return
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        lock = os.open(self._path.with_name(f"{self._path.name}.lock"), flags, 0o600)
        try:
            with contextlib.suppress(ImportError):  # not POSIX
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, others: dict[str, int]) -> None:
        """Add the sessions of other servers to ours, and write those that have not ended by time."""
        now = time.time()
        both = self._sessions | others
        self._sessions = {name: end for name, end in both.items() if end > now}
        if self._path is not None:
            record = {"xattn": "ended sessions", "sessions": self._sessions}
            write_json(self._path, record, "password_file", mode=0o600)

    def _read(self) -> dict[str, int]:
        if self._path is None or not self._path.exists():
            return {}
        remedy = (
            f"set the password again with 'xattn app --set-password {self._path.with_suffix('')}', "
            "which ends all sessions"
        )
        record = strict_json.read(self._path, "password_file", remedy)
        found = record.get("sessions") if isinstance(record, dict) else None
        if not isinstance(found, dict) or not all(type(end) is int for end in found.values()):
            raise ValueError(f"password_file: {self._path} is damaged; {remedy}")
        return found


def _ended_file(path: Path) -> Path:
    """Where the sessions are kept that logged out under the password in ``path``."""
    return path.with_name(f"{path.name}{ENDED}")


@dataclass(frozen=True)
class Password:
    """What a password is checked against, the key that signs cookies, and the sessions that ended."""

    salt: bytes
    hash: bytes
    key: bytes
    ended: Ended = field(default_factory=Ended, repr=False, compare=False)
    _one: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def check(self, password: str) -> bool:
        """Whether this is the password, in constant time; one try at a time, since each takes 32 MiB."""
        if not 0 < len(password) <= LONGEST:
            return False
        with self._one:
            return hmac.compare_digest(_hash(password, self.salt), self.hash)

    def cookie(self, now: Callable[[], float] = time.time) -> str:
        """The value of a new session's cookie: its end in Unix seconds, its id, their signature."""
        text = f"{int(now()) + LIFETIME}.{secrets.token_urlsafe(16)}"
        return f"{text}.{self._sign(text)}"

    def session(
        self, cookie: str | None, now: Callable[[], float] = time.time
    ) -> tuple[str, int] | None:
        """Id and end of the session that a cookie speaks of; None if it is not ours or has ended."""
        text, _, signature = (cookie or "").rpartition(".")
        if not hmac.compare_digest(self._sign(text).encode(), signature.encode("utf-8", "replace")):
            return None
        end, _, session = text.partition(".")  # signed by us, so it has the form of cookie()
        return (session, int(end)) if int(end) > now() and session not in self.ended else None

    def _sign(self, text: str) -> str:
        return hmac.new(self.key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _hash(password: str, salt: bytes) -> bytes:
    normal = unicodedata.normalize("NFKC", password)  # the same password from every keyboard
    return hashlib.scrypt(normal.encode(), salt=salt, maxmem=MEMORY, dklen=32, **SCRYPT)


def write_password(path: Path, password: str) -> None:
    """Store the hash of ``password``, readable by its owner alone; sessions of an older one end."""
    if not SHORTEST <= len(password) <= LONGEST:
        raise ValueError(
            f"password: got {len(password)} characters; give {SHORTEST} to {LONGEST:,}"
        )
    if path.exists():
        _read(path)  # whatever else lies there is not overwritten
    salt = secrets.token_bytes(16)
    record = {
        "xattn": "password",
        "scrypt": SCRYPT,
        "salt": salt.hex(),
        "hash": _hash(password, salt).hex(),
        "key": secrets.token_hex(32),
    }
    write_json(path, record, "set_password", mode=0o600)
    _ended_file(path).unlink(missing_ok=True)  # of the key before


def read_password(path: Path) -> Password:
    """The password of a file of ``xattn app --set-password``, which others must not be able to read,
    with the sessions that ended under it."""
    values = _read(path)
    try:
        ended = Ended(_ended_file(path))
    except OSError as error:
        raise ValueError(
            f"password_file: cannot read {_ended_file(path)} ({error.strerror}), which holds the "
            "sessions that logged out; make it readable"
        ) from None
    return Password(values["salt"], values["hash"], values["key"], ended)


def _read(path: Path) -> dict[str, bytes]:
    """Salt, hash and key of a password's file."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(
            f"password_file: cannot read {path} ({reason}); make it with "
            f"'xattn app --set-password {path}'"
        ) from None
    try:
        record: dict[str, Any] = strict_json.parse(text)
        values = {name: bytes.fromhex(record[name]) for name in ("salt", "hash", "key")}
        whole = record["xattn"] == "password" and record["scrypt"] == SCRYPT
    except (ValueError, KeyError, TypeError):
        whole, values = False, {}
    if not whole or len(values["hash"]) != 32 or len(values["key"]) < 32:
        raise ValueError(
            f"password_file: {path} is not a file of 'xattn app --set-password'; make a new one"
        )
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(
            f"password_file: {path} can be used by others on this machine; run: chmod 600 {path}"
        )
    return values


def ask_password() -> str:
    """Twice on a terminal; a line of standard input otherwise."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password of the viewer: ")
    if getpass.getpass("Once more: ") != password:
        raise ValueError("password: the two differ; nothing was written")
    return password
