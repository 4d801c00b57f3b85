"""The attention page: exact rows in words, the URL that restores, messages, conversions, bounds."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("streamlit")

from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest
from synthetic_packs import picture
from viewer_pages import opened

from xattn.app import components, models, state
from xattn.app.attention import attention_pass, charts
from xattn.app.attention.attention_pass import (
    AS_TRAINED,
    KEPT,
    TRAINED,
    Choice,
    ImageAttention,
    prefix_names,
)
from xattn.app.attention.view import (
    Colours,
    choice_of,
    default_view,
    name_of,
    place_of,
    png,
    shares,
    slug,
    token_of,
    view_of,
)
from xattn.app.library import Library
from xattn.attention import (
    Inputs,
    LowRankOperator,
    ProductOperator,
    SoftmaxOperator,
    converted_copy,
    create_mechanism,
)
from xattn.attention.statistics import statistics
from xattn.backbone import load_backbone
from xattn.explainers.relevance.attention import NoAttention, read_attention
from xattn.explaining.photos import explain
from xattn.packs.writer import save_pack
from xattn.photos.view import prepare
from xattn.pictures.scales import Scale, make_scale
from xattn.runtime.lru_cache import LRUCache

GRID = (3, 5)  # of the packs' model: 48 x 80 pixels in patches of 16
LAYERS, HEADS = 6, 2


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    loaded = load_backbone("test_vit", weights=None, input_size=(48, 80))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return loaded


@pytest.fixture(scope="module")
def root(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    photos = folder / "photos"
    photos.mkdir()
    for i in range(4):
        picture(i).save(photos / f"photo-{i}.png")
    save_pack(folder / "root" / "vit", explain(photos, backbone, explainer="rollout"))
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

    from xattn.app import state
    from xattn.app.pages.attention import page
    from xattn.app.state import Context

    library = state.library()
    page(Context(library, library.open(library.packs()[0].id), st.query_params.to_dict()))


def readings(app):
    """The readings that the session keeps."""
    return [value for value, _ in app.session_state["attention.kept"]._kept.values()]


def shown(**params: str) -> AppTest:
    return opened(script, **params)


def words(app: AppTest) -> str:
    """All text of the page, that of ``st.html`` included, without the escapes of Markdown."""
    kinds = (app.markdown, app.caption, app.title, app.header, app.subheader, app.info, app.warning)
    found = [e.value for kind in kinds for e in kind] + [e.proto.body for e in app.get("html")]
    return " ".join(found).replace("\\", "").replace("<wbr>", "")


def own_rows(pack, backbone, token, image="photo-0.png"):
    """Rows of the photo as the pack holds it, by an own pass."""
    images, _ = prepare(pack.photo(image), backbone.preprocessing)
    with torch.no_grad():
        found = read_attention(backbone, images[None])
    return [c.operator.rows(torch.tensor([token]))[0, :, 0] for c in found.layers], images


# ---------------------------------------------------------------------- what the page says


def test_the_row_in_words_is_the_exact_row_of_the_chosen_layer_and_head(pack, backbone):
    app = shown(layer="2", head="1", patch="2,4")
    row = own_rows(pack, backbone, 1 + 1 * 5 + 3)[0][2][1].double()
    text = words(app)
    best = int(row[1:].argmax())
    nats = -float((row * row.log()).sum())
    assert "layer 2, head 1, from row 2, column 4" in text
    assert f"{float(row[0]):.1%}" in text
    assert f"row {best // 5 + 1}, column {best % 5 + 1}: {float(row[1:].max()):.1%}" in text
    assert f"{nats:.2f} nats ({nats / np.log(2):.2f} bits)" in text


def test_the_mean_of_heads_and_the_class_token_may_ask(pack, backbone):
    text = words(shown(layer="0", patch="class-token"))
    row = own_rows(pack, backbone, 0)[0][0].mean(0)
    assert "layer 0, mean of all heads, from the class token" in text
    assert f"{float(row[0]):.1%}" in text and "Mean distance" not in text


def test_it_says_that_the_stored_photo_was_read_and_whether_rows_were_sampled(pack, monkeypatch):
    text = words(shown())
    assert "stored in the pack (at most 512 pixels per side)" in text
    assert "all 15 patches as queries" in text
    monkeypatch.setattr(attention_pass, "MOST_QUERIES", 4)
    assert "a random sample of 4 of the 15 patches as queries" in words(shown())


def test_the_url_restores_the_view(pack):
    app = shown(
        image="photo-2.png", layer="3", head="0", patch="3,1", depth="2", mechanism="gna", size="3",
        scale="linear",
    )  # fmt: skip
    assert not app.warning
    assert [s.value for s in app.slider] == [3, 2]
    assert {s.label: s.value for s in app.selectbox} == {
        "Head": "0",
        "Colours": "linear",
        "Mechanism": "gna",
        "Window, patches a side": 3,
    }
    assert "from row 3, column 1" in words(app) and "photo-2.png" in words(app)
    assert "up to layer 2" in words(app) or "after layer 2" in words(app)


def address(app: AppTest) -> dict[str, str]:
    return {n: v[0] if isinstance(v, list) else v for n, v in app.query_params.items()}


def test_widgets_write_the_url_and_usual_values_stay_out_of_it(pack):
    app = shown()
    assert address(app) == {"image": "photo-0.png"}
    app.slider[0].set_value(1).run()
    app.selectbox[0].set_value("1").run()
    assert address(app) == {"image": "photo-0.png", "layer": "1", "head": "1"}
    app.slider[0].set_value(LAYERS - 1).run()
    assert address(app) == {"image": "photo-0.png", "head": "1"}
    assert not app.exception


def test_a_new_url_counts_and_not_the_widgets(pack):
    app = shown(layer="1")
    app.query_params["layer"] = "4"
    app.run()
    assert app.slider[0].value == 4


def test_a_click_counts_although_the_browser_sent_an_older_address(pack):
    app = shown(layer="1")
    app.selectbox[0].set_value("1").run()
    app.query_params.clear()
    app.query_params["layer"] = "1"  # what the browser knew before head=1 was written
    app.slider[0].set_value(3).run()
    assert app.slider[0].value == 3 and app.selectbox[0].value == "1"


def test_a_browser_may_send_a_widget_that_the_last_run_replaced(pack):
    app = shown(head="1")
    replaced = app.selectbox[0]._widget_state
    app.query_params["head"] = "0"
    app.run()
    tree = app._tree
    states = tree.get_widget_states()
    states.widgets.append(replaced)
    tree.get_widget_states = lambda: states
    app.run()
    assert not app.exception
    assert app.selectbox[0].value == "0" and "head 0" in words(app)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("layer", "99", "There is no layer '99'; this network has layers 0 to 5"),
        ("layer", "-1", "There is no layer '-1'"),
        ("depth", "x", "There is no depth 'x'"),
        ("head", "2", "There is no head '2'; this layer has heads 0 to 1"),
        ("patch", "4,1", "There is no patch '4,1'; the grid has 3 rows and 5 columns"),
        ("patch", "register-1", "There is no patch 'register-1'"),
    ],
)
def test_a_bad_parameter_leaves_what_is_usual_and_says_so(name, value, says):
    seen = made(layers=LAYERS)
    start = default_view(seen, AS_TRAINED)
    view, messages = view_of({name: value, "scale": "linear"}, start, seen)
    assert view == replace(start, scale="linear")
    assert len(messages) == 1 and says in messages[0]


def test_a_mechanism_or_size_that_does_not_fit_leaves_what_is_usual():
    assert choice_of({"mechanism": "nope"}, GRID)[0] == AS_TRAINED
    assert choice_of({"mechanism": "gna", "size": "3"}, None)[0] == AS_TRAINED
    assert choice_of({"mechanism": "gna"}, (2, 9))[0] == AS_TRAINED
    choice, messages = choice_of({"mechanism": "gna", "size": "5", "target": "0"}, GRID)
    assert choice == Choice("gna", 3) and "kernel cannot be '5' here" in messages[0]
    assert messages[1:] == ["There is no region '0' to look at here."]
    choice, messages = choice_of({"mechanism": "localist", "target": "4"}, GRID)
    assert choice == Choice("localist", 16) and "no region '4'" in messages[0]


def test_messages_stand_on_the_page_and_the_rest_is_shown(pack):
    app = shown(layer="99", patch="4,1", mechanism="nope")
    assert len(app.warning) == 3
    assert "layer 5, mean of all heads, from row 2, column 3" in words(app)
    app.slider[0].set_value(0).run()
    assert not app.warning


def test_an_image_that_is_not_there_is_a_message_for_a_person(pack):
    app = AppTest.from_function(script, default_timeout=600)
    app.query_params["image"] = "../../etc/passwd"
    app.run()
    assert [e.value for e in app.exception] == [
        "This pack has no such image; choose another one in the gallery."
    ]


def test_without_attention_it_says_so_and_leads_back(pack, monkeypatch):
    cnn = load_backbone("test_efficientnet", weights=None)
    monkeypatch.setattr(models, "backbone_of", lambda pack: cnn)
    app = shown()
    assert "has no attention" in words(app) and "convolutional" in words(app)
    assert "Open the maps of this photo" in [b.label for b in app.button]
    assert not app.slider


def test_attention_in_windows_is_told_apart_from_none(pack, monkeypatch):
    def refuse(*_):
        raise NoAttention("swin", "attends inside windows (4 x 49 tokens)", 4)

    monkeypatch.setattr(attention_pass, "read", refuse)
    text = words(shown())
    assert "attends inside windows (4 x 49 tokens)" in text and "has no attention" not in text


# ---------------------------------------------------------------------- conversions


def test_a_window_of_three_reads_nine_patches_and_the_class_token(pack, backbone):
    text = words(shown(mechanism="gna", size="3"))
    assert "9 of 15 patches; the others have no colour" in text
    assert "after a conversion without training" in text
    assert "What each patch receives" in text
    assert not any(hasattr(m, "mechanism") for m in backbone.model.modules())


def test_agents_show_what_they_read_and_the_query_spreads_over_them(pack, backbone):
    app = shown(mechanism="agent", size="4")
    assert "What each agent of layer 5 reads" in words(app)
    seen = next(r for r in readings(app) if any(r.maps))
    assert seen.maps[0]["agents"].shape == (4, *GRID)
    assert torch.allclose(seen.agent_shares(0, 3).sum(-1), torch.ones(HEADS))


def test_choosing_a_mechanism_brings_a_size_that_fits(pack):
    app = shown()
    app.selectbox[2].set_value("gna").run()
    assert not app.exception
    assert app.selectbox[3].value == 3  # of the odd windows up to 3 rows
    assert address(app) == {"image": "photo-0.png", "mechanism": "gna", "size": "3"}
    app.selectbox[2].set_value("agent").run()
    assert app.selectbox[3].value == 9  # 16 agents are more than 15 patches
    app.selectbox[2].set_value(TRAINED).run()
    assert len(app.selectbox) == 3 and "mechanism" not in app.query_params


def test_keys_kept_by_a_model_of_its_own_mechanism_are_shown(pack, backbone, monkeypatch):
    torch.manual_seed(1)
    own = converted_copy(backbone, "dma", options={"window": 4})
    monkeypatch.setattr(models, "backbone_of", lambda pack: own)
    text = words(shown(head="0"))
    assert "The keys that each head of layer 5 keeps" in text
    assert "4 of 15 patches; the others have no colour" in text


def test_the_dial_is_a_slider_beside_p_and_agreement(pack, backbone):
    app = shown(mechanism="localist", size="64", patch="class-token")
    (dial,) = app.select_slider
    assert dial.value == 64 and not app.warning
    text = words(app)
    _, images = own_rows(pack, backbone, 0)
    local = converted_copy(backbone, "localist", options={"beta": 64})
    with torch.no_grad():
        before, after = (b.probabilities(b.logits(images[None]))[0] for b in (backbone, local))
    k, now = int(before.argmax()), int(after.argmax())
    assert (
        f"<dt>p of {backbone.class_names[k]}</dt><dd>{after[k]:.3f}, as trained {before[k]:.3f}"
        in text
    )
    assert f"<dt>Agreement</dt><dd>{'the same' if now == k else 'another'} class" in text
    seen = next(r for r in readings(app) if any(r.maps))
    region, rows = seen.maps[5]["region"][0].flatten(), seen.rows(0)[5][:, 1:]
    masses = torch.stack([rows[:, region == b].sum(1) for b in range(4)], 1)
    assert f"gets {masses.amax(1).mean():.1%}, averaged over heads" in text
    one = shown(mechanism="localist", size="64", patch="class-token", head="1")
    corner = ("top left", "top right", "bottom left", "bottom right")[masses[1].argmax()]
    assert f"{corner} gets {masses[1].max():.1%}" in words(one)
    assert [bool(m) for m in seen.maps] == [False] * 4 + [True] * 2  # the last quarter
    dial.set_value(0).run()
    assert "the same class" in words(app) and address(app)["size"] == "0"
    app.slider[0].set_value(0).run()
    assert (
        "Layer 0 has no such maps; it keeps its trained attention" in words(app)
        and not app.exception
    )


def box(app, label):
    return next(found for found in app.selectbox if found.label == label)


def test_the_dial_steers_all_queries_to_one_region(pack):
    app = shown(mechanism="localist", size="64", patch="class-token")
    box(app, "Looks at").set_value("Bottom left").run()
    assert address(app)["target"] == "2" and not app.exception
    seen = next(r for r in readings(app) if any(r.maps))
    region = seen.maps[5]["region"][0]
    assert region[0, 0] == 0 and region[0, -1] == 1 and region[-1, 0] == 2 and region[-1, -1] == 3
    below = region.flatten() == 2
    rows = seen.rows(3)[5]
    assert rows[:, 1:][:, below].sum(1).min() > 0.99  # whatever the query is
    again = shown(mechanism="localist", size="64", target="2")
    assert box(again, "Looks at").value == "Bottom left" and not again.warning
    box(again, "Looks at").set_value("Each query's own region").run()
    assert "target" not in address(again)
    box(again, "Looks at").set_value("Top left").run()
    assert address(again)["target"] == "0"
    box(again, "Mechanism").set_value(TRAINED).run()
    assert not again.exception and "target" not in address(again)


def test_a_mechanism_that_does_not_run_here_leaves_the_network_as_trained(pack, monkeypatch):
    torch.manual_seed(0)
    flat = load_backbone("test_vit", weights=None, input_size=(16, 80))  # a single row of patches
    monkeypatch.setattr(models, "backbone_of", lambda pack: flat)
    app = shown(mechanism="localist", size="64", target="2")
    assert "localist does not run here: sides: got 2 for a grid of 1 x 5 patches" in words(app)
    assert box(app, "Mechanism").value == TRAINED and "mechanism" not in address(app)
    box(app, "Mechanism").set_value("localist").run()
    assert len(app.warning) == 1 and not app.exception
    box(app, "Head").set_value("1").run()
    assert not app.warning and not app.exception and address(app)["head"] == "1"


def test_the_prior_of_a_rotation_is_shown(pack, backbone, monkeypatch):
    torch.manual_seed(1)
    own = converted_copy(backbone, "softmax", options={"rotate": "comrope:form=ap"})
    monkeypatch.setattr(models, "backbone_of", lambda pack: own)
    app = shown()
    assert "would attend to by positions alone in layer 5" in words(app)
    (seen,) = readings(app)
    assert seen.maps[5]["prior"].shape == (HEADS, *GRID)


# ---------------------------------------------------------------------- readings


def test_the_grid_lies_on_the_very_pixels_that_the_model_saw(pack, backbone):
    seen = attention_pass.read(pack, "photo-1.png", backbone, AS_TRAINED, LRUCache(KEPT))
    _, images = own_rows(pack, backbone, 0, "photo-1.png")
    assert torch.equal(torch.from_numpy(np.array(seen.pixels)).permute(2, 0, 1) / 255, images)


def test_a_session_keeps_a_few_images_and_asks_the_model_once_for_each(pack, monkeypatch):
    passes = []
    monkeypatch.setattr(
        attention_pass, "read_attention", lambda *a: passes.append(1) or read_attention(*a)
    )
    app = shown()
    app.slider[0].set_value(1).run()
    app.selectbox[0].set_value("1").run()
    assert len(passes) == 1
    for i in (1, 2, 3):
        app.query_params["image"] = f"photo-{i}.png"
        app.run()
    assert len(passes) == 4 and len(readings(app)) == KEPT


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("test_vit", {}, ("class token",)),
        ("deit_tiny_distilled_patch16_224", {}, ("class token", "distillation token")),
        ("vit_small_patch14_reg4_dinov2", {}, ("class token", *(f"register {i}" for i in range(1, 5)))),
        ("vit_wee_patch16_reg1_gap_256", {}, ("register 1",)),
        ("test_vit", {"class_token": False, "global_pool": "avg"}, ()),
    ],
)  # fmt: skip
def test_prefix_tokens_have_their_names(name, options, expected):
    model = timm.create_model(name, depth=1, img_size=56 if "14" in name else 64, **options)
    found = load_backbone(model)
    assert prefix_names(found, found.prefix_tokens) == expected


def made(prefix: int = 1, grid: tuple[int, int] = GRID, layers: int = 3) -> ImageAttention:
    """A reading of random queries and keys."""
    n = grid[0] * grid[1] + prefix
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(layers, 2, 1, HEADS, n, 4, generator=generator)
    names = ("class token", *(f"register {i}" for i in range(1, prefix)))[:prefix]
    operators = [SoftmaxOperator(2 * q, k) for q, k in draws]
    empty = Image.new("RGB", (grid[1], grid[0]))
    return ImageAttention(empty, operators, [{}] * layers, torch.zeros(3), grid, names)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_every_token_has_a_name_in_the_url_and_in_words(prefix):
    seen = made(prefix)
    for token in range(prefix + 15):
        place = place_of(token, seen)
        text = slug(seen.prefix[token]) if place is None else f"{place[0] + 1},{place[1] + 1}"
        assert token_of(text, seen) == token
        assert view_of({"patch": text}, default_view(seen, AS_TRAINED), seen)[0].patch == text
    assert name_of(prefix + 7, seen) == "row 2, column 3"


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_rows_and_rollouts_are_those_of_the_dense_matrices(prefix):
    seen = made(prefix)
    dense = [(o.scale * o.q @ o.k.transpose(-2, -1)).softmax(-1)[0] for o in seen.operators]
    product = torch.eye(prefix + 15)
    for layer, a in enumerate(dense):
        product = (a.mean(0) + torch.eye(prefix + 15)) / 2 @ product
        torch.testing.assert_close(seen.rows(prefix + 4)[layer], a[:, prefix + 4])
        torch.testing.assert_close(seen.rollout(prefix + 4, layer), product[prefix + 4])


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_rows_that_are_no_shares_are_shown_as_those_of_the_absolute_matrix(prefix):
    seen = made(prefix)
    q, k = seen.operators[1].q, seen.operators[1].k
    signed = seen.operators[1] = LowRankOperator(q, k.transpose(-2, -1))
    assert seen.scaled == [1] and not seen.hides
    a = signed.rows(torch.tensor([prefix + 4]))[0, :, 0]
    rows = seen.rows(prefix + 4)
    torch.testing.assert_close(rows[1], a.abs() / a.abs().sum(-1, keepdim=True))
    assert all(row.sum(-1).allclose(torch.ones(HEADS)) for row in rows)
    assert seen.rollout(prefix + 4, 2).sum().item() == pytest.approx(1)
    assert charts.heads_table(seen)["entropy"].between(0, math.log(prefix + 15)).all()


def test_the_operator_says_whether_keys_are_hidden_and_whether_it_goes_in_stages():
    seen = made()
    q, k = seen.operators[0].q, seen.operators[0].k
    assert seen.agent_shares(0, 3) is None
    first, second = SoftmaxOperator(q, k[:, :, :4]), SoftmaxOperator(k[:, :, :4], k)
    seen.operators[0] = ProductOperator([first, second])
    assert not seen.hides
    torch.testing.assert_close(seen.agent_shares(0, 3), first.rows(torch.tensor([3]))[0, :, 0])
    for name, options in (("gna", {"kernel": 3}), ("gna", {"kernel": 3, "backend": "cpu"})):
        window = create_mechanism(name, q.shape[3] * HEADS, HEADS, **options)
        seen.operators[2] = window.operator(Inputs(q, k, k, None, GRID, 1))
        assert seen.hides


def test_the_charts_tables_are_the_statistics():
    seen = made(prefix=2)
    heads, sinks = charts.heads_table(seen), charts.sinks_table(seen)
    expected = statistics(seen.operators[1], GRID, 2)
    row = heads[(heads["layer"] == 1) & (heads["head"] == 0)].iloc[0]
    assert row["entropy"] == pytest.approx(float(expected.entropy[0, 0]))
    assert row["distance"] == pytest.approx(float(expected.distance[0, 0]))
    share = sinks[(sinks["layer"] == 1) & (sinks["part"] == charts.PARTS[0])]["share"]
    assert share.item() == pytest.approx(float(expected.prefix_mass[0].mean()))
    assert (
        charts.sinks_table(made(prefix=0))["part"].unique().tolist()
        == [charts.PARTS[1]]
    )  # fmt: skip


def test_heads_are_ranked_from_the_narrowest():
    seen = made()
    table = charts.heads_table(seen)
    spec = charts.entropy_chart(table, 2.8, 0, "1").to_dict()
    (rows,) = spec["datasets"].values()
    entropies = [row["entropy"] for row in rows]
    assert entropies == sorted(entropies) and len(rows) == 6
    assert [r["shown"] for r in rows].count(True) == 1


# ---------------------------------------------------------------------- pictures


def pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return np.array(Image.open(io.BytesIO(data)))


def test_pictures_of_a_row_share_their_colours():
    first, second = torch.tensor([[0.1, 0.4]]), torch.tensor([[0.1, 0.2]])
    for kind in ("root", "linear"):
        scale = shares([first, second], kind)
        one, two = pixels(png(first, scale, None)), pixels(png(second, scale, None))
        assert (one[0, 0] == two[0, 0]).all() and (one[0, 1] != two[0, 1]).any()
    own = shares([first, second], "own")
    assert (pixels(png(first, own, None))[0, 1] == pixels(png(second, own, None))[0, 1]).all()


def test_patches_that_are_not_kept_have_no_colour_and_pixels_stay_whole():
    values = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    image = pixels(png(values, shares([values], "root"), values > 0, side=5))
    assert image.shape == (6, 6, 4)  # three pixels a patch
    assert image[:3, :3, 3].max() == 0 and image[:3, 3:, 3].min() == 255


def test_the_root_is_for_shares_only():
    assert Colours(Scale(0, 4), "root")(np.array([1.0])) == pytest.approx(0.5)
    signed = Colours(make_scale([(-1.0, 1.0)]), "root")
    assert signed(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]


@given(st.none() | st.integers() | st.text() | st.lists(st.integers() | st.text(), max_size=3))
def test_whatever_a_browser_sends_is_a_patch_or_nothing(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "sent_value", lambda key, name: value)
        found = components.picked_patch("picture", GRID)
    assert found is None or (0 <= found[0] < 3 and 0 <= found[1] < 5)
