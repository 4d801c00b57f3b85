"""Packs in an object store: what is fetched, and what is said of one that cannot be read."""

import numpy as np
import pytest
from object_stores import upload
from small_explanations import make

from xattn.cli import main
from xattn.packs.contained_files import PackError, RemoteFolder
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import pack_writer, save_pack
from xattn.runtime.stores import resolve_place


@pytest.fixture
def pack(tmp_path, bucket):
    """The URL of a pack of two photos, and what it holds."""
    found = [make("cat", 3, seed=1), make("cat", 4, seed=2), make("dog", 3, seed=3)]
    return upload(save_pack(tmp_path / "pack", found), f"{bucket}/runs/pack"), found


def test_a_pack_is_read_as_from_a_folder(pack):
    url, given = pack
    found = load_pack(url)
    assert [e.id for e in found] == [e.id for e in given]
    assert all(np.array_equal(a.map, b.map) for a, b in zip(found, given, strict=True))
    assert found[0].photo().size == (90, 60) and found[2].file_name == "dog.png"
    opened = Pack(resolve_place(url))
    assert opened.folder is None and opened.name == "pack" and len(opened.entries) == 3
    assert opened.photo("cat").size == (90, 60) and opened.video is None


def test_a_pack_of_several_shards_is_read_as_from_a_folder(tmp_path, bucket):
    given = [make("cat", 3, seed=1), make("cat", 4, seed=2), make("dog", 3, seed=3)]
    with pack_writer(tmp_path / "pack", photos=1) as writer:
        writer.add(given[:2])
        writer.add(given[2:])
    url = upload(tmp_path / "pack", f"{bucket}/runs/shards")
    found = load_pack(url)
    assert all(np.array_equal(a.map, b.map) for a, b in zip(found, given, strict=True))
    assert found[0].photo().size == (90, 60)
    opened = Pack(resolve_place(url))
    assert list(opened.entries.index) == [e.id for e in given]


def test_a_map_costs_its_own_bytes(tmp_path, bucket, fetched):
    maps = [make("cat", i, seed=i) for i in range(5)]
    for e in maps:
        object.__setattr__(e, "map", np.random.default_rng(e.target).random((200, 300)))
    url = upload(save_pack(tmp_path / "pack", maps), f"{bucket}/pack")
    opened = Pack(resolve_place(url))
    wanted = opened.entry_ids[3]
    assert opened.key(wanted)[0] == "cat" and opened.has_photo("cat")
    fetched.clear()
    found = opened.explanation(wanted)
    assert fetched == [("maps-00000.safetensors", 200 * 300 * 4)]
    assert np.array_equal(found.map, maps[3].map.astype(np.float32))
    fetched.clear()
    data = opened.photo_bytes("cat")
    assert fetched == [("thumbnails-00000.safetensors", len(data))]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a//b", "a/../../b", "a\\b", "a?v=1"])
def test_a_name_cannot_lead_out_of_the_folder(name):
    folder = RemoteFolder(resolve_place("memory://closed/pack"))
    for question in (folder.exists, folder.size, lambda n: folder.read(n, 9)):
        with pytest.raises(PackError, match="cannot be the name of a file of a pack"):
            question(name)


def test_a_part_of_a_file_is_read_and_no_more_than_the_limit(bucket):
    place = resolve_place(f"{bucket}/pack")
    data = np.random.default_rng(0).bytes(1_500_000)
    (place / "big").write(data)
    folder = RemoteFolder(place)
    assert folder.size("big") == len(data) and folder.exists("big") and not folder.exists("none")
    assert folder.part("big", 8, 100_008) == data[8:100_008]
    assert folder.part("big", len(data) - 5, len(data) + 5) == data[-5:]
    assert folder.read("big", len(data)) == data
    (place / "small").write(data[:2000])
    for name, size in (("big", "1,500,000"), ("small", "2,000")):
        with pytest.raises(PackError, match=rf"^{name} has {size} bytes, over the limit of 1,000$"):
            RemoteFolder(place).read(name, 1000)
    with pytest.raises(
        PackError, match=r"^memory://.*/pack/none is missing; upload the pack again"
    ):
        folder.size("none")


def test_a_store_that_stops_answering_is_named(pack, impatient, monkeypatch):
    url, _ = pack
    opened = Pack(resolve_place(url))
    monkeypatch.setattr("xattn.runtime.stores.file_system", broken)
    with pytest.raises(
        PackError, match=r"^memory://bucket-\w+ does not answer \(the line is cut; 2 att"
    ):
        opened.explanation(opened.entry_ids[0])
    with pytest.raises(ValueError, match=r"^pack: memory://bucket-\w+ does not answer"):
        load_pack(url)
    monkeypatch.undo()
    assert opened.explanation(opened.entry_ids[0]).id == "cat@3.head"


def broken(scheme):
    class Broken:
        async_impl = False

        def __getattr__(self, name):
            if name == "_strip_protocol":
                return lambda url: url
            if name == "invalidate_cache":
                return lambda: None
            raise ConnectionResetError("the line is cut")

    return Broken()


def test_what_is_not_there_is_said(bucket):
    with pytest.raises(ValueError, match=r"^pack: memory://.*/none/manifest.json is missing"):
        load_pack(f"{bucket}/none")


def test_a_film_is_copied_once_and_goes_with_its_folder(bucket, tmp_path, fetched):
    (tmp_path / "film.mp4").write_bytes(b"a film" * 1000)
    written = save_pack(tmp_path / "pack", [make("cat")], video=tmp_path / "film.mp4")
    opened = Pack(resolve_place(upload(written, f"{bucket}/pack")))
    film = opened.video
    assert film.read_bytes() == b"a film" * 1000
    fetched.clear()
    assert opened.video == film and fetched == []
    opened.files._copies.cleanup()
    film.parent.mkdir()
    film.write_bytes(b"another film")
    with pytest.raises(PackError, match="is not the film that was written"):
        _ = opened.video


def test_packs_of_a_store_are_merged_into_one_there(pack, bucket, tmp_path, capsys):
    url, _ = pack
    save_pack(tmp_path / "other", [make("owl", 3, seed=9)])
    words = ["merge", url, str(tmp_path / "other"), "--output", f"{bucket}/merged"]
    assert main(words) == 0
    assert f"pack: {bucket}/merged" in capsys.readouterr().out
    merged = Pack(resolve_place(f"{bucket}/merged"))
    assert sorted(merged.images.index) == ["cat", "dog", "owl"]
    assert merged.explanation(merged.entry_ids[0]).map.shape == (7, 5)
    assert merged.photo("owl").size == (90, 60)
    assert main(words) == 2 and "already holds results" in capsys.readouterr().err


def test_diff_compares_packs_of_a_store_with_local_ones(pack, tmp_path, capsys):
    url, _ = pack
    save_pack(tmp_path / "other", [make("cat", 3, seed=9), make("dog", 3, seed=3)])
    assert main(["diff", url, str(tmp_path / "other")]) == 0
    assert "photos" in capsys.readouterr().out
    assert main(["diff", url, f"{url}-none"]) == 2
    assert "packs: memory://" in capsys.readouterr().err
