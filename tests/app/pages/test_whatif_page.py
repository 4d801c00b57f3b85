"""The page What if: masks that a browser sends, fills, words and bars, suggestions, maps of the changed photo."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch

pytest.importorskip("streamlit")

from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_packs import picture, small_pack
from viewer_pages import opened

from xattn.app import models, state
from xattn.app.library import Library
from xattn.app.pages.whatif import answer, page
from xattn.app.pages.whatif import page as whatif
from xattn.app.pages.whatif.page import KEY, Painting
from xattn.backbone import load_backbone
from xattn.explaining.photos import explain
from xattn.packs.contained_files import PackError
from xattn.packs.writer import save_pack
from xattn.photos.view import prepare

SIZE = (48, 80)  # of the model's input


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = load_backbone("test_vit", weights=None, input_size=SIZE)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return loaded


@pytest.fixture(scope="module")
def root(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whatif")
    photos = folder / "photos"
    photos.mkdir()
    for i in range(3):
        picture(i).save(photos / f"photo-{i}.png")
    found = explain(photos, backbone, explainer=["gradcam", "rollout"], top=2)
    save_pack(folder / "root" / "vit", found, overlays=False)
    return folder / "root"


@pytest.fixture
def pack(root, backbone, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))
    library = Library(root)
    monkeypatch.setattr(state, "library", lambda: library)
    monkeypatch.setattr(models, "backbone_of", lambda pack: backbone)
    return library.open(library.packs()[0].id)


def script() -> None:
    import streamlit as st

    from xattn.app import main

    st.session_state["_page"] = "whatif"
    main._run("whatif")


def words(app) -> str:
    kinds = (app.markdown, app.caption, app.subheader, app.warning, app.error)
    found = [e.value for kind in kinds for e in kind] + [e.proto.body for e in app.get("html")]
    return " ".join(found).replace("\\", "")


def canvas(app) -> dict:
    """What the component was given."""
    [element] = [e for e in app.get("bidi_component") if e.proto.id.endswith(f"-{KEY}canvas")]
    return json.loads(element.proto.json)


def painting(app) -> Painting:
    [(found, _)] = app.session_state[f"{KEY}kept"]._kept.values()
    return found


def half(raster=SIZE) -> answer.Mask:
    mask = np.zeros(raster, bool)
    mask[:, : raster[1] // 2] = True
    return mask


# ---------------------------------------------------------------------- masks


@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_mask_comes_back_as_it_was_sent(rows, columns, random):
    mask = np.array([[random.random() < 0.5 for _ in range(columns)] for _ in range(rows)])
    sent = {"rows": rows, "columns": columns, "bits": answer.encode_mask(mask)}
    assert (answer.decode_mask(sent, (rows, columns)) == mask).all()


@pytest.mark.parametrize(
    "sent, words",
    [
        (None, "got no bits"),
        ("AAAA", "got no bits"),
        ({"rows": 4, "columns": 6}, "got no bits"),
        ({"rows": 4, "columns": 6, "bits": 7}, "got no bits"),
        ({"rows": 9999, "columns": 9999, "bits": "AAAA"}, "got 9999 x 9999"),
        ({"rows": "4" * 5000, "columns": 6, "bits": "AAAA"}, "got 4444"),
        ({"rows": 4, "columns": 6, "bits": "A" * 10_000_000}, "got 10,000,000 characters"),
        ({"rows": 4, "columns": 6, "bits": ""}, "got 0 characters"),
        ({"rows": 4, "columns": 6, "bits": "A?/\n"}, "not base64"),
        ({"rows": 4, "columns": 6, "bits": "ÄÖÜß"}, "not base64"),
        ({"rows": 4, "columns": 6, "bits": "AA=="}, "got 1 bytes"),
    ],
)
def test_a_mask_of_another_size_or_form_is_refused_in_a_sentence(sent, words):
    with pytest.raises(ValueError, match="mask: got .*; give 4 x 6 bits in base64") as error:
        answer.decode_mask(sent, (4, 6))
    assert words in str(error.value) and len(str(error.value)) < 120


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100)
@given(
    ANYTHING
    | st.fixed_dictionaries(
        {
            "rows": st.just(4) | ANYTHING,
            "columns": st.just(6) | ANYTHING,
            "bits": st.text(min_size=4, max_size=4) | ANYTHING,
        }
    )
)
def test_whatever_a_browser_sends_is_a_mask_or_a_short_sentence(sent):
    try:
        assert answer.decode_mask(sent, (4, 6)).shape == (4, 6)
    except ValueError as error:
        assert str(error).startswith("mask: got ") and len(str(error)) < 120


def test_a_raster_is_the_input_or_smaller_in_its_shape():
    assert answer.raster_of((224, 224)) == (224, 224)
    assert answer.raster_of((768, 384)) == (384, 192)


def test_a_mask_on_a_larger_input_has_whole_cells():
    found = answer.upsample_mask(np.array([[True, False], [False, True]]), (4, 6))[0].int().tolist()
    assert found == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2


def test_the_top_of_a_map_is_its_share_of_the_picture_where_the_map_is_greatest():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    mask = answer.strongest_cells(values, 0.25, (3, 4))
    assert np.flatnonzero(mask).tolist() == [9, 10, 11]
    assert (
        answer.strongest_cells(np.ones((2, 2)), 0.2, (10, 10)).sum() == 20
    )  # constant: a share all the same


def test_regions_cover_the_raster_and_follow_edges():
    pixels = torch.zeros(3, 40, 60)
    pixels[:, :, 30:] = 1
    runs = np.array(answer.region_runs(pixels, (40, 60))).reshape(-1, 2)
    labels = np.repeat(runs[:, 0], runs[:, 1]).reshape(40, 60)
    assert not set(labels[:, :30].ravel()) & set(labels[:, 30:].ravel())


# ---------------------------------------------------------------------- the answer


@pytest.mark.parametrize("kind", answer.FILLS)
def test_only_the_hidden_part_is_filled(backbone, kind):
    pixels = torch.rand(3, *SIZE)
    found = answer.hide_cells(pixels, half(), kind, backbone)
    assert torch.equal(found[:, :, 40:], pixels[:, :, 40:])
    assert (found[:, :, :40] != pixels[:, :, :40]).float().mean() > 0.9
    mean = torch.tensor(backbone.preprocessing.mean)
    colour = {"mean": mean, "black": torch.zeros(3)}.get(kind)
    if colour is not None:
        assert torch.equal(found[:, 5, 5], colour)


def test_the_verdict_says_what_became_of_the_first_class(backbone):
    before, after = torch.zeros(1000), torch.zeros(1000)
    before[0], after[0], after[7] = 0.82, 0.31, 0.4
    name = backbone.class_names[7].split(",")[0]
    assert answer.verdict(before, None, backbone) == "tench 82.0%"
    assert (
        answer.verdict(before, after, backbone) == f"tench 82.0% → 31.0%; now first: {name} 40.0%"
    )
    after[7] = 0
    assert answer.verdict(before, after, backbone) == "tench 82.0% → 31.0%; still first"


def test_bars_show_the_first_classes_before_and_after_with_their_changes(backbone):
    before, after = torch.zeros(1000), torch.zeros(1000)
    before[:6] = torch.tensor([0.5, 0.2, 0.1, 0.09, 0.08, 0.03])
    after[9], after[0] = 0.7, 0.25
    assert answer.classes_to_show(before, after)[:6] == [0, 1, 2, 3, 4, 9]
    table = answer.bars(before, after, backbone)
    assert "width:50.00%" in table and "width:25.00%" in table
    assert ">−25.0<" in table and ">+70.0<" in table


# ---------------------------------------------------------------------- the page


def test_the_page_opens_with_the_networks_answer_to_the_stored_photo(pack, backbone):
    app = opened(script, image="photo-1.png")
    pixels, _ = prepare(pack.photo("photo-1.png"), backbone.preprocessing)
    with torch.no_grad():
        p = backbone.probabilities(backbone.logits(pixels[None]))[0]
    name = backbone.class_names[int(p.argmax())].split(",")[0]
    assert app.subheader[0].value.replace("\\", "") == f"{name} {float(p.max()):.1%}"
    given = canvas(app)
    assert (given["rows"], given["columns"]) == SIZE
    assert sum(given["regions"][1::2]) == SIZE[0] * SIZE[1]
    assert "Paint over a part" in words(app)


def test_a_stroke_changes_the_answer_and_survives_a_rerun(pack, backbone):
    app = opened(script, image="photo-0.png")
    painting(app).mask = half()
    for _ in range(2):
        app.run()
        expected = answer.hide_cells(painting(app).seen.pixels, half(), "mean", backbone)
        after = answer.predict(backbone, expected)
        said = answer.verdict(painting(app).seen.answer, after, backbone)
        assert app.subheader[0].value.replace("\\", "") == said.replace("  ", " ")
        assert "50.0% of the picture is hidden." in words(app)
        assert canvas(app)["mask"] == answer.encode_mask(half())


def test_what_is_painted_may_be_all_that_is_kept(pack, backbone):
    app = opened(script, image="photo-0.png", paint="kept", fill="black")
    mask = half()
    mask[:, 10:] = False
    painting(app).mask = mask
    app.run()
    assert "87.5% of the picture is hidden, the rest is kept." in words(app)
    after = answer.predict(
        backbone, answer.hide_cells(painting(app).seen.pixels, ~mask, "black", backbone)
    )
    assert answer.verdict(painting(app).seen.answer, after, backbone) in words(app)


@pytest.mark.parametrize("paint", ["hidden", "kept"])
def test_a_suggestion_paints_the_top_of_the_chosen_map(pack, paint):
    app = opened(script, image="photo-0.png", method="rollout")
    app.button(key=f"{KEY}top {paint}").click().run()
    entry = pack.entries[(pack.entries["method"] == "rollout")].index[0]
    expected = answer.strongest_cells(pack.explanation(entry).map, 0.2, SIZE)
    assert (painting(app).mask == expected).all()
    assert canvas(app)["stamp"] == 1
    assert app.query_params.get("paint", "hidden") == paint
    hidden = "20.0%" if paint == "hidden" else "80.0%"
    assert f"{hidden} of the picture is hidden" in words(app)


def test_a_press_explains_the_changed_photo_and_a_stroke_drops_that_map(pack, backbone):
    app = opened(script, image="photo-0.png", method="gradcam")
    assert app.button(key=f"{KEY}explain").disabled
    painting(app).mask = half()
    app.run()
    app.button(key=f"{KEY}explain").click().run()
    assert "changed photo</figcaption>" in words(app)
    painting(app).mask = ~half()
    app.run()
    assert "changed photo</figcaption>" not in words(app)


@pytest.mark.parametrize("method", ["gradcam", "rollout"])
def test_a_map_is_made_again_by_the_method_and_for_the_class_of_the_packs(pack, backbone, method):
    pixels = answer.read_photo(pack, "photo-0.png", backbone).pixels
    entries = pack.entries[
        (pack.entries["image_id"] == "photo-0.png") & (pack.entries["method"] == method)
    ]
    for entry, target in entries["target"].items():
        [own] = explain(pack.photo("photo-0.png"), backbone, explainer=method, classes=int(target))
        found = page.explain_pixels(pack, entry, pixels, backbone)
        assert found.target == target and np.allclose(found.map, own.map, atol=1e-6)


def test_a_method_of_many_passes_is_refused_in_a_sentence(pack, backbone, monkeypatch):
    monkeypatch.setattr(page, "MOST_PASSES", 0)
    with pytest.raises(ValueError, match="gradcam takes 1 passes of the network; choose a method"):
        page.explain_pixels(pack, pack.entries.index[0], torch.rand(3, *SIZE), backbone)


def test_a_refused_mask_is_said_and_the_earlier_one_counts(pack, monkeypatch):
    app = opened(script, image="photo-0.png")
    found = painting(app)
    found.mask = half()
    monkeypatch.setattr(
        whatif, "sent_value", lambda key, name: {"rows": 1, "columns": 1, "bits": "AAAA"}
    )
    whatif._painted(found, f"{KEY}canvas")
    app.run()
    assert "mask: got 1 x 1; give 48 x 80 bits in base64. What was painted before" in words(app)
    assert (painting(app).mask == half()).all()
    bits = base64.b64encode(np.packbits(~half()).tobytes()).decode()
    monkeypatch.setattr(
        whatif, "sent_value", lambda key, name: {"rows": 48, "columns": 80, "bits": bits}
    )
    whatif._painted(found, f"{KEY}canvas")
    app.run()
    assert (found.mask == ~half()).all() and not app.warning


def test_a_pack_whose_network_is_not_at_hand_says_which_command_loads_it(tmp_path, monkeypatch):
    small_pack(tmp_path / "pack", 2, ("gradcam",))
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    app = opened(script)
    assert "The maps of this pack explain made up. " in words(app)
    assert (
        "start the viewer with this file: xattn app --backbone made up --weights FILE. "
        in words(app)
    )


@pytest.mark.parametrize("count", [3, pytest.param(500, marks=pytest.mark.slow)])
def test_any_address_opens_the_page_or_is_a_sentence(pack, count):
    @settings(max_examples=count)
    @given(
        st.dictionaries(
            st.sampled_from(["image", "method", "class", "fill", "paint", "view", "entry", "pack"]),
            st.sampled_from(["photo-1.png", "rollout", "kept", "blur", "281", "../../etc/passwd"])
            | st.text(max_size=30),
        )
    )
    def opens(params):
        app = opened(script, **params)
        assert app.subheader or app.error or app.warning

    opens()


def test_a_damaged_map_is_a_sentence_and_the_photo_can_be_painted_on(pack, monkeypatch):
    def damaged(entry_id):
        raise PackError("The map is damaged.")

    monkeypatch.setattr(type(pack), "explanation", lambda self, entry_id: damaged(entry_id))
    app = opened(script, image="photo-0.png")
    painting(app).mask = half()
    app.run()
    assert "The map is damaged." in app.warning[0].value.replace("\\", "")
    assert "50.0% of the picture is hidden." in words(app)
    app.button(key=f"{KEY}top hidden").click().run()
    assert (painting(app).mask == half()).all() and painting(app).problem == "The map is damaged."


def test_too_little_memory_for_a_stroke_is_a_sentence(pack, monkeypatch):
    app = opened(script, image="photo-0.png")
    painting(app).mask = half()

    def full(*arguments):
        raise ValueError("There is not enough memory for a pass.")

    monkeypatch.setattr(whatif, "predict", full)
    app.run()
    assert "There is not enough memory for a pass." in app.error[0].value.replace("\\", "")


def test_an_unknown_photo_is_a_sentence(pack):
    assert "This pack has no such image" in words(opened(script, image="nope"))
