"""The feature maps that a pass returns, and their names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Blocks that apply ``norm1`` to their input before attention (timm class names). A block that is
# not listed may normalise after attention, where ``norm1`` of the block's input has no meaning.
PRE_NORM_BLOCKS = frozenset(
    {
        "Block",
        "LayerScaleBlock",
        "EvaBlock",
        "XCABlock",
        "LayerScaleBlockClassAttn",
        "MixerBlock",
        "DiffBlock",
        "RelPosBlock",
        "DiffParallelScalingBlock",
        "SingleHeadBlock",  # from xattn.backbone.pruning, like RoutedBlock
        "RoutedBlock",
        "TransformersBlock",  # from Hugging Face transformers
    }
)


class Taps(NamedTuple):
    """The result of one pass: ``logits`` (B, K) and ``maps``, a tuple of (B, C_i, h_i, w_i).

    A ViT also has ``prefix`` (B, P, C), the class and register tokens that reach the classifier, and
    ``prefixes``, the same tokens at each tap: after the block for a ``block`` tap, and as the block's
    attention reads them for a ``norm1`` tap.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> taps.logits.shape, taps.maps[-1].shape, taps.prefix.shape
        (torch.Size([2, 1000]), torch.Size([2, 64, 2, 2]), torch.Size([2, 1, 64]))
    """

    logits: Tensor
    maps: tuple[Tensor, ...]
    prefix: Tensor | None = None
    prefixes: tuple[Tensor | None, ...] = ()

    def each(self, function: Callable[[Tensor], Tensor]) -> Taps:
        """Return the taps after ``function`` has been applied to every tensor."""
        prefix = None if self.prefix is None else function(self.prefix)
        prefixes = tuple(None if p is None else function(p) for p in self.prefixes)
        return Taps(function(self.logits), tuple(map(function, self.maps)), prefix, prefixes)

    def to(self, target: torch.dtype | torch.device | str) -> Taps:
        """Return the taps with all tensors converted to another dtype, or moved to another device."""
        return self.each(lambda tensor: tensor.to(target))


@runtime_checkable
class TapModule(Protocol):
    """The adapter protocol for modules that are not from timm.

    ``forward_taps(x)`` takes normalised images (B, 3, H, W) and returns ``(logits, maps)`` with 4-D NCHW
    maps. It may instead take clips (B, 3, T, H, W) and return maps (B, C, t, h, w). These attributes are
    used if present: ``preprocessing`` (a :class:`~xattn.photos.preprocessing.Preprocessing`), ``tap_names``
    (one per map), ``classifier_weight`` (K, C), ``classifier_bias`` (K,) and ``gradcam_layer`` (the module
    whose output Grad-CAM reads).
    :func:`xattn.backbone.families.traced.from_torchvision` creates such a module.

    Example:
        >>> import torch, xattn
        >>> from xattn import TapModule
        >>> from torch import nn
        >>> class Mine(nn.Module):
        ...     tap_names, preprocessing = ["grid"], xattn.Preprocessing((32, 32))
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5)
        ...     def forward_taps(self, x):
        ...         maps = self.conv(x).relu()
        ...         return self.fc(maps.mean((2, 3))), [maps]
        >>> isinstance(Mine(), TapModule)
        True
    """

    def forward_taps(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]: ...


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps to ``size``: (B, M, h, w) bilinearly to (H, W), or (B, M, t, h, w) trilinearly."""
    mode = "bilinear" if maps.ndim == 4 else "trilinear"
    return F.interpolate(maps, tuple(size), mode=mode, align_corners=False)


def averaged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average maps (B, M, h, w) or (B, M, t, h, w) over the cells of a grid of ``size``."""
    pool = F.adaptive_avg_pool2d if maps.ndim == 4 else F.adaptive_avg_pool3d
    return pool(maps, tuple(size))  # type: ignore[arg-type]


def parse_tap(tap: str) -> tuple[str, int, bool]:
    """Parse the name of a tap into its kind, its index, and whether it is pooled.

    >>> parse_tap("stage.2.pool"), parse_tap("head")
    (('stage', 2, True), ('head', -1, False))
    """
    kind, *rest = tap.split(".")
    return kind, int(rest[0]) if rest else -1, rest[1:] == ["pool"]


def wanted_intermediates(taps: Sequence[str], depth: int) -> list[int]:
    """Return, in ascending order, which of the ``depth`` intermediates ``taps`` need."""
    named = [parse_tap(tap) for tap in taps]
    wanted = {index - (kind == "norm1") for kind, index, _ in named if kind != "head"}
    return sorted(wanted) or [depth - 1]  # "head" alone still needs a map to know its grid


def block_taps(depth: int) -> list[str]:
    """Return the names of the outputs of all blocks of a ViT, in order."""
    return [f"block.{i}" for i in range(depth)]


def reads_prefix(model: nn.Module, taps: Sequence[str], prefix_tokens: int) -> bool:
    """Return whether ``taps`` read blocks that have prefix tokens, and the model returns these tokens."""
    if not prefix_tokens or not any(parse_tap(tap)[0] in ("norm1", "block") for tap in taps):
        return False
    forward = model.forward_intermediates
    return "return_prefix_tokens" in inspect.signature(forward).parameters  # type: ignore[arg-type]


def read_prefixes(
    model: nn.Module, taps: Sequence[str], tokens: dict[int, Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the prefix tokens (B, P, C) for each tap.

    For a ``norm1`` tap, these are the tokens as attention reads them; for a ``block`` tap, as the block
    returns them; for any other tap, None is returned instead. If there are no prefix tokens at all,
    the tuple is empty. ``tokens`` are the blocks' outputs."""
    found: list[Tensor | None] = []
    for tap in taps:
        kind, index, _ = parse_tap(tap)
        prefix = tokens.get(index - (kind == "norm1")) if kind in ("norm1", "block") else None
        if prefix is not None and kind == "norm1":
            prefix = model.blocks[index].norm1(prefix)  # type: ignore[index,union-attr]
        found.append(prefix)
    return tuple(found) if any(p is not None for p in found) else ()


def vit_blocks(model: nn.Module) -> list[nn.Module] | None:
    """Return the transformer blocks of a ViT, each with a ``norm1``; None for other networks."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or (not hasattr(model, "patch_embed") and not hasattr(model, "stem")):
        return None
    blocks = list(blocks)
    return blocks if blocks and all(hasattr(b, "norm1") for b in blocks) else None


def default_vit_taps(blocks: Sequence[nn.Module], depth: int) -> tuple[str, ...]:
    """Return ``norm1`` of the last three blocks, or their outputs if the blocks are not pre-norm."""
    kind = "norm1" if type(blocks[-1]).__name__ in PRE_NORM_BLOCKS and depth > 3 else "block"
    return tuple(f"{kind}.{i}" for i in range(max(depth - 3, 0), depth))


def default_map_taps(final: Tensor | None, inner: Sequence[Tensor]) -> tuple[str, ...]:
    """Return two taps of different inner resolutions, then the tap of the map that the classifier pools.

    ``final`` is that map (B, C, h, w), or None if the classifier reads tokens (MViT, TNT, ...); then the
    intermediates are already maps.
    """
    depth = len(inner)
    if final is None:
        return tuple(f"stage.{i}" for i in range(max(depth - 3, 0), depth))
    area = final.shape[2] * final.shape[3]
    last_of_size = {m.shape[-2] * m.shape[-1]: i for i, m in enumerate(inner)}
    finer = sorted(i for size, i in last_of_size.items() if size > area)[-2:]
    if not finer:  # isotropic: every map has the size of the final one
        finer = list(range(max(depth - 3, 0), depth - 1))
    return (*(f"stage.{i}" for i in finer), "head")


def name_taps(
    taps: str | Sequence[str],
    depth: int,
    model_name: str,
    blocks: Sequence[nn.Module] | None,
    is_vit: bool,
) -> tuple[str, ...]:
    """Return the full names of ``taps``, checked against a network of ``depth`` intermediates.

    Raises:
        ValueError: if the network does not have a tap.
    """
    if isinstance(taps, str):
        plural = {"norm1": "norm1", "block": "block", "blocks": "block", "stage": "stage"}
        last = range(max(depth - 3, 0), depth)
        taps = [f"{plural[taps]}.{i}" for i in last] if taps in plural else [taps]
    named = []
    for tap in taps:
        if tap == "head":
            named.append("head")
            continue
        match = re.fullmatch(r"(stage|block|norm1)\.(-?\d+)(\.pool)?", str(tap))
        i = int(match[2]) if match else depth
        i = i + depth if i < 0 else i
        if not match or not 0 <= i < depth or (match[1] == "norm1" and match[3]):
            raise ValueError(
                f"taps: got {tap!r}; {model_name} offers 'head', 'stage.i', 'stage.i.pool' or "
                f"'block.i'{' or norm1.i' if blocks else ''} with i in 0..{depth - 1}"
            )
        if match[1] == "norm1":
            _check_norm1(i, model_name, blocks if is_vit else None)
        named.append(f"{match[1]}.{i}{match[3] or ''}")
    if not named:
        raise ValueError("taps: got an empty list; name at least one tap, or pass None")
    return tuple(named)


def _check_norm1(index: int, model_name: str, blocks: Sequence[nn.Module] | None) -> None:
    if blocks is None:
        raise ValueError(f"taps: {model_name} has no blocks with norm1; use 'stage.i' taps")
    block = type(blocks[index]).__name__
    if block not in PRE_NORM_BLOCKS:
        raise ValueError(
            f"taps: norm1 of a {block} does not normalise the block's input "
            f"({model_name} is not a pre-norm ViT); use 'block.{index}'"
        )
    if index == 0:
        raise ValueError("taps: 'norm1.0' precedes every block; use 'norm1.1' or later")
