"""Explain the detections in photos: one map per box.

    for one in explain_detections("photo.jpg", load_detector("torchvision/fcos_resnet50_fpn"), "odam"):
        one.overlay().save(f"{one.target_name}.png")

The detections in all photos together are the classes of one view (:class:`~xattn.detection.Detections`); in
each photo, only the detections found there are explained.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.detection.detector import WANTED, Detection, Detector, Score, check_threshold
from xattn.explainers import Explainer, as_explainer, create_explainer
from xattn.explainers.base import Choose
from xattn.explaining.naming import Source, file_name_of, named_photos
from xattn.explaining.passes import ClassPerPhoto
from xattn.explaining.photos import Explanations, explain
from xattn.heads.base import Head, create_head, load_head
from xattn.photos.arrays import ArrayImage
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.runtime.option_checks import Count, Whole, check

Box = Sequence[float]


def explain_detections(
    images: Any,
    detector: Detector,
    explainer: Any = "d_rise",
    *,
    threshold: float = 0.5,
    most: int = 10,
    detections: Sequence[Detection] | None = None,
    missed: Sequence[tuple[int | str, Box]] = (),
    candidates: int = 0,
    score: Score = "similarity",
    output: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    max_pixels: int | None = MAX_PIXELS,
    overlays: bool = True,
    progress: bool = False,
    keep: int | None = None,
) -> Explanations:
    """Explain the detections in one photo, in a folder, in a list file, or in given images.

    Args:
        images: as in :func:`xattn.explain`.
        detector: from :func:`~xattn.detection.load_detector`.
        explainer: one or several names, such as ``"d_rise"``, ``"odam"``, ``"gradcam"``, ``"layercam"`` or
            ``"occlusion"``; a trained head, or the :class:`~pathlib.Path` of its folder.
        threshold: lowest score of a detection. In each photo, only the ``most`` best ones are explained.
        detections: explain these detections of a single photo, without running the detector to find any.
        missed: objects in a single photo that the detector does not find, as (class, box in pixels of the
            photo). The best candidate for each is explained as well.
        candidates: how many of the best candidates to explain in a photo without a detection.
        score: how p and logit of a detection are defined, see :class:`~xattn.detection.Detections`.
        output, batch_size, seed, max_pixels, overlays, progress, keep: as in :func:`xattn.explain`.
        options: options of explainers, by name, such as ``{"d_rise": {"masks": 1000}}``.

    Returns:
        The same as :func:`xattn.explain`, with one explanation per detection and method;
        ``protocol["detection"]`` holds the box in pixels of the photo, the class and the score. Photos
        without a detection are left out with a warning; a single photo without one is an error.

    Raises:
        ValueError: as in :func:`xattn.explain`; or the threshold is outside [0, 1], a class is unknown, a
            box is outside the photo, or a single photo has no detection.

    Example:
        >>> import numpy as np, torch, xattn
        >>> from xattn import explain_detections
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> photo = np.zeros((32, 32, 3), np.uint8)
        >>> [explanation] = explain_detections(photo, detector, "occlusion")
        >>> explanation.target_name, explanation.map.shape
        ('dog 0.90', (32, 32))
    """
    if not isinstance(detector, Detector):
        raise ValueError(
            f"detector: got a {type(detector).__name__}; give xattn.load_detector(...), and for a "
            f"classifier call xattn.explain"
        )
    check_threshold(threshold)
    check("most", most, Count)
    check("candidates", candidates, Whole)
    names = explainer if isinstance(explainer, list | tuple) else [explainer]
    foreign = sorted(set(options or {}).difference(e for e in names if isinstance(e, str)))
    if foreign:
        raise ValueError(f"options: {foreign[0]!r} is not among the explainers; give it there, too")
    asked = _Asked(threshold, most, detections, tuple(missed), candidates, max_pixels)
    photos, found = asked.of(images, detector)
    view = detector.of([one for own in found for one in own], score)
    about: dict[str, Any] = {"seed": seed, "max_forward_batch": batch_size}
    methods = [_explainer(e, view, dict(options or {}), about) for e in names]
    return explain(
        photos,
        view,
        None,
        methods,
        _OwnEach(found, [image_id for image_id, _ in named_photos(photos)]),  # type: ignore[arg-type]
        output=output,
        batch_size=batch_size,
        seed=seed,
        max_pixels=max_pixels,
        overlays=overlays,
        progress=progress,
        keep=keep,
    )


def _explainer(
    method: Any, view: Any, options: dict[str, Mapping[str, Any]], about: dict[str, Any]
) -> Explainer:
    if isinstance(method, str):
        return create_explainer(method, view, **{**about, **options.get(method, {})})
    if isinstance(method, Path):
        method = load_head(method, view)
    elif isinstance(method, Head):  # made for other detections
        state = method.state_dict()
        method = create_head(method.name, view, **method.options).eval()
        method.load_state_dict(state)
    return as_explainer(method, view, **about)


class _Asked(NamedTuple):
    """Which detections to explain, see :func:`explain_detections`."""

    threshold: float
    most: int
    given: Sequence[Detection] | None
    missed: tuple[tuple[int | str, Box], ...]
    candidates: int
    max_pixels: int | None

    def of(self, images: Any, detector: Detector) -> tuple[list[Source], list[list[Detection]]]:
        """The photos that have detections, and the detections of each."""
        channels = len(detector.preprocessing.mean)
        sources = [source for _, source in named_photos(images, channels)]
        if (self.given is not None or self.missed) and len(sources) != 1:
            argument = "missed" if self.missed else "detections"
            raise ValueError(f"{argument}: belong to one photo, got {len(sources)}; give one")
        kept, left = [], []
        for source in sources:
            name = file_name_of(source) or "a photo"
            try:
                photo = self._read(source)
            except (ValueError, OSError) as error:
                if len(sources) == 1:
                    raise
                left.append(f"{name} ({error})")
                continue
            own = self._of_photo(photo, detector)
            if own:
                kept.append((source, own))
            else:
                left.append(f"{name} (no detection above {self.threshold:g})")
        reasons = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        if not kept:
            raise ValueError(self._nothing(detector, sources, reasons))
        if left:
            warnings.warn(
                f"explain_detections: left out {reasons}; candidates=1 explains the best "
                f"candidate of photos without a detection",
                stacklevel=3,
            )
        return [source for source, _ in kept], [own for _, own in kept]

    def _of_photo(self, photo: Any, detector: Detector) -> list[Detection]:
        """The detections to explain in one photo."""
        own = self.given
        if own is None:
            own = detector.detect(photo, self.threshold, self.most)
        own = [*own, *(detector.missed(photo, label, box) for label, box in self.missed)]
        if not own and self.candidates:
            return detector.best_candidates(photo, self.candidates)
        return own

    def _read(self, source: Any) -> Any:
        """The pixels of an array, or a decoded photo."""
        if isinstance(source, ArrayImage) and source.is_tensor:
            return source.pixels
        return load_image(source, self.max_pixels)

    def _nothing(self, detector: Detector, sources: Sequence[Source], reasons: str) -> str:
        level = f"threshold: no detection above {self.threshold:g} in"
        if len(sources) > 1:
            return f"{level} {len(sources)} photos: {reasons}; give a lower one, or candidates=1"
        level = f"{level} {file_name_of(sources[0]) or 'the photo'}"
        candidates = detector.best_candidates(self._read(sources[0]))
        if not candidates:
            return f"{level}, and no candidate with a score above 0; give another photo"
        (best,) = candidates
        box = ", ".join(f"{v:.0f}" for v in best.box)
        return (
            f"{level}; the best candidate is {best.name} "
            f"{best.score:.3f} at ({box}); give a lower threshold, or candidates=1 (--candidates 1)"
        )


def _always(classes: Tensor) -> Choose:
    return lambda logits: classes


class _OwnEach(ClassPerPhoto):
    """The detections of each photo, as classes of a view that has the detections of all photos in order."""

    def __init__(self, found: Sequence[Sequence[Detection]], names: Sequence[str]) -> None:
        self.of_photo: dict[str, range] = {}
        start = 0
        for name, own in zip(names, found, strict=True):
            self.of_photo[name] = range(start, start + len(own))
            start += len(own)

    def maps(
        self, explainer: Explainer, pixels: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), classes (B, M) and maps (B, M, h, w); M is the largest number of
        detections in a photo, and the first detection of a photo that has fewer is repeated."""
        most = max(len(self.of_photo[name]) for name in names)
        parts = []
        for name, image in zip(names, pixels, strict=True):
            numbers = self.of_photo[name]
            own = torch.tensor([list(numbers)], device=pixels.device)
            token = WANTED.set(numbers)
            try:
                logits, _, maps = explainer.attribute_classes(image[None], _always(own))
            finally:
                WANTED.reset(token)
            at = [*range(own.shape[1]), *[0] * (most - own.shape[1])]
            parts.append((logits, own[:, at], maps[:, at]))
        logits, classes, maps = (torch.cat(p) for p in zip(*parts, strict=True))
        return logits, classes, maps
