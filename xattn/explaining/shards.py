"""Explain photos into a pack of format 2: maps go to disk as they come, from one process or from many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from xattn.backbone import Backbone
from xattn.explaining.naming import Source
from xattn.explaining.photos import Reading, report, work_of
from xattn.heads import Head
from xattn.packs.explanation import Explanation, blank_note, map_name
from xattn.packs.format import check_output, photos_of_a_shard
from xattn.packs.writer import pack_writer
from xattn.photos.images import MAX_PIXELS
from xattn.runtime.distributed import gather, processes, together

FIRST = 20  # explanations that are returned


class Written(NamedTuple):
    """What was written to a pack, by all processes: the first explanations in its order, how many photos
    and maps, and (file name, reason) of images that were left out."""

    first: list[Explanation]
    photos: int
    maps: int
    skipped: list[tuple[str, str]]


def explain_to_shards(
    images: Any,
    backbone: Backbone,
    head: Head | None = None,
    explainer: Any = None,
    classes: int | str | Sequence[int | str] | None = None,
    top: int = 1,
    view: str = "crop",
    *,
    output: str | Path,
    batch_size: int = 8,
    seed: int = 0,
    max_pixels: int | None = MAX_PIXELS,
    progress: bool = False,
    labels: str | Path | None = None,
    target: Any = None,
    features: bool = False,
    shard_photos: int | None = None,
) -> Written:
    """:func:`~xattn.explaining.photos.explain` into the pack ``output`` of format 2, without overlays.

    A shard has ``shard_photos`` photos one after the other, 4,096 or with many maps a photo fewer; its
    batches are its own. Of several
    processes (:func:`~xattn.runtime.distributed.processes`) number r of n explains the shards r, r + n,
    ..., and the pack is the one that a single process writes, byte by byte.

    After Ctrl-C or an error a single process keeps what was explained until then, as ``explain`` does;
    several keep nothing.

    Raises:
        ValueError, OSError: as ``explain``; or pyarrow is missing.
    """
    count, rank = processes(backbone.device)
    check_output(output)
    reading = Reading(view, batch_size, max_pixels, features, progress and rank == 0)
    work = together(
        lambda: work_of(
            images, backbone, head, explainer, classes, top, seed, labels, target, reading
        )
    )
    if shard_photos is None:
        named = [classes] if isinstance(classes, int | str) else classes
        shard_photos = photos_of_a_shard(len(work.jobs) * (top if named is None else len(named)))
    seen, blank = _Seen(), []
    with pack_writer(
        output, format=2, photos=shard_photos, gather=gather, rank=rank, keep=count == 1
    ) as writer:
        for number, block in enumerate(_blocks(work.sources, shard_photos)):
            if number % count != rank:
                continue
            writer.block(number)
            for batch in work.explained(iter(block), writer.skipped):
                for _, found in groupby(batch, lambda e: e.image_id):
                    group = list(found)
                    writer.add(group)
                    seen.add(number, group)
                blank += [
                    map_name(e.method, e.target_name, e.file_name or e.image_id)
                    for e in batch
                    if e.is_blank
                ]
        result = seen.all(writer.skipped)
        together(lambda: _check(result))
    if rank == 0 and result.skipped:
        report(result.skipped, result.photos)
    if blank:
        warnings.warn(f"explain: {blank_note(blank)}", stacklevel=2)
    return result


class _Seen:
    """Counts of what this process has explained, and the first explanations of each block."""

    def __init__(self) -> None:
        self._photos = self._maps = 0
        self._first: list[tuple[int, Explanation]] = []

    def add(self, block: int, group: Sequence[Explanation]) -> None:
        self._photos, self._maps = self._photos + 1, self._maps + len(group)
        self._first += [(block, e) for e in group[: FIRST - len(self._first)]]

    def all(self, skipped: Sequence[tuple[str, str]]) -> Written:
        """Of all processes."""
        parts = gather((self._first, self._photos, self._maps, skipped))
        first = sorted((item for part in parts for item in part[0]), key=lambda item: item[0])
        return Written(
            [e for _, e in first[:FIRST]],
            sum(part[1] for part in parts),
            sum(part[2] for part in parts),
            [item for part in parts for item in part[3]],
        )


def _check(result: Written) -> None:
    if not result.photos:
        report(result.skipped, 0)


def _blocks(
    sources: Iterable[tuple[str, Source]], photos: int
) -> Iterator[list[tuple[str, Source]]]:
    remaining = iter(sources)
    while block := list(islice(remaining, photos)):
        yield block
