"""Plans: what depends on the layout of tokens alone, made once and kept for all calls.

Orders, lists of blocks and rules are made of numbers, on a CPU, and moved to the device of the call. To
``torch.compile`` a plan is a constant: making one reads values, which would break the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

from xattn.attention.operators.base import changed

MOST = 32  # plans that are kept of each kind
Made = TypeVar("Made")


def planned(make: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator of a function that makes a plan of numbers, which have to be hashable.

    Callers name the ``device`` of its tensors beside the function's own arguments; a CPU by default.
    """

    @lru_cache(maxsize=MOST)
    def kept(device: torch.device | str, *args: Any, **options: Any) -> Made:
        return moved(build(make, *args, **options), device)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def name(device: torch.device | str, *args: Any, **options: Any) -> str:
        return refer_to(kept(device, *args, **options))

    @wraps(make)
    def plan(*args: Any, device: torch.device | str = "cpu", **options: Any) -> Made:
        if torch.compiler.is_compiling():
            found: Made = getattr(Constants, name(device, *_numbers(args), **options))
            return found
        return kept(device, *args, **options)

    return plan


class Constants:
    """What compiled code refers to, by names that its compiler finds when it is told them."""


def refer_to(made: Any) -> str:
    """The name of ``made`` among the :class:`Constants`, which keep it."""
    name = f"plan_{id(made)}"
    setattr(Constants, name, made)
    return name


def build(make: Callable[..., Made], *args: Any, **options: Any) -> Made:
    """What ``make`` returns, with tensors on a CPU that may serve training later."""
    with torch.inference_mode(False), torch.device("cpu"):
        return make(*args, **options)


def moved(made: Made, device: torch.device | str) -> Made:
    """A plan with all of its tensors on the ``device``, which may serve training later."""
    with torch.inference_mode(False):
        found: Made = changed(made, lambda x: x.to(device))
    return found


def _numbers(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """``values`` with plain numbers for those that compiled code would leave open."""
    return tuple(
        _numbers(x) if isinstance(x, tuple) else operator.index(x) if isinstance(x, int) else x
        for x in values
    )
