"""Where image tokens lie: the table is what a measurement finds, and maps keep the sum of the scores."""

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
import vlm_models as tiny

from xattn.photos.view import View
from xattn.vlm import layout
from xattn.vlm.layout import Places, check_table, locate, places
from xattn.vlm.model import VLM, entrance_of

QUESTION = "what is on the table ?"


@pytest.fixture(scope="module")
def loaded():
    found = {}

    def load(kind):
        if kind not in found:
            model = tiny.network(kind)
            entrance = entrance_of(model)
            how = "cross" if entrance.method == "forward" else "decoder"
            found[kind] = VLM(model, tiny.processor(kind), entrance, how)
        return found[kind]

    return load


def asked(vlm, photos):
    inputs = vlm.inputs(photos, QUESTION)
    return photos, QUESTION, inputs, len(vlm.entered(inputs).features)


@pytest.mark.parametrize("size", [(24, 40), (96, 50)], ids=str)
@pytest.mark.parametrize("kind", sorted(layout.TABLE.keys() - {"vipllava"}))
def test_the_table_is_what_is_measured(loaded, kind, size):
    vlm = loaded(kind)
    given = asked(vlm, [tiny.photo(1, *size)])
    for bands in (3, 64):  # wider than cells, and as wide
        found = check_table(vlm, *given, most=bands)
        assert found is not None
        assert found < 0.5


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_5_vl", "idefics3"])
def test_of_two_photos_each_has_its_own_tokens(loaded, kind):
    vlm = loaded(kind)
    photos, prompt, inputs, n = asked(vlm, [tiny.photo(0, 24, 40), tiny.photo(1, 40, 24)])
    first, second = locate(vlm, photos, prompt, inputs, n)
    assert (first.first, second.first, len(first) + len(second)) == (0, len(first), n)
    assert check_table(vlm, photos, prompt, inputs, n, most=64) < 0.5


def test_a_table_that_is_wrong_is_refused(loaded, monkeypatch):
    vlm = loaded("qwen2_vl")
    right = layout.TABLE["qwen2_vl"]

    def transposed(photo):
        told = right(photo)
        boxes = told.boxes.reshape(*told.shape, 4).transpose(1, 0, 2).reshape(-1, 4)
        return told._replace(boxes=boxes)

    monkeypatch.setitem(layout.TABLE, "qwen2_vl", transposed)
    for bands in (3, 64):
        with pytest.raises(ValueError, match="by the table, at .* as measured"):
            check_table(vlm, *asked(vlm, [tiny.photo(1, 96, 48)]), most=bands)


@pytest.mark.parametrize("kind", ["paligemma", "qwen3_vl", "blip"])
def test_a_family_without_an_entry_is_measured(loaded, monkeypatch, kind):
    vlm = loaded(kind)
    given = asked(vlm, [tiny.photo(1, 40, 40)])
    (told,) = locate(vlm, *given)
    monkeypatch.delitem(layout.TABLE, kind)
    with pytest.warns(
        UserWarning, match="^layout: the positions of a .* image tokens are measured"
    ):
        (found,) = locate(vlm, *given)
    assert (found.source, told.source, found.shape) == ("measured", "table", told.shape)
    assert np.array_equal(found.has_place, told.has_place)
    np.testing.assert_allclose(found.rows, told.rows, atol=0.2)
    np.testing.assert_allclose(found.columns, told.columns, atol=0.2)


@pytest.mark.parametrize("size", [(50, 37), (100, 75), (24, 40), (40, 160), (160, 40)], ids=str)
def test_measured_tokens_lie_on_a_grid_though_bands_do_not_meet_patches(monkeypatch, size):
    model = tiny.network("llava")
    vlm = VLM(model, tiny.processor("llava"), entrance_of(model), "decoder")
    monkeypatch.delitem(layout.TABLE, "llava")
    with pytest.warns(UserWarning, match="are measured"):
        (found,) = locate(vlm, *asked(vlm, [tiny.photo(1, *size)]))
    (grid,) = found.grids
    assert grid.tolist() == np.arange(16).reshape(4, 4).tolist()
    monkeypatch.setattr(layout, "measure_reactions", None)  # another photo of this size is not
    assert locate(vlm, *asked(vlm, [tiny.photo(2, *size)])) == [found]


@pytest.mark.parametrize("kind", ["llava_next", "internvl", "mllama", "florence2"])
def test_a_map_and_what_has_no_place_have_the_sum_of_the_scores(loaded, kind):
    vlm = loaded(kind)
    given = asked(vlm, [tiny.photo(1, 50, 90)])
    (found,) = locate(vlm, *given)
    scores = np.random.default_rng(0).normal(size=(3, given[3]))
    total = found.maps(scores).sum((1, 2)) + found.unplaced(scores)
    np.testing.assert_allclose(total, scores.sum(1), atol=1e-5)


def test_tiles_and_the_whole_photo_add_up_on_the_finest_grid():
    base, tiles = layout.grid(1, 1), layout.grid(2, 2, newline=True)
    found = Places(np.concatenate([base, tiles]), (2, 2)).layout(0, 0, (10, 20))
    maps = found.maps(np.array([[4.0, 10, 20, 99, 30, 40, 99]]))
    assert maps.tolist() == [[[11, 21], [31, 41]]]
    assert found.unplaced(np.ones((1, 7))).tolist() == [2]
    assert found.view == View("whole", (10, 20), (10, 20), (0, 0, 10, 20), (10, 20))


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "internvl", "idefics3"])
def test_the_whole_photo_and_its_tiles_are_maps_of_their_own(loaded, kind):
    vlm = loaded(kind)
    given = asked(vlm, [tiny.photo(1, 24, 60)])
    (found,) = locate(vlm, *given)
    scores = np.random.default_rng(0).random((2, given[3]))
    whole, tiles = found.maps(scores, "base"), found.maps(scores, "tiles")
    np.testing.assert_allclose(whole + tiles, found.maps(scores), atol=1e-5)
    side = 4 if kind.startswith("llava") else 2
    base = slice(side**2) if kind.startswith("llava") else slice(-(side**2), None)
    own = scores[:, base].reshape(2, side, side)
    # The mean over the area of each of its tokens, so that sums are kept.
    blocks = whole.reshape(2, side, found.shape[0] // side, side, found.shape[1] // side)
    np.testing.assert_allclose(blocks.sum((2, 4)), own, atol=1e-5)
    np.testing.assert_allclose(blocks.std((2, 4)), 0, atol=1e-6)
    for views in ("base", "tiles"):
        total = found.maps(scores, views).sum((1, 2)) + found.unplaced(scores, views)
        np.testing.assert_allclose(total, scores.sum(1), atol=1e-5)


def test_a_photo_without_tiles_is_its_whole(loaded):
    vlm = loaded("paligemma")
    given = asked(vlm, [tiny.photo(1)])
    (found,) = locate(vlm, *given)
    scores = np.ones((1, given[3]))
    assert np.array_equal(found.maps(scores, "base"), found.maps(scores))
    with pytest.raises(ValueError, match="^views: got 'tiles', but the photo is shown only whole"):
        found.maps(scores, "tiles")


def test_a_window_hides_what_it_shares_half_of():
    base, tiles = layout.grid(2, 2), layout.grid(4, 4)
    found = Places(np.concatenate([base, tiles]), (4, 4)).layout(0, 0, (8, 8))
    hidden = np.flatnonzero(found.hidden_by((0, 1, 2, 3)))
    # Half of both upper tokens of the coarse view, and four of the fine one.
    assert hidden.tolist() == [0, 1, 4 + 1, 4 + 2, 4 + 5, 4 + 6]


def test_the_map_lies_on_the_part_of_the_photo_that_was_seen(loaded):
    vlm = loaded("llava")  # cuts the middle
    given = asked(vlm, [tiny.photo(0, 32, 64)])
    (found,) = locate(vlm, *given)
    shown = found.view.to_photo(found.maps(np.ones((1, given[3])))[0])
    assert shown.shape == (32, 64)
    assert np.isnan(shown[:, :15]).all() and np.isnan(shown[:, -15:]).all()
    assert not np.isnan(shown[:, 17:-17]).any()


def test_the_table_counts_or_is_not_used(loaded):
    vlm = loaded("paligemma")
    photos, _, inputs, n = asked(vlm, [tiny.photo()])
    assert places(vlm, photos, inputs, n) is not None
    assert places(vlm, photos, inputs, n + 1) is None


def test_queries_of_a_resampler_are_what_they_look_at(loaded):
    vlm = loaded("blip_2")
    photos, prompt, inputs, n = asked(vlm, [tiny.photo()])
    (found,) = locate(vlm, photos, prompt, inputs, n)
    vlm.model.set_attn_implementation("eager")
    with torch.no_grad():
        tower = vlm.model.vision_model(inputs["pixel_values"])[0]
        looked = vlm.model.qformer(
            query_embeds=vlm.model.query_tokens, encoder_hidden_states=tower, output_attentions=True
        ).cross_attentions
    vlm.model.set_attn_implementation("sdpa")
    wanted = torch.stack([a for a in looked if a is not None]).mean((0, 2))[0, :, 1:]
    assert (found.source, found.shape, n) == ("resampler", (4, 4), 5)
    np.testing.assert_allclose(found.spread.reshape(5, 16), wanted, atol=1e-6)
    scores = np.arange(5.0)[None]
    np.testing.assert_allclose(found.maps(scores)[0].ravel(), scores[0] @ wanted.numpy(), atol=1e-5)


def test_nothing_that_was_set_for_measuring_stays(loaded):
    vlm = loaded("blip")
    photos, prompt, inputs, n = asked(vlm, [tiny.photo()])
    before = vlm.entered(inputs).features
    check_table(vlm, photos, prompt, inputs, n)
    assert torch.equal(vlm.entered(inputs).features, before)
