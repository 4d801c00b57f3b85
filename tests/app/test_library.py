"""Packs read for the viewer: lazily, never stale, and nothing from outside whatever lies in them."""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pandas")

from pack_files import ENTRIES, MAPS, edit, rewritten
from synthetic_packs import (
    METRICS,
    VIEW,
    big_pack,
    explanation,
    picture,
    small_pack,
)
from viewer_pages import only

from xattn.app import library as library_module
from xattn.app.library import Library
from xattn.packs.answers import frame_id
from xattn.packs.contained_files import PackError
from xattn.packs.contents import Contents
from xattn.packs.explanation import ImageFacts
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import pack_writer, save_pack
from xattn.runtime.lru_cache import LRUCache


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return small_pack(tmp_path_factory.mktemp("written") / "pack")


@pytest.fixture
def root(tmp_path, written):
    """A root with one pack, to be damaged."""
    shutil.copytree(written, tmp_path / "root" / "cats")
    return tmp_path / "root"


THUMBNAILS = "thumbnails-00000.safetensors"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------- what is in a pack


@pytest.mark.parametrize(
    ("video", "title"),
    [
        ({"fps": 25.0}, "w.mp4, frame 1,503, 1:00.12"),
        ({"fps": 29.97002997}, "w.mp4, frame 1,503, 0:50.15"),
        ({"fps": 0.334}, "w.mp4, frame 1,503, 1:15:00.00"),
        ({"fps": 0}, "w.mp4, frame 1,503"),
        ({"fps": "25"}, "w.mp4, frame 1,503"),
        ({"fps": 5e-324}, "w.mp4, frame 1,503"),
        ({"fps": True}, "w.mp4, frame 1,503"),
        ({}, "w.mp4, frame 1,503"),
        ([25.0], "w.mp4"),
        (None, "w.mp4"),
    ],
    ids=str,
)
def test_a_frame_is_titled_by_its_clip_number_and_time(tmp_path, video, title):
    frame = {"image_id": "frame-001503", "file_name": "w.mp4", "protocol": {"video": video}}
    of_answer = {**frame, "image_id": frame_id("w", 1503)}
    made = [explanation(1, **frame), explanation(2), explanation(3, **of_answer)]
    save_pack(tmp_path / "root" / "clip", made)
    titles = only(tmp_path / "root").images["title"]
    assert titles["frame-001503"] == titles["w#frame-001503"] == title
    assert titles["photo-00002"] == "photo-00002.jpg"


def test_a_pack_gives_its_images_entries_and_metrics(root):
    pack = only(root)
    assert list(pack.images.index) == [f"photo-{i:05}" for i in range(6)]
    assert pack.images["right"].tolist() == [False, True, True, True, False, True]
    assert (pack.images["methods"] == 3).all() and pack.images["disagreement"].between(0, 2).all()
    assert pack.images["predicted"].tolist() == list(range(6))
    assert pack.images["label"].tolist() == [1, 1, 2, 3, 5, 5]
    assert [m.key for m in pack.metrics] == list(METRICS)
    assert [m.higher_is_better for m in pack.metrics] == [False, True, True]
    assert list(pack.entries["method"].iloc[:3]) == ["gradcam", "saliency", "random"]
    assert pack.entries["sanity"].tolist() == [False, False, True] * 6
    assert pack.entries[list(METRICS)].notna().all().all()
    entry = pack.entries.index[0]
    assert list(pack.curves(entry)) == ["deletion", "insertion"]
    assert pack.top("photo-00003")[0][:2] == (3, "ostrich")
    assert (
        pack.version == hashlib.sha256((root / "cats/manifest.json").read_bytes()).hexdigest()[:12]
    )


def test_maps_are_those_that_were_saved(root):
    pack = only(root)
    saved = {e.id: e for e in load_pack(root / "cats")}
    assert set(saved) == set(pack.entries.index)
    for id, other in saved.items():
        mine = pack.explanation(id)
        assert np.array_equal(mine.map, other.map) and not mine.map.flags.writeable
        assert (mine.view, mine.facts, mine.protocol) == (other.view, other.facts, other.protocol)
        assert (mine.metrics, mine.curves, mine.sanity) == (
            other.metrics,
            other.curves,
            other.sanity,
        )


def test_opening_reads_no_map_and_asking_reads_one(root, monkeypatch):
    asked = []
    real = Contents.map
    monkeypatch.setattr(Contents, "map", lambda self, e: asked.append(e.id) or real(self, e))
    pack = only(root)
    assert asked == []
    pack.explanation(pack.entries.index[4])
    pack.explanation(pack.entries.index[4])
    assert asked == [pack.entries.index[4]], "the second time from memory"


def test_what_is_kept_in_memory_is_bounded():
    recent = LRUCache(limit=100)
    for i in range(50):
        recent.put(i, f"value {i}", 30)
    assert [recent.get(i) for i in (46, 47, 48, 49)] == [None, "value 47", "value 48", "value 49"]
    recent.put(49, "larger", 100)
    assert recent.get(49) == "larger" and recent.get(48) is None
    recent.put("huge", 1, 1000)
    assert recent.get("huge") is None


def test_photos_are_thumbnails_of_any_smaller_side(root):
    pack = only(root)
    assert pack.photo("photo-00002").size == (128, 96)
    assert pack.photo("photo-00002", 64).size == (64, 48)
    want = np.asarray(picture(2)).astype(int)
    assert np.abs(np.asarray(pack.photo("photo-00002")).astype(int) - want).mean() < 6


def test_without_first_classes_the_most_probable_of_the_explained_top_ones_is_predicted(tmp_path):
    for name, classes in (("top", [0, None]), ("named", [None, None])):
        protocol = {"classes": name}
        found = [explanation(0, facts=ImageFacts(), protocol=protocol),
                 explanation(1, facts=ImageFacts(), protocol={})]  # fmt: skip
        pack = Pack(save_pack(tmp_path / name, found))
        assert pack.images["predicted"].tolist() == classes
        assert pack.images["right"].tolist() == [None] * 2 and pack.top("photo-00000") == []
        assert pack.images["disagreement"].isna().all()


def test_provenance_names_method_protocol_and_hashes(root):
    pack = only(root)
    entry = pack.entries.index[0]
    found = pack.provenance(entry)
    assert found["method"] == "gradcam" and found["backbone"]["name"] == "made up"
    assert found["metrics"]["ROAD"] == "ROAD-made-up"
    data = pack.explanation(entry).map.tobytes()
    assert found["sha256"]["map"] == hashlib.sha256(data).hexdigest()
    jpeg = pack.photo_bytes("photo-00000")
    assert found["sha256"]["thumbnail"] == hashlib.sha256(jpeg).hexdigest()
    json.dumps(found)


def test_names_of_users_come_through_as_they_are_but_for_what_would_hide_letters(tmp_path):
    name = '<img src=x onerror="alert(1)">&\u202e\U0001f600.jpg'
    folder = save_pack(
        tmp_path / "root" / "pack",
        [explanation(0, file_name=name, target_name="<b>'\"", source=picture(0))],
    )
    pack = only(tmp_path / "root")
    assert pack.images["file_name"].tolist() == [name.replace("\u202e", "\ufffd")]
    assert pack.entries["target_name"].tolist() == ["<b>'\""]
    rewritten(folder, "target_name", "\u202eolleh")
    assert only(tmp_path / "root").entries["target_name"].tolist() == ["\ufffdolleh"]


def test_a_film_is_checked_by_its_hash(tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"a film")
    folder = save_pack(tmp_path / "root" / "clip", [explanation(0)], video=film)
    assert only(tmp_path / "root").video == (folder / "overlay.mp4")
    (folder / "overlay.mp4").write_bytes(b"another")
    with pytest.raises(PackError, match="not the film that was written"):
        _ = only(tmp_path / "root").video


def test_thousands_of_entries_are_an_index(tmp_path, monkeypatch):
    big_pack(tmp_path / "root" / "big", images=3000, methods=2, pictures=3)
    monkeypatch.setattr(Contents, "map", lambda *a: pytest.fail("read a map"))
    pack = only(tmp_path / "root")
    assert (len(pack.entries), len(pack.images)) == (6000, 3000)
    assert pack.photo("photo-02999").size == (256, 192)


# ---------------------------------------------------------------------- the list


def test_packs_are_found_three_folders_deep_and_not_in_hidden_ones(tmp_path, written):
    places = ("a", "b/c", "b/d/e", "b/d/f/too-deep", ".hidden", "a/thumbnails/inside")
    for place in places:
        shutil.copytree(written, tmp_path / place, dirs_exist_ok=True)
    library = Library(tmp_path)
    infos = library.packs()
    assert [info.name for info in infos] == ["a", "b/c", "b/d/e"]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", info.id) for info in infos)
    assert infos == Library(tmp_path).packs(), "the same ids after a restart"
    assert (infos[0].entries, infos[0].images) == (18, 6)
    assert infos[0].methods == ("Grad-CAM", "Saliency", "Random")
    assert [info.name for info in Library(tmp_path / "a").packs()] == ["a"], "the root itself"


def test_an_empty_or_missing_root_has_no_packs(tmp_path):
    assert Library(tmp_path).packs() == []
    assert Library(tmp_path / "nowhere").packs() == []


def test_other_programs_manifests_are_not_packs(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert Library(tmp_path).packs() == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: edit(f, lambda m: m.update(version=2)), r"format version 2.*upgrade xattn"),
        (
            lambda f: (f / "manifest.json").write_bytes(b'{"format": "xattn'),
            r"no readable manifest",
        ),
        (lambda f: edit(f, lambda m: m.update(shards=[])), r"manifest.json .*is damaged"),
        (lambda f: (f / MAPS).unlink(), rf"{MAPS} is missing"),
        (lambda f: os.truncate(f / MAPS, 999), rf"{MAPS} .*is damaged"),
        (lambda f: os.truncate(f / ENTRIES, 0), rf"{ENTRIES} .*is damaged"),
        (lambda f: flip(f / ENTRIES, 99), rf"{ENTRIES} .*is damaged: it is not the file"),
        (lambda f: rewritten(f, "view", "{}"), r"manifest.json .*is damaged"),
        (
            lambda f: edit(
                f, lambda m: m["shards"][0]["maps"].update(file="../maps-0.safetensors")
            ),
            r"a shard's maps are '../maps",
        ),
    ],
)
def test_a_pack_that_cannot_be_shown_says_why_and_the_others_stay(root, written, damage, says):
    shutil.copytree(written, root / "dogs")
    damage(root / "cats")
    library = Library(root)
    bad, good = library.packs()
    assert re.search(says, bad.problem) and good.problem is None
    assert str(root) not in bad.problem and "\n" not in bad.problem
    with pytest.raises(PackError, match=says):  # rows are read when they are asked for
        library.open(bad.id).provenance("photo-00000@0.gradcam")
    assert len(library.open(good.id).entries) == 18


def test_a_replaced_pack_is_noticed(root):
    library = Library(root)
    (info,) = library.packs()
    before = library.open(info.id)
    assert library.open(info.id) is before, "the same object while nothing has changed"
    save_pack(root / "cats", [explanation(8), explanation(9)], overlays=False)
    (again,) = library.packs()
    assert again.id == info.id and again.images == 2
    after = library.open(info.id)
    assert list(after.images.index) == ["photo-00008", "photo-00009"]
    assert after.version != before.version
    shutil.rmtree(root / "cats")
    assert library.packs() == []
    with pytest.raises(PackError, match=r"no such pack|is gone"):
        library.open(info.id)


def test_maps_that_come_back_are_noticed(root):
    library = Library(root)
    (root / "cats" / MAPS).rename(root / "maps")
    (info,) = library.packs()
    assert "missing" in info.problem
    (root / "maps").rename(root / "cats" / MAPS)
    assert library.packs()[0].problem is None


@pytest.mark.parametrize(
    "id", ["", "nothing", "../cats", "/etc/passwd", "cats", "a" * 500, "scratch-x", None, 7, "a\0"]
)
def test_an_unknown_id_is_a_message(root, id):
    library = Library(root)
    with pytest.raises(PackError, match="no such pack"):
        library.open(id)
    pack = only(root)
    for ask in (pack.explanation, pack.curves, pack.provenance, pack.photo, pack.top):
        with pytest.raises(PackError, match=r"no such (map|image)"):
            ask(id)
    with pytest.raises(PackError, match="no such comparison"):
        library.read(id, "leaderboard.json")


def test_scratch_packs_are_not_listed_and_only_so_many(tmp_path, root, written, monkeypatch):
    monkeypatch.setattr(library_module, "SCRATCH_PACKS", 2)
    library = Library(root)
    shutil.copytree(written, tmp_path / "live")
    first, second = library.add_scratch(tmp_path / "live"), library.add_scratch(tmp_path / "live")
    assert first != second and len(first) > 32
    assert len(library.packs()) == 1
    assert len(library.open(first).entries) == 18
    library.add_scratch(tmp_path / "live")
    library.add_scratch(tmp_path / "live")
    with pytest.raises(PackError, match="no such pack"):
        library.open(first)


def test_the_id_of_a_scratch_pack_can_be_part_of_a_components_key(tmp_path, monkeypatch):
    """A random id with two underscores in a row kept the film of a clip from being shown."""
    monkeypatch.setattr(secrets, "token_bytes", lambda n: b"\xff" * n)  # in base64 all underscores
    assert "__" not in Library(tmp_path).add_scratch(tmp_path / "live")


def test_comparisons_and_heads_are_found_by_what_is_in_them(root, written):
    folder = root / "runs" / "compared"
    shutil.copytree(written, folder / "pack")
    (folder / "leaderboard.json").write_text('{"standings": []}')
    head = root / "runs" / "head"
    head.mkdir()
    (head / "config.json").write_text("{}")
    (head / "model.safetensors").write_bytes(b"")
    (root / "config.json").write_text("{}")
    library = Library(root)
    (found,) = library.comparisons()
    assert (found.name, found.folder) == ("runs/compared", folder)
    assert library.open(found.pack_id).name == "runs/compared", "its pack has its name"
    assert library.read(found.id, "leaderboard.json") == b'{"standings": []}'
    for name in ("../../cats/manifest.json", "/etc/passwd", "nothing", "pack"):
        with pytest.raises(PackError):
            library.read(found.id, name)
    assert [(h.name, h.folder) for h in library.heads()] == [("runs/head", head)]


def test_threads_share_a_library(root):
    library = Library(root)
    (info,) = library.packs()
    wrong = []

    def work(number):
        try:
            for i in range(20):
                pack = library.open(info.id)
                entry = pack.entries.index[(number + i) % 18]
                assert pack.explanation(entry).id == entry
                library.packs()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_pack_is_read_once_however_many_ask_for_it_at_once(root, monkeypatch):
    read = []

    class Slow(Pack):
        def __init__(self, *arguments):
            read.append(arguments)
            time.sleep(0.1)
            super().__init__(*arguments)

    monkeypatch.setattr(library_module, "Pack", Slow)
    library = Library(root)
    [pack_id] = library.newest()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: library.open(pack_id, passing=n % 2 == 0), range(16)))
    assert library.packs()[0].problem is None and library.open(pack_id) is found[0]
    assert len(read) == len(set(map(id, found))) == 1


# ---------------------------------------------------------------------- tampering, links


def test_a_changed_byte_spoils_one_map_and_no_other(root):
    flip(root / "cats" / MAPS, -1)  # of the last by name
    pack = only(root)
    with pytest.raises(PackError, match=r"the bytes of photo-00005@5.saliency are not those that"):
        pack.explanation("photo-00005@5.saliency")
    assert pack.explanation("photo-00005@5.gradcam").map.shape == (7, 7)


def test_maps_that_change_under_an_open_pack_are_refused(root):
    pack = only(root)
    os.truncate(root / "cats" / MAPS, 5000)
    with pytest.raises(PackError, match="truncated"):
        pack.explanation(pack.entries.index[-1])
    (root / "cats" / MAPS).unlink()
    with pytest.raises(PackError, match="missing"):
        pack.explanation(pack.entries.index[-1])


@pytest.mark.parametrize("key", ["photo_size", "resized", "box", "input_size"])
def test_a_view_of_absurd_size_is_refused(root, key):
    view = VIEW.to_json()
    rewritten(root / "cats", "view", json.dumps({**view, key: [10**7] * len(view[key])}))
    pack = Pack(root / "cats")
    with pytest.raises(PackError, match="more than a million pixels per side"):
        pack.view(pack.first_entry)


def test_an_endless_curve_is_damage(root):
    edit(root / "cats", lambda manifest: manifest.update(shares={"deletion": [0] * 100_001}))
    with pytest.raises(PackError, match="more than 100,000 values"):
        Pack(root / "cats")


def test_a_manifest_that_would_fill_the_memory_is_not_read(root):
    with (root / "cats" / "manifest.json").open("r+b") as stream:
        stream.truncate(300 << 20)  # a hole, which takes no space
    (info,) = Library(root).packs()
    assert "over the limit" in info.problem


def test_a_changed_thumbnail_is_refused(root):
    flip(root / "cats" / THUMBNAILS, -20)  # of the last photo
    pack = only(root)
    with pytest.raises(PackError, match="not the one that was written"):
        pack.photo("photo-00005")
    assert pack.photo("photo-00002").size == (128, 96)
    (root / "cats" / THUMBNAILS).unlink()
    with pytest.raises(PackError, match=rf"{THUMBNAILS} is missing"):
        pack.photo("photo-00002")


@pytest.mark.parametrize("content", ["empty", "noise", "huge"])
def test_pictures_are_decoded_within_bounds(tmp_path, content):
    stream = io.BytesIO()
    Image.new("L", (20_000, 400)).save(stream, "JPEG")
    data = {"empty": b"\0", "noise": os.urandom(3000), "huge": stream.getvalue()}[content]
    with pack_writer(tmp_path / "pack") as writer:
        writer.add([explanation(0, metrics={})], data)
    with pytest.raises(PackError, match=r"picture of photo-00000 is damaged"):
        Pack(tmp_path / "pack").photo("photo-00000")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
@pytest.mark.parametrize("name", ["manifest.json", MAPS, ENTRIES, THUMBNAILS])
def test_links_out_of_a_pack_are_refused(tmp_path, root, name):
    outside = tmp_path / "outside"
    (root / "cats" / name).rename(outside)
    (root / "cats" / name).symlink_to(outside)
    library = Library(root)
    (info,) = library.packs()
    assert "link that leads out" in info.problem
    with pytest.raises(PackError, match="link that leads out"):
        library.open(info.id)


def test_a_link_to_another_folder_is_listed_and_refused(tmp_path, root, written):
    (root / "linked").symlink_to(written)
    (root / "photos").symlink_to(tmp_path)
    (root / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "cats")
    library = Library(root)
    infos = {info.name: info for info in library.packs()}
    assert len(infos) == 2 and "link that leads out" in infos["linked"].problem
    with pytest.raises(PackError, match="link that leads out"):
        library.open(infos["linked"].id)


def test_a_folder_that_becomes_a_link_is_refused(tmp_path, root, written):
    library = Library(root)
    (info,) = library.packs()
    library.open(info.id)
    shutil.rmtree(root / "cats")
    (root / "cats").symlink_to(written)
    with pytest.raises(PackError, match="link that leads out"):
        library.open(info.id)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["manifest.json", MAPS, ENTRIES, THUMBNAILS])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(root, name):
    (root / "cats" / name).unlink()
    os.mkfifo(root / "cats" / name)
    with pytest.raises(PackError, match="is not a regular file"):
        Pack(root / "cats").photo("photo-00000")


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.jpg", "maps-00000.safetensors/../../secret.jpg", "/etc/passwd", "..", ""),
        *("thumbnails-00000\\..\\secret.jpg", f"{MAPS}\0", f"maps-{'0' * 5000}.safetensors"),
        *("file:///etc/passwd", "C:\\secret.jpg"),
    ],
)
def test_no_path_of_a_manifest_leads_anywhere(root, path):
    edit(root / "cats", lambda manifest: manifest["shards"][0]["maps"].update(file=path))
    (info,) = Library(root).packs()
    assert info.problem is not None and "\n" not in info.problem


# ---------------------------------------------------------------------- keeping results


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *(
            (name, "letters")
            for name in ("", "..", "a/b", "../out", ".hidden", "a\\b", "a" * 81, "a.")
        ),
        *(
            ("jobs", "training jobs"),
            ("Jobs", "training jobs"),
            (" there ", "already a folder 'there'"),
        ),
    ],
)
def test_a_new_folder_has_a_free_name_that_is_no_path(tmp_path, name, says):
    (tmp_path / "there").mkdir()
    library = Library(tmp_path)
    with pytest.raises(ValueError, match=says):
        library.new_folder(name)
    assert library.new_folder(" my photos ") == library.root / "my photos"
