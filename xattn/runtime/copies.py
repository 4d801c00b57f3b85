"""Copies of a network over the same weights, so that changes to one do not affect the other."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from xattn.runtime.locking import alone

Model = TypeVar("Model", bound=nn.Module)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

_COPIES = WeakIdKeyDictionary()  # module -> weak references to its copies
_ADDING = threading.Lock()


def shared_copy(model: Model) -> Model:
    """A copy of the modules over the same parameters and buffers; ``model`` must not be in use during the
    copy."""
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    with alone(model):
        return copy.deepcopy(model, shared)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient and share memory with ``model``.

    ``model`` is not changed, and in-place updates of its weights in training are visible in the copy.
    A model that cannot be copied is frozen itself, with a warning.
    """
    views = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo: dict[int, Any] = {id(t): t for m in model.modules() for t in _tensors(m)} | views
    try:
        with alone(model):
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        return freeze(model, f"{type(error).__name__}: {error}")
    if copied is model or {*map(id, copied.parameters())} - {*map(id, views.values())}:
        return freeze(model, "its copy does not share its parameters")
    remember_copies(memo)
    return copied.eval()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that are attributes; computed tensors cannot be copied."""
    values = [*module._buffers.values(), *vars(module).values()]
    return (value for value in values if isinstance(value, Tensor))


def freeze(model: nn.Module, reason: str) -> nn.Module:
    """``model`` itself in eval mode without gradients, with a warning that gives the ``reason``."""
    reason = " ".join(reason.split())[:200]
    warnings.warn(
        f"name_or_module: {type(model).__name__} cannot be copied ({reason}), so it is frozen itself; to "
        f"train it further, call model.train().requires_grad_(True)",
        stacklevel=2,
    )
    with alone(model):
        return model.eval().requires_grad_(False)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and the result of ``torch.compile``."""
    while True:
        compiled = model._modules.get("_orig_mod")
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif compiled is not None:
            model = compiled
        else:
            return model


def remember_copies(memo: dict[int, Any]) -> None:
    """Tell :func:`copies_of` about the modules that ``copy.deepcopy(..., memo)`` has copied."""
    originals = [m for m in memo.get(id(memo), ()) if isinstance(m, nn.Module)]
    with _ADDING:
        for original in originals:
            earlier = [ref for ref in _COPIES.get(original, ()) if ref() is not None]
            _COPIES[original] = [*earlier, weakref.ref(memo[id(original)])]


def copies_of(module: nn.Module) -> Iterator[nn.Module]:
    """The copies of a module, the copies of those copies, and so on."""
    for ref in _COPIES.get(module, ()):
        copied = ref()
        if copied is not None:
            yield copied
            yield from copies_of(copied)


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[str]]:
    """Context manager that lists the type of every module of ``model`` itself (not of a copy) that this
    thread calls. Each such call raises an error, so that it cannot change any statistics."""
    me, parts = threading.get_ident(), set(model.modules())
    called: list[str] = []

    def before(module: nn.Module, inputs: Any) -> None:
        if module in parts and threading.get_ident() == me:
            called.append(type(module).__name__)
            raise RuntimeError(f"calls the {called[-1]} of another network")

    handle = register_module_forward_pre_hook(before)
    try:
        yield called
    finally:
        handle.remove()
