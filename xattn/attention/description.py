"""Determine the kernels that a mechanism calls and the maps that it shows, by running it on few tokens."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.attention.base import MECHANISMS, Entry
from xattn.attention.record import record

DIM, HEADS = 32, 2
GRIDS = {2: (5, 6), 1: (30,), 3: (2, 3, 5)}  # by number of dimensions, the most common first


@dataclass(frozen=True)
class Description:
    """The names of the :mod:`xattn.kernels` ops that a mechanism calls and the names of its maps. Ops
    without a Triton kernel are marked "(PyTorch)"."""

    kernels: tuple[str, ...]
    maps: tuple[str, ...]


def described(name: str) -> Description:
    """Describe a mechanism by running all of its test cases, bidirectional and, if supported, causal.

    Raises:
        ValueError: if the name is unknown.
    """
    entry = MECHANISMS.entry(name)
    own = MECHANISMS.options(name)
    kernels: dict[str, None] = {}
    maps: dict[str, None] = {}
    for case in entry.cases:
        # With "cpu", the ops are the same on every device except a GPU. With "auto", many calls would
        # use PyTorch's own attention instead.
        options = {**case, "backend": "cpu"} if own is None or "backend" in own else dict(case)
        _run(entry, options, False, kernels, maps)
        if entry.causal:
            with suppress(ValueError):  # some options have one number for each side of a grid
                _run(entry, options, True, kernels, maps)
    return Description(tuple(sorted(kernels)), tuple(maps))


@torch.no_grad()
def _run(
    entry: Entry, options: Any, causal: bool, kernels: dict[str, None], maps: dict[str, None]
) -> None:
    grid: tuple[int, ...] | None
    grid = next((g for n, g in GRIDS.items() if 0 in entry.grid or n in entry.grid), GRIDS[2])
    prefix = 1  # a class token
    if causal:  # tokens in a row
        grid, prefix = (None if 0 in entry.grid else (31,)), 0
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        mechanism = MECHANISMS.create(entry.name, DIM, HEADS, **options)
        q, k, v = torch.randn(3, 1, HEADS, 31, DIM // HEADS)
        x = torch.randn(1, 31, DIM)
    with _Ops() as ops, record(alone=True) as calls:
        mechanism(q, k, v, grid, prefix, x=x, causal=causal)
    kernels |= ops.found
    maps |= dict.fromkeys(name for call in calls for name in call.maps)


class _Ops(TorchDispatchMode):
    """Context manager that collects the names of the :mod:`xattn.kernels` ops that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        space, _, op = func._schema.name.partition("::")
        if space == "xattn":
            op = op.removesuffix("_forward").removesuffix("_backward")
            triton = importlib.util.find_spec(f"xattn.kernels.{op}.triton") is not None
            self.found[op if triton else f"{op} (PyTorch)"] = None
        return func(*args, **(kwargs or {}))
