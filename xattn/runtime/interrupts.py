"""Handle Ctrl-C at a moment that the program chooses."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """Hold back the first Ctrl-C (or SIGTERM) until the caller asks; a second one acts at once.

    A checkpoint taken in the middle of a step would not be a state of an uninterrupted run. The caller
    gets the number of the signal, or 0. A program's own handler of SIGTERM is left in place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        asked.append(number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if number == signal.SIGINT or handler == signal.SIG_DFL:
            signal.signal(number, ask)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
