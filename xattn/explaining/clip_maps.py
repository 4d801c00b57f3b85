"""Explain a clip or a volume as a whole, with a network that reads (B, C, T, H, W): maps (t, h, w).

    found = explain_clip("clip.mp4", load_backbone("torchvision/r3d_18"), "gradcam")
    found[0].map, found[0].by_frame, found[0].strip()

A network for photos explains a clip frame by frame instead: :func:`xattn.explain_video`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.backbone import Backbone
from xattn.explainers import Explainer
from xattn.explainers.base import method_title
from xattn.explaining.clips import Film
from xattn.explaining.passes import retarget, set_up, top_classes
from xattn.explaining.photos import Explanations
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.format import OVERLAYS, is_pack
from xattn.photos.clip import FALLBACK_FPS, evenly_spaced
from xattn.photos.images import MAX_PIXELS
from xattn.photos.view import View
from xattn.photos.whole_clips import read_clip
from xattn.pictures.strip import strip, write_gif
from xattn.runtime.files import check_output

STRIP = 8  # number of frames in a strip


@dataclass(frozen=True, eq=False)
class ClipExplanation:
    """The explanation of one class of one clip.

    ``map`` holds raw scores (t, h, w), float32; ``photos`` are the T frames that the network read,
    ``numbers`` are their frame numbers in the clip or slice numbers in the volume, and ``fps`` is the
    clip's frame rate. The other fields are the same as in :class:`xattn.Explanation`.
    """

    map: NDArray[np.float32]
    photos: Sequence[Image.Image] = field(repr=False)
    numbers: tuple[int, ...]
    fps: float
    target: int
    target_name: str
    probability: float
    method: str
    view: View
    protocol: dict[str, Any] = field(default_factory=dict, repr=False)
    is_mask: bool = False
    facts: ImageFacts = field(default_factory=ImageFacts, repr=False)
    unit: str = "frame"

    @property
    def is_blank(self) -> bool:
        """Whether the map is constant and therefore shows nothing."""
        return bool(self.map.min() == self.map.max())

    def normalized(self) -> NDArray[np.float32]:
        """(T, h, w): the map min-maxed over the whole clip to [0, 1], interpolated linearly in time."""
        values = self.map.astype(np.float64)
        if not self.is_mask:
            low, span = values.min(), np.ptp(values)
            values = (values - low) / span if span else np.zeros_like(values)
        return self._at_frames(values).astype(np.float32)

    def _at_frames(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(t, h, w), interpolated linearly in time at each of the T frames."""
        steps, count = len(values), len(self.photos)
        at = np.clip((np.arange(count) + 0.5) * steps / count - 0.5, 0, steps - 1)
        before = np.floor(at).astype(int)
        after, share = np.minimum(before + 1, steps - 1), (at - before)[:, None, None]
        return (1 - share) * values[before] + share * values[after]

    @property
    def by_frame(self) -> NDArray[np.float32]:
        """(T,): the share of the map's positive values in each frame. If a map has no negative values, its
        minimum is subtracted first. If no positive values are left, all shares are zero."""
        values = self.map.astype(np.float64)
        total = self._at_frames(np.maximum(values - max(values.min(), 0), 0)).sum((1, 2))
        return (total / (total.sum() or 1)).astype(np.float32)

    def on_photos(self) -> NDArray[np.float32]:
        """(T, H, W): the map on the pixels of the frames, in [0, 1]; NaN for pixels that the network did
        not see."""
        return self.view.to_photo(self.normalized())

    def strip(self, count: int = STRIP, side: int = 144) -> Image.Image:
        """``count`` evenly spaced frames above their overlays, ``side`` pixels high. Each frame is
        labelled with its time and with a bar for its share of the map, which has full length for the
        largest share."""
        at, shares = evenly_spaced(len(self.photos), count), self.by_frame
        photos, maps = self._shown(at, side)
        value = self.protocol.get("probability") == "value"
        amount = f"{self.probability:.4g}" if value else f"{self.probability:.1%}"
        title = f"{self.target_name.split(',')[0]}  {amount}  {method_title(self.method)}"
        return strip(
            photos,
            maps,
            [self._label(i) for i in at],
            [float(shares[i] / (shares.max() or 1)) for i in at],
            title,
        )

    def film(self, path: str | Path, side: int = 240) -> Path:
        """Write the overlays of all T frames as a GIF, ``side`` pixels high. It lasts as long as the clip,
        with 0.04 to 1 s per frame."""
        span = self.numbers[-1] - self.numbers[0] + 1
        seconds = span / self.fps if self.unit == "frame" else len(self.photos) / 4
        return write_gif(path, *self._shown(np.arange(len(self.photos)), side), seconds)

    def _shown(
        self, at: NDArray[np.int64], side: int
    ) -> tuple[list[Image.Image], NDArray[np.float32]]:
        """The frames, ``side`` pixels high, and the map resized to them."""
        width = max(1, round(self.photos[0].width * side / self.photos[0].height))
        small = [self.photos[i].resize((width, side), Image.Resampling.LANCZOS) for i in at]
        return small, self.view.to_photo(self.normalized()[at], (side, width))

    def _label(self, i: int) -> str:
        number = self.numbers[i]
        return f"slice {number}" if self.unit != "frame" else f"{number / self.fps:.2f} s"

    def explanations(self) -> list[Explanation]:
        """One explanation per frame, on the clip's scale, for packs and the viewer."""
        protocol = self.protocol
        if not self.is_mask:
            how = "as explained; min-max over the clip, linear between its steps"
            protocol = {**protocol, "map": how}
        twice = len(set(self.numbers)) < len(self.numbers)
        return [
            Explanation(
                map=values,
                target=self.target,
                target_name=self.target_name,
                probability=self.probability,
                method=self.method,
                method_title=method_title(self.method),
                view=self.view,
                image_id=f"{self.unit}-{number:06d}{f'-{i:03d}' * twice}",
                protocol=protocol,
                is_mask=True,
                source=photo,
                facts=self.facts,
            )
            for i, (values, photo, number) in enumerate(
                zip(self.normalized(), self.photos, self.numbers, strict=True)
            )
        ]


def explain_clip(
    clip: Any,
    backbone: Backbone,
    explainer: str | Explainer = "gradcam",
    *,
    classes: int | str | Sequence[int | str] | None = None,
    target: Any = None,
    top: int = 1,
    view: str = "whole",
    output: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    max_pixels: int | None = MAX_PIXELS,
    fps: float = FALLBACK_FPS,
    overlays: bool = True,
) -> list[ClipExplanation]:
    """Explain a clip or a volume with a network that reads it as a whole. Arguments that are not listed
    here are the same as in ``explain``.

    Args:
        clip: a file that OpenCV reads; a NIfTI file, whose axial slices are the frames; a list of photos,
            of arrays (H, W, 3) or of tensors (C, H, W); an array (frames, H, W, 3) or, if the network
            reads one channel, a grey one (frames, H, W) or (frames, H, W, 1); a tensor (C, T, H, W) in
            [0, 1], used unchanged if it has the network's size; or a .npy file of an array or a tensor. If
            there are more frames than the network reads, evenly spaced ones are used; if there are fewer,
            they are repeated, with a warning.
        batch_size: clips per pass, for methods that run many passes.
        output: folder for a pack: one map per frame, ``overlay.mp4``, and a strip for each class in
            ``overlays/``.
        fps: frame rate of an array, a tensor or a list.
        overlays: whether to write the film and the pictures to the pack.

    Returns:
        One explanation per class, the most probable first.

    Raises:
        ValueError: the network is for photos, the clip cannot be read, or an argument is invalid.
        OSError: the file does not exist, or ``output`` cannot be written.

    Example:
        >>> import torch, xattn
        >>> from torchvision.models.video import r3d_18
        >>> net = xattn.load_backbone(r3d_18(), input_size=32)
        >>> [explanation, *_] = xattn.explain_clip(torch.rand(3, 8, 32, 32), net, "gradcam")
        >>> assert explanation.map.ndim == 3
    """
    if not 0 < fps < np.inf:
        raise ValueError(f"fps: got {fps!r}; give frames per second, above 0")
    if output is not None:
        check_output(output, is_ours=is_pack)
    backbone, (explainer,), classes = retarget(backbone, [explainer], classes, target)
    method, choose, protocol = set_up(
        backbone, None, explainer, classes, top, view, batch_size, seed, clips=True
    )
    reads = backbone.preprocessing, view, max_pixels, fps, backbone.name
    pixels, seen, frames, unit = read_clip(clip, *reads)
    assert callable(choose)
    logits, targets, maps = method.attribute_classes(pixels[None].to(backbone.device), choose)
    every = backbone.probabilities(logits)[0]
    protocol |= {"view": seen.mode}
    protocol[unit] = {"frames": list(frames.numbers), "of": frames.total, "fps": frames.fps}
    found = [
        ClipExplanation(
            values,
            frames.photos,
            frames.numbers,
            frames.fps,
            number,
            backbone.class_names[number],
            float(every[number]),
            method.name,
            seen,
            {**protocol, **backbone.about(number)},
            method.is_mask,
            ImageFacts(top_classes(every, backbone)),
            unit,
        )
        for number, values in zip(targets[0].tolist(), maps[0].float().cpu().numpy(), strict=True)
    ]
    _warn_of_blank(found)
    if output is not None:
        _save(Path(output), found, overlays)
    return found


def _warn_of_blank(found: Sequence[ClipExplanation]) -> None:
    blank = [f"{e.method} of {e.target_name.split(',')[0]}" for e in found if e.is_blank]
    if blank:
        warnings.warn(
            f"explain_clip: the map by {', '.join(blank)} has the same value everywhere, so it "
            "highlights nothing",
            stacklevel=3,
        )


def _save(output: Path, found: Sequence[ClipExplanation], overlays: bool) -> None:
    """Write the pack of all classes, frame by frame, and their strips."""
    first = found[0]
    span = max(1, first.numbers[-1] - first.numbers[0] + 1)
    speed = len(first.photos) * first.fps / span if first.unit == "frame" else 4.0
    groups = list(zip(*(e.explanations() for e in found), strict=True))
    with Film(output, min(speed, first.fps), overlays) as film:
        for photo, group in zip(first.photos, groups, strict=True):
            film.add(photo, group)
        result = Explanations(replace(e, source=None) for group in groups for e in group)
        film.save(result)
    for e in found if overlays else ():
        (output / OVERLAYS).mkdir(exist_ok=True)
        e.strip().save(output / OVERLAYS / f"strip-{e.target}.png")
