"""Put another mechanism into the attention layers of a timm ViT, keeping every weight.

    convert(model, "gna", blocks=range(0, 8), kernel=9)      # and revert(model) puts it back

The layer's own code still makes q, k and v (norms, biases, rotary embeddings, gates) and uses the
output; the mechanism only replaces its call of ``F.scaled_dot_product_attention``. Weights keep their
names; those of the mechanism lie under ``attn.mechanism``.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xattn.attention.base import Mechanism, create_mechanism, mechanism_class
from xattn.attention.record import FUSED, fused, record
from xattn.runtime.locking import alone


def convert(
    model: nn.Module, name: str, blocks: Iterable[int] | None = None, **options: Any
) -> nn.Module:
    """Swap the attention of ``model.blocks`` in place; returns the model.

    Args:
        model: a timm ViT, or any module whose ``blocks[i].attn`` call fused attention once over all
            tokens and whose ``patch_embed`` sees the image. A :class:`~xattn.Backbone` is converted
            inside.
        name: see :func:`~xattn.attention.list_attention`; layers converted before are converted anew.
        blocks: numbers of the blocks, negative ones counted from the end; all by default.
        options: of the mechanism.

    Raises:
        ValueError: unknown name or option, a missing block, or a layer that cannot be converted (it
            is named); the model is left untouched.
    """
    mechanism_class(name)
    model = getattr(model, "model", model) if not hasattr(model, "blocks") else model
    with alone(model):
        layers = _layers(model, blocks)
        _check(model, layers, name)
        made: dict[str, Mechanism] = {}
        for path, layer in layers.items():
            heads = _heads(path, layer)
            width = _width(path, layer)
            with torch.device("cpu"):  # whatever torch's default device is
                made[path] = create_mechanism(name, width, heads, **options)
        layout = _layout(model)
        before = {path: getattr(layer, "mechanism", None) for path, layer in layers.items()}
        for path, layer in layers.items():
            weight = next(layer.parameters())
            _take(layer, made[path].to(weight.device, weight.dtype).train(layer.training), layout)
        try:
            _probe(model)
        except Exception as error:
            for path, layer in layers.items():
                _release(layer)
                mechanism = before[path]
                if mechanism is not None:
                    _take(layer, mechanism, layout)
            if not any(isinstance(m, _Converted) for m in model.modules()):
                revert(model)
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"model: {name} does not run in it ({error}); untouched") from error
    return model


Model = TypeVar("Model", bound=nn.Module)


def converted_copy(model: Model, name: str, **options: Any) -> Model:
    """:func:`convert` of a copy that shares every weight and buffer; ``model`` stays as it is."""
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    with alone(model):
        copied = copy.deepcopy(model, shared)
    convert(copied, name, **options)
    return copied


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert` in place; the mechanisms' own weights are dropped."""
    model = getattr(model, "model", model) if not hasattr(model, "blocks") else model
    with alone(model):
        for layer in list(model.modules()):
            _release(layer)
        hooks = getattr(getattr(model, "patch_embed", None), "_forward_pre_hooks", {})
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Layout)]:
            del hooks[key]
    return model


class _Converted:
    """Mixed into the class of a converted layer."""

    mechanism: Mechanism
    layout: _Layout
    fused_attn: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            with fused(self), _Swap(self.mechanism, self.layout):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        before, self.fused_attn = self.fused_attn, True  # compilers cannot trace locks
        try:
            with _Swap(self.mechanism, self.layout):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.fused_attn = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type] = {}


def _converted(cls: type) -> type:
    """The class of a converted layer; as a subclass it keeps the names of weights, also in copies."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Converted{cls.__name__}", (_Converted, cls), {})
    return _CLASSES[cls]


def _blank(cls: type) -> nn.Module:
    """A converted layer while unpickling, before its attributes are restored."""
    made: Any = _converted(cls)
    return made.__new__(made)


def _take(layer: nn.Module, mechanism: Mechanism, layout: _Layout) -> None:
    _release(layer)
    layer.__dict__["layout"] = layout
    layer.mechanism = mechanism
    layer.__class__ = _converted(type(layer))


def _release(layer: nn.Module) -> None:
    if not isinstance(layer, _Converted):
        return
    layer.__class__ = type(layer).__mro__[2]
    del layer.mechanism
    del layer.__dict__["layout"]


class _Grid(threading.local):
    """The grid of the pass that this thread runs."""

    def __init__(self, sides: tuple[int, ...] | None) -> None:
        self.sides = sides

    def __reduce__(self) -> Any:
        return _Grid, (self.sides,)


class _Layout:
    """How a model's tokens are laid out: prefix tokens, then a grid that the patch embedding reports."""

    def __init__(self, prefix: int, grid: tuple[int, ...] | None) -> None:
        self.prefix, self._own = prefix, _Grid(grid)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of earlier versions hold ``grid`` itself."""
        state = dict(state)
        if "grid" in state:
            state["_own"] = _Grid(state.pop("grid"))
        self.__dict__.update(state)

    @property
    def grid(self) -> tuple[int, ...] | None:
        return self._own.sides

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            grid_of_size: Any = getattr(module, "dynamic_feat_size", None)
            if grid_of_size is not None:
                self._own.sides = tuple(int(n) for n in grid_of_size(tuple(args[0].shape[-2:])))

    def grid_of(self, tokens: int, needed: bool) -> tuple[int, ...] | None:
        count = tokens - self.prefix
        if self.grid is not None and math.prod(self.grid) == count:
            return self.grid
        if needed:
            raise ValueError(
                f"model: {count} patch tokens are not its grid {self.grid}; mechanisms on a grid "
                f"need all patches (no patch dropping) of one known grid"
            )
        return None


class _Swap(TorchFunctionMode):
    def __init__(self, mechanism: Mechanism, layout: _Layout) -> None:
        super().__init__()
        self.mechanism, self.layout = mechanism, layout

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function is not FUSED:
            return function(*args, **kwargs)
        return self._answer(*args, **kwargs)

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        name = self.mechanism.entry.name
        for wanted, what, remedy in (
            (dropout_p > 0, "drops attention weights at random", "set its attn_drop to 0"),
            (attn_mask is not None, "gives a mask", "leave out attn_mask"),
            (is_causal, "asks for causal attention", "leave out is_causal"),
            (enable_gqa, "shares keys among heads", "do not convert it"),
        ):
            if wanted:
                raise ValueError(f"model: its layer {what}, which {name} cannot do; {remedy}")
        grid = self.layout.grid_of(query.shape[-2], 0 not in self.mechanism.entry.grid)
        return self.mechanism(query, key, value, grid, self.layout.prefix, scale)


def _layers(model: nn.Module, blocks: Iterable[int] | None) -> dict[str, nn.Module]:
    found = getattr(model, "blocks", None)
    if not isinstance(found, (nn.Sequential, nn.ModuleList)) or not len(found):
        raise ValueError(
            f"model: {type(model).__name__} has no list of blocks; only ViT-like models are converted"
        )
    numbers = range(len(found)) if blocks is None else list(blocks)
    wrong = [i for i in numbers if not -len(found) <= i < len(found)]
    if wrong:
        raise ValueError(
            f"blocks: got {wrong[0]}; {type(model).__name__} has 0 to {len(found) - 1}"
        )
    layers = {}
    for i in sorted({i % len(found) for i in numbers}):
        layer = getattr(found[i], "attn", None)
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"model: block {i} ({type(found[i]).__name__}) has no attention 'attn'; untouched"
            )
        layers[f"blocks.{i}.attn"] = layer
    return layers


def _check(model: nn.Module, layers: dict[str, nn.Module], name: str) -> None:
    """Raise unless each layer calls fused attention once, over all tokens and without a mask."""
    for path, layer in layers.items():
        if not hasattr(layer, "fused_attn"):
            raise ValueError(
                f"model: {path} ({type(layer).__name__}) does not use fused attention; untouched"
            )
    seen: dict[str, list[tuple[tuple[int, ...], bool, int]]] = {path: [] for path in layers}
    handles = []
    with record(model, alone=True) as calls:
        for path, layer in layers.items():
            start: list[int] = []
            handles.append(
                layer.register_forward_pre_hook(lambda m, a, s=start: s.append(len(calls)))
            )

            def after(m: nn.Module, a: Any, o: Any, path: str = path, s: list[int] = start) -> None:
                for call in calls[s.pop() :]:
                    masked = getattr(call.operator, "bias", None) is not None
                    seen[path].append((call.operator.shape, masked, call.value.shape[-1]))

            handles.append(layer.register_forward_hook(after))
        try:
            _run(model)
        finally:
            for handle in handles:
                handle.remove()
    tokens = max((call[0][2] for found in seen.values() for call in found), default=0)
    for path, layer in layers.items():
        found, kind = seen[path], type(layer).__name__
        if isinstance(layer, _Converted):
            continue
        if len(found) != 1:
            why = f"calls fused attention {len(found)} times"
        elif found[0][0][2] != found[0][0][3] or found[0][0][2] != tokens or found[0][0][0] != 1:
            batch, _, n, s = found[0][0]
            why = f"attends {n} to {s} tokens ({batch} windows), not all to all"
        elif found[0][1]:
            why = "adds a bias or mask to its scores"
        elif found[0][0][1] * found[0][2] != _width(path, layer):
            why = f"does not attend by heads of its {_width(path, layer)} channels"
        else:
            continue
        raise ValueError(f"model: {path} ({kind}) {why}; {name} cannot stand in for it; untouched")


def _run(model: nn.Module) -> None:
    """One image through the model, in evaluation mode and without gradients."""
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(_example(model))
    finally:
        for m, mode in training.items():
            m.training = mode


def _probe(model: nn.Module) -> None:
    with record(model, alone=True):
        _run(model)


def _example(model: nn.Module) -> Tensor:
    weight = next(model.parameters())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    height, width = size or config.get("input_size", (3, 224, 224))[-2:]
    channels = getattr(model, "in_chans", 3) or 3
    return torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype)


def _heads(path: str, layer: nn.Module) -> int:
    heads = getattr(layer, "num_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"model: {path} ({type(layer).__name__}) has no num_heads; untouched")
    return heads


def _width(path: str, layer: nn.Module) -> int:
    """C of queries, keys and values, over all heads."""
    attn_dim = getattr(layer, "attn_dim", None)
    if isinstance(attn_dim, int):
        return attn_dim
    head_dim = getattr(layer, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim * _heads(path, layer)
    projection = getattr(layer, "proj", None)
    if isinstance(projection, nn.Linear):
        return projection.in_features
    raise ValueError(f"model: {path} ({type(layer).__name__}) does not tell its width; untouched")


def _layout(model: nn.Module) -> _Layout:
    """The model's layout, created and hooked into its patch embedding on first use."""
    embed = getattr(model, "patch_embed", None)
    hooks = getattr(embed, "_forward_pre_hooks", {})
    for hook in hooks.values():
        if isinstance(hook, _Layout):
            return hook
    grid = getattr(embed, "grid_size", None)
    layout = _Layout(int(getattr(model, "num_prefix_tokens", 0)), tuple(grid) if grid else None)
    if isinstance(embed, nn.Module):
        embed.register_forward_pre_hook(layout)
    return layout
