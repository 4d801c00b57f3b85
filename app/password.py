"""The viewer's password: a file with its scrypt hash, and the signed cookies of those who gave it."""

from __future__ import annotations

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn import strict_json
from xattn.files import write_json

SHORTEST, LONGEST = 8, 1024  # characters; the longest bounds the work of one try
SCRYPT = {"n": 1 << 15, "r": 8, "p": 3}  # 32 MiB and about 0.2 s a try
MEMORY = 64 << 20
LIFETIME = 12 * 3600  # seconds until the password is asked for again


@dataclass(frozen=True)
class Password:
    """What a password is checked against, and the key that signs cookies."""

    salt: bytes
    hash: bytes
    key: bytes
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
        return (session, int(end)) if int(end) > now() else None

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
        read_password(path)  # whatever else lies there is not overwritten
    salt = secrets.token_bytes(16)
    record = {
        "xattn": "password",
        "scrypt": SCRYPT,
        "salt": salt.hex(),
        "hash": _hash(password, salt).hex(),
        "key": secrets.token_hex(32),
    }
    write_json(path, record, "set_password", mode=0o600)


def read_password(path: Path) -> Password:
    """The password of a file of ``xattn app --set-password``, which others must not be able to read."""
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
    return Password(values["salt"], values["hash"], values["key"])


def ask_password() -> str:
    """Twice on a terminal; a line of standard input otherwise."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password of the viewer: ")
    if getpass.getpass("Once more: ") != password:
        raise ValueError("password: the two differ; nothing was written")
    return password
