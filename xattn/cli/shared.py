"""Define options that have the same meaning in every command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

from xattn.cli.checks import check_heads, check_images, rename_argument
from xattn.runtime.arguments import Argument
from xattn.runtime.option_checks import Count, check_fields

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

Images: TypeAlias = Annotated[tuple[str, ...], Argument(positional=True, metavar="PHOTOS")]


@dataclass(frozen=True, kw_only=True)
class PhotoArgs:
    """The photos that a command works on, given without an option."""

    folders_of_clips: ClassVar[bool] = False

    images: Images = ()
    """Images, folders, .txt lists with one path per line, URLs of these (s3://, gs://, hf://), or a data
    set: hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""

    def check(self) -> None:
        """Reject paths and values that are obviously wrong, before torch is imported."""
        check_fields(self)
        check_images(self.images, clips=self.folders_of_clips)

    @property
    def photos(self) -> str | list[Path]:
        """Return the photos as the library's functions take them: as one name, or as a list of files."""
        return self.images[0] if len(self.images) == 1 else files_of(self.images)


@dataclass(frozen=True, kw_only=True)
class MethodArgs(PhotoArgs):
    """Options that choose which methods explain which photos."""

    heads: tuple[str, ...] = ()
    """Trained heads: folders (of a head, or of the run that trained it), names of shipped heads, or hub
    repositories; by default a shipped head that fits."""
    options: tuple[str, ...] = ()
    """Options of explainers as explainer.name=value, for example rise.masks=1000; head.name=value applies
    to all heads, and the name of a head's row to that head only."""
    limit: Count | None = None
    """Use only this many photos, spread over their folders and drawn with --seed, so that every command
    uses the same ones."""
    max_pixels: int = 40_000_000
    """Skip photos with more pixels than this."""
    seed: int = 0
    """Seed for perturbations, random rows, the bootstrap and --limit."""

    @property
    def chosen(self) -> Any:
        """Return the photos selected by ``limit``; none of them is read yet."""
        return self.chosen_for(None)

    def chosen_for(self, backbone: Any) -> Any:
        """Return the photos of :meth:`chosen`, or the clips if the backbone reads clips."""
        from xattn.photos.sources import limit_photos

        clips = backbone is not None and backbone.reads_clips
        return limit_photos(self.photos, self.limit, self.seed, clips)[0]

    def check(self) -> None:
        super().check()
        check_heads(self.heads, "heads")


def files_of(images: Sequence[str]) -> list[Path]:
    """List the image files that several photos, folders and lists give, each file once."""
    from xattn.photos.images import list_images

    return list(dict.fromkeys(path for name in images for path in list_images(name)))


def registered_names(
    argument: str, names: Sequence[str], registry: Any, *more: str
) -> tuple[str, ...]:
    """Return ``names`` in their registered form; unknown names are rejected before a network is loaded.
    The names in ``more`` are also allowed."""
    with rename_argument(argument):
        return tuple(name if name in more else registry.name(name) for name in names)


def open_packs(folders: Sequence[Path]) -> list[Pack]:
    """Open the packs in folders or at URLs, including those inside results of ``xattn compare``.

    Raises:
        ValueError: one of them is not a pack, or is damaged.
    """
    from xattn.packs.contained_files import PackError
    from xattn.packs.reader import Pack
    from xattn.runtime.stores import resolve_place

    opened = []
    for folder in folders:
        place = resolve_place(folder, "packs")
        try:
            place = _pack_of(place)
            opened.append(Pack(place, name=str(place), trusted=True))
        except PackError as error:
            raise ValueError(f"packs: {place} cannot be opened ({error})") from None
    return opened


def _pack_of(place: Any) -> Any:
    """The pack that a folder is, or that it contains if xattn compare wrote it."""
    from xattn.packs.contained_files import folder_of
    from xattn.packs.format import MANIFEST

    if isinstance(place, Path) and not place.is_dir():
        raise ValueError(f"packs: {place} is not a folder; give a folder that xattn explain wrote")
    inside = not folder_of(place).exists(MANIFEST) and folder_of(place / "pack").exists(MANIFEST)
    return place / "pack" if inside else place
