"""Plans: data that depend only on the layout of tokens, built once and cached for all calls.

Orders, block lists and rules are computed from numbers on a CPU and then moved to the device of the call.
For ``torch.compile`` and ``torch.export`` a plan is a constant, because building one reads values of
tensors, which would break the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from xattn.attention.operators.base import map_tensors
from xattn.runtime.lru_cache import LRUCache

KEPT = LRUCache(2**30)  # bytes of plans; the least recently used are dropped first
MOST = 256  # largest number of plans to which compiled code can refer
Made = TypeVar("Made")


def cache_plan(make: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator for a function that builds a plan from sizes and options; its arguments must be hashable.

    The decorated function also takes the keyword ``device``, the device of the plan's tensors.
    """

    def found(device: torch.device | str, *args: Any, **options: Any) -> Made:
        key = make, str(device), args, tuple(sorted(options.items()))
        return load_or_make(key, lambda: move_plan(build_on_cpu(make, *args, **options), device))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def name(device: torch.device | str, *args: Any, **options: Any) -> str:
        return constant_name(found(device, *args, **options))

    @wraps(make)
    def plan(*args: Any, device: torch.device | str = "cpu", **options: Any) -> Made:
        if torch.compiler.is_compiling():
            args, options = _numbers(args), _numbers(options)
        if torch.compiler.is_dynamo_compiling():
            constant: Made = getattr(Constants, name(device, *args, **options))
            return constant
        return found(device, *args, **options)

    return plan


def load_or_make(key: Any, make: Callable[[], Made]) -> Made:
    """Return the cached result of ``make`` for ``key``. If there is none, compute it."""
    return KEPT.kept(key, make, _bytes)


class Constants:
    """Plans to which compiled code refers. They are attributes, so that the compiler can look them up by
    name. Only the last ``MOST`` plans are kept; code that was compiled for an earlier plan is recompiled
    when it runs."""


_NUMBERS = count()


def constant_name(made: Any) -> str:
    """Return the name of ``made`` in :class:`Constants`. A name is never reused for another plan."""
    names = [name for name in vars(Constants) if name.startswith("plan_")]
    for name in names:
        if getattr(Constants, name) is made:
            return name
    name = f"plan_{next(_NUMBERS)}"
    setattr(Constants, name, made)
    if len(names) >= MOST:
        delattr(Constants, names[0])
    return name


@contextmanager
def real_tensors() -> Iterator[None]:
    """Context manager in which new tensors are real, even during graph export, and can be used in training
    later."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield


def build_on_cpu(make: Callable[..., Made], *args: Any, **options: Any) -> Made:
    """Return the result of ``make``, with its tensors on a CPU."""
    with real_tensors(), torch.device("cpu"):
        return make(*args, **options)


def move_plan(made: Made, device: torch.device | str) -> Made:
    """Return the plan with all of its tensors on ``device``."""
    with real_tensors():
        found: Made = map_tensors(made, lambda x: x.to(device))
    return found


def _bytes(made: Any) -> int:
    total = 0

    def add(x: Tensor) -> Tensor:
        nonlocal total
        total += x.nbytes
        return x

    map_tensors(made, add)
    return total


def _numbers(values: Any) -> Any:
    """Return ``values`` with the symbolic numbers of traced code replaced by plain numbers."""
    if isinstance(values, tuple):
        return tuple(_numbers(x) for x in values)
    if isinstance(values, dict):
        return {name: _numbers(x) for name, x in values.items()}
    return operator.index(values) if isinstance(values, int | torch.SymInt) else values
