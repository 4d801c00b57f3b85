"""Merge several packs into one that contains each photo with its maps from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xattn.packs.answers import AnswerFacts
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.format import SHARD_PHOTOS
from xattn.packs.reader import Pack
from xattn.packs.writer import pack_writer


class MergeCounts(NamedTuple):
    """The number of photos and of maps in a merged pack, and the number of photos that were in several
    packs."""

    photos: int
    joined: int
    maps: int


def merge_packs(
    packs: Sequence[Pack], output: str | Path, shard_photos: int = SHARD_PHOTOS
) -> MergeCounts:
    """Write the pack ``output`` with the photos of all ``packs``, in their order; see :func:`join_photo`.

    Every map keeps its protocol. All other facts about a photo come from the first pack that has them. A
    shard has at most ``shard_photos`` photos. Films, overlay pictures and features are left out.

    Raises:
        ValueError: there is only one pack, or the packs contradict each other: metrics have different
            descriptions, different photos or maps have the same id, or true classes differ.
        PackError: a pack is damaged. OSError: it cannot be written.
    """
    if len(packs) < 2:
        raise ValueError(f"packs: got {len(packs)}; give two or more")
    metrics = _agreed("metrics", [(p, _described(p)) for p in packs])
    shares = _agreed("shares", [(p, p.shares) for p in packs])
    ids = [set(pack.image_ids) for pack in packs]
    photos = joined_photos = maps = 0
    with pack_writer(output, photos=shard_photos) as writer:
        writer.metrics, writer.shares = metrics, shares
        writer.skipped = list(dict.fromkeys(item for pack in packs for item in pack.skipped))
        for number, pack in enumerate(packs):
            for image_id in pack.image_ids:
                if any(image_id in earlier for earlier in ids[:number]):
                    continue
                holders = [p for p, known in zip(packs, ids, strict=True) if image_id in known]
                group, jpeg = join_photo(image_id, holders)
                writer.add(group, jpeg)
                photos, maps = photos + 1, maps + len(group)
                joined_photos += len(holders) > 1
    return MergeCounts(photos, joined_photos, maps)


def join_photo(image_id: str, packs: Sequence[Pack]) -> tuple[list[Explanation], bytes | None]:
    """Return the explanations of one photo in all ``packs`` that contain it, and its thumbnail; a map that
    several packs contain is included once.

    Raises:
        ValueError: the packs contradict each other.
    """
    found: dict[str, tuple[Pack, Explanation]] = {}
    picture: tuple[Pack, bytes] | None = None
    for pack in packs:
        if pack.has_photo(image_id):
            data = pack.photo_bytes(image_id)
            if picture is not None and picture[1] != data:
                raise ValueError(
                    f"packs: {image_id} is one photo in {picture[0].name} and a different photo "
                    f"in {pack.name}; explain one of them under another file name"
                )
            picture = picture or (pack, data)
        for id in pack.entries_of(image_id):
            explanation = pack.explanation(id)
            if id not in found:
                found[id] = pack, explanation
            elif not _equal(found[id][1], explanation):
                raise ValueError(
                    f"packs: the map {id} is not the same in {found[id][0].name} and in "
                    f"{pack.name}; merge packs of other methods or photos, or compare these two "
                    "with xattn diff"
                )
    group = [explanation for _, explanation in found.values()]
    group[0] = replace(group[0], facts=_facts(image_id, list(found.values())))
    return group, picture and picture[1]


def _equal(a: Explanation, b: Explanation) -> bool:
    """Whether two explanations with one id have the same content."""
    facts = ("target", "probability", "protocol", "view", "is_mask", "metrics", "curves")
    return np.array_equal(a.map, b.map) and all(getattr(a, f) == getattr(b, f) for f in facts)


def _facts(image_id: str, found: Sequence[tuple[Pack, Explanation]]) -> ImageFacts:
    """The facts about a photo in all packs; each fact comes from the first pack that has it."""
    top = next((e.facts.top for _, e in found if e.facts.top), ())
    answer = _answer(image_id, found)
    labelled = [(pack, e.facts) for pack, e in found if e.facts.label_name is not None]
    if not labelled:
        return ImageFacts(top, answer=answer)
    first, facts = labelled[0]
    for pack, other in labelled[1:]:
        if other.label_name != facts.label_name:
            raise ValueError(
                f"packs: the true class of {image_id} is {facts.label_name} in {first.name} and "
                f"{other.label_name} in {pack.name}; make one of the packs again with the right "
                "--labels"
            )
    return ImageFacts(top, facts.label, facts.label_name, answer=answer)


def _answer(image_id: str, found: Sequence[tuple[Pack, Explanation]]) -> AnswerFacts | None:
    """The answer about a photo, with the words' results from every pack."""
    answered = [(pack, e.facts.answer) for pack, e in found if e.facts.answer is not None]
    if not answered:
        return None
    first, answer = answered[0]
    for pack, other in answered[1:]:
        try:
            answer = answer.combine(other)
        except ValueError:
            raise ValueError(
                f"packs: the answer about {image_id} is not the same in {first.name} and in "
                f"{pack.name}; make one of the packs again with the same prompt, or with --answer"
            ) from None
    return answer


def _described(pack: Pack) -> dict[str, dict[str, Any]]:
    return {
        m.key: {name: value for name, value in m._asdict().items() if name != "key"}
        for m in pack.metrics
    }


def _agreed(what: str, given: Sequence[tuple[Pack, Mapping[str, Any]]]) -> dict[str, Any]:
    """The union of the packs' values by name; raises a ``ValueError`` if two packs differ."""
    found: dict[str, tuple[Pack, Any]] = {}
    for pack, table in given:
        for name, value in table.items():
            first, before = found.setdefault(name, (pack, value))
            if before != value:
                raise ValueError(
                    f"packs: the {what} {name} of {first.name} are not those of {pack.name}; "
                    "measure one of the packs again with the same protocol"
                )
    return {name: value for name, (_, value) in found.items()}
