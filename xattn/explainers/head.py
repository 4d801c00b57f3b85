"""A trained head as an explainer: maps of any number of classes from one backbone pass, or the mean over
several passes.

    S(x) = mean_i T_i^-1 S_1(T_i x),    T_i: identity, mirror, shift by half a cell, both (other way)

S_1 are the head's scores from one pass. With a shifted image, the coarse grid samples positions between
its usual cells:

    x' [i] = x[i - p],    p = round(H / 2 h) pixels of H,  h cells of the coarsest tap
    S  [j] = S'[j + d],   d = p n / H cells of a map of n;  unknown where j + d lies outside of S'

Both axes are shifted in the same way; beyond the image's border, its edge pixels are repeated. All frames
of a clip are presented in the same way.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xattn.backbone import Taps
from xattn.explainers.base import Choose, Explainer, register_explainer
from xattn.heads import AttentiveHead
from xattn.heads.fusion import resize
from xattn.heads.mixer import SHARES


class Pose(NamedTuple):
    """How an image is presented: shifted by ``shift`` half cells down and to the right, then mirrored."""

    mirrored: bool = False
    shift: int = 0


# The two shifts go opposite ways, so that each border of the image is lost in at most one of four passes.
POSES = (Pose(), Pose(mirrored=True), Pose(shift=1), Pose(mirrored=True, shift=-1))


@dataclass(frozen=True)
class PoseTransform:
    """Transforms images of ``size`` (H, W) into poses, and maps back.

    Args:
        cells: (h, w) of the coarsest tap.
        moves: whether any pose has a shift; otherwise maps keep their size.
    """

    size: tuple[int, int]
    cells: tuple[int, int]
    moves: bool

    def posed(self, images: Tensor, pose: Pose) -> Tensor:
        """``images`` (B, 3, H, W) or (B, 3, T, H, W) in a pose, at the same size."""
        for axis, pixels in zip((-2, -1), self._pixels, strict=True):
            images = _moved(images, pose.shift * pixels, axis)
        return images.flip(-1) if pose.mirrored else images

    def aligned(self, maps: Tensor, pose: Pose) -> tuple[Tensor, Tensor]:
        """Maps (B, M, n, m) of images in a pose, mapped back to (B, M, n', m') on the original images, and
        an (n', m') mask, 1 where they are known and 0 elsewhere.

        n' is n if the shift is a whole number of the map's cells, otherwise the next multiple of 2 h.
        """
        if pose.mirrored:
            maps = maps.flip(-1)
        known = maps.new_ones(())
        if self.moves:
            grid = tuple(map(_fine, maps.shape[-2:], self.cells, self._pixels, self.size))
            maps = resize(maps, (*maps.shape[2:-2], *grid))
            known = maps.new_ones(grid)
            for axis, pixels, side in zip((-2, -1), self._pixels, self.size, strict=True):
                count = maps.shape[axis]
                back = pose.shift * pixels * count / side
                maps = _moved(maps, -back, axis)
                places = torch.arange(count, device=maps.device) + back
                inside = (places >= 0) & (places <= count - 1)
                known = known * (inside[:, None] if axis == -2 else inside)
        return maps, known

    @property
    def _pixels(self) -> tuple[int, int]:
        """Half a cell in pixels, for each axis."""
        height, width = (
            max(1, round(side / (2 * count)))
            for side, count in zip(self.size, self.cells, strict=True)
        )
        return height, width


def _fine(count: int, cells: int, pixels: int, side: int) -> int:
    """The smallest size of at least ``count`` in which ``pixels`` of ``side`` are usually whole cells."""
    if pixels * count % side == 0:
        return count
    return math.ceil(count / (2 * cells)) * 2 * cells


def _moved(x: Tensor, by: float, axis: int) -> Tensor:
    """``x`` shifted ``by`` positions towards larger indices, interpolated linearly, its edge repeated."""
    whole = math.ceil(by)
    count = x.shape[axis]
    places = torch.arange(count, device=x.device) - whole
    lower = x.index_select(axis, places.clamp(0, count - 1))
    if whole == by:
        return lower
    upper = x.index_select(axis, (places + 1).clamp(0, count - 1))
    return lower + (whole - by) * (upper - lower)


@register_explainer("head", title="Explanation head", cases=({}, {"passes": 4}))
@dataclass(kw_only=True, eq=False, repr=False)
class HeadExplainer(Explainer):
    """A trained explanation head, which explains any number of classes in one forward pass.

    With several passes, the *scores* of each class are averaged, and a head that shows its mask computes
    it from the mean score. The result is a mask like those that the head was trained to produce,
    with 1/2 where the mean score is 0; averaging masks would not give such a mask. Attention is
    averaged directly.

    Args:
        maps: the kind of map to return instead of the one set by ``explain_with``: ``"scores"``,
            ``"mask"`` or, for a head that pools by attention, ``"attention"``.
        passes: 1 uses only the image; 2 averages the maps of the image and its mirror image; 4 also
            includes both of these shifted by half a cell of the coarsest tap, with the image's edge
            repeated. Each pass is one forward pass. If half a cell is not a whole number of the map's
            cells, the map is up-sampled until it is.
        caption: only for the head ``words``: use only the words in this text, and set the maps of all
            others to 0. None uses all words.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("ttame", net)  # untrained; see xattn.fit
        >>> method = xattn.create_explainer("head", net, head)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 8, 8])
    """

    maps: str | None = None
    passes: Literal[1, 2, 4] = 1
    caption: str | None = None
    needs_head = True
    per_class = True
    clips = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caption is not None:
            from xattn.heads import WordHead

            if not isinstance(self.head, WordHead):
                name = getattr(self.head, "name", None)
                raise ValueError(
                    f"caption: got {self.caption!r} for the head {name!r}; give a text, and "
                    f"only for the head 'words'"
                )
            self.head = self.head.for_caption(self.caption)
            asked = [self.head.class_names[i] for i in self.head.words_of(self.caption)]  # type: ignore[index]
            self._note(f"only the words of the caption: {', '.join(asked)}")
        choices = ["scores", "mask"]
        if isinstance(self.head, AttentiveHead) and self.head.learns_scores:
            choices.append("attention")
        if self.head is not None:
            self.tapped = self.head.tapped(self.backbone)
        if self.maps not in (None, *choices):
            raise ValueError(f"maps: got {self.maps!r}; this head shows {', '.join(choices)}")
        if self.passes > 1 and self.backbone.boxes is not None:
            raise ValueError(
                f"passes: got {self.passes}, but boxes are not mirrored or shifted with the photo; give 1"
            )
        each = 1 if self.head is None else 1 + self.head.own_passes
        if self.passes * each > 1:  # else set nothing, because result records list what is set
            self.forwards = self.passes * each
        if self.maps is not None:
            self.head = copy.copy(self.head)
            self.head.explain_with = self.maps  # type: ignore[union-attr]
        if self.head is not None and self.head.mixer is not None:
            self._note(SHARES.format(name=self.head.mixer.name))

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._explanation(images, self.tapped(images), target)

    @torch.no_grad()
    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        taps = self.tapped(images)
        classes = self._chosen(choose, taps.logits)
        return taps.logits, classes, self._explanation(images, taps, classes)

    def _explanation(self, images: Tensor, taps: Taps, classes: Tensor) -> Tensor:
        """Maps (b, M, h, w) of classes (b,) or (b, M); ``taps`` belong to the unchanged image."""
        assert self.head is not None
        if self.passes == 1:
            return self.head.explanation(taps, classes)
        mask = self.head.explain_with == "mask"
        read = self.head if mask else self.head.explanation
        poser = PoseTransform(_sides(images), _coarsest(taps), moves=self.passes > 2)
        parts: list[tuple[Tensor, Tensor]] = []
        for pose in POSES[: self.passes]:
            if pose != POSES[0]:
                taps = self.tapped(poser.posed(images, pose))
            parts.append(poser.aligned(read(taps, classes), pose))
        total = torch.stack([maps * known for maps, known in parts]).sum(0)
        scores = total / torch.stack([known for _, known in parts]).sum(0)
        return self.head.mask(scores) if mask else scores


def _sides(images: Tensor) -> tuple[int, int]:
    return int(images.shape[-2]), int(images.shape[-1])


def _coarsest(taps: Taps) -> tuple[int, int]:
    """The cells (h, w) of the tap with the fewest cells."""
    return min((_sides(maps) for maps in taps.maps), key=lambda sides: sides[0] * sides[1])
