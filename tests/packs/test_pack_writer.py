"""What a pack carries beside its maps: hashes, facts, metrics, curves; equal bytes for equal input."""

import hashlib
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from pack_files import ENTRIES, MAPS, rewritten
from PIL import Image
from safetensors.numpy import load_file
from synthetic_packs import explanation

from xattn.backbone import Preprocessing
from xattn.correlation import disagreement
from xattn.packs.contained_files import PackError
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import pack_writer, save_pack
from xattn.photos.view import View, make_view

VIEW = View("crop", (40, 50), (64, 80), (0, 8, 64, 64), (64, 64))


def make(image_id="cat", method="cam", side=7, target=1, **changes):
    rng = np.random.default_rng([side, target, *method.encode(), *image_id.encode()])
    changes.setdefault("source", Image.new("RGB", (50, 40), "grey"))
    return Explanation(
        rng.random((side, side + 2)),
        target,
        "tabby",
        0.5,
        method,
        VIEW,
        image_id,
        {"explainer": method},
        f"{image_id}.jpg",
        **changes,
    )


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_facts_metrics_and_curves_come_back(tmp_path):
    facts = ImageFacts(((3, "tabby, cat", 0.75), (1, "dog", 0.125)), 1, "dog")
    e = make(facts=facts, metrics={"AD@50": 0.25}, curves={"deletion": [0.5, 0.25]}, sanity=True)
    (again,) = load_pack(save_pack(tmp_path / "pack", [e]))
    assert (again.facts, again.metrics, again.curves) == (facts, e.metrics, e.curves)
    assert again.sanity


def test_hashes_are_those_of_the_bytes(tmp_path):
    e = make()
    folder = save_pack(tmp_path / "pack", [e])
    pack = Pack(folder)
    found = pack.provenance(e.id)["sha256"]
    assert found["map"] == hashlib.sha256(e.map.tobytes()).hexdigest()
    jpeg = load_file(folder / "thumbnails-00000.safetensors")["cat"].tobytes()
    assert found["thumbnail"] == hashlib.sha256(jpeg).hexdigest()
    assert jpeg == pack.photo_bytes("cat")
    data = bytearray((folder / MAPS).read_bytes())
    data[-1] ^= 1
    (folder / MAPS).write_bytes(data)
    with pytest.raises(ValueError, match="not those that were written"):
        load_pack(folder)


def test_a_view_that_readers_would_refuse_is_not_written(tmp_path):
    narrow = make_view((1, 20_000), Preprocessing())
    with pytest.raises(ValueError, match="20000 x 1 pixels"):
        save_pack(tmp_path / "pack", [make(), replace(make("strip"), view=narrow)])
    assert not any(tmp_path.iterdir())


def test_writers_and_readers_share_the_largest_side_of_a_map(tmp_path):
    wide = save_pack(tmp_path / "wide", [replace(make(), map=np.ones((1, 16_384)))])
    (again,) = load_pack(wide)
    assert again.map.shape == (1, 16_384)
    with pytest.raises(ValueError, match=r"map: got shape \(1, 16385\).*16,384 per side"):
        replace(make(), map=np.ones((1, 16_385)))
    rewritten(wide, "width", 16_385)
    for read, error in ((load_pack, ValueError), (read_in_viewer, PackError)):
        with pytest.raises(error, match=r"16,384 cells per side"):
            read(wide)


def test_equal_explanations_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_pack(tmp_path / name, [make(), make("dog", side=9), make(method="other")])
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_maps_of_a_photo_come_one_after_the_other_however_photos_are_mixed(tmp_path):
    given = [make("b"), make("a"), make("b", "other"), make("a", "other")]
    folder = save_pack(tmp_path / "pack", given)
    assert [e.id for e in load_pack(folder)] == [given[i].id for i in (0, 2, 1, 3)]


def test_disagreement_is_between_methods_of_one_class_without_sanity_rows(tmp_path):
    same = [make(), make(method="other", side=5)]
    rest = [
        make(method="random", side=9, sanity=True),
        make(method="ones", is_mask=True),
        make(method="third", target=2),
    ]
    found = Pack(save_pack(tmp_path / "pack", same + rest)).images.at["cat", "disagreement"]
    assert found == round(disagreement([e.map for e in same]), 4)
    one = Pack(save_pack(tmp_path / "one", [make(), make(target=2)]))
    assert np.isnan(one.images.at["cat", "disagreement"]), "one method"


def test_values_that_are_not_finite_are_left_out(tmp_path):
    e = make(metrics={"AD@50": float("nan"), "IC": 1.0})
    assert load_pack(save_pack(tmp_path / "pack", [e]))[0].metrics == {"IC": 1.0}


def test_a_photo_is_added_at_once(tmp_path):
    with (
        pytest.raises(ValueError, match="'cat' was added before"),
        pack_writer(tmp_path / "p") as w,
    ):
        w.add([make()])
        w.add([make(method="other")])
    assert list(tmp_path.iterdir()) == []


def test_photos_without_pixels_have_no_thumbnail(tmp_path):
    folder = save_pack(tmp_path / "pack", [replace(make(), source=None)])
    assert not Pack(folder).has_photo("cat")
    assert Pack(folder).provenance("cat@1.cam")["sha256"]["thumbnail"] is None


def test_a_file_name_that_is_no_utf8_does_not_lose_the_work(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    folder = save_pack(tmp_path / "pack", [replace(make(), file_name=name)])
    assert [e.file_name for e in load_pack(folder)] == [r"caf\udce9.jpg"]


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "column, value, named",
    [
        ("entry_id", "dog@1.cam", "entries-00000.parquet.*dog@1.cam occurs twice"),
        ("sha256", bytes(32), "maps-00000.safetensors.*not those that"),
        ("view", '{"mode": "xxx", "box": []}', "manifest.json.*view"),
        ("place", -5, "entries-00000.parquet.*place"),
    ],
)
def test_what_is_wrong_with_a_pack_is_one_short_line_with_the_file_and_the_remedy(
    tmp_path, column, value, named
):
    folder = rewritten(save_pack(tmp_path / "pack", [make(), make("dog")]), column, value)
    with pytest.raises(ValueError, match=named) as caught:
        load_pack(folder)
    message = str(caught.value)
    assert message.startswith(f"pack: {folder}") and message.endswith("; make the pack again")
    assert "\n" not in message and len(message) < len(str(folder)) + 400


VALUES = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e999,
    "",
    "a\nb",
    "\ud800",
    "\0",
    [],
    [[]],
    {},
    [None] * 3,
)


def places(value, at=()):
    """Every place in JSON, as keys and indices."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield (*at, key)
        if isinstance(item, dict | list):
            yield from places(item, (*at, key))


def test_no_change_of_a_manifest_or_header_gives_a_traceback(tmp_path):
    folder = save_pack(tmp_path / "pack", [make(), make("dog", metrics={"AD": 0.5})])
    whole = {name: (folder / name).read_bytes() for name in ("manifest.json", ENTRIES, MAPS)}
    rng, refused = random.Random(0), 0
    for number in range(300):
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        if number % 3:
            found = manifest(folder)
            *way, last = rng.choice(list(places(found)))
            at = found
            for key in way:
                at = at[key]
            at[last] = rng.choice(VALUES)
            (folder / "manifest.json").write_text(json.dumps(found))
        else:
            name, data = rng.choice(list(whole.items()))
            changed = bytearray(data)
            changed[rng.randrange(min(len(data), 300))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(
                changed[: rng.choice([len(data), rng.randrange(len(data))])]
            )
        for read, error in ((load_pack, ValueError), (read_in_viewer, PackError)):
            try:
                read(folder)
            except error as refusal:
                message = str(refusal)
                refused += 1
                assert "\n" not in message and len(message) < 600
                assert re.search(r"manifest\.json|entries-|maps-|The (map|picture|pack) ", message)
    assert refused > 200


def read_in_viewer(folder):
    pack = Pack(folder)
    for entry_id in pack.entries.index:
        pack.explanation(entry_id)
    for image_id in pack.images.index:
        pack.photo(image_id)


def test_the_image_row_of_a_photo_is_right_or_wrong_if_its_label_and_prediction_are_known(tmp_path):
    top = explanation(0).facts.top
    known = [(top, None), (top, top[0][0]), (top, 7), ((), 7)]
    found = [
        explanation(i, facts=ImageFacts(*facts), metrics={}, protocol={})
        for i, facts in enumerate(known)
    ]
    pack = Pack(save_pack(tmp_path / "pack", found, overlays=False))
    assert pack.images["right"].tolist() == [None, True, False, None]
