"""Localization heads: which heads are taken, and what they show."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conversations import conversation, explained

from xattn.vlm.explainers.base import create_token_explainer, exclusive_use
from xattn.vlm.explainers.layers import HeadRows
from xattn.vlm.explainers.localization_heads import connected_sums, elbow
from xattn.vlm.reading import read_rows


def entropy(grid):
    """Spatial entropy of a row that is ``grid`` (4, 4) on the photo."""
    explainer = create_token_explainer("localization_heads")
    return explainer._entropy(conversation(), torch.tensor(grid, dtype=torch.float32).flatten())


def test_the_entropy_counts_the_places_that_a_head_looks_at():
    one = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    by_a_corner = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    two = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    unequal = [[3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert entropy(one) == 0 and entropy(by_a_corner) == 0
    assert entropy(two) == pytest.approx(math.log(2), abs=1e-6)
    p = 2.75 / (2.75 + 0.75)
    assert entropy(unequal) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)
    assert entropy([[0.25] * 4] * 4) == math.inf
    assert entropy([[0] * 4] * 3 + [[1] * 4]) == math.inf  # all of the bottom row
    assert entropy([[0] * 4] * 3 + [[1, 1, 1, 0]]) == 0


def test_parts_that_sides_or_corners_connect_are_one():
    inside = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]) > 0
    sums = connected_sums(torch.arange(20.0).view(4, 5), inside)
    assert sorted(float(s) for s in sums) == [3 + 4, 0 + 6 + 10 + 15, 13 + 19]


def test_the_elbow_is_farthest_from_the_line_between_the_ends():
    assert elbow(torch.tensor([0.0, 1.0, 2.0, 10.0])) == 2
    assert elbow(torch.tensor([0.0, 8.0, 9.0, 10.0])) == 1
    assert elbow(torch.tensor([1.0])) == 0


def test_compact_heads_above_the_elbow_are_taken():
    context = conversation()
    rows = torch.zeros(6, len(context.sequence))
    at = context.image.view(4, 4)
    rows[0, at[0, 0]] = 0.05  # compact, but hardly on the image
    rows[1, at[0, 0]], rows[1, at[2, 3]] = 0.45, 0.45  # two places
    rows[2, at[1, 1]] = 0.8
    rows[3, at[3]] = 0.25  # the bottom row
    rows[4, context.image] = 0.06  # everywhere alike
    rows[5, at[0, 2]], rows[5, at[2, 0]] = 0.8, 0.05
    explainer = create_token_explainer("localization_heads", heads=3)
    assert explainer.chosen(context, rows).tolist() == [2, 5, 1]
    explainer = create_token_explainer("localization_heads", heads=1)
    assert explainer.chosen(context, rows).tolist() == [2]
    # Sorted by their sums, heads are 0, 2, 5, 1, 4, 3, the elbow is at 1: those numbered from 2 on are kept.
    explainer = create_token_explainer("localization_heads", released=True)
    assert explainer.chosen(context, rows).tolist() == [2, 5]


def test_words_that_no_head_localizes_are_told():
    context = conversation(asked=[0, 3])
    explainer = create_token_explainer("localization_heads", heads=2, smooth=0)
    rows = torch.zeros(2, 6, len(context.sequence))
    rows[0, 1, context.image[5]] = 0.7
    rows[1, 2, context.image], rows[1, 3, context.image] = 0.05, 0.06  # everywhere alike
    seen = HeadRows(context.vlm)
    seen.of_words = lambda *given: iter(rows)
    found = explainer.explain(context, seen).image
    torch.testing.assert_close(
        found, torch.stack([rows[0, 1], rows[1, 2:4].mean(0)])[:, context.image]
    )
    told = ["no head localizes 'and'; the heads with the largest sums are shown"]
    assert explainer.notes(context) == told
    rows[1] = rows[0]
    seen.of_words = lambda *given: iter(rows)
    explainer.explain(context, seen)
    assert explainer.notes(context) == []


@pytest.mark.parametrize("kind", ["llava", "florence2", "blip"])
def test_a_map_is_the_row_of_one_head_read_in_a_pass_or_while_generating(kind):
    vlm = conversation(kind).vlm
    explainer = create_token_explainer("localization_heads", heads=1, smooth=0)
    base = conversation(kind)
    inputs = vlm.inputs(base.photos, base.prompt)
    with explainer.watch(vlm, base.prompt_ids) as seen:
        ids = vlm.generate(inputs, 4).ids
    context = conversation(kind, answer=vlm.tokenizer.decode(ids[:1]), asked=[0])
    with exclusive_use(vlm):
        later, first = explainer.explain(context), explainer.explain(context, seen)
    torch.testing.assert_close(later.image, first.image, atol=2e-3, rtol=0)
    found = []
    with read_rows(vlm.decoder, found.append, context.rows.tolist()):
        context.logits()
    found = [r for r in found if r.cross == (vlm.kind != "decoder")]
    heads = torch.cat([r.weights[0, :, 0] for r in found])
    heads = heads if vlm.kind == "cross" else heads[:, context.image]
    assert ((heads - later.image).abs().amax(1) < 1e-3).any()


def test_smoothing_keeps_sums_and_spreads_a_spot():
    context = conversation("llava_next")
    base, tiles = context.layouts[0].grids
    spots = torch.zeros(1, len(context.features))
    spots[0, base[0, 1]], spots[0, tiles[2, 3]], spots[0, 22] = 1, 1, 5  # 22 ends a row: no place
    found = create_token_explainer("localization_heads")._smoothed(context, spots)[0]
    assert found[22] == 5 and float(found.sum()) == pytest.approx(7)
    assert float(found[base].sum()) == pytest.approx(1) and found[base[0, 1]] < 0.5
    inner = found[tiles]
    assert inner[2, 3] == inner.max() and inner[1, 3] == pytest.approx(float(inner[2, 2]), rel=0.5)
    assert found[base[0, 0]] == pytest.approx(float(found[base[0, 1]]) * math.exp(-0.5), rel=0.5)


def test_tokens_without_places_cannot_localize():
    context = conversation("blip_2")
    with pytest.raises(ValueError, match="localization_heads needs image tokens on a grid"):
        explained("localization_heads", context)
    (whole,) = conversation().layouts
    row = replace(whole, rows=np.eye(1).repeat(16, 0), columns=np.eye(16))
    with pytest.raises(ValueError, match="^photo: its image tokens form a single row or column"):
        explained("localization_heads", replace(conversation(), layouts=[row]))
