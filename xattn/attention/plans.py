"""Plans: what depends on the layout of tokens alone, made once and kept for all calls.

Orders, lists of blocks and rules are made of numbers, on a CPU, and moved to the device of the call. To
``torch.compile`` and ``torch.export`` a plan is a constant: making one reads values, which would break the
graph.
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

from xattn.attention.operators.base import changed
from xattn.runtime.lru_cache import LRUCache

KEPT = LRUCache(2**30)  # bytes of plans; those that were not asked for the longest go first
MOST = 256  # plans that compiled code refers to
Made = TypeVar("Made")


def planned(make: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator of a function that makes a plan of numbers, which have to be hashable.

    Callers name the ``device`` of its tensors beside the function's own arguments; a CPU by default.
    """

    def found(device: torch.device | str, *args: Any, **options: Any) -> Made:
        key = make, str(device), args, tuple(sorted(options.items()))
        return kept(key, lambda: moved(build(make, *args, **options), device))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def name(device: torch.device | str, *args: Any, **options: Any) -> str:
        return refer_to(found(device, *args, **options))

    @wraps(make)
    def plan(*args: Any, device: torch.device | str = "cpu", **options: Any) -> Made:
        if torch.compiler.is_compiling():
            args, options = _numbers(args), _numbers(options)
        if torch.compiler.is_dynamo_compiling():
            constant: Made = getattr(Constants, name(device, *args, **options))
            return constant
        return found(device, *args, **options)

    return plan


def kept(key: Any, make: Callable[[], Made]) -> Made:
    """What ``make`` returned for ``key``, or returns now."""
    return KEPT.kept(key, make, _bytes)


class Constants:
    """What compiled code refers to, by names that its compiler finds when it is told them: the last
    ``MOST`` plans. Code that was compiled for an earlier one is compiled anew where it runs again."""


_NUMBERS = count()


def refer_to(made: Any) -> str:
    """The name of ``made`` among the :class:`Constants`, which no other plan ever has."""
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
    """Context in which tensors are real, also while a graph is exported, and may serve training later."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield


def build(make: Callable[..., Made], *args: Any, **options: Any) -> Made:
    """What ``make`` returns, with tensors on a CPU."""
    with real_tensors(), torch.device("cpu"):
        return make(*args, **options)


def moved(made: Made, device: torch.device | str) -> Made:
    """A plan with all of its tensors on the ``device``."""
    with real_tensors():
        found: Made = changed(made, lambda x: x.to(device))
    return found


def _bytes(made: Any) -> int:
    total = 0

    def add(x: Tensor) -> Tensor:
        nonlocal total
        total += x.nbytes
        return x

    changed(made, add)
    return total


def _numbers(values: Any) -> Any:
    """``values`` with plain numbers for those that traced code would leave open."""
    if isinstance(values, tuple):
        return tuple(_numbers(x) for x in values)
    if isinstance(values, dict):
        return {name: _numbers(x) for name, x in values.items()}
    return operator.index(values) if isinstance(values, int | torch.SymInt) else values
