"""What a person did with a photo: the painted mask and a map of the changed photo, kept for the session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from xattn.app.pages.whatif.answer import Seen, seen
from xattn.app.pages.whatif.masks import Mask, raster_of, region_runs
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import Pack

KEY = "whatif."  # before the names of what the page keeps
KEPT = 32 << 20  # bytes of the photos that a session looked at last


@dataclass(eq=False)
class Painting:
    """One photo: as the network sees it, what is painted, and what came of it.

    ``stamp`` counts the masks that the page set by itself; ``problem`` says why the last one that came
    from the browser was refused; ``drawn`` are URLs of the pack's maps, by entry; ``fresh`` is a map of the
    changed photo, by what it belongs to.
    """

    seen: Seen
    mask: Mask
    regions: list[int]
    stamp: int = 0
    problem: str = ""
    drawn: dict[str, str] = field(default_factory=dict)
    fresh: dict[tuple[object, ...], Explanation] = field(default_factory=dict)

    @property
    def raster(self) -> tuple[int, int]:
        """Rows and columns of the mask."""
        return self.mask.shape[0], self.mask.shape[1]

    def paint(self, mask: Mask) -> None:
        """Take a mask that the page makes in place of the painted one."""
        self.mask, self.stamp, self.problem = mask, self.stamp + 1, ""


def painting_of(pack: Pack, image_id: str, backbone: Backbone) -> Painting:
    """The session's painting of a photo, begun if there is none.

    Raises:
        PackError, ValueError: as :func:`seen`.
    """
    kept = st.session_state.setdefault(f"{KEY}kept", LRUCache(KEPT))
    key = (pack.id, pack.version, image_id, backbone.fingerprint)
    found: Painting | None = kept.get(key)
    if found is None:
        photo = seen(pack, image_id, backbone)
        raster = raster_of((photo.pixels.shape[1], photo.pixels.shape[2]))
        found = Painting(photo, np.zeros(raster, bool), region_runs(photo.pixels, raster))
        kept.put(key, found, min(2 * photo.pixels.nbytes, KEPT))
    return found
