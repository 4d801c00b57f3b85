"""Hostile inputs for all that reads a file or an address from outside.

A :class:`Target` is one reader with valid inputs and nasty ones written by hand. Input number i of a
target is a pure function of (seed, target, i): first the valid inputs, then the nasty ones, then
mutations of both in turn. A reader passes if it takes the input, or refuses it by an error of the
project's own: a ``ValueError`` or ``OSError`` whose text begins with what it is about. Anything else is
a failure, and so is an input that takes too long or too much memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import mutations

SECONDS = 10  # of processor time an input may take
MEMORY = 1 << 30  # bytes of address space that an input may add
OWN = r"[a-z_][\w.-]*(=\S+)?(, [a-z_][\w.-]*(=\S+)?)*: "  # the argument that an error is about


@dataclass(frozen=True)
class Target:
    """One reader.

    Args:
        name: in tables, and the folder of its failures.
        read: called with a folder in which ``file`` is the hostile input.
        file: the input's path in that folder.
        valid: inputs that must be accepted, made when they are first asked for.
        nasty: further inputs, written by hand, that are not valid.
        kind: how inputs are mutated: one of :data:`fuzz.mutations.KINDS`; by default as the file's name says.
        template: fills a folder with the other files that ``read`` needs.
        says: how an error of this reader begins, as a regular expression.
        share: how many inputs it gets beside the others.
    """

    name: str
    read: Callable[[Path], object]
    file: str
    valid: Callable[[], Sequence[bytes]]
    nasty: Callable[[], Sequence[bytes]]
    kind: str = "bytes"
    template: Callable[[Path], object] | None = None
    says: str = OWN
    share: float = 1.0
    _made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def inputs(self, what: str) -> Sequence[bytes]:
        """The ``"valid"`` or ``"nasty"`` inputs."""
        if what not in self._made:
            with silence():
                self._made[what] = list(getattr(self, what)())
        return self._made[what]


TARGETS: dict[str, Target] = {}
SUFFIXES = {".json": "json", ".jsonl": "json lines", ".safetensors": "safetensors"}
SUFFIXES |= dict.fromkeys((".txt", ".csv", ".yaml"), "text")


def target(
    name: str,
    file: str,
    valid: Callable[[], Sequence[bytes]],
    nasty: Callable[[], Sequence[bytes]] = lambda: (),
    **options: Any,
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Decorator: enter a reader into :data:`TARGETS`; one that several targets share is passed to each."""

    def add(read: Callable[[Path], object]) -> Callable[[Path], object]:
        assert name not in TARGETS, name
        kind = options.pop("kind", SUFFIXES.get(Path(file).suffix, "bytes"))
        TARGETS[name] = Target(name, read, file, valid, nasty, kind, **options)
        return read

    return add


@dataclass(frozen=True)
class Failure:
    """An input that is neither accepted nor refused in the project's own words."""

    target: str
    number: int
    data: bytes = field(repr=False)
    what: str
    trace: str = field(repr=False)

    def save(self, folder: Path) -> Path:
        """Write the input and, beside it, how it failed; returns the input's path."""
        digest = hashlib.sha256(self.data).hexdigest()[:8]
        path = folder / self.target.replace(" ", "-") / f"{self.number:06}-{digest}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        path.with_name(path.name + ".txt").write_text(
            f"{self.what}\n\n{self.trace}", encoding="utf-8", errors="backslashreplace"
        )
        return path


@dataclass
class Tally:
    """What became of a target's inputs."""

    accepted: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.accepted + self.refused + len(self.failures)


def shares(targets: Sequence[Target], count: int) -> dict[str, int]:
    """How many of ``count`` inputs each target gets; they add up to ``count``."""
    total = sum(t.share for t in targets)
    exact = {t.name: count * t.share / total for t in targets}
    given = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: (given[name] - exact[name], name))
    for name in order[: count - sum(given.values())]:
        given[name] += 1
    return given


def make_input(target: Target, number: int, seed: int) -> bytes:
    """Input ``number`` of a target, a pure function of its arguments."""
    valid, nasty = target.inputs("valid"), target.inputs("nasty")
    if number < len(valid):
        return valid[number]
    turn, odd = divmod(number - len(valid), 2)
    if not odd and turn < len(nasty):
        return nasty[turn]
    rng = random.Random(f"{seed}/{target.name}/{number}")
    base = rng.choice(nasty if nasty and (not valid or rng.random() < 0.2) else valid)
    return mutations.KINDS[target.kind](base, rng, valid or nasty)


def run(target: Target, numbers: Sequence[int], seed: int) -> Iterator[tuple[int, bool | Failure]]:
    """Number by number whether the input was accepted, or how it failed."""
    with workspace(target) as place:
        for number in numbers:
            data = make_input(target, number, seed)
            found = attempt(target, data, place, number)
            if found is False and number < len(target.inputs("valid")):
                found = Failure(target.name, number, data, "a valid input was refused", "")
            yield number, found


@contextlib.contextmanager
def workspace(target: Target) -> Iterator[Path]:
    """A folder for :func:`attempt`, with the target's other files."""
    with tempfile.TemporaryDirectory(prefix="xattn-fuzz-") as root:
        template = Path(root) / "template"
        template.mkdir()
        if target.template is not None:
            with silence():
                target.template(template)
        yield Path(root)


def attempt(target: Target, data: bytes, place: Path, number: int = 0) -> bool | Failure:
    """Whether the reader accepted ``data``, or how it failed; in a copy of the target's folder."""
    folder = place / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "template", folder)
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    before = Path.cwd()
    what: str | None = None
    try:
        with limits(), silence():
            target.read(folder)
        return True
    except KeyboardInterrupt:
        raise
    except TooLong:
        what, trace = f"more than {SECONDS} s of processor time", traceback.format_exc()
    except BaseException as error:
        what, trace = complaint(error, target), traceback.format_exc()
    finally:
        os.chdir(before)
    return (
        False if what is None else Failure(target.name, number, data, what[:300], trace[-20_000:])
    )


def complaint(error: BaseException, target: Target) -> str | None:
    """What is wrong with an error, None if it is one of the project's own."""
    text = str(error)
    if isinstance(error, MemoryError):
        return f"more than {MEMORY >> 20} MB of memory"
    if not isinstance(error, ValueError | OSError) or isinstance(error, UnicodeError):
        return f"{type(error).__name__}: {text}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return None  # the system's own reason, beside the file's name
    if isinstance(error, OSError) and error.args:
        text = str(error.args[-1])
    if not re.match(target.says, text):
        return f"{type(error).__name__} in foreign words: {text}"
    return None


# ---------------------------------------------------------------------- limits


class TooLong(BaseException):
    """An input takes too much time; no reader catches it."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Processor time and memory of an input."""

    def stop(*_: object) -> None:
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    # Again each second: what lies in C, or in a finaliser, when the first comes may swallow it.
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without the prints and warnings of readers; libraries in C write where file 2 leads."""
    streams = io.StringIO(), io.StringIO()
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def table(tallies: Mapping[str, Tally]) -> str:
    """A line a target, and the sum."""
    width = max(map(len, (*tallies, "target")))
    lines = [f"{'target':{width}}  inputs  accepted  refused  failures"]
    for name, tally in [*tallies.items(), ("all", _sum(tallies))]:
        counts = (tally.count, tally.accepted, tally.refused, len(tally.failures))
        lines.append(f"{name:{width}}  {counts[0]:6}  {counts[1]:8}  {counts[2]:7}  {counts[3]:8}")
    return "\n".join(lines)


def _sum(tallies: Mapping[str, Tally]) -> Tally:
    values = tallies.values()
    failures = [failure for tally in values for failure in tally.failures]
    return Tally(sum(t.accepted for t in values), sum(t.refused for t in values), failures)
