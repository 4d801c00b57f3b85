"""Replace the attention in the layers of a timm ViT with another mechanism, and keep every weight.

    convert(model, "gna", layers="0-7", options={"kernel": 9})      # revert(model) undoes this

The layer's own code still computes q, k and v (norms, biases, rotary embeddings, gates) and uses the
output. The mechanism only replaces the layer's call of ``F.scaled_dot_product_attention``. Weights of the
model keep their names; those of the mechanism are under ``attn.mechanism``.

The module also checks which attention layers of a model can be replaced, and explains why others cannot.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xattn.attention.base import (
    MECHANISMS,
    Mechanism,
    create_mechanism,
    mechanism_class,
    with_layer,
)
from xattn.attention.model.folding import is_folded
from xattn.attention.model.spec import LAYERS_FORM, Conversion, parse_layers
from xattn.attention.record import (
    FUSED,
    Call,
    fused,
    product_replacement,
    record,
    record_layers,
    recording,
)
from xattn.runtime.copies import shared_copy
from xattn.runtime.locking import alone

Layers = dict[str, nn.Module]
NEEDED = "a mechanism needs a timm ViT, such as -b vit_tiny_patch16_224"


def chosen_layers(
    model: nn.Module,
    numbers: Iterable[int] | str | None,
    default: Callable[[int], Iterable[int]] = range,
) -> Layers:
    """Return the attention layers of some blocks, keyed by their paths.

    Args:
        numbers: the numbers of the blocks, or a str that lists them; None selects the blocks that
            ``default`` returns when it is called with the total number of blocks.

    Raises:
        ValueError: if there are no blocks, a number does not exist, or a block has no attention.
    """
    blocks = getattr(model, "blocks", None)
    kind = type(model).__name__
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(f"mechanism: {kind} has no list of blocks with attention; {NEEDED}")
    if numbers is None:
        numbers = default(len(blocks))
    found = {}
    for i in _numbers(numbers, len(blocks), kind):
        layer = getattr(blocks[i], "attn", None)
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"mechanism: block {i} ({type(blocks[i]).__name__}) has no attention layer 'attn'; {NEEDED}"
            )
        found[f"blocks.{i}.attn"] = layer
    return found


def _numbers(given: Iterable[int] | str, count: int, kind: str) -> list[int]:
    """Return the block numbers in ascending order, none of them negative."""
    numbers = parse_layers(given) if isinstance(given, str) else given
    if not isinstance(numbers, Iterable):
        raise ValueError(
            f"layers: got {numbers!r}; give a list of numbers, or a str of {LAYERS_FORM}"
        )
    numbers = list(numbers)
    wrong = [i for i in numbers if not isinstance(i, int) or not -count <= i < count]
    if wrong or not numbers:
        what = repr(wrong[0]) if wrong else "none"
        raise ValueError(
            f"layers: got {what}, but {kind} has blocks 0 to {count - 1}; give a list of numbers, or a "
            f"str of {LAYERS_FORM}"
        )
    return sorted({i % count for i in numbers})


class _Attended(NamedTuple):
    """One call of fused attention: A has the shape (B, H, N, S), and values have ``width`` channels per
    head."""

    shape: tuple[int, int, int, int]
    width: int
    masked: bool
    causal: bool

    @classmethod
    def of(cls, call: Call) -> _Attended:
        operator = call.operator
        masked = getattr(operator, "bias", None) is not None
        return cls(operator.shape, call.value.shape[-1], masked, operator.causal)


def check(
    model: nn.Module, layers: Layers, name: str, causal: bool, known: Collection[str]
) -> None:
    """Raise a ``ValueError`` unless each layer calls fused attention once, over all tokens and without a
    mask.

    Args:
        layers: the layers to replace, keyed by their paths.
        name: the name of the mechanism.
        causal: whether the mechanism has a causal form.
        known: paths of layers that were converted earlier and have already passed this check.
    """
    for path, layer in layers.items():
        if not hasattr(layer, "fused_attn"):
            raise ValueError(
                f"model: {path} ({type(layer).__name__}) does not use fused attention; nothing was changed"
            )
    seen = _attended(model, layers)
    tokens = max((call.shape[2] for calls in seen.values() for call in calls), default=0)
    for path, layer in layers.items():
        calls = seen[path]
        if path in known:
            continue
        if len(calls) != 1:
            why = f"calls fused attention {len(calls)} times"
        else:
            why = _obstacle(calls[0], tokens, width_of(path, layer), causal)
        if why:
            raise ValueError(
                f"model: {path} ({type(layer).__name__}) {why}, so {name} cannot replace it; "
                f"nothing was changed"
            )


def _obstacle(call: _Attended, tokens: int, width: int, causal: bool) -> str:
    """Return the reason why no mechanism can replace ``call``, or an empty str if one can."""
    batch, heads, queries, keys = call.shape
    if queries != keys or queries != tokens or batch != 1:
        return f"attends from {queries} to {keys} tokens ({batch} windows), not from all to all"
    if call.masked:
        return "adds a bias or mask to its scores"
    if heads * call.width != width:
        return f"does not divide its {width} channels among its heads"
    return "attends causally" if call.causal and not causal else ""


def _attended(model: nn.Module, layers: Layers) -> dict[str, list[_Attended]]:
    """Run one image, and return the calls of fused attention that each layer makes for it."""
    seen: dict[str, list[_Attended]] = {path: [] for path in layers}

    def after(path: str, args: Any, kwargs: Any, calls: list[Call], result: Any) -> None:
        seen[path] += map(_Attended.of, calls)

    with record_layers(model, layers, after):
        run_one_image(model)
    return seen


def run_one_image(model: nn.Module) -> None:
    """Run one grey image through the model, in evaluation mode and without gradients."""
    with evaluation_mode(model):
        model(_example(model))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that puts the model into evaluation mode and turns off gradients.

    On exit, it restores the previous mode of every module.
    """
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for m, mode in training.items():
            m.training = mode


def _example(model: nn.Module) -> Tensor:
    weight = next(model.parameters())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    height, width = size or config.get("input_size", (3, 224, 224))[-2:]
    channels = getattr(model, "in_chans", 3) or 3
    return torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype)


def heads_of(path: str, layer: nn.Module) -> int:
    """Return the number of heads of the attention layer at ``path``."""
    heads = getattr(layer, "num_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"model: {path} ({type(layer).__name__}) has no num_heads; nothing was changed"
        )
    return heads


def width_of(path: str, layer: nn.Module) -> int:
    """Return C, the total width of the queries of all heads."""
    attn_dim = getattr(layer, "attn_dim", None)
    if isinstance(attn_dim, int):
        return attn_dim
    head_dim = getattr(layer, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim * heads_of(path, layer)
    projection = getattr(layer, "proj", None)
    if isinstance(projection, nn.Linear):
        return projection.in_features
    raise ValueError(
        f"model: {path} ({type(layer).__name__}) has no known width; nothing was changed"
    )


Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    name: str | type[Mechanism],
    layers: Iterable[int] | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Replace the attention of ``model.blocks`` in place; return the model.

    Args:
        model: a timm ViT, or any module whose ``patch_embed`` receives the image and in which each
            ``blocks[i].attn`` calls fused attention once, over all tokens. For a :class:`~xattn.Backbone`,
            the network inside is converted.
        name: the name of a mechanism from :func:`~xattn.attention.list_attention`, or a mechanism class
            with an ``entry``, which need not be registered. In layers that are already converted, it
            replaces the earlier mechanism.
        layers: block numbers, where negative ones count from the end, or a str such as "4-11" or
            "0,3,8-11". By default, :meth:`Mechanism.default_blocks` chooses them, usually all.
        options: options of the mechanism, and ``rotate``, the name of a rotation of queries and keys that
            replaces the layer's own rotary embedding; see :func:`create_mechanism`.

    Raises:
        ValueError: if a name or option is unknown, a block does not exist, or a layer cannot be converted
            (the message names it). The model is not changed.

    Example:
        >>> import timm, torch
        >>> from xattn.attention import convert
        >>> model = timm.create_model("test_vit", img_size=32)
        >>> model = convert(model, "agent", layers="5")
        >>> model(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 1000])
    """
    _convert(model, name, layers, options)
    return model


def converted_copy(
    model: Model,
    name: str | type[Mechanism],
    layers: Iterable[int] | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Apply :func:`convert` to a copy that shares every weight and buffer; ``model`` is not changed.

    Example:
        >>> import timm
        >>> from xattn.attention import conversion, converted_copy
        >>> model = timm.create_model("test_vit", img_size=32)
        >>> other = converted_copy(model, "hedgehog")
        >>> other is model, conversion(model)
        (False, None)
    """
    copied = shared_copy(model)
    _convert(copied, name, layers, options)
    return copied


def conversion(model: nn.Module) -> list[Conversion] | None:
    """Return what :func:`convert` has put into ``model``, as a list of (name, layers, options), or None if
    there is nothing.

    Layers with the same mechanism and equal options form one entry.

    Example:
        >>> import timm
        >>> from xattn.attention import conversion, converted_copy
        >>> model = timm.create_model("test_vit", img_size=32)
        >>> conversion(model), conversion(converted_copy(model, "hedgehog", layers="5"))
        (None, [Conversion(name='hedgehog', layers=(5,), options={})])
    """
    found: dict[str, Conversion] = {}
    blocks = getattr(_network(model), "blocks", None)
    for i, block in enumerate(blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else ()):
        taken = _taken(getattr(block, "attn", None))
        if taken is not None:
            name, options = taken[0].entry.name, taken[1]
            key = json.dumps([name, options], sort_keys=True, default=str)
            before = found.get(key, Conversion(name, (), options))
            found[key] = before._replace(layers=(*before.layers, i))
    return list(found.values()) or None


def revert(model: Model) -> Model:
    """Undo :func:`convert` in place and return the model. The mechanisms' own weights are discarded.

    Example:
        >>> import timm
        >>> from xattn.attention import conversion, convert, revert
        >>> model = convert(timm.create_model("test_vit", img_size=32), "agent")
        >>> conversion(revert(model)) is None
        True
    """
    network = _network(model)
    _check_unfolded(network)
    with alone(network):
        for layer in list(network.modules()):
            _release(layer)
        _stand_around_blocks(network)
        hooks = getattr(getattr(network, "patch_embed", None), "_forward_pre_hooks", {})
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Layout)]:
            del hooks[key]
    return model


def _network(model: nn.Module) -> nn.Module:
    """Return the module that contains the blocks: ``model`` itself, or the network inside a backbone."""
    return getattr(model, "model", model) if not hasattr(model, "blocks") else model


def _convert(model: nn.Module, name: Any, numbers: Any, options: Any) -> None:
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options: got {options!r}; give a dict, such as {{'kernel': 7}}")
    options = dict(options or {})
    cls = mechanism_class(name)
    if isinstance(name, str):
        MECHANISMS.check_options(name, [str(option) for option in options if option != "rotate"])
    _check_rotation(cls, options.get("rotate"))
    model = _network(model)
    _check_unfolded(model)
    with alone(model):
        layers = chosen_layers(model, numbers, cls.default_blocks)
        known = {path for path, layer in layers.items() if isinstance(layer, _Converted)}
        check(model, layers, cls.entry.name, cls.entry.causal, known)
        made: dict[str, Mechanism] = {}
        for path, layer in layers.items():
            heads, width = heads_of(path, layer), width_of(path, layer)
            own = with_layer(name, options, int(path.split(".")[1]))
            with torch.device("cpu"):  # ignores torch's default device
                made[path] = create_mechanism(name, width, heads, **own)
        layout = _layout(model)
        before = {path: _taken(layer) for path, layer in layers.items()}
        for path, layer in layers.items():
            weight = next(layer.parameters())
            mechanism = made[path].to(weight.device, weight.dtype).train(layer.training)
            _take(layer, mechanism, options, layout)
        _stand_around_blocks(model)
        try:
            cls.prepare(model, {int(path.split(".")[1]): m for path, m in made.items()})
            with record(model, alone=True):
                run_one_image(model)
        except Exception as error:
            for path, layer in layers.items():
                _release(layer)
                earlier = before[path]
                if earlier is not None:
                    _take(layer, *earlier, layout)
            _stand_around_blocks(model)
            if not any(isinstance(m, _Converted) for m in model.modules()):
                revert(model)
            if isinstance(error, ValueError):
                raise
            why = f"{cls.entry.name} does not run in it ({error})"
            raise ValueError(f"model: {why}; nothing was changed") from error


def _check_rotation(cls: type[Mechanism], rotate: Any) -> None:
    if not isinstance(rotate, str | None):
        raise ValueError(
            f"rotate: got {rotate!r}; give a name with options, such as 'axial:base=10'"
        )
    if rotate is not None and _stands_around(cls):
        raise ValueError(
            f"rotate: {cls.entry.name} removes tokens, so their positions are lost; leave out rotate"
        )


def _stands_around(cls: type[Mechanism]) -> bool:
    """Return whether the mechanism changes which tokens a block computes on."""
    return cls.enter is not Mechanism.enter or cls.leave is not Mechanism.leave


def _check_unfolded(model: nn.Module) -> None:
    if is_folded(model):
        raise ValueError(
            "model: its rotations are folded into its projections; give the model as it was"
        )


class _Converted:
    """A mixin for the classes of converted layers."""

    mechanism: Mechanism
    layout: _Layout
    fused_attn: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens = args[0] if args else None  # the layer's input tokens
        if kwargs.get("rope") is not None and getattr(self.mechanism, "rotate", None) is not None:
            kwargs = {**kwargs, "rope": None}
        if not torch.compiler.is_compiling():
            with fused(self), _Swap(self.mechanism, self.layout, tokens):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        before, self.fused_attn = self.fused_attn, True  # compilers cannot trace locks
        try:
            with _Swap(self.mechanism, self.layout, tokens):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.fused_attn = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type] = {}


def _converted(cls: type) -> type:
    """Return the class of converted layers for the layer class ``cls``.

    Since it is a subclass of ``cls``, the names of weights are the same in all copies of a layer.
    """
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Converted{cls.__name__}", (_Converted, cls), {})
    return _CLASSES[cls]


def _blank(cls: type) -> nn.Module:
    """Create a converted layer during unpickling, before its attributes are restored."""
    made: Any = _converted(cls)
    return made.__new__(made)


def _taken(layer: Any) -> tuple[Mechanism, dict[str, Any]] | None:
    """Return the mechanism of a converted layer and its options; None for any other layer."""
    if not isinstance(layer, _Converted):
        return None
    return layer.mechanism, layer.__dict__.get("mechanism_options", {})  # older pickles have none


def _take(layer: nn.Module, mechanism: Mechanism, options: dict[str, Any], layout: _Layout) -> None:
    _release(layer)
    layer.__dict__["layout"] = layout
    layer.__dict__["mechanism_options"] = {k: v for k, v in options.items() if k != "backend"}
    layer.mechanism = mechanism
    layout.keeps_photo |= "photo" in mechanism.reads
    layer.__class__ = _converted(type(layer))


def _release(layer: nn.Module) -> None:
    if not isinstance(layer, _Converted):
        return
    layer.__class__ = type(layer).__mro__[2]
    del layer.mechanism
    del layer.__dict__["layout"]
    layer.__dict__.pop("mechanism_options", None)


class _Grid(threading.local):
    """The grid of the forward pass that this thread is running, and what layers store for later layers."""

    def __init__(self, sides: tuple[int, ...] | None) -> None:
        self.sides = sides
        self.carried: dict[Any, Any] | None = None  # set when a pass begins

    def __reduce__(self) -> Any:
        return _Grid, (self.sides,)


class _Layout:
    """The layout of a model's tokens: prefix tokens, then the grid that the patch embedding reports."""

    keeps_photo = False  # whether to store the photo, for mechanisms that read it

    def __init__(self, prefix: int, grid: tuple[int, ...] | None) -> None:
        self.prefix, self._own = prefix, _Grid(grid)

    @property
    def grid(self) -> tuple[int, ...] | None:
        return self._own.sides

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._own.carried = {"photo": args[0]} if self.keeps_photo and args else {}
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            grid_of_size: Any = getattr(module, "dynamic_feat_size", None)
            if grid_of_size is not None:
                self._own.sides = tuple(int(n) for n in grid_of_size(tuple(args[0].shape[-2:])))

    @property
    def carried(self) -> dict[Any, Any] | None:
        return self._own.carried

    def grid_of(self, tokens: int, needed: bool) -> tuple[int, ...] | None:
        count = tokens - self.prefix
        if self.grid is not None and math.prod(self.grid) == count:
            return self.grid
        if needed:
            raise ValueError(
                f"model: {count} patch tokens do not form its grid {self.grid}; mechanisms on a grid "
                f"need all patches (no patch dropping) of one known grid"
            )
        return None


class _Swap(TorchFunctionMode):
    """A mode that replaces fused attention with ``mechanism`` inside a layer that reads ``tokens``
    (B, N, C)."""

    def __init__(self, mechanism: Mechanism, layout: _Layout, tokens: Any) -> None:
        super().__init__()
        self.mechanism, self.layout, self.tokens = mechanism, layout, tokens

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
        entry, count = self.mechanism.entry, query.shape[-2]
        for wanted, what, remedy in (
            (dropout_p > 0, "drops attention weights at random", "set its attn_drop to 0"),
            (attn_mask is not None, "passes a mask", "leave out attn_mask"),
            (is_causal and not entry.causal, "asks for causal attention", "leave out is_causal"),
        ):
            if wanted:
                raise ValueError(f"model: its layer {what}, which {entry.name} cannot do; {remedy}")
        grid: tuple[int, ...] | None = None
        if not is_causal:
            grid, prefix = self.layout.grid_of(count, 0 not in entry.grid), self.layout.prefix
        else:  # all tokens form a row
            grid, prefix = (None if 0 in entry.grid else (count,)), 0
        x = self.tokens
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != (query.shape[0], count):
            x = None
        carried = self.layout.carried
        return self.mechanism(
            query, key, value, grid, prefix, scale, x=x, causal=is_causal, carried=carried
        )


class _Enter:
    """A hook before a block that replaces its input with the tokens from :meth:`Mechanism.enter`.

    A block that also receives a tensor for all tokens, such as rotary angles, must compute on all tokens.
    """

    def __init__(self, mechanism: Mechanism, layout: _Layout) -> None:
        self.mechanism, self.layout = mechanism, layout

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        carried = self.layout.carried
        if carried is None or not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return None
        more = any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values()))
        whole = more or recording() or product_replacement() is not None or _is_watched(block)
        x = self.mechanism.enter(args[0], self.layout.prefix, carried, whole)
        return (x, *args[1:]), kwargs


class _Leave:
    """A hook after a block that replaces its output with the tokens from :meth:`Mechanism.leave`."""

    def __init__(self, mechanism: Mechanism, layout: _Layout) -> None:
        self.mechanism, self.layout = mechanism, layout

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        carried = self.layout.carried
        if carried is None or not isinstance(output, Tensor) or output.ndim != 3:
            return output
        return self.mechanism.leave(output, carried)


class _Embed:
    """A hook before the first block that stores the block's input for mechanisms that read it."""

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if self.layout.carried is not None and args:
            self.layout.carried["embedding"] = args[0]


def _is_watched(block: nn.Module) -> bool:
    """Return whether any module inside ``block`` has a hook."""
    if torch.compiler.is_compiling():
        return False
    inner = (m for m in block.modules() if m is not block)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)


def _stand_around_blocks(model: nn.Module) -> None:
    """Attach hooks to those blocks of ``model`` whose mechanisms need them, and remove them from all
    others."""
    blocks: Any = getattr(model, "blocks", None) or ()
    layout: _Layout | None = None
    for block in blocks:
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            ours = [
                key for key, hook in hooks.items() if isinstance(hook, _Enter | _Leave | _Embed)
            ]
            for key in ours:
                del hooks[key]
                block._forward_pre_hooks_with_kwargs.pop(key, None)
        layer = getattr(block, "attn", None)
        if not isinstance(layer, _Converted):
            continue
        if _stands_around(type(layer.mechanism)):
            enter = _Enter(layer.mechanism, layer.layout)
            block.register_forward_pre_hook(enter, with_kwargs=True)
            block.register_forward_hook(_Leave(layer.mechanism, layer.layout))
        if "embedding" in layer.mechanism.reads:
            layout = layer.layout
    if layout is not None:
        blocks[0].register_forward_pre_hook(_Embed(layout), prepend=True)


def _layout(model: nn.Module) -> _Layout:
    """Return the model's layout; on first use, create it and hook it into the patch embedding."""
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
