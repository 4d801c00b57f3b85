"""A shortcut that was planted is found: a network that learned a mark in a corner, and a real explainer."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pandas")

from planted_shortcut import explained, marked

from xattn.eval.report.photo_map.clusters import clusters
from xattn.eval.report.photo_map.pooled_maps import read


def groups(folder, mark):
    """The groups of a pack, each with the share of its photos that have the mark, or would have it."""
    pack = explained(folder, mark)
    entries = pack.entries[pack.entries["method"] == "gradcam"]
    images = pack.images.loc[entries["image_id"]]
    has_mark = np.array([marked(int(name.removesuffix(".png"))) for name in images["title"]])
    one_by_one = clusters(
        read(pack, entries.index), images["predicted_name"].tolist(), images["right"].tolist()
    )
    return [(one, has_mark[one.rows].mean()) for one in one_by_one], has_mark


def test_the_photos_with_the_mark_are_among_the_first_three_groups(tmp_path):
    found, has_mark = groups(tmp_path, mark=True)
    own = [one for one, share in found[:3] if share > 0.9]
    assert [(one.place, one.class_name) for one in own] == [("bottom right corner", "disc")]
    assert own[0].apart > 0.5 and len(own[0].rows) > 0.8 * has_mark.sum()


def test_without_the_mark_no_group_at_the_top_looks_into_that_corner(tmp_path):
    found, _ = groups(tmp_path, mark=False)
    assert len(found) > 3
    for one, share in found[:3]:
        assert one.place != "bottom right corner" and share < 0.9 and one.apart < 0.5
