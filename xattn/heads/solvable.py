"""Heads whose weights are solved for in closed form, in place of training by steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from xattn.heads.attended import Tokens


class LabelledTokens(NamedTuple):
    """Photos to solve for, or to measure on: every call of ``batches`` goes through their tokens once, in
    the order of ``labels`` (n,)."""

    batches: Callable[[], Iterable[Tokens]]
    labels: Tensor


@runtime_checkable
class Solvable(Protocol):
    """A classifier with a solve of its own, which ``xattn probe`` calls."""

    def solve(self, train: LabelledTokens, validation: LabelledTokens) -> dict[str, Any]:
        """Set the weights from ``train``, and return what the head's config is to say about it, some of it
        measured on ``validation``."""
