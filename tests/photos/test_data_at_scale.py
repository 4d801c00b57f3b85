"""Hugging Face datasets and webdataset shards: the same photos, the same training, exact resume."""

from __future__ import annotations

import gc
import io
import json
import pickle
import shutil
import sys
import tarfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

import xattn
from xattn.config import TrainConfig
from xattn.eval import evaluate
from xattn.heads import create_head
from xattn.photos import shards as shards_module
from xattn.photos.sources import open_photos
from xattn.training import fit
from xattn.training.data import epoch_batches, steps_per_epoch
from xattn.training.objectives.mask import Mask

COUNT = 14


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)


@pytest.fixture(scope="module")
def photos():
    """Photos of several shapes as PNG bytes, so that every container holds the same pixels."""
    found = []
    for i in range(COUNT):
        noise = np.random.default_rng(i).integers(0, 256, (9, 12 + i % 3, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((70 + 3 * i, 50)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def write_files(folder, photos):
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(photos):
        (folder / f"{i:03d}.png").write_bytes(data)
    return folder


def write_shards(folder, photos, lengths=(5, 4, 5), info=True):
    """Shards as webdataset writes them; ``_info.json`` as timm reads it."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    names, at = [], iter(enumerate(photos))
    for number, length in enumerate(lengths):
        names.append(f"photos-{number:04d}.tar")
        with webdataset.TarWriter(str(folder / names[-1])) as writer:
            for _ in range(length):
                i, data = next(at)
                writer.write({"__key__": f"{i:03d}", "cls": str(i), "png": data})
    if info:
        split = {
            "name": "train",
            "filenames": names,
            "shard_lengths": list(lengths),
            "num_samples": sum(lengths),
        }
        (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory, photos):
    """One dataset of each kind, by name; all of them hold the same photos in the same order."""
    root = tmp_path_factory.mktemp("stored")
    write_files(root / "folder/train", photos)
    kinds = {"folder": str(root / "folder/train")}
    write_shards(root / "shards", photos)
    kinds["wds"] = f"wds/{root}/shards:train"
    kinds["wds in braces"] = f"wds/{root}/shards/photos-{{0000..0002}}.tar"
    try:
        import datasets
    except ImportError:
        return kinds
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        cells = [{"bytes": data, "path": None} for data in photos]
        data = datasets.Dataset.from_dict(
            {"image": cells, "label": list(range(COUNT))},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.Value("int64")}
            ),
        )
        data.save_to_disk(str(root / "saved"))
        datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(
            str(root / "splits")
        )
        (root / "parquet").mkdir()
        renamed = data.rename_column("image", "picture").remove_columns("label")
        renamed.to_parquet(str(root / "parquet/train-00000-of-00001.parquet"))
        kinds["hfds saved"] = f"hfds/{root}/saved"
        kinds["hfds splits"] = f"hfds/{root}/splits:train"
        kinds["hfds parquet"] = f"hfds/{root}/parquet"
        kinds["hfds folder"] = f"hfds/{root}/folder"
        yield kinds


KINDS = ["wds", "wds in braces", "hfds saved", "hfds splits", "hfds parquet", "hfds folder"]


def get(stored, kind):
    if kind not in stored:
        pytest.skip("needs datasets")
    return stored[kind]


def fresh(backbone, seed=3):
    torch.manual_seed(seed)
    return create_head("ttame", backbone)


def assert_equal_heads(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_photos(stored, photos, kind, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 2)
    found = open_photos(get(stored, kind))
    assert len(found) == COUNT
    for photo, data in zip(found, photos, strict=True):
        assert photo.load().tobytes() == Image.open(io.BytesIO(data)).tobytes()
    again = [p.load().size for p in found[::-1]]  # backwards too
    assert again == [p.load().size for p in found][::-1]
    assert len({photo.name for photo in found}) == COUNT
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda photo: photo.load().size, found))
    assert at_once == again[::-1]
    with pytest.raises(ValueError, match=r"(004|row-4)\b.*max_pixels=100"):
        found[4].load(max_pixels=100)


def test_a_split_is_chosen_by_name(stored):
    data = get(stored, "hfds splits").removesuffix(":train")
    assert len(open_photos(data + ":test")) == 1 and len(open_photos(data)) == COUNT
    parquet = get(stored, "hfds parquet")
    assert len(open_photos(parquet + ":train[:5]")) == 5
    with pytest.raises(ValueError, match="no data|is empty"):
        open_photos(parquet + ":train[:0]")


@pytest.mark.parametrize("kind", ["wds", "hfds splits", "hfds saved", "hfds parquet"])
def test_an_unknown_split_is_one_line_that_names_the_known(stored, kind):
    data = get(stored, kind).removesuffix(":train")
    with pytest.raises(ValueError, match="^data: .*(train|None).*:SPLIT") as error:
        open_photos(data + ":nothing")
    assert "\n" not in str(error.value)


def test_shards_that_are_named_one_by_one_have_no_split(stored):
    with pytest.raises(ValueError, match="^data: got the split 'val' of shards .*leave it out"):
        open_photos(get(stored, "wds in braces") + ":val")


def test_missing_data_is_one_line_with_a_remedy(tmp_path, photos):
    pytest.importorskip("webdataset")
    for scheme in ("hfds", "wds"):
        with pytest.raises(FileNotFoundError, match=f"^data: no folder.*{scheme}/"):
            open_photos(f"{scheme}/{tmp_path}/nowhere")
    folder = write_shards(tmp_path / "s", photos)
    (folder / "photos-0001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 shards.*0001.*_info.json"):
        open_photos(f"wds/{folder}")
    with pytest.raises(FileNotFoundError, match="1 of 3 shards"):
        open_photos(f"wds/{folder}/photos-{{0000..0002}}.tar")
    (folder / "_info.json").unlink()
    with pytest.raises(ValueError, match=r"no _info.json.*braces"):
        open_photos(f"wds/{folder}")
    (folder / "photos-0001.tar").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match="photos-0001.tar is damaged"):
        open_photos(f"wds/{folder}/photos-{{0000..0002}}.tar")
    write_shards(tmp_path / "none", [], (0,))
    with pytest.raises(ValueError, match="no sample"):
        open_photos(f"wds/{tmp_path}/none")
    for length in (-3, "3", None, 2.5, 10**30):
        write_shards(tmp_path / "odd", photos[:3], (3,))
        info = json.loads((tmp_path / "odd" / "_info.json").read_text())
        info["splits"]["train"]["shard_lengths"] = [length]
        (tmp_path / "odd" / "_info.json").write_text(json.dumps(info))
        with pytest.raises(ValueError, match="_info.json of .* not numbers of samples"):
            open_photos(f"wds/{tmp_path}/odd")
    with pytest.raises(ValueError, match="more than 1000000 shards"):
        open_photos(f"wds/{folder}/{{0..9999}}-{{0..9999}}.tar")
    with pytest.raises(ValueError, match="data: .* close its braces"):
        open_photos(f"wds/{folder}/{{0..1.tar")
    with pytest.raises(ValueError, match="lengths.*_info.json"):
        open_photos("wds/https://example.invalid/photos-{0000..0002}.tar")
    with pytest.raises(ValueError, match="hfids.*hfds/"):
        open_photos("hfids/some/name")


def test_a_dataset_without_photos_says_what_it_has(tmp_path):
    datasets = pytest.importorskip("datasets")
    text = datasets.Dataset.from_dict({"text": ["a"]})
    text.save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"image columns \[\]"):
        open_photos(f"hfds/{tmp_path}/text")


@pytest.mark.parametrize(("scheme", "module"), [("hfds", "datasets"), ("wds", "webdataset")])
def test_a_missing_extra_is_named(monkeypatch, scheme, module):
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r'pip install "xattn\[data\]"'):
        open_photos(f"{scheme}/anything")


# ---------------------------------------------------------------- streams


@pytest.fixture
def served(tmp_path):
    """A folder and the address where a local server offers it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs by curl")
def test_shards_are_streamed_from_a_url(served, photos):
    folder, url = served
    write_shards(folder / "s", photos)
    found = open_photos(f"wds/{url}/s:train")
    assert [p.load().tobytes() for p in found] == [
        Image.open(io.BytesIO(data)).tobytes() for data in photos
    ]
    found.close()
    (folder / "s/photos-0001.tar").unlink()
    for photo in found:
        if photo.name.startswith("photos-0001"):
            with pytest.raises(ValueError, match=f"^image: {photo.name} is missing"):
                photo.load()
        else:
            photo.load()
    with pytest.raises(ValueError, match="split other not found.*train"):
        open_photos(f"wds/{url}/s:other")


@pytest.mark.parametrize(
    ("lengths", "batch", "ranks", "streams"),
    [((5, 4, 5), 2, 1, 1), ((5, 4, 5), 2, 2, 2), ((7, 1, 9, 3), 3, 2, 3), ((3,), 2, 2, 4)],
)
def test_streams_share_out_every_sample_once_in_equally_many_steps(lengths, batch, ranks, streams):
    shards = shards_module.Shards([f"{i}.tar" for i in range(len(lengths))], lengths)
    for epoch in (0, 1):
        plans = [epoch_batches(shards, batch, 0, epoch, 0, r, ranks, streams) for r in range(ranks)]
        steps = steps_per_epoch(sum(lengths), batch, ranks)
        assert [len(plan) for plan in plans] == [steps] * ranks
        given = [i for plan in plans for keys in plan for _, i in keys]
        assert sorted(given) == list(range(sum(lengths)))
        sizes = [[len(keys) for keys in plan] for plan in plans]
        assert all(n == batch for plan in sizes for n in plan[:-1])
        assert max(p[-1] for p in sizes) - min(p[-1] for p in sizes) <= 1
        assert epoch_batches(shards, batch, 0, epoch, 1, 0, ranks, streams) == plans[0][1:]
    assert shards.order(0, 0) != shards.order(0, 1) != shards.order(1, 1)


def count_opened(monkeypatch):
    opened, shard = [], shards_module._Shard
    monkeypatch.setattr(shards_module, "_Shard", lambda url: opened.append(url) or shard(url))
    return opened


def test_a_shard_is_opened_once_by_the_stream_that_reads_it(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 3)
    opened = count_opened(monkeypatch)
    found = open_photos(f"wds/{write_shards(tmp_path / 's', photos)}")
    plan = epoch_batches(found, 2, 0, 0, streams=2)
    for worker in (0, 1):  # as the loader deals batches out
        for keys in plan[worker::2]:
            for _, i in keys:
                found.load(i)
        found.close()
    assert len(opened) == 4  # three shards, one of them in two pieces
    opened.clear()
    for keys in plan[4:]:  # one worker takes both streams over
        found.open_shards = 2
        for _, i in keys:
            found.load(i)
    assert len(opened) == len(set(opened)) <= 3


def test_a_shard_that_is_left_is_closed_at_once(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 2)
    found = open_photos(f"wds/{write_shards(tmp_path / 's', photos)}")
    gc.disable()
    try:
        found.load(0)
        left = weakref.ref(found._open[0]._samples)
        found.load(7)
        assert left() is None
        left = weakref.ref(found._open[1]._samples)
        found.close()
        assert left() is None
    finally:
        gc.enable()


def test_photos_of_an_open_shard_can_be_pickled(tmp_path, photos):
    found = open_photos(f"wds/{write_shards(tmp_path / 's', photos)}")
    expected = found[3].load()
    assert pickle.loads(pickle.dumps(found[3])).load().tobytes() == expected.tobytes()
    assert found._open


def test_unreadable_samples_are_listed_by_shard_and_key(tmp_path, backbone, photos):
    broken = [*photos[:7], b"no picture", *photos[8:]]
    folder = write_shards(tmp_path / "s", broken)
    with tarfile.open(folder / "photos-0000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("zzz.txt"))  # a sample without an image
    cut = folder / "photos-0002.tar"
    size = cut.stat().st_size
    with cut.open("r+b") as file:  # the last samples are lost
        file.truncate(size // 2)
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"][0] = 6
    (folder / "_info.json").write_text(json.dumps(info))
    config = TrainConfig(epochs=2, batch_size=4, workers=0)
    result = fit(fresh(backbone), backbone, f"wds/{folder}", config, progress=False)
    names, reasons = zip(*result.skipped, strict=True)
    assert names == (
        "photos-0000.tar#5", "photos-0001.tar#2", *(f"photos-0002.tar#{i}" for i in (2, 3, 4))
    )  # fmt: skip
    assert reasons[0] == "image: photos-0000.tar/zzz has no image"
    assert reasons[1].startswith("image: photos-0001.tar/007.png is not an image that can be read")
    assert "photos-0002.tar/011 has no image, the shard is cut (ReadError" in reasons[2]
    assert all("missing, the shard ended early (ReadError" in reason for reason in reasons[3:])
    assert result.head.summary["skipped"] == len(names)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["hfds saved", "hfds folder"])
def test_training_on_a_dataset_equals_training_on_its_files(stored, backbone, kind):
    config = TrainConfig(epochs=1, batch_size=4, workers=2, lr=0.01)
    a = fit(fresh(backbone), backbone, stored["folder"], config, progress=False)
    b = fit(fresh(backbone), backbone, get(stored, kind), config, progress=False)
    assert_equal_heads(a.head, b.head)


class Killed(BaseException):
    """Ends a run as SIGKILL would: no handler, no checkpoint."""


def kill_at(monkeypatch, step):
    calls, on_photos = [], Mask.on_photos

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return on_photos(*args, **kwargs)

    monkeypatch.setattr(Mask, "on_photos", killing)


@pytest.mark.parametrize("kind", ["wds", "hfds saved"])
@pytest.mark.parametrize("workers", [(0, 0), (2, 0)], ids=["0", "2 then 0"])
def test_a_killed_run_resumes_to_bit_identical_weights(
    tmp_path, stored, backbone, monkeypatch, kind, workers
):
    data = get(stored, kind)
    settings = {"epochs": 2, "batch_size": 2, "lr": 0.01, "checkpoint_every": 2}
    before, after = (TrainConfig(workers=n, **settings) for n in workers)
    whole = fit(fresh(backbone), backbone, data, before, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 10)
        fit(fresh(backbone), backbone, data, before, output=tmp_path / "run", progress=False)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000008\n"
    opened = count_opened(monkeypatch)
    resumed = fit(
        fresh(backbone, 9), backbone, data, after, output=tmp_path / "run", resume=True,
        progress=False,
    )  # fmt: skip
    assert_equal_heads(whole.head, resumed.head)
    assert len(opened) <= 4  # three shards, one of them in two pieces
    steps = [json.loads(x)["step"] for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, whole.steps + 1))


@pytest.mark.parametrize("kind", ["wds", "hfds saved"])
def test_resume_on_other_data_is_refused(tmp_path, stored, photos, backbone, kind):
    data = get(stored, kind)
    config = TrainConfig(epochs=1, batch_size=7, workers=0)
    fit(fresh(backbone), backbone, data, config, output=tmp_path / "run", progress=False)
    if kind == "wds":
        other = f"wds/{write_shards(tmp_path / 's', photos, (4, 5, 5))}"
    else:
        import datasets

        cells = [{"bytes": p, "path": None} for p in [*photos[1:], photos[0]]]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(
            str(tmp_path / "s")
        )
        other = f"hfds/{tmp_path}/s"
    for changed in (other, stored["folder"]):
        with pytest.raises(ValueError, match="resume: .*other settings"):
            fit(fresh(backbone), backbone, changed, config, output=tmp_path / "run", resume=True,
                progress=False)  # fmt: skip
    fit(
        fresh(backbone),
        backbone,
        data,
        config,
        output=tmp_path / "run",
        resume=True,
        progress=False,
    )


# ---------------------------------------------------------------- explaining and evaluating


@pytest.mark.parametrize("kind", ["wds", "hfds saved", "hfds folder"])
def test_stored_photos_are_explained_and_evaluated_like_files(tmp_path, stored, backbone, kind):
    options = {"explainer": "gradcam", "batch_size": 4}
    files = xattn.explain(stored["folder"], backbone, **options)
    found = xattn.explain(get(stored, kind), backbone, output=tmp_path / "pack", **options)
    for a, b in zip(files, found, strict=True):
        assert np.array_equal(a.map, b.map) and a.target == b.target
        assert a.photo().tobytes() == b.photo().tobytes()
    assert len({e.image_id for e in found}) == COUNT
    assert [e.file_name for e in found][3].endswith(("#3", "-3"))
    assert len(xattn.load_pack(tmp_path / "pack")) == COUNT

    methods = {"gradcam": xattn.create_explainer("gradcam", backbone)}
    a, b = (
        evaluate(backbone, methods, data, progress=False)
        for data in (stored["folder"], stored[kind])
    )
    assert a.mean("gradcam", "AD", 1.0) == b.mean("gradcam", "AD", 1.0)
