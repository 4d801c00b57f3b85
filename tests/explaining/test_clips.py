"""Clips: decoded in batches, explained like photos, written as a film and a pack, whatever breaks."""

import os
import signal
import warnings
import weakref
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from xattn.explainers import Explainer
from xattn.explaining import clips
from xattn.explaining.clips import explain_video
from xattn.explaining.photos import explain
from xattn.packs.format import read_manifest
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.clip import Clip
from xattn.photos.image_names import is_video
from xattn.pictures.overlay import overlay


def textures(count, size, seed=0):
    """Blocks of colour that drift, as RGB frames."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((2 * size[0], size[1]))
    for i in range(count):
        yield np.roll(np.asarray(image), 3 * i, 1)[:, : size[0]]


def write(path, frames, size, fps=25.0, codec="mp4v", backend=cv2.CAP_FFMPEG):
    writer = cv2.VideoWriter(str(path), backend, cv2.VideoWriter.fourcc(*codec), fps, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def clip(path, count=12, size=(64, 48), **options):
    return write(path, textures(count, size), size, **options)


def read(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    assert capture.isOpened()
    while True:
        valid, frame = capture.read()
        if not valid:
            return frames
        frames.append(Image.fromarray(frame[..., ::-1].copy()))


class Half(Explainer):
    """Hot on the left; the class is 1 for bright frames; stops at call ``fail_at`` with ``error``."""

    name = "half"
    fail_at, error, calls, scale = 10**9, KeyboardInterrupt(), 0, 1.0

    def _attribute(self, images, target):
        maps = torch.zeros(len(images), 1, 4, 4)
        maps[..., :2] = self.scale * (1 + images.mean((1, 2, 3))[:, None, None, None])
        return maps

    def _attribute_classes(self, images, choose):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        logits = torch.zeros(len(images), 7)
        logits[range(len(images)), (images.mean((1, 2, 3)) > 0.5).long()] = 3.0
        classes = self._chosen(choose, logits)
        return (
            logits,
            classes,
            self._attribute(images, classes[:, 0]).expand(-1, classes.shape[1], -1, -1),
        )


def test_clips_are_told_by_their_name():
    assert is_video("a/b.MP4") and is_video("x.webm") and is_video("x.tar.avi")
    assert not any(map(is_video, ("x.jpg", "x.gif", "mp4", "list.txt", "folder.mp4/x.png")))


# ---------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("options", [{}, {"top": 2, "view": "crop"}, {"classes": ["fox", 2]}])
def test_frames_are_explained_as_photos_are(backbone, head, tmp_path, options):
    path = clip(tmp_path / "clip.mp4", 7)
    found = explain_video(path, backbone, head, output=tmp_path / "pack", batch_size=3, **options)
    single = explain(read(path), backbone, head, **{"view": "whole", **options})
    assert len(found) == len(single) == 7 * (2 if options else 1)
    for a, b in zip(found, single, strict=True):
        assert np.abs(a.map - b.map).max() <= 1e-6 * max(np.abs(b.map).max(), 1)
        assert abs(a.probability - b.probability) < 1e-6
        assert (a.target, a.view, a.method) == (b.target, b.view, b.method)
    step = len(found) // 7
    assert [e.image_id for e in found[::step]] == [f"frame-{i:06d}" for i in range(7)]
    assert (found.frames, found.announced, found.fps, found.skipped) == (7, 7, 25.0, [])
    loaded = load_pack(tmp_path / "pack")
    assert [e.id for e in loaded] == [e.id for e in found]
    assert all(np.array_equal(a.map, b.map) for a, b in zip(loaded, found, strict=True))
    assert loaded[0].file_name == "clip.mp4" and loaded[0].photo().size == (64, 48)
    assert loaded[0].protocol["video"] == {"fps": 25.0, "every": 1, "smoothing": 0.0}
    assert loaded[0].protocol["classes"] == ("named" if "classes" in options else "top")
    assert read_manifest(tmp_path / "pack")["video"]["file"] == "overlay.mp4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "pack"]


@pytest.mark.parametrize("size", [(64, 48), (65, 47), (64, 47), (1, 1)])
def test_the_film_has_the_clips_frames_rate_and_even_size(backbone, tmp_path, size):
    path = clip(tmp_path / "c.avi", 5, size, codec="MJPG", fps=12, backend=cv2.CAP_OPENCV_MJPEG)
    assert read(path)[0].size == size
    found = explain_video(path, backbone, explainer="centre", output=tmp_path / "pack")
    assert found[0].view.photo_size == size[::-1] and found[0].photo().size == size
    film = read(tmp_path / "pack" / "overlay.mp4")
    assert len(film) == 5 and {f.size for f in film} == {tuple(s + s % 2 for s in size)}
    capture = cv2.VideoCapture(str(tmp_path / "pack" / "overlay.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 12
    first = np.asarray(film[0]).astype(int)
    assert size[0] % 2 == 0 or np.abs(first[:, -1] - first[:, -2]).mean() < 8
    assert size[1] % 2 == 0 or np.abs(first[-1] - first[-2]).mean() < 8


def test_a_stream_without_a_frame_count_is_explained_to_its_end(backbone, tmp_path):
    with open(tmp_path / "c.mjpeg", "wb") as file:
        for frame in textures(5, (65, 47)):
            Image.fromarray(frame).save(file, "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain_video(tmp_path / "c.mjpeg", backbone, explainer="centre", batch_size=2)
    assert len(found) == found.frames == 5 and found.announced == 0


def test_the_film_is_coloured_where_the_map_is_hot(backbone, tmp_path):
    grey = [np.full((96, 128, 3), 110, np.uint8)] * 4
    path = write(tmp_path / "grey.mp4", grey, (128, 96))
    found = explain_video(path, backbone, explainer=Half(backbone), output=tmp_path / "pack")
    film = np.stack([np.asarray(f) for f in read(tmp_path / "pack" / "overlay.mp4")]).astype(int)
    expected = np.asarray(overlay(read(path)[0], found[0].on_photo())).astype(int)
    above = slice(0, 60)  # the caption is below
    assert np.abs(film[:, above] - expected[above]).mean() < 4
    hot, cold = film[:, above, 4:40].mean((0, 1, 2)), film[:, above, 88:124].mean((0, 1, 2))
    assert hot[0] > cold[0] + 80 and hot[1] > cold[1] + 80
    explain_video(path, backbone, explainer=Half(backbone), output=tmp_path / "b", overlays=False)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "entries-00000.parquet",
        "images-00000.parquet",
        "manifest.json",
        "maps-00000.safetensors",
        "thumbnails-00000.safetensors",
    ]


def test_the_caption_names_the_most_probable_class_where_it_fits(backbone, tmp_path):
    e = explain(Image.new("RGB", (320, 240), "white"), backbone, explainer="ones")[0]
    white = Image.new("RGB", (320, 240), "white")

    def box(name="fox", probability=0.5, image=white):
        drawn = clips._caption(image.copy(), replace(e, target_name=name, probability=probability))
        return np.argwhere((np.asarray(drawn) != 255).any(-1)), drawn

    (top, left), (bottom, right) = (f(box()[0], 0) for f in (np.min, np.max))
    assert top > 200 and left < 12 and bottom < 240 and 60 < right < 160
    assert box("a very long name of a class that never ends, ever")[0].max(0)[1] < 320
    assert np.array_equal(box("owl, bird of prey")[1], box("owl")[1])
    assert not np.array_equal(box()[1], box(probability=0.4)[1])
    assert not np.array_equal(box()[1], box("box")[1])
    assert box(image=Image.new("RGB", (80, 47), "white"))[0].size == 0

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "_caption", lambda image, e: (seen.append(e), image)[1])
        path = write(tmp_path / "c.mp4", [np.full((48, 64, 3), 250, np.uint8)] * 2, (64, 48))
        explain_video(path, backbone, None, Half(backbone), [0, 1, 2], output=tmp_path / "pack")
    assert [e.target for e in seen] == [1, 1]


def test_a_longer_clip_shows_stills_spread_evenly(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "STILLS", 2)
    path = clip(tmp_path / "c.mp4", 19)
    found = explain_video(path, backbone, explainer="centre", output=tmp_path / "pack")
    assert len(found) == 19
    shown = [e.image_id for e in found if e.source is not None]
    assert shown == [f"frame-{i:06d}" for i in (0, 8, 16)]
    assert len(list((tmp_path / "pack" / "overlays").iterdir())) == 3
    photos = read(path)
    for e in found:
        if e.source is not None:
            difference = np.asarray(e.photo()).astype(int) - np.asarray(photos[int(e.image_id[6:])])
            assert np.abs(difference).mean() < 6


def test_every_nth_frame_plays_at_the_clips_pace(backbone, head, tmp_path):
    path = clip(tmp_path / "c.mp4", 10)
    found = explain_video(path, backbone, head, output=tmp_path / "pack", every=4)
    assert [e.image_id for e in found] == ["frame-000000", "frame-000004", "frame-000008"]
    assert found.frames == 10 and found.skipped == []
    single = explain(read(path)[8], backbone, head, view="whole")
    assert np.allclose(found[2].map, single[0].map, atol=1e-6)
    capture = cv2.VideoCapture(str(tmp_path / "pack" / "overlay.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 6.25 and capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_a_clip_without_output_writes_nothing(backbone, head, tmp_path):
    path = clip(tmp_path / "c.mp4", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain_video(str(path), backbone, head, classes="owl", every=1000)
    assert [e.target_name for e in found] == ["owl"] and found[0].source is None
    assert [p.name for p in tmp_path.iterdir()] == ["c.mp4"]


def test_rotation_metadata_is_applied(backbone, tmp_path):
    left = np.zeros((48, 64, 3), np.uint8)
    left[:, :32] = 255
    data = bytearray(write(tmp_path / "c.mp4", [left] * 3, (64, 48)).read_bytes())
    matrix = data.find(b"tkhd") + 44
    numbers = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    (tmp_path / "c.mp4").write_bytes(data)
    found = explain_video(tmp_path / "c.mp4", backbone, explainer="ones", output=tmp_path / "pack")
    assert found[0].view.photo_size == (64, 48)
    film = np.asarray(read(tmp_path / "pack" / "overlay.mp4")[0]).astype(int)
    assert film.shape == (64, 48, 3)
    photo = np.asarray(found[0].photo()).astype(int)
    assert photo[:30].mean() > 220 and photo[34:].mean() < 35


def test_a_photo_pack_in_the_same_folder_leaves_no_film_behind(backbone, tmp_path):
    found = explain_video(
        clip(tmp_path / "c.mp4", 2), backbone, explainer="ones", output=tmp_path / "pack"
    )
    assert (tmp_path / "pack" / "overlay.mp4").is_file()
    save_pack(tmp_path / "pack", [replace(found[0], source=None)])
    assert not (tmp_path / "pack" / "overlay.mp4").exists()
    assert read_manifest(tmp_path / "pack")["video"] is None


# ---------------------------------------------------------------------- smoothing


def test_smoothing_is_an_exponential_average_of_raw_maps(backbone, head, tmp_path):
    path = clip(tmp_path / "c.mp4", 6)
    raw = explain_video(path, backbone, head, classes=[3, 5])
    smooth = explain_video(path, backbone, head, classes=[3, 5], smoothing=0.7, batch_size=2)
    for target in (3, 5):
        expected = None
        for a, b in zip(raw, smooth, strict=True):
            if a.target == target:
                expected = a.map if expected is None else 0.7 * expected + 0.3 * a.map
                assert np.allclose(b.map, expected, rtol=1e-5, atol=1e-6)
    assert smooth[0].protocol["video"]["smoothing"] == 0.7
    assert not np.allclose(raw[-1].map, smooth[-1].map, atol=1e-4)


def test_smoothing_leaves_a_constant_sequence_as_it_is(backbone, head, tmp_path):
    path = write(tmp_path / "c.avi", [next(textures(1, (64, 48)))] * 9, (64, 48), codec="MJPG")
    raw = explain_video(path, backbone, head, batch_size=1)
    smooth = explain_video(path, backbone, head, batch_size=1, smoothing=0.9)
    assert all(np.array_equal(a.map, b.map) for a, b in zip(raw, smooth, strict=True))


def test_smoothing_starts_anew_when_the_class_changes(backbone, tmp_path):
    levels = [20, 60, 90, 200, 240, 30, 70]
    frames = [np.full((48, 64, 3), v, np.uint8) for v in levels]
    path = write(tmp_path / "c.avi", frames, (64, 48), codec="MJPG")
    raw = explain_video(path, backbone, explainer=Half(backbone), batch_size=3)
    smooth = explain_video(path, backbone, explainer=Half(backbone), batch_size=3, smoothing=0.5)
    assert [e.target for e in smooth] == [0, 0, 0, 1, 1, 0, 0]
    for i in (0, 3, 5):
        assert np.array_equal(raw[i].map, smooth[i].map)
    for i in (1, 2, 4, 6):
        middle = (raw[i].map + smooth[i - 1].map) / 2
        assert np.allclose(smooth[i].map, middle) and not np.allclose(raw[i].map, smooth[i].map)


# ---------------------------------------------------------------------- memory


def test_frames_alive_are_bounded_by_the_batch(backbone, tmp_path, monkeypatch):
    alive, peaks = [], {}
    real = Clip.frames

    def counted(self, every):
        for number, photo in real(self, every):
            alive.append(weakref.ref(photo))
            peak = sum(r() is not None for r in alive)
            peaks[self.announced] = max(peaks.get(self.announced, 0), peak)
            yield number, photo
            del photo

    monkeypatch.setattr(Clip, "frames", counted)
    for count in (13, 40):
        path = clip(tmp_path / "c.mp4", count, (32, 32))
        explain_video(path, backbone, explainer="centre", output=tmp_path / "pack", batch_size=4)
    assert set(peaks) == {13, 40} and peaks[13] == peaks[40] <= 6
    assert not any(r() for r in alive)


# ---------------------------------------------------------------------- what breaks


def test_a_clip_that_is_cut_off_is_explained_as_far_as_it_goes(backbone, head, tmp_path):
    path = clip(tmp_path / "c.avi", 12, codec="MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    left = len(read(path))
    assert 0 < left < 12
    with pytest.warns(UserWarning, match=rf"c\.avi: {left} of 12 announced frames can be decoded"):
        found = explain_video(path, backbone, head, output=tmp_path / "pack")
    assert len(found) == found.frames == left and found.announced == 12
    manifest = read_manifest(tmp_path / "pack")
    assert manifest["skipped"][0]["file_name"] == "c.avi" and manifest["entries"] == left
    assert len(read(tmp_path / "pack" / "overlay.mp4")) == left


def test_frames_after_a_damaged_one_are_explained(backbone, tmp_path):
    path = clip(tmp_path / "c.mp4", 12)
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") + (data.find(b"moov") - data.find(b"mdat")) // 2
    data[start : start + 300] = b"\xff" * 300
    path.write_bytes(data)
    first_gap = len(read(path))
    with pytest.warns(UserWarning, match=r"of 12 announced frames"):
        found = explain_video(path, backbone, explainer="centre")
    assert first_gap < len(found) < 12


def test_what_is_no_clip_is_named(backbone, head, tmp_path):
    files = {
        "empty.mp4": b"",
        "text.mp4": b"hello " * 50,
        "cut.mp4": clip(tmp_path / "c.mp4").read_bytes()[:1500],
        "header.mp4": clip(tmp_path / "z.mp4", 0).read_bytes(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"video: OpenCV cannot read .*{name}.*ffmpeg"):
            explain_video(tmp_path / name, backbone, head, output=tmp_path / "pack")
    with pytest.raises(ValueError) as raised:
        explain_video((tmp_path / "empty.mp4").rename(tmp_path / "a clip.mp4"), backbone, head)
    assert "ffmpeg -i 'a clip.mp4' 'a clip-converted.mp4'" in str(raised.value)
    with pytest.raises(
        ValueError, match=r"video: no frame of .*z\.avi can be decoded, .* announces 0"
    ):
        explain_video(
            clip(tmp_path / "z.avi", 0, codec="MJPG"), backbone, head, output=tmp_path / "pack"
        )
    with pytest.raises(FileNotFoundError, match=r"video: no file .*nowhere\.mp4"):
        explain_video(tmp_path / "nowhere.mp4", backbone, head)
    with pytest.raises(ValueError, match=r"video: .* is a folder"):
        explain_video(tmp_path, backbone, head)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.mp4")
        with pytest.raises(ValueError, match=r"pipe\.mp4 is not a file"):
            explain_video(tmp_path / "pipe.mp4", backbone, head)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("fps", [0.0, float("nan"), -1.0, 90000.0])
def test_a_header_without_a_frame_rate(backbone, tmp_path, monkeypatch, fps):
    path = clip(tmp_path / "c.mp4", 2)

    real = cv2.VideoCapture

    class Capture:  # cv2's own class cannot be derived from
        def __init__(self, name):
            self.capture = real(name)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def get(self, key):
            return fps if key == cv2.CAP_PROP_FPS else self.capture.get(key)

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "VideoCapture", Capture)
        with pytest.warns(UserWarning, match=r"c\.mp4 gives .* frames per second; .* at 25"):
            found = explain_video(path, backbone, explainer="ones", output=tmp_path / "pack")
    assert found.fps == 25.0
    film = cv2.VideoCapture(str(tmp_path / "pack" / "overlay.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == 25.0


@pytest.mark.parametrize(
    ("fps", "every"), [(66.6666, 1), (30000 / 1001, 1), (25, 10_000), (240, 7)]
)
def test_every_frame_rate_makes_a_film(backbone, tmp_path, monkeypatch, fps, every):
    path = clip(tmp_path / "c.mp4", 3)
    monkeypatch.setattr(Clip, "fps", property(lambda s: fps, lambda s, v: None), False)
    explain_video(path, backbone, explainer="ones", output=tmp_path / "pack", every=every)
    film = cv2.VideoCapture(str(tmp_path / "pack" / "overlay.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == pytest.approx(max(fps / every, 0.01), rel=0.01)


def test_large_frames_and_bad_arguments_are_refused_before_any_work(backbone, tmp_path, capfd):
    path = clip(tmp_path / "c.mp4", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    explainer = Half(backbone)
    for options, message in [
        ({"max_pixels": 3000}, r"video: .* frames of 64 x 48 pixels, over max_pixels=3000"),
        ({"every": 0}, r"every: got 0"),
        ({"smoothing": 1.0}, r"smoothing: got 1.0"),
        ({"smoothing": float("nan")}, r"smoothing: got nan"),
        ({"batch_size": 0}, r"batch_size: got 0"),
        ({"view": "middle"}, r"view: got 'middle'"),
        ({"classes": "tobby"}, r"class 'tobby'"),
        ({"output": tmp_path / "mine"}, r"output: .* was not written by xattn"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain_video(path, backbone, explainer=explainer, **options)
    assert explainer.calls == 0
    capfd.readouterr()
    level = cv2.utils.logging.LOG_LEVEL_WARNING
    before = cv2.utils.logging.setLogLevel(level)
    wide = clip(tmp_path / "wide.avi", 1, (8400, 2), codec="MJPG")
    with pytest.raises(
        ValueError, match=r"video: OpenCV cannot write MPEG-4 of 8400 x 2 .*overlays"
    ):
        explain_video(wide, backbone, explainer="ones", output=tmp_path / "pack")
    explain_video(wide, backbone, explainer="ones", output=tmp_path / "pack", overlays=False)
    assert "[ERROR" not in capfd.readouterr().err
    assert cv2.utils.logging.setLogLevel(before) == level
    assert not os.environ.get("OPENCV_FFMPEG_LOGLEVEL")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("lost"), ValueError("NaN")])
def test_what_was_explained_survives_an_interrupt(backbone, tmp_path, error):
    path = clip(tmp_path / "c.mp4", 12)
    explainer = Half(backbone)
    explainer.fail_at, explainer.error = 3, error
    name = type(error).__name__
    with pytest.warns(RuntimeWarning, match=rf"stopped after frame-000007 by {name}; .*pack holds"):
        with pytest.raises(type(error)) as caught:
            explain_video(
                path, backbone, explainer=explainer, output=tmp_path / "pack", batch_size=4
            )
    assert caught.value is error
    kept = load_pack(tmp_path / "pack")
    assert [e.image_id for e in kept] == [f"frame-{i:06d}" for i in range(8)]
    assert len(read(tmp_path / "pack" / "overlay.mp4")) == 8
    assert name in read_manifest(tmp_path / "pack")["skipped"][0]["reason"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.mp4", "pack"]


def test_an_interrupt_before_the_first_frame_keeps_the_earlier_pack(backbone, tmp_path):
    path = clip(tmp_path / "c.mp4", 3)
    explain_video(path, backbone, explainer="ones", output=tmp_path / "pack")
    explainer = Half(backbone)
    explainer.fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        explain_video(path, backbone, explainer=explainer, output=tmp_path / "pack")
    assert {e.method for e in load_pack(tmp_path / "pack")} == {"ones"}


def test_an_interrupt_while_the_pack_is_written_waits_for_it(backbone, tmp_path, monkeypatch):
    real = clips.save_pack

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(clips, "save_pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain_video(
            clip(tmp_path / "c.mp4", 3), backbone, explainer="ones", output=tmp_path / "pack"
        )
    assert len(load_pack(tmp_path / "pack")) == 3


def test_a_full_disk_is_noticed_although_opencv_is_silent(backbone, tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "c.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
    write(path, noise, (128, 96))
    explain_video(path, backbone, explainer="ones", output=tmp_path / "pack")
    size = (tmp_path / "pack" / "overlay.mp4").stat().st_size
    before, limits = read_manifest(tmp_path / "pack"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"output: .*film .*pack.* of 20 frames; .*free space"):
            explain_video(path, backbone, explainer="centre", output=tmp_path / "pack")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_manifest(tmp_path / "pack") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.mp4", "pack"]
