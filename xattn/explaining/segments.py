"""Ask a segmentation network about places in a photo: why is this pixel "dog", or why this mask?

targets = segment_targets("photo.jpg", network, [("dog", (120, 80)), (None, (10, 10))])
explain("photo.jpg", network, explainer="gradcam", target=targets)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.segmentation import Masks
from xattn.backbone.targets import SegmentationTarget, at_mask, at_point, at_query, like_mask
from xattn.photos.arrays import array_images, is_array
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.photos.view import View, prepare, prepare_source

By = Literal["class", "mask", "similarity"]


@torch.no_grad()
def segment_targets(
    photo: Any,
    segmenter: Backbone,
    at: Sequence[tuple[int | str | None, Any]],
    by: By = "class",
    view: str = "crop",
    max_pixels: int | None = MAX_PIXELS,
) -> list[SegmentationTarget]:
    """Targets for one photo: a class at a point or in a mask, or the network's own mask there.

    Args:
        photo: a path, a PIL image, or a tensor (3, H, W) or an array (H, W, 3) in [0, 1], with the
            network's number of channels; prepared as in :func:`xattn.explain`.
        segmenter: from :func:`xattn.load_segmenter`.
        at: (class, place) for each question. The class is a name, a number, or None for the most probable
            one there. The place is a point (x, y) in pixels of the photo, or a mask over it: an array
            (H, W), or the path of a picture whose non-black pixels form the mask.
        by: ``"class"``, or ``"mask"`` for a network that predicts masks. ``"mask"`` explains the mask with
            the largest product of the class's probability and the mask's own probability there, see
            :func:`~xattn.backbone.targets.at_query`; ``"similarity"`` explains whether any mask is like
            that one, see :func:`~xattn.backbone.targets.like_mask`.
        view: as in :func:`xattn.explain`.

    Returns:
        Targets for ``explain(photo, segmenter, target=...)``; p is the probability of the class there, or
        the score of a mask.

    Raises:
        ValueError: a place outside the photo or outside what the network sees, an unknown class, or a
            network without pixel logits or without masks.

    Example:
        >>> import numpy as np, torch, xattn
        >>> from xattn import segment_targets
        >>> mine = torch.nn.Conv2d(3, 4, 3, padding=1)  # logits of 4 classes at every pixel
        >>> segmenter = xattn.load_segmenter(mine, input_size=32, class_names=list("abcd"))
        >>> photo = np.zeros((32, 32, 3), np.uint8)
        >>> [target] = segment_targets(photo, segmenter, [("b", (10, 12))])
        >>> target.name
        'b at (10, 12)'
    """
    if by not in get_args(By):
        raise ValueError(f"by: got {by!r}; choose one of {', '.join(get_args(By))}")
    model: Any = segmenter.model
    if not hasattr(model, "forward_pixels"):
        raise ValueError(
            f"segmenter: {segmenter.name} answers no pixels; give xattn.load_segmenter(...)"
        )
    if isinstance(at, str) or not at:
        raise ValueError(
            f"at: got {at!r:.80}; give a list of (class, (x, y)) or (class, mask), one or more"
        )
    if is_array(photo):
        photo = array_images(photo, len(segmenter.preprocessing.mean), "photo")[0]
    opened = load_image(photo, max_pixels)
    pixels, seen = prepare_source(photo, opened, segmenter.preprocessing, view)
    asked = [_Asked.of(question, seen, segmenter) for question in at]
    dtype = next((p.dtype for p in segmenter.parameters()), pixels.dtype)
    x = segmenter.normalize(pixels[None].to(segmenter.device, dtype))
    with segmenter._passing(x):
        if by != "class" and not getattr(model, "answers_masks", False):
            raise ValueError(f"by: {segmenter.name} answers no masks; leave it out")
        if by != "class":
            found = model.masks(x)[0]
            return [one.mask(found, by) for one in asked]
        logits = model.forward_pixels(x)[0]
    return [one.at_class(logits, segmenter) for one in asked]


class _Asked(NamedTuple):
    """A class, if one was given, and its place on the input; ``text`` and ``record`` describe the place on
    the photo."""

    label: int | None
    make: Callable[..., SegmentationTarget]
    place: tuple[Any, ...]
    text: str
    record: dict[str, Any]

    @classmethod
    def of(cls, question: Any, seen: View, segmenter: Backbone) -> _Asked:
        try:
            label, place = question
        except (TypeError, ValueError):
            raise ValueError(
                f"at: got {question!r:.80}; give (class, (x, y)) or (class, mask)"
            ) from None
        index = None
        if label is not None:
            try:
                index = segmenter.class_index(label)
            except ValueError as error:
                raise ValueError(f"at: {error}") from None
        if isinstance(place, tuple) or (isinstance(place, list) and np.ndim(place) < 2):
            x, y = _point(place, seen.photo_size)
            place = _on_input(x, y, seen)
            return cls(index, at_point, place, f"at ({x:g}, {y:g})", {"point": [x, y]})
        mask, name = _mask(place, seen, segmenter)
        count = int((mask > 0).sum())
        text = f"in {name}" if name else f"in a mask of {count} pixels"
        return cls(index, at_mask, (mask,), text, {"pixels": count})

    def means(self, maps: Tensor) -> Tensor:
        """(1, C, h, w) -> (C,), the mean over the place."""
        read: Any = self.make(0, *self.place).function
        return torch.cat([replace(read, index=i)(maps) for i in range(maps.shape[1])])

    def at_class(self, logits: Tensor, segmenter: Backbone) -> SegmentationTarget:
        odds = getattr(segmenter.model, "odds", lambda logits: logits)
        index = self.label
        if index is None:
            index = int(self.means(odds(logits)).argmax())
        name = segmenter.class_names[index]
        made = self.make(index, *self.place, f"{name} {self.text}", "sigmoid")
        return replace(made, label=name, record=self.record)

    def mask(self, found: Masks, by: By) -> SegmentationTarget:
        every = found.classes.softmax(-1)[0, :, :-1]
        p = every.amax(1) if self.label is None else every[:, self.label]
        number = int((p * self.means(found.masks.sigmoid())).argmax())
        if by == "similarity":
            made = like_mask(found.masks[0, number] > 0, every[number])
            made = replace(made, label=int(every[number].argmax()), record={"like": number})
            where = f"{{}}, masks like {number} {self.text}"
        else:
            made = at_query(number, self.label)
            where = f"{{}}, mask {number} {self.text}"
        return replace(made, where=where, record={**made.record, **self.record})


def _point(place: Any, size: tuple[int, int]) -> tuple[float, float]:
    """x and y on a photo of ``size`` (H, W)."""
    try:
        x, y = (float(v) for v in place)
    except (TypeError, ValueError):
        raise ValueError(f"at: got {place!r:.80}; give a point (x, y), or a mask") from None
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"at: ({x:g}, {y:g}) lies outside the photo of {width} x {height} pixels; give pixels of the "
            f"photo, from its upper left corner"
        )
    return x, y


def _on_input(x: float, y: float, seen: View) -> tuple[float, float]:
    """(row, column) of the centre of a pixel of the photo, as fractions of the input."""
    shares = [
        ((value + 0.5) * resized / whole - start) / length
        for value, resized, whole, start, length in zip(
            (y, x), seen.resized, seen.photo_size, seen.box[:2], seen.box[2:], strict=True
        )
    ]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"at: ({x:g}, {y:g}) lies outside the part of the photo that the network sees; give "
            f"view='whole' (--view whole)"
        )
    return shares[0], shares[1]


def _mask(place: Any, seen: View, segmenter: Backbone) -> tuple[Tensor, str]:
    """A mask (h, w) over the input, and the name of its file."""
    name = ""
    if isinstance(place, str | Path):
        name = Path(place).name
        try:
            place = np.asarray(load_image(place)).any(2)
        except OSError as error:
            raise ValueError(f"at: {error}") from None
    mask = np.asarray(place.cpu() if isinstance(place, Tensor) else place)
    if mask.shape != tuple(seen.photo_size):
        height, width = seen.photo_size
        raise ValueError(
            f"at: got a mask of {mask.shape} for a photo of {width} x {height} pixels; give ({height}, "
            f"{width})"
        )
    if not mask.any():
        raise ValueError("at: got a mask without a pixel; give one that marks a pixel or more")
    if seen.mode == "tensor":  # used unchanged
        return torch.from_numpy(mask != 0).float(), name
    picture = Image.fromarray(np.where(mask != 0, 255, 0).astype(np.uint8)).convert("RGB")
    photos = replace(segmenter.preprocessing, mean=(0.0,) * 3, interpolation="box")
    found = prepare(picture, photos, seen.mode)[0][0]
    if not found.any():
        raise ValueError(
            "at: the mask lies outside the part of the photo that the network sees; give view='whole' "
            "(--view whole)"
        )
    return found, name
