"""A cache that keeps what was used last, up to a sum of sizes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


class LRUCache:
    """Values up to a sum of sizes of ``limit``; the least recently used go first. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The value of ``key``, None if it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep ``value``, which takes ``size``, for as long as there is room."""
        with self._lock:
            self._total += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = (value, size)
            while self._total > self._limit:
                self._total -= self._kept.popitem(last=False)[1][1]

    def kept(
        self, key: Any, make: Callable[[], Made], size: Callable[[Made], int] | None = None
    ) -> Made:
        """The value of ``key``, made if it is missing; ``size`` tells what it takes, by default 1."""
        value: Made | None = self.get(key)
        if value is None:
            value = make()
            self.put(key, value, 1 if size is None else size(value))
        return value
