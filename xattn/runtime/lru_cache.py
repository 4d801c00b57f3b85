"""A cache that keeps the most recently used values, up to a total size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


class LRUCache:
    """Values up to a total size of ``limit``; the least recently used are dropped first. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The value of ``key``, None if it is not in the cache."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Store ``value``, which has the given ``size``, as long as there is room."""
        with self._lock:
            self._total += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = (value, size)
            while self._total > self._limit:
                self._total -= self._kept.popitem(last=False)[1][1]

    def kept(
        self, key: Any, make: Callable[[], Made], size: Callable[[Made], int] | None = None
    ) -> Made:
        """The value of ``key``, computed if it is missing; ``size`` returns its size, by default 1."""
        value: Made | None = self.get(key)
        if value is None:
            value = make()
            self.put(key, value, 1 if size is None else size(value))
        return value
