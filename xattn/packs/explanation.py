"""The record of one explanation.

An :class:`Explanation` is a raw map (h, w) of one class of one photo, with everything needed to interpret
it later: the class and its probability, the method, how the map lies on the photo, and the protocol. Many
of them form a pack, see :mod:`xattn.packs.writer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.packs.answers import AnswerFacts
from xattn.photos.base import StoredPhoto
from xattn.photos.images import load_image
from xattn.photos.view import View
from xattn.pictures.scales import overlay_of
from xattn.runtime.stores import StorePath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CELLS = 16_384  # largest side of a map, for writers and readers alike


@dataclass(frozen=True)
class ImageFacts:
    """Facts about a photo other than its maps.

    ``top`` are the classifier's most probable classes, (class, its name, probability); ``label`` is the
    true class as an index into the classifier's classes, or None if it is not one of them, and
    ``label_name`` is its name; ``features`` (d,) are the features that the classifier receives, if they
    were requested; ``answer`` is a vision-language model's answer about the photo.
    """

    top: tuple[tuple[int, str, float], ...] = ()
    label: int | None = None
    label_name: str | None = None
    features: NDArray[np.float16] | None = field(default=None, compare=False, repr=False)
    answer: AnswerFacts | None = None


@dataclass(frozen=True, eq=False)
class Explanation:
    """The explanation of one class of one photo.

    ``map`` holds raw scores (h, w), float32, read-only, on the grid of the model's input, at most
    ``MAX_CELLS`` per side; ``probability`` is the softmax over all classes, the class's sigmoid
    (multi-label) or, for a target that is a number of any size (``is_value``), that number; ``image_id``
    identifies the photo, see :mod:`xattn.photos.image_names`, and ``source`` is where its pixels come
    from: a file, an image, or None. ``is_mask`` marks maps whose values are by definition in [0, 1] and
    must not be stretched. ``facts`` describe the photo. Three fields come from comparisons: ``metrics``,
    by column such as "AD@50"; ``curves``, by name such as "deletion"; and ``sanity``, whether this is a
    row that every method has to beat. ``method_title`` is the method's name in running text, by default
    its name; use different titles for different methods.

    Example:
        >>> import numpy as np, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> photo = np.zeros((64, 64, 3), np.uint8)
        >>> [explanation] = xattn.explain(photo, net, explainer="gradcam", classes=3)
        >>> explanation.overlay().size
        (64, 64)
    """

    map: NDArray[np.float32]
    target: int
    target_name: str
    probability: float
    method: str
    view: View
    image_id: str
    protocol: dict[str, Any] = field(default_factory=dict)
    file_name: str = ""
    is_mask: bool = False
    source: Path | StorePath | Image.Image | StoredPhoto | None = field(default=None, repr=False)
    facts: ImageFacts = field(default_factory=ImageFacts, repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict, repr=False)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)
    sanity: bool = False
    method_title: str = ""

    def __post_init__(self) -> None:
        values = np.array(self.map, dtype=np.float32)
        if values.ndim != 2 or values.size == 0 or max(values.shape) > MAX_CELLS:
            raise ValueError(
                f"map: got shape {values.shape}; give (h, w), at most {MAX_CELLS:,} per side"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"map: the {self.method} map of {self.image_id} holds NaN or infinite values; "
                f"check the weights of the model"
            )
        known = math.isfinite(self.probability) if self.is_value else 0 <= self.probability <= 1
        if not known:
            raise ValueError(
                f"probability: got {self.probability} for {self.image_id}; give a number "
                "from 0 to 1"
            )
        if not self.image_id or "\0" in self.id:
            raise ValueError(
                f"image_id, method: got {self.id!r}; give names without null characters"
            )
        values.setflags(write=False)
        object.__setattr__(self, "map", values)
        object.__setattr__(self, "method_title", self.method_title or self.method)

    @property
    def is_value(self) -> bool:
        """Whether ``probability`` is a number of any size, see :mod:`xattn.backbone.targets`."""
        return self.protocol.get("probability") == "value"

    @property
    def id(self) -> str:
        """An id that is unique in a pack; it consists of photo, class and method."""
        return f"{self.image_id}@{self.target}.{self.method}"

    @property
    def is_constant(self) -> bool:
        """Whether the map carries no information, because all its values are equal."""
        return bool(self.map.min() == self.map.max())

    @property
    def is_blank(self) -> bool:
        """Whether the map is constant. The mask of ones does not count as blank, since it keeps every
        pixel on purpose."""
        return self.is_constant and not (self.is_mask and self.map.flat[0] == 1)

    def normalized(self) -> NDArray[np.float32]:
        """Return the map (h, w), min-max scaled to [0, 1]; a constant map becomes 0, and a mask is
        unchanged."""
        if self.is_mask:
            return np.clip(self.map, 0, 1)
        low, high = float(self.map.min()), float(self.map.max())
        if low == high:
            return np.zeros_like(self.map)
        scaled = (self.map.astype(np.float64) - low) / (high - low)
        return scaled.astype(np.float32)

    def on_photo(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """Return the map resized to the photo's pixels (H, W), in [0, 1]; it is NaN outside the part that
        the model saw.

        Min-max scaling is applied first, to the coarse map, as in the fidelity metrics. ``size`` (height,
        width) requests a different resolution for the same photo.
        """
        return self.view.to_photo(self.normalized(), size)

    def numpy(self) -> NDArray[np.float32]:
        """Return the same as :meth:`on_photo`: (H, W) float32 on the photo's pixels, in [0, 1], and NaN
        outside the part that the model saw. ``explanation.map`` contains the raw scores (h, w)."""
        return self.on_photo()

    def photo(self, max_side: int | None = None) -> Image.Image:
        """Return the photo, RGB, shrunk to ``max_side`` if it is larger.

        Raises:
            ValueError: its pixels are not available, or the file is missing or damaged.
        """
        if self.source is None:
            raise ValueError(f"source: the pixels of {self.image_id} are not available; set source")
        try:
            image = load_image(self.source, max_pixels=None)
        except OSError as error:
            raise ValueError(f"source: {error}") from error
        if max_side is not None:
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        return image

    def overlay(
        self,
        opacity: float = 0.55,
        cmap: str = "inferno",
        max_side: int | None = None,
        style: str = "overlay",
    ) -> Image.Image:
        """Draw the map over the photo: in colour, as an "outline" or as a "spotlight"; see
        :func:`xattn.pictures.overlay.overlay`."""
        return overlay_of(self, self.photo(max_side), opacity, cmap, style)

    def figure(self, cmap: str = "inferno", width: float = 8.0, style: str = "overlay") -> Figure:
        """Draw photo, map and colour bar as a matplotlib figure, see
        :func:`xattn.pictures.notebook.figure`."""
        from xattn.pictures import notebook

        return notebook.figure(self, cmap, width, style)

    def _repr_html_(self) -> str:
        from xattn.pictures import notebook

        return notebook.grid_html([self])

    def _repr_png_(self) -> bytes:
        from xattn.pictures import notebook

        return notebook.png([self])


def blank_note(names: Sequence[str]) -> str:
    """Return a warning about constant maps (:attr:`Explanation.is_blank`); ``names`` are the results of
    :func:`map_name` for these maps.

    >>> blank_note([map_name("cam", "hen, biddy", "a.png")])
    'The map by cam of hen on a.png has the same value everywhere, so its overlay highlights nothing.'
    """
    if len(names) == 1:
        return (
            f"The map {names[0]} has the same value everywhere, so its overlay highlights nothing."
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} maps have the same value everywhere, so their overlays highlight nothing: "
        f"{'; '.join(names[:3])}{more}."
    )


def map_name(method: str, target_name: str, photo: str) -> str:
    """Return a text that describes a map."""
    return f"by {method} of {target_name.split(',')[0]} on {photo}"


def contrast(
    explanation: Explanation, other: Explanation, raw: bool = False
) -> NDArray[np.float32]:
    """Return the evidence for one class rather than the other, as the difference of two maps (h, w).

    By default it is the difference of the min-max scaled maps, in [-1, 1], which compares only how each
    map is distributed. With ``raw``, it is the difference of the scores themselves, which also compares
    their strength.

    Raises:
        ValueError: the maps belong to different photos, crops or sizes.
    """
    same = explanation.image_id == other.image_id and explanation.view == other.view
    if not same or explanation.map.shape != other.map.shape:
        raise ValueError(
            f"other: the map {other.id} is not on the grid of {explanation.id}; give two classes "
            "of the same photo, explained by the same method"
        )
    if raw:
        return explanation.map - other.map
    return explanation.normalized() - other.normalized()
