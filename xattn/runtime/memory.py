"""Handling exhausted memory: continue with half the batch, and warn once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_TEXTS = ("out of memory", "can't allocate memory", "could not allocate", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports that device or host memory was exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _TEXTS)


@contextmanager
def raise_on_out_of_memory(refusal: Exception) -> Iterator[None]:
    """Context manager that raises ``refusal`` in place of an out-of-memory error."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise refusal from error


class _Exhausted(MemoryError):
    """A single image does not fit, so that halving again is useless."""


class ForwardBatches:
    """Runs a function on slices of at most ``size`` images; halves ``size`` when memory runs out.

    ``size`` keeps the smaller value, so that the rest of the job does not run out of memory again.
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or size < 1:
            raise ValueError(f"max_forward_batch: got {size}; give at least 1")
        self.size = size
        self.halved = False

    def run(self, function: Callable[..., Any], *inputs: Tensor) -> list[Any]:
        """The results of ``function`` on equal slices of ``inputs`` (B, ...), in order.

        Raises:
            MemoryError: a single image does not fit.
        """
        results = []
        start = 0
        while start < len(inputs[0]):
            count, reason = min(self.size, len(inputs[0]) - start), ""
            try:
                results.append(function(*(x[start : start + count] for x in inputs)))
                start += count
            except Exception as error:
                if not is_out_of_memory(error) or isinstance(error, _Exhausted):
                    raise
                reason = str(error).strip().splitlines()[0][:120]
            if reason:  # outside except: the traceback keeps the failed pass's tensors alive
                self._halve(count, reason)
        return results

    def _halve(self, count: int, reason: str) -> None:
        if count == 1:
            raise _Exhausted(
                f"max_forward_batch: out of memory with one image ({reason}); free memory, or choose "
                f"a smaller input or backbone"
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = count // 2
        if not self.halved:
            self.halved = True
            warnings.warn(
                f"max_forward_batch: out of memory with {count} images; continuing with "
                f"{self.size}, or fewer if needed",
                RuntimeWarning,
                stacklevel=3,
            )
