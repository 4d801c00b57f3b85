"""Decide which thread may use a network: several may run passes at once, but one that changes it runs
alone.

Explainers put hooks on layers and change flags while they run. A lock belongs to the weights, so all
backbones over one model share it; it is stored outside the network, so copies and pickles have none.
Waiting threads take turns in order of arrival.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class ModelLock:
    """A lock that many threads share for passes, or that one thread holds exclusively to change the
    network.

    A thread that holds the lock, shared or exclusively, may acquire it again, shared or exclusively.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self._changed = threading.Condition()
        self._line: list[object] = []  # waiting threads, in order
        self._passes: dict[int, int] = {}  # thread -> number of its running passes
        self._owner: int | None = None
        self._depth = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Context manager in which no other thread changes the network."""
        me = threading.get_ident()
        with self._changed:
            if self._owner != me and me not in self._passes:
                self._wait(lambda: self._owner is None)
            self._passes[me] = self._passes.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._passes[me] -= 1
                if not self._passes[me]:
                    del self._passes[me]
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager in which no other thread uses the network."""
        me = threading.get_ident()
        with self._changed:
            # Called from a hook: this thread's own pass is suspended and does not count.
            halted = self._passes.pop(me, 0)
            try:
                if self._owner != me:
                    self._wait(lambda: self._owner is None and not self._passes)
            except BaseException:
                self._resume(me, halted)
                raise
            self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                self._resume(me, halted)
                self._changed.notify_all()

    def _wait(self, free: Callable[[], bool]) -> None:
        place = object()
        self._line.append(place)
        try:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._line[0] is place and free())
        finally:
            self._line.remove(place)
            self._changed.notify_all()

    def _resume(self, thread: int, passes: int) -> None:
        if passes:
            self._passes[thread] = passes


_LOCKS = WeakIdKeyDictionary()
_FINDING = threading.Lock()


def lock_of(module: nn.Module) -> ModelLock:
    """The lock of a module's weights; modules with the same first parameter share it."""
    key = next(module.parameters(), module)
    with _FINDING:
        lock = _LOCKS.get(key)
        if lock is None:
            lock = _LOCKS[key] = ModelLock()
        return lock


@contextmanager
def alone(*modules: nn.Module) -> Iterator[None]:
    """Hold several modules exclusively; locks are always taken in one order, so threads cannot deadlock."""
    locks = {lock.number: lock for lock in map(lock_of, modules)}
    with ExitStack() as stack:
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock.alone())
        yield


def _forget() -> None:
    """Reset the locks in a forked child, where the threads that held them do not exist."""
    global _FINDING, _LOCKS
    _FINDING, _LOCKS = threading.Lock(), WeakIdKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
