"""Exports: figures and the static report hold what was asked for, as text, and nothing runs."""

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("streamlit")

from PIL import Image
from synthetic_packs import CLASSES, described, explanation, picture, small_pack
from viewer_pages import only

from xattn.app.pictures import export
from xattn.app.pictures.rendering import Look
from xattn.packs.contained_files import PackError
from xattn.packs.format import MAPS
from xattn.packs.writer import save_pack

NAME = '=cmd|"x"!A1 <script>alert(1)<b> ünï 🦎.jpg'


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    found = [
        explanation(
            i,
            method,
            target=(i + c) % len(CLASSES),
            signed=method == "lrp",
            source=picture(i),
            file_name=NAME if i == 1 else f"photo-{i}.jpg",
            metrics={} if method == "lrp" and i == 0 else {"AD@50": 12.5, "ROAD": -0.25},
        )
        for i in range(3)
        for method in ("gradcam", "lrp")
        for c in range(2)
    ]
    save_pack(folder / "pack", found, overlays=False, metrics=described())
    return only(folder)


def test_the_png_carries_its_provenance(pack):
    ids = list(pack.entries.index[:2])
    image = Image.open(io.BytesIO(export.figure(pack, ids, "png")))
    assert image.format == "PNG" and image.width > 3 * export.SIDE
    assert "gradcam: made up (sha256 000000000000)" in image.text["Description"]
    assert pack.version in image.text["Description"]


def test_the_svg_is_one_file_whose_text_is_text(pack):
    ids = list(pack.entries.index[pack.entries["image_id"] == "photo-00001"])
    data = export.figure(pack, ids, "svg", Look(opacity=0.4, threshold=0.2)).decode()
    root = ET.fromstring(data)
    names = {element.tag.split("}")[1] for element in root.iter()}
    assert names == {"svg", "title", "rect", "image", "text"}, "no script, no link"
    links = re.findall(r'href="([^"]{0,30})', data)
    assert links and all(link.startswith("data:image/jpeg;base64,") for link in links)
    written = " ".join(element.text or "" for element in root.iter())
    assert "<script>" in written and "🦎" in written
    assert "opacity 0.4, without colour below 0.2" in written
    assert "blue against it" in written, "one of the maps is signed and has its own legend"


@pytest.mark.parametrize("end", ["\n", "\r", "\x1c", "\x85", "\u2029"])
def test_a_name_of_two_lines_is_drawn_on_one(tmp_path, end):
    """Pillow's layout refuses line breaks, which a file name may have."""
    name = f"two{end}lines.jpg"
    save_pack(tmp_path / "pack", [explanation(0, "gradcam", source=picture(0), file_name=name)])
    pack = only(tmp_path)
    assert export.figure(pack, list(pack.entries.index), "png").startswith(b"\x89PNG")


@pytest.fixture
def partly_damaged(tmp_path):
    folder = small_pack(tmp_path / "pack", 2, ("gradcam", "saliency"))
    data = bytearray((folder / MAPS).read_bytes())
    data[-1] ^= 64  # of the last map
    (folder / MAPS).write_bytes(data)
    return only(tmp_path)


def test_a_damaged_map_is_left_out_of_a_report_by_name(partly_damaged):
    ids = list(partly_damaged.entries.index)
    report = export.html(partly_damaged, ids)
    assert "3 maps of 2 photos" in report and report.count("left out") == 1
    assert "The map by Saliency of" in report and "photo-00001.jpg is left out" in report


@pytest.mark.parametrize("kind", export.FORMATS)
def test_a_damaged_map_is_left_out_of_a_figure(partly_damaged, kind):
    ids = list(partly_damaged.entries.index)
    data = export.figure(partly_damaged, ids, kind)
    if kind == "png":
        assert "is left out" in Image.open(io.BytesIO(data)).text["Description"]
    else:
        written = " ".join(element.text or "" for element in ET.fromstring(data).iter())
        assert "is left out" in written


def test_damaged_maps_alone_make_no_figure(partly_damaged):
    with pytest.raises(PackError, match="damaged"):
        export.figure(partly_damaged, [partly_damaged.entries.index[-1]], "png")


def test_a_figure_shows_the_maps_as_they_are_looked_at(pack):
    first, second = pack.entries.index[:2]
    plain, contrast = (
        np.asarray(Image.open(io.BytesIO(export.figure(pack, [first], "png", look))))
        for look in (Look(), Look(minus=second))
    )
    side = slice(30, 200)
    assert not np.array_equal(plain[side, side.stop * 2 :], contrast[side, side.stop * 2 :])


@pytest.mark.parametrize("kind", ["png", "svg", "html"])
def test_nothing_too_much_and_unknown_maps_are_refused(pack, kind):
    make = export.html if kind == "html" else lambda p, ids: export.figure(p, ids, kind)
    most = export.MOST_MAPS[kind]
    for ids in ([], list(pack.entries.index[:1]) * (most + 1)):
        with pytest.raises(ValueError, match=f"entry_ids: got {len(ids)} maps; give 1 to {most}"):
            make(pack, ids)
    with pytest.raises(PackError, match="no such map"):
        make(pack, ["../none"])


def test_another_format_is_refused(pack):
    with pytest.raises(ValueError, match="format: got 'pdf'; give one of png, svg"):
        export.figure(pack, list(pack.entries.index[:1]), "pdf")


# ---------------------------------------------------------------------- report


def test_the_report_needs_no_server_and_shows_names_as_text(pack):
    page = export.html(pack, list(pack.entries.index))
    assert page.count("<img") == 3 + 12 and page.count("data:image/jpeg;base64,") == 15
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "url(" not in page
    assert page.count('class="legend"') == 2
    assert "12 maps of 3 photos" in page


def test_the_report_has_every_figure_with_its_direction_and_protocol(pack):
    page = export.html(pack, list(pack.entries.index[:4]))
    assert (
        "AD@50 ↓" in page and "ROAD ↑" in page and "insertion" not in page.split("<table>")[1][:300]
    )
    assert "protocol AD@50-made-up" in page and "12.5" in page and "–" in page


def test_a_pack_without_figures_has_no_table(tmp_path):
    save_pack(tmp_path / "pack", [explanation(source=picture(0), metrics={})], overlays=False)
    pack = only(tmp_path)
    assert "<table>" not in export.html(pack, list(pack.entries.index))


def test_a_record_of_a_network_that_is_no_table_is_an_unknown_network(tmp_path):
    odd = explanation(source=picture(0), protocol={"backbone": "resnet18", "head": ["t-tame"]})
    save_pack(tmp_path / "pack", [odd], overlays=False)
    pack = only(tmp_path)
    assert "unknown network" in export.html(pack, list(pack.entries.index))


def test_a_report_shows_the_same_part_and_style_as_the_gallery(pack):
    ids = list(pack.entries.index[:2])
    looks = [Look(style="outline", crop=crop) for crop in (False, True)]
    whole, crop = (export.html(pack, ids, look) for look in looks)
    assert "around the smallest region that holds half of the map" in crop
    assert "Drawn as outlines of the region that holds half of each map." in crop
    sizes = [set(re.findall(r'width="(\d+)" height="(\d+)"', page)) for page in (whole, crop)]
    assert sizes == [{("128", "96")}, {("84", "84")}], "the photo and its maps"
