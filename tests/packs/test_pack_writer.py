"""What a pack carries beside its maps: hashes, facts, metrics, curves; equal bytes for equal input."""

import hashlib
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from xattn.backbone import Preprocessing
from xattn.correlation import disagreement
from xattn.packs.contained_files import PackError
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import pack_writer, save_pack
from xattn.photos.view import View, make_view
from xattn.runtime.tensor_file import TensorFile

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
    found = manifest(folder)
    assert found["entries"][0]["sha256"] == hashlib.sha256(e.map.tobytes()).hexdigest()
    jpeg = (folder / "thumbnails/cat.jpg").read_bytes()
    assert found["images"]["cat"]["thumbnail_sha256"] == hashlib.sha256(jpeg).hexdigest()
    data = bytearray((folder / "maps.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "maps.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="not those that were written"):
        load_pack(folder)


def test_a_view_that_readers_would_refuse_is_not_written(tmp_path):
    narrow = make_view((1, 20_000), Preprocessing())
    with pytest.raises(ValueError, match="20000 x 1 pixels"):
        save_pack(tmp_path / "pack", [make(), replace(make("strip"), view=narrow)])
    assert not any(tmp_path.iterdir())


def with_a_wide_map(folder):
    """A pack whose one map is 16,385 cells wide, as this xattn does not write it."""
    save_pack(folder, [make(side=1)])
    header = json.dumps(
        {"cat@1.cam": {"dtype": "F32", "shape": [1, 16_385], "data_offsets": [0, 65_540]}}
    ).encode()
    data = bytes(65_540)
    whole = len(header).to_bytes(8, "little") + header + data
    (folder / "maps.safetensors").write_bytes(whole)
    found = manifest(folder)
    found["entries"][0].update(shape=[1, 16_385], sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(found))


def test_writers_and_readers_share_the_largest_side_of_a_map(tmp_path):
    (again,) = load_pack(save_pack(tmp_path / "pack", [replace(make(), map=np.ones((1, 16_384)))]))
    assert again.map.shape == (1, 16_384)
    with pytest.raises(ValueError, match=r"map: got shape \(1, 16385\).*16,384 a side"):
        replace(make(), map=np.ones((1, 16_385)))
    with_a_wide_map(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*16,384 a side"):
        load_pack(tmp_path / "wide")
    with pytest.raises(PackError, match=r"cat@1.cam has 1 x 16385 cells.*16,384 a side"):
        Pack(tmp_path / "wide")


def test_maps_are_a_safetensors_file(tmp_path):
    saved = [make(side=3), make("dög", side=8), make("dög", "other", side=1)]
    folder = save_pack(tmp_path / "pack", saved)
    theirs = load_file(folder / "maps.safetensors")
    ours = TensorFile(lambda: (folder / "maps.safetensors").open("rb"))
    assert set(theirs) == {e.id for e in saved}
    for e in saved:
        assert np.array_equal(theirs[e.id], e.map) and np.array_equal(ours.read(e.id), e.map)


def test_equal_explanations_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_pack(tmp_path / name, [make(), make("dog", side=9), make(method="other")])
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_entries_keep_their_order_however_photos_are_mixed(tmp_path):
    given = [make("b"), make("a"), make("b", "other"), make("a", "other")]
    folder = save_pack(tmp_path / "pack", given)
    assert [e.id for e in load_pack(folder)] == [e.id for e in given]


def test_disagreement_is_between_methods_of_one_class_without_sanity_rows(tmp_path):
    same = [make(), make(method="other", side=5)]
    rest = [
        make(method="random", side=9, sanity=True),
        make(method="ones", is_mask=True),
        make(method="third", target=2),
    ]
    found = manifest(save_pack(tmp_path / "pack", same + rest))["images"]["cat"]["disagreement"]
    assert found == round(disagreement([e.map for e in same]), 4)
    one = manifest(save_pack(tmp_path / "one", [make(), make(target=2)]))
    assert one["images"]["cat"]["disagreement"] is None, "one method"


def test_values_that_are_not_finite_are_left_out(tmp_path):
    e = make(metrics={"AD@50": float("nan"), "IC": 1.0})
    assert manifest(save_pack(tmp_path / "pack", [e]))["entries"][0]["metrics"] == {"IC": 1.0}


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
    assert manifest(folder)["entries"][0]["thumbnail"] is None
    assert "thumbnail_sha256" not in manifest(folder)["images"]["cat"]


def test_a_file_name_that_is_no_utf8_does_not_lose_the_work(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    folder = save_pack(tmp_path / "pack", [replace(make(), file_name=name)])
    assert [e.file_name for e in load_pack(folder)] == [name]


# ---------------------------------------------------------------------- damage


def damage(folder, change):
    found = manifest(folder)
    change(found["entries"])
    (folder / "manifest.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda entries: entries.append(entries[0]), "manifest.json.*cat@1.cam comes twice"),
        (lambda entries: entries[0].update(sha256="0" * 64), "maps.safetensors.*not those that"),
        (lambda entries: entries[0]["view"].update(mode="x" * 9999, box=[]), "manifest.json.*view"),
        (lambda entries: entries[0].update(thumbnail="thumbnails/" + "x" * 999 + ".jpg"), "thumb"),
        (lambda entries: entries[0].update(shape="a\nb"), "manifest.json"),
    ],
)
def test_what_is_wrong_with_a_pack_is_one_short_line_with_the_file_and_the_remedy(
    tmp_path, change, named
):
    folder = save_pack(tmp_path / "pack", [make(), make("dog")])
    damage(folder, change)
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
    whole = {name: (folder / name).read_bytes() for name in ("manifest.json", "maps.safetensors")}
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
                assert re.search(
                    r"manifest\.json|maps\.safetensors|The (map|picture|pack) ", message
                )
    assert refused > 200


def read_in_viewer(folder):
    pack = Pack(folder)
    for entry_id in pack.entries.index:
        pack.explanation(entry_id)
    for image_id in pack.images.index:
        pack.photo(image_id)
