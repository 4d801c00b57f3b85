"""Cached features: equal to the backbone's pass, whole or not at all, bound to their key, killable."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_runs import dies_in_write, write_photos

import xattn
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.training import cache
from xattn.training import features as module
from xattn.training.features import cache_features


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", None, ["block.1", "head"], input_size=64)


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return xattn.load_backbone("test_efficientnet", None, ["stage.2", "head"], input_size=64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 7)


@pytest.fixture(scope="module")
def whole(vit, photos, tmp_path_factory):
    """The folder of a whole cache, to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "f"
    cached(vit, photos, folder)
    return folder


def cached(backbone, data, folder, **options):
    return cache_features(backbone, data, folder, **{"batch_size": 3, "progress": False, **options})


def same(a, b):
    a, b = (f.batch(range(len(f))) for f in (a, b))
    return all(
        torch.equal(x, y) for x, y in zip((*a.patches, a.prefix), (*b.patches, b.prefix), strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_features_are_those_of_the_backbone(name, request, photos, tmp_path):
    backbone = request.getfixturevalue(name)
    features = cached(backbone, photos, tmp_path / "f")
    assert len(features) == 7 and features.names == sorted(map(str, photos.iterdir()))
    images = [prepare(load_image(n), backbone.preprocessing)[0] for n in features.names]
    with torch.no_grad():
        taps = backbone(torch.stack(images))
    tokens = features.batch([5, 0, 2])
    grid = taps.maps[-1].shape[2:]
    assert tokens.grid == features.grid == tuple(grid)
    assert features.channels == backbone.channels
    for got, whole in zip(tokens.patches, taps.maps, strict=True):
        expected = F.adaptive_avg_pool2d(whole, grid).flatten(2).transpose(1, 2)[[5, 0, 2]]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    prefix = whole.new_zeros(7, 0, 0) if taps.prefix is None else taps.prefix
    assert features.prefix_tokens == prefix.shape[1] == backbone.prefix_tokens
    torch.testing.assert_close(tokens.prefix, prefix[[5, 0, 2]], atol=1e-5, rtol=1e-4)
    maps = features.taps([5, 0, 2]).maps
    torch.testing.assert_close(maps[-1], taps.maps[-1][[5, 0, 2]], atol=1e-5, rtol=1e-4)


def test_a_finished_cache_is_read_without_the_backbone(vit, photos, tmp_path, monkeypatch):
    first = cached(vit, photos, tmp_path / "f")
    monkeypatch.setattr(module, "_block_tokens", lambda *_: pytest.fail("computed again"))
    assert same(first, cached(vit, photos, tmp_path / "f"))


@pytest.mark.parametrize("size", [2, 7])
def test_the_batch_size_changes_nothing_but_rounding(vit, photos, tmp_path, size):
    a = cached(vit, photos, tmp_path / "a").batch(range(7)).patches[-1]
    b = cached(vit, photos, tmp_path / "b", batch_size=size).batch(range(7)).patches[-1]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_half_precision_takes_half_the_space(vit, photos, tmp_path):
    whole = cached(vit, photos, tmp_path / "a")
    half = cached(vit, photos, tmp_path / "b", dtype="float16")
    sizes = [sum(p.stat().st_size for p in (tmp_path / f).glob("rows-*")) for f in "ab"]
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.05)  # beside the headers
    got = half.batch([3]).patches[-1]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, whole.batch([3]).patches[-1], atol=1e-2, rtol=2e-3)


def test_unreadable_photos_are_listed_and_leave_the_others_alone(vit, photos, tmp_path):
    data = tmp_path / "p"
    shutil.copytree(photos, data)
    whole = cached(vit, data, tmp_path / "a")
    (data / "003.png").write_bytes(b"words")
    features = cached(vit, data, tmp_path / "b")
    assert len(features) == 6 and str(data / "003.png") not in features.names
    ((name, reason),) = features.skipped
    assert name.endswith("003.png") and "not an image" in reason
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(features.batch(range(6)).patches[-1], whole.batch(others).patches[-1])
    assert torch.equal(features.batch(range(6)).prefix, whole.batch(others).prefix)
    for path in data.iterdir():
        path.write_bytes(b"words")
    with pytest.raises(ValueError, match="none of the 7 images"):
        cached(vit, data, tmp_path / "c")


def test_views_are_random_crops_of_a_seed(vit, photos, tmp_path):
    one = cached(vit, photos, tmp_path / "a")
    three = cached(vit, photos, tmp_path / "b", views=3, seed=5)
    again = cached(vit, photos, tmp_path / "c", views=3, seed=5)
    other = cached(vit, photos, tmp_path / "d", views=3, seed=6)
    assert three.views == 3 and len(three) == 7
    index = list(range(7))
    assert torch.equal(one.batch(index).prefix, three.batch(index).prefix)
    for view in (1, 2):
        got = three.batch(index, view).prefix
        assert torch.equal(got, again.batch(index, view).prefix)
        assert not torch.allclose(got, one.batch(index).prefix)
        assert not torch.allclose(got, other.batch(index, view).prefix)
    mixed = three.batch([4, 4], torch.tensor([2, 0])).prefix
    assert torch.equal(mixed[0], three.batch([4], 2).prefix[0])
    assert torch.equal(mixed[1], three.batch([4], 0).prefix[0])


# ---------------------------------------------------------------- what a cache belongs to


def test_a_foreign_or_stale_cache_is_refused_with_both_keys(vit, cnn, photos, tmp_path):
    first = cached(vit, photos, tmp_path / "f")
    torch.manual_seed(1)
    other = xattn.load_backbone("test_vit", None, ["block.1", "head"], input_size=64)
    fewer = sorted(photos.iterdir())[:5]
    for arguments, words in [
        ((other, photos), [other.fingerprint, vit.fingerprint, "backbone"]),
        ((cnn, photos), ["test_vit", "test_efficientnet", "taps"]),
        ((vit.with_taps(["head"]), photos), ["taps", "block.1"]),
        ((vit, fewer), ["photos", '"count": 7', '"count": 5']),
    ]:
        with pytest.raises(ValueError, match="another folder") as error:
            cached(*arguments, tmp_path / "f")
        assert first.digest in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(ValueError, match="dtype"):
        cached(vit, photos, tmp_path / "f", dtype="float16")
    assert same(first, cached(vit, photos, tmp_path / "f"))


def test_the_key_depends_on_no_path(vit, photos, tmp_path):
    cached(vit, photos, tmp_path / "f")
    moved = tmp_path / photos.name
    shutil.copytree(photos, moved)
    features = cached(vit, moved, tmp_path / "f")
    assert features.names[0] == str(moved / "000.png")


def shard(folder, number=1):
    return sorted(folder.glob("rows-*"))[number]


@pytest.mark.parametrize("damage", ["short", "header", "gone", "renamed"])
def test_the_rows_of_a_damaged_shard_are_computed_again(
    vit, photos, whole, tmp_path, damage, counted
):
    folder = shutil.copytree(whole, tmp_path / "f")
    file, data = shard(folder), shard(folder).read_bytes()
    if damage == "short":
        file.write_bytes(data[:-4])
    elif damage == "header":
        file.write_bytes(b"x" + data[1:])
    elif damage == "renamed":
        file.rename(folder / "rows-00000001-00000004.safetensors")
    else:
        file.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = cached(vit, photos, folder)
    assert len(counted) == 1 and same(features, cached(vit, photos, whole))
    said = [
        str(w.message).startswith(f"features: these files in {folder} have changed since")
        for w in caught
    ]
    assert said == [True] * (damage != "gone")
    assert file.read_bytes() == data


def test_a_cache_names_three_damaged_files_and_counts_the_others(vit, photos, tmp_path):
    folder = tmp_path / "f"
    cached(vit, photos, folder, batch_size=1)  # a file for each photo
    for damaged, more in ((2, ""), (3, ""), (4, " and 1 more"), (5, " and 2 more")):
        files = sorted(folder.glob("rows-*"))[:damaged]
        for file in files:
            file.write_bytes(b"short")
        names = ", ".join(file.name for file in files[:3])
        with pytest.warns(UserWarning, match=f": {names}{more}; their rows are computed again"):
            cached(vit, photos, folder, batch_size=1)


@pytest.mark.parametrize("text", ["", '{"format": ', "[]", None])
def test_a_damaged_key_is_written_again_where_the_rows_are_of_it(
    vit, photos, whole, tmp_path, text, counted
):
    folder = shutil.copytree(whole, tmp_path / "f")
    (folder / "key.json").write_text(text) if text is not None else (folder / "key.json").unlink()
    with pytest.raises(ValueError, match="features: .*(damaged|holds no features)"):
        cached(vit, photos, folder, dtype="float16")
    with pytest.warns(UserWarning, match="key.json was damaged"):
        cached(vit, photos, folder)
    assert not counted and same(cached(vit, photos, folder), cached(vit, photos, whole))


@pytest.mark.parametrize("place", [0.2, 0.99])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_flipped_bit_is_noticed_when_its_shard_is_read(vit, photos, tmp_path, place, dtype):
    folder = tmp_path / "f"
    cached(vit, photos, folder, dtype=dtype, views=2)
    file = shard(folder, 4)  # photos 3 to 5 in the second view
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(place * (len(data) - header))] ^= 1
    file.write_bytes(data)
    features = cached(vit, photos, folder, dtype=dtype, views=2)
    intact = features.batch([0, 4, 6])
    assert torch.equal(intact.prefix, features.batch([0, 4, 6]).prefix)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"features: .*rows-00000010-.*cache again") as error:
            features.taps([0, 4, 6], torch.tensor([0, 1, 0]))
        assert "\n" not in str(error.value)


@pytest.fixture
def counted(monkeypatch):
    """One number for each block that is computed."""
    real, calls = module._block_tokens, []
    monkeypatch.setattr(module, "_block_tokens", lambda *args: (calls.append(1), real(*args))[1])
    return calls


def test_bad_arguments_and_folders(vit, photos, tmp_path):
    for options in ({"dtype": "int8"}, {"batch_size": 0}, {"views": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            cached(vit, photos, tmp_path / "f", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="contains no features"):
        cached(vit, photos, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        cached(vit, photos, tmp_path / "mine/notes.txt")


def test_features_that_are_not_finite_are_refused(vit, photos, tmp_path, monkeypatch):
    real = module._block_tokens

    def broken(*args):
        maps = [m.clone() for m in real(*args)]
        maps[0][1, 0, 0] = 1e6
        return maps

    monkeypatch.setattr(module, "_block_tokens", broken)
    with pytest.raises(ValueError, match=r"001.png are not finite in float16"):
        cached(vit, photos, tmp_path / "f", dtype="float16")


# ---------------------------------------------------------------- interrupts and full disks


@pytest.mark.parametrize("block", [0, 2])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    vit, photos, tmp_path, monkeypatch, block
):
    whole = cached(vit, photos, tmp_path / "a")
    real, calls = module._block_tokens, []

    def stop(*args):
        calls.append(1)
        if len(calls) == block + 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_block_tokens", stop)
        with pytest.raises(KeyboardInterrupt):
            cached(vit, photos, tmp_path / "b")
    calls.clear()
    monkeypatch.setattr(module, "_block_tokens", lambda *args: (calls.append(1), real(*args))[1])
    resumed = cached(vit, photos, tmp_path / "b")
    assert len(calls) == 3 - block
    assert same(whole, resumed)


@pytest.mark.parametrize("write", [2])
def test_a_run_that_dies_in_a_block_computes_the_block_again(vit, photos, tmp_path, write):
    with dies_in_write(write):
        cached(vit, photos, tmp_path / "b")
    assert same(cached(vit, photos, tmp_path / "a"), cached(vit, photos, tmp_path / "b"))
    assert not list((tmp_path / "b").glob(".*"))


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(vit, photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match="GB are free"):
            cached(vit, photos, tmp_path / "a")
    assert len(cached(vit, photos, tmp_path / "a", dtype="float16")) == 7  # nothing was stored yet

    real, calls = cache._store, []

    def full(*args):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_store", full)
        with pytest.raises(OSError, match=r"features: cannot write .*No space left"):
            cached(vit, photos, tmp_path / "b")
    assert same(cached(vit, photos, tmp_path / "c"), cached(vit, photos, tmp_path / "b"))


def test_two_runs_do_not_share_a_folder(vit, photos, tmp_path, held_elsewhere):
    with (
        held_elsewhere(tmp_path / "f"),
        pytest.raises(ValueError, match="features: another run"),
    ):
        cached(vit, photos, tmp_path / "f")
    whole = cached(vit, photos, tmp_path / "f")
    with held_elsewhere(tmp_path / "f"):
        assert same(whole, cached(vit, photos, tmp_path / "f"))  # many may read what is finished


def test_features_of_a_hugging_face_dataset_and_of_shards(vit, photos, tmp_path):
    datasets, webdataset = pytest.importorskip("datasets"), pytest.importorskip("webdataset")
    paths = sorted(map(str, photos.iterdir()))
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "hf")
    with webdataset.TarWriter(str(tmp_path / "s-0.tar")) as tar:
        for i, path in enumerate(paths):
            tar.write({"__key__": f"{i:03d}", "png": Path(path).read_bytes()})
    files = cached(vit, photos, tmp_path / "a")
    hf = cached(vit, f"hfds/{tmp_path}/hf", tmp_path / "b", workers=1)
    wds = cached(vit, f"wds/{tmp_path}/s-{{0..0}}.tar", tmp_path / "c", workers=2)
    assert same(files, hf) and same(files, wds)
    assert hf.names[2] == "row-2" and wds.names[2] == "s-0.tar#2"


def test_other_pixels_of_equal_size_are_other_photos(vit, tmp_path):
    folders = []
    for name, value in (("a", 20), ("b", 220)):
        folder = tmp_path / name / "photos"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), (value, value, value)).save(folder / "0.bmp")
        folders.append(folder)
    cache_features(vit, folders[0], tmp_path / "f", progress=False)
    with pytest.raises(ValueError, match="photos"):
        cache_features(vit, folders[1], tmp_path / "f", progress=False)
