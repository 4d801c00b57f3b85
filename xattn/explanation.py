"""The record of one explanation, and packs: folders that hold many of them.

An :class:`Explanation` is a raw map (h, w) of one class of one photo, with all that is needed to
read it later: the class and its probability, the method, the geometry back onto the photo, and the
protocol. A pack is ``maps.safetensors``, ``manifest.json``, ``thumbnails/`` and ``overlays/`` with
JPEG files, and for a clip ``overlay.mp4``; it appears whole or not at all, and carries the SHA-256 of
every map and thumbnail. See :mod:`xattn.pack_writer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.photos.base import StoredPhoto
from xattn.photos.images import load_image
from xattn.photos.view import View
from xattn.runtime import strict_json
from xattn.runtime.files import follow_link, output_error, temporary_folder
from xattn.runtime.tensor_file import TensorFile

FORMAT, VERSION = "xattn-pack", 1
MANIFEST, MAPS, VIDEO = "manifest.json", "maps.safetensors", "overlay.mp4"
THUMBNAIL = r"thumbnails/[^/\\\0]+\.jpg"  # what a thumbnail may be named
THUMBNAIL_SIDE, OVERLAY_SIDE = 512, 2048  # longest side in pixels
MAX_CELLS = 16_384  # of a side of a map, for writers and readers alike


class LaterVersion(ValueError):
    """A pack that this xattn cannot read, and a later one can."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a photo beside its maps.

    ``top`` are the classifier's first classes, (class, its name, probability); ``label`` is the true
    class as an index into the classifier's classes, None where it has no such class, and
    ``label_name`` its name.
    """

    top: tuple[tuple[int, str, float], ...] = ()
    label: int | None = None
    label_name: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "top": [list(item) for item in self.top],
            "label": self.label,
            "label_name": self.label_name,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageFacts:
        """What :meth:`to_json` wrote; all of it may be missing."""
        top = tuple((int(i), str(name), float(p)) for i, name, p in data.get("top", ()))
        return cls(top, data.get("label"), data.get("label_name"))


@dataclass(frozen=True, eq=False)
class Explanation:
    """One class of one photo, explained.

    ``map`` holds raw scores (h, w), float32, read-only, on the grid of the model's input, at most
    ``MAX_CELLS`` a side;
    ``probability`` is the softmax over all classes, or the class's sigmoid (multi-label);
    ``image_id`` names the photo within its run and ``source`` is where its pixels are: a file, an
    image, or None. ``is_mask`` marks maps that are
    in [0, 1] by meaning and must not be stretched. ``facts`` are of the photo. ``metrics``, by column
    such as "AD@50", ``curves``, by name such as "deletion", and ``sanity``, whether this is a row
    that every method has to beat, come with comparisons.
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
    source: Path | Image.Image | StoredPhoto | None = field(default=None, repr=False)
    facts: ImageFacts = field(default_factory=ImageFacts, repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict, repr=False)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)
    sanity: bool = False

    def __post_init__(self) -> None:
        values = np.array(self.map, dtype=np.float32)
        if values.ndim != 2 or values.size == 0 or max(values.shape) > MAX_CELLS:
            raise ValueError(
                f"map: got shape {values.shape}; give (h, w), at most {MAX_CELLS:,} a side"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"map: the {self.method} map of {self.image_id} holds NaN or infinite values; "
                f"check the weights of the model"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability: got {self.probability} for {self.image_id}; give 0..1")
        if re.search(r"[/\\\0]", self.id) or self.id.startswith("."):
            raise ValueError(f"image_id: {self.id!r} cannot name a file; leave out slashes")
        values.setflags(write=False)
        object.__setattr__(self, "map", values)

    @property
    def id(self) -> str:
        """Unique in a pack: photo, class and method; usable as a file name."""
        return f"{self.image_id}@{self.target}.{self.method}"

    @property
    def is_constant(self) -> bool:
        """Whether the map says nothing: all values equal."""
        return bool(self.map.min() == self.map.max())

    @property
    def is_blank(self) -> bool:
        """Whether the map is constant and not the mask of ones, which keeps every pixel on purpose."""
        return self.is_constant and not (self.is_mask and self.map.flat[0] == 1)

    def normalized(self) -> NDArray[np.float32]:
        """The map (h, w) min-maxed to [0, 1]; a constant map becomes 0, a mask stays as it is."""
        if self.is_mask:
            return np.clip(self.map, 0, 1)
        low, high = float(self.map.min()), float(self.map.max())
        if low == high:
            return np.zeros_like(self.map)
        scaled = (self.map.astype(np.float64) - low) / (high - low)
        return scaled.astype(np.float32)

    def on_photo(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """The map on the photo's pixels (H, W), in [0, 1]; NaN where the model did not look.

        Min-max comes first, on the coarse map, as in the fidelity metrics. ``size`` asks for
        another raster (height, width) over the same photo.
        """
        return self.view.to_photo(self.normalized(), size)

    def photo(self, max_side: int | None = None) -> Image.Image:
        """The photo, RGB, shrunk to ``max_side`` if it is larger.

        Raises:
            ValueError: its pixels are not at hand, or the file is gone or damaged.
        """
        if self.source is None:
            raise ValueError(f"source: the pixels of {self.image_id} are not at hand; set source")
        try:
            image = load_image(self.source, max_pixels=None)
        except OSError as error:
            raise ValueError(f"source: {error}") from error
        if max_side is not None:
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        return image

    def overlay(self, opacity: float = 0.55, cmap: str = "inferno", max_side: int | None = None):
        """The map in colour over the photo, a PIL image; see :func:`xattn.visualize.overlay`."""
        from xattn.visualize import overlay

        photo = self.photo(max_side)
        return overlay(photo, self.on_photo((photo.height, photo.width)), opacity, cmap)


def blank_note(names: Sequence[str]) -> str:
    """What to say of maps that are constant (:attr:`Explanation.is_blank`), by :func:`map_name`.

    >>> blank_note([map_name("cam", "hen, biddy", "a.png")])
    'The map by cam of hen on a.png has one value everywhere; its overlay points at nothing.'
    """
    if len(names) == 1:
        return f"The map {names[0]} has one value everywhere; its overlay points at nothing."
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} maps have one value everywhere; their overlays point at nothing: "
        f"{'; '.join(names[:3])}{more}."
    )


def map_name(method: str, target_name: str, photo: str) -> str:
    """A map in words."""
    return f"by {method} of {target_name.split(',')[0]} on {photo}"


# ---------------------------------------------------------------------- writing


def check_output(folder: str | Path) -> Path:
    """Refuse ``folder`` now rather than after the work.

    Raises:
        ValueError: it is a file, a link that leads nowhere, or a folder with other things in it than
            a pack.
        OSError: nothing can be written there.
    """
    folder = follow_link(folder)
    if folder.is_dir() and any(folder.iterdir()) and not is_pack(folder):
        raise ValueError(
            f"output: {folder} is not empty and is not a pack of xattn; choose a new folder, "
            f"nothing was overwritten"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder):
            pass
    except OSError as error:
        raise output_error("output", folder, error) from error
    return folder


def save_pack(
    folder: str | Path,
    explanations: Iterable[Explanation],
    overlays: bool = True,
    skipped: Sequence[tuple[str, str]] = (),
    video: Path | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a pack; an earlier pack in ``folder`` is replaced only once the new one is complete.

    Args:
        overlays: also write ``overlays/<id>.jpg``, the map in colour over the photo.
        skipped: (file name, reason) of images that could not be read, for the manifest.
        video: a film of overlays, moved into the pack.
        metrics: what the explanations' metrics are, by column:
            ``{"higher_is_better": bool, "formula": str, "protocol_id": str}``.

    Raises:
        ValueError: no explanations, two with the same id, or a folder that is not a pack.
        OSError: the folder cannot be written or the disk is full; earlier results are intact.
    """
    from xattn.pack_writer import pack_writer

    explanations = list(explanations)
    groups: dict[str, list[Explanation]] = {}
    for explanation in explanations:
        groups.setdefault(explanation.image_id, []).append(explanation)
    with pack_writer(folder, overlays) as writer:
        for group in groups.values():
            writer.add(group)
        if video is not None:
            writer.add_video(video)
        writer.skipped = list(skipped)
        writer.order = [e.id for e in explanations]
        writer.metrics = metrics or {}
    return Path(folder)


def interrupted_output(folder: str | Path) -> Path:
    """Where the pack of a run that was stopped goes: ``folder``, or beside a pack that is there."""
    folder = Path(folder)
    whole = (folder / MANIFEST).exists()
    return folder.with_name(f"{folder.name}-interrupted") if whole else folder


# ---------------------------------------------------------------------- reading


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The checked ``manifest.json`` of a pack.

    Raises:
        FileNotFoundError: no such folder. ValueError: not a pack, damaged, or of a later version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"pack: no folder {folder}; give one that save_pack wrote")
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise _unreadable(str(folder), error) from None
    return parse_manifest(data, str(folder))


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """The bytes of a ``manifest.json``, checked; ``name`` is of the pack, for errors.

    Raises:
        ValueError: not of a pack, damaged, or of a later version.
    """
    try:
        manifest = strict_json.parse(data)
        found, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(name, error) from None
    if found != FORMAT or type(version) is not int or version < 1:
        raise ValueError(
            f"pack: {MANIFEST} of {name} is not of a pack; it says format {found!r:.60}"
        )
    if version > VERSION:
        raise LaterVersion(
            f"pack: {name} has format version {version}, this xattn reads up to {VERSION}; "
            f"upgrade xattn"
        )
    return manifest  # type: ignore[no-any-return]


def _unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"pack: {name} holds no readable {MANIFEST} ({type(error).__name__}); "
        f"give a folder that save_pack wrote"
    )


def load_pack(folder: str | Path) -> list[Explanation]:
    """The explanations of a pack, in their order; photos come as thumbnails.

    Raises:
        FileNotFoundError: no such folder. ValueError: not a pack, or a damaged one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        maps = TensorFile(lambda: (folder / MAPS).open("rb"))
    except (OSError, ValueError) as error:
        raise _damaged(folder / MAPS, "missing or damaged", error) from None
    try:
        taken: set[str] = set()
        for entry in manifest["entries"]:
            if entry["id"] in taken:  # one map may not stand for a million
                raise ValueError(f"{entry['id']} comes twice")
            taken.add(entry["id"])
        return [_entry(folder, manifest, maps, entry) for entry in manifest["entries"]]
    except _DamagedMaps as error:
        raise _damaged(folder / MAPS, "damaged", error) from None
    except (
        KeyError,
        TypeError,
        IndexError,
        ValueError,
        AttributeError,
        OverflowError,
        OSError,
    ) as error:
        raise _damaged(folder / MANIFEST, "damaged", error) from None


class _DamagedMaps(Exception):
    """The manifest may be right, the file of maps is not."""


def _damaged(path: Path, what: str, error: Exception) -> ValueError:
    spoken = isinstance(error, ValueError | OSError | _DamagedMaps)
    reason = " ".join((str(error) if spoken else f"{type(error).__name__}: {error}").split())
    if len(reason) > 300:
        reason = f"{reason[:200]} ... {reason[-80:]}"
    return ValueError(f"pack: {path} is {what} ({reason}); make the pack again")


def _entry(
    folder: Path, manifest: dict[str, Any], maps: TensorFile, entry: dict[str, Any]
) -> Explanation:
    if maps.shape(entry["id"]) is None:
        raise ValueError(f"{MAPS} has no map {entry['id']}")
    try:
        values = maps.read(entry["id"], entry.get("sha256"))
    except (OSError, ValueError) as error:
        raise _DamagedMaps(error) from None
    if list(values.shape) != entry["shape"]:
        raise ValueError(f"{entry['id']} has shape {list(values.shape)}, not {entry['shape']}")
    thumbnail = entry["thumbnail"]
    if thumbnail is not None and not re.fullmatch(THUMBNAIL, thumbnail):
        raise ValueError(f"thumbnail {thumbnail!r} lies outside the pack")
    source = folder / thumbnail if thumbnail is not None else None
    facts = manifest.get("images", {}).get(entry["image_id"], {})
    return Explanation(
        map=values,
        target=int(entry["target"]),
        target_name=str(entry["target_name"]),
        probability=float(entry["probability"]),
        method=str(entry["method"]),
        view=View.from_json(entry["view"]).check_size(),
        image_id=str(entry["image_id"]),
        protocol=manifest["protocols"][entry["protocol"]],
        file_name=str(entry["file_name"]),
        is_mask=bool(entry["is_mask"]),
        source=source if source is not None and source.is_file() else None,
        facts=ImageFacts.from_json(facts),
        metrics=entry.get("metrics", {}),
        curves=entry.get("curves", {}),
        sanity=bool(entry.get("sanity", False)),
    )


def is_pack(folder: Path) -> bool:
    """Whether a folder is a pack, perhaps of a later version."""
    try:
        read_manifest(folder)
    except LaterVersion:
        return True
    except ValueError:
        return False
    return True
