"""Print everything that is not a command's result."""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_ERROR = 2000  # characters


def note(line: str) -> None:
    """Print progress, separate from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show the library's warnings as plain lines within this context."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "explain: skipped")  # listed one by one at the end
        warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # max_pixels decides
        warnings.showwarning = lambda message, *where: print(message, file=sys.stderr)
        yield


def one_line(text: str) -> str:
    """Return the text of an error on one line, shortened in the middle if it quotes a file at length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_ERROR else f"{line[:1000]} ... {line[-500:]}"


def pipe_is_closed() -> bool:
    """Return whether nobody reads stdout any more, as after ``| head``; any further output is then
    dropped."""
    try:
        sys.stdout.flush()
        gone = _is_hung_up(sys.stdout.fileno())
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # not a file, or closed
        return False
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    return gone


def _is_hung_up(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_nothing(line: str) -> None:
    """Print nothing; this replaces printing in all but the first process of a launch, which alone reports
    progress."""
