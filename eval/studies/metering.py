"""Counts exactly what a call costs: images, backward passes, operations and memory.

It counts the operators that PyTorch calls, so the figures do not depend on how busy the machine is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
OWN = (ATEN._scaled_dot_product_flash_attention_for_cpu,)  # PyTorch has no formula for these


class Meter(TorchDispatchMode):
    """Counts what happens inside its ``with`` block.

    Attributes: ``images``, passed into the network; ``backwards``, images in a full or partial
    backward pass; ``operations``, the floating-point operations of products, convolutions and fused
    attention; ``peak``, the most bytes that tensors returned by operators took up at one time.

    Args:
        network: its weights are not counted as memory.
        channels: of its images, by default as many as its first convolution reads. A convolution
            with so many input channels, on images as large as the first, counts as the network's
            first layer.
        any_size: also count images of other sizes, such as mosaics of photos.

    >>> net = nn.Conv2d(3, 4, 1)
    >>> images = torch.zeros(2, 3, 5, 5)
    >>> with Meter(net) as meter:
    ...     _ = net(images)
    >>> meter.images, meter.backwards, meter.operations, meter.peak
    (2, 0, 1200, 800)
    """

    def __init__(
        self, network: nn.Module, channels: int | None = None, any_size: bool = False
    ) -> None:
        super().__init__()
        first = (m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
        self.channels = channels or next(first, 3)
        self.any_size = any_size
        self._size: tuple[int, ...] | None = None
        self.images = self.backwards = self.operations = self.peak = 0
        self._live, self._last = 0, 1
        kept = [*network.parameters(), *network.buffers()]
        self._seen: dict[int, Any] = {x.untyped_storage()._cdata: None for x in kept}

    def __enter__(self) -> Meter:
        self._run = torch.autograd._engine_run_backward
        torch.autograd._engine_run_backward = self._backward
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.autograd._engine_run_backward = self._run

    def _backward(self, *args: Any, **options: Any) -> Any:
        before = self.operations
        found = self._run(*args, **options)
        self.backwards += self._last * (self.operations > before)  # not for a mask alone
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is ATEN.convolution and args[1].shape[1] == args[0].shape[1] == self.channels:
            self._size = self._size or args[0].shape[2:]
            if self.any_size or args[0].shape[2:] == self._size:
                self._last = len(args[0])
                self.images += self._last
        if packet in flop_registry:
            self.operations += int(flop_registry[packet](*args, **kwargs, out_val=found))
        elif packet in OWN:
            query, key = args[0].shape, args[1].shape
            self.operations += 4 * prod(query) * key[2]
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._keep(tensor)
        return found

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._live += size
        self.peak = max(self.peak, self._live)
        self._seen[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self._live -= size


def measured(
    call: Callable[[], Any],
    network: nn.Module,
    channels: int | None = None,
    any_size: bool = False,
) -> tuple[Any, Meter]:
    """The result of ``call``, and the meter that ran during the call."""
    with Meter(network, channels, any_size) as meter:
        found = call()
    return found, meter


def costs(
    network: str, options: str, photos: int, meter: Meter | None = None, seconds: float = 0.0
) -> dict[str, Any]:
    """A row of a table of costs."""
    found = (meter.images, meter.backwards, meter.operations, meter.peak) if meter else (0,) * 4
    names = ("images", "backwards", "operations", "peak")
    return {
        "network": network, "options": options, "photos": photos,
        **dict(zip(names, found, strict=True)), "seconds": round(seconds, 4),
    }  # fmt: skip
