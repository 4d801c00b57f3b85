"""Clips: a map a word on frames, in packs as frames, and families that take none."""

import cv2
import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
import vlm_models as tiny
from conversations import loaded

from xattn.cli import main
from xattn.packs.reader import Pack
from xattn.photos.clip import Clip
from xattn.vlm import explain as explaining
from xattn.vlm import layout
from xattn.vlm.clips import frames_of
from xattn.vlm.explain import explain_tokens
from xattn.vlm.explainers.base import create_token_explainer
from xattn.vlm.layout import locate
from xattn.vlm.model import OF_CLIPS, Timing

QUESTION = "what is on the table ?"
EACH = {"llava_onevision": 1}  # frames of an image token; others: 2


def frames(count):
    return [tiny.photo(i) for i in range(count)]


def clip_array(count):
    return np.stack([np.asarray(frame) for frame in frames(count)])


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (40, 24))
    for number in range(10):
        writer.write(np.full((24, 40, 3), 25 * number, np.uint8))
    writer.release()
    return path


def of_clip(kind, count=5):
    """The model as it takes ``count`` frames, and these."""
    return loaded(kind).of_clip(Timing(tuple(range(count)), count, 2.0)), frames(count)


def test_all_of_the_table_of_clips_take_them():
    assert layout.CLIPS.keys() == OF_CLIPS.keys()


@pytest.mark.parametrize("kind", OF_CLIPS)
def test_one_pass_over_a_clip_gives_the_logits_of_generation(kind):
    vlm, shown = of_clip(kind)
    inputs = vlm.inputs(shown, QUESTION)
    made = vlm.generate(inputs, 4, logits=True)
    forced, entered = vlm.forced(inputs, made.ids), vlm.entered(inputs)
    with torch.no_grad():
        twice = vlm.logits(forced, entered, entered.features.repeat(2, 1, 1))
        own = vlm.model(**forced.inputs).logits[:, forced.rows]
    torch.testing.assert_close(twice, made.logits.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own[0], made.logits, atol=1e-5, rtol=1e-5)
    assert len(vlm.image_places(inputs["input_ids"][0])) == len(entered.features)
    assert torch.equal(made.entered.features, entered.features)


@pytest.mark.parametrize("kind", OF_CLIPS)
def test_tokens_of_a_clip_lie_where_changed_frames_change_them(kind):
    vlm, shown = of_clip(kind)
    inputs = vlm.inputs(shown, QUESTION)
    own = vlm.entered(inputs).features
    layouts, each = locate(vlm, shown, QUESTION, inputs, len(own)), EACH.get(kind, 2)
    assert [x.number for x in layouts] == list(range(0, 5, each))
    bands = [(4, 4)] * len(shown)
    sums, _ = layout.measure_reactions(vlm, shown, QUESTION, bands)
    for number in range(len(shown)):
        changed = np.flatnonzero(sums[number] > 1e-4).tolist()
        at = layouts[number // each]
        assert changed == np.flatnonzero(at.has_place).__add__(at.first).tolist()
    assert layout.check_table(vlm, shown, QUESTION, inputs, len(own)) < 0.1


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_onevision"])
def test_each_word_has_a_map_of_each_frame(kind):
    methods = ["attention", create_token_explainer("occlusion", size=1)]
    (answer,) = explain_tokens(
        clip_array(8), loaded(kind), QUESTION, "a red fork", methods, frames=5
    )
    each, shown = EACH.get(kind, 2), [0, 2, 4, 5, 7]
    maps = answer.of("red").explanations
    assert [e.image_id for e in maps] == [f"image 0#frame-{n:06d}" for n in shown[::each]]
    assert maps[0].protocol["video"] == {
        "fps": 25.0,
        "frames": shown[::each],
        "frames_per_map": each,
    }
    assert np.array_equal(maps[1].source, clip_array(8)[shown[each]])
    total = sum(e.map.sum() for e in maps)
    assert total == pytest.approx(answer.of("red").shares[0], rel=0.1)
    [slow] = explain_tokens(clip_array(4), loaded(kind), QUESTION, "a red fork", fps=4.0)
    assert slow.of("red").explanations[0].protocol["video"]["fps"] == 4.0


def test_frames_are_those_of_even_steps(clip_file):
    for count, wanted in ((4, (0, 3, 6, 9)), (1, (0,)), (20, tuple(range(10)))):
        found, timing = frames_of(clip_file, count, None, 1.0)
        assert timing == (wanted, 10, 5.0)
        assert [np.asarray(f).mean() // 5 * 5 for f in found] == pytest.approx(
            [25 * n for n in wanted], abs=6
        )
    assert frames_of(clip_array(3), 2, None, 1.0)[1] == ((0, 2), 3, 1.0)


@pytest.mark.parametrize("header", [200, 0, 50, 900])
def test_frames_are_even_whatever_the_header_says(tmp_path, monkeypatch, header):
    path = tmp_path / "long.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (16, 16))
    for number in range(200):
        writer.write(np.full((16, 16, 3), number, np.uint8))
    writer.release()
    get = Clip.frames_at

    def told(self, numbers):
        damaged = self._retrieved
        self._retrieved = lambda: None if self.decoded == 1 else damaged()
        return get(self, numbers)

    start = Clip.__init__

    def opened(self, *arguments):
        start(self, *arguments)
        self.announced = header

    monkeypatch.setattr(Clip, "__init__", opened)
    wanted = np.linspace(0, 199, 16).round().astype(int).tolist()
    found, timing = frames_of(path, 16, None, 1.0)
    assert timing == (tuple(wanted), 200, 5.0)
    assert [np.asarray(f).mean() for f in found] == pytest.approx(wanted, abs=3)
    monkeypatch.setattr(Clip, "frames_at", told)
    assert frames_of(path, 16, None, 1.0)[1].numbers == (1, *wanted[1:])  # the first is damaged


def test_an_array_is_a_batch_of_photos_where_a_model_takes_no_clips():
    found = explain_tokens(clip_array(2), loaded("llava"), QUESTION, "a red fork")
    assert [answer.image_id for answer in found] == ["image 0", "image 1"]


def test_a_clip_becomes_a_pack_of_frames(clip_file, tmp_path, capsys):
    folder = tiny.save("qwen2_vl", tmp_path / "model")
    given = ["--vlm", str(folder), "--prompt", QUESTION, "--answer", "a red fork", "--frames", "4"]
    out = tmp_path / "pack"
    assert main(["caption", str(clip_file), *given, "--output", str(out)]) == 0
    pack = Pack(out)
    ids = ["walk.avi#frame-000000", "walk.avi#frame-000006"]
    assert list(pack.images.index) == ids
    assert list(pack.images["title"]) == [
        "walk.avi, frame 0, 0:00.00",
        "walk.avi, frame 6, 0:01.20",
    ]
    assert all(pack.facts_of(name).answer.text == "a red fork" for name in ids)
    assert pack.explanation(f"{ids[1]}@1.attention").protocol["video"]["frames"] == [0, 6]


def test_clips_of_one_name_have_a_limit_and_texts_by_folder(clip_file, tmp_path, capsys):
    folder = tiny.save("qwen2_vl", tmp_path / "model")
    clips = [tmp_path / name / "walk.avi" for name in ("a", "b", "c")]
    for clip in clips:
        clip.parent.mkdir()
        clip.write_bytes(clip_file.read_bytes())
    texts = tmp_path / "texts.json"
    texts.write_text('{"a/walk.avi": "a red fork", "b/walk.avi": "a blue cup"}')
    given = ["--vlm", str(folder), "--answer", str(texts), "--limit", "2", "--frames", "2"]
    out = tmp_path / "pack"
    assert main(["caption", *map(str, clips), *given, "--output", str(out)]) == 0
    pack = Pack(out)
    said = {pack.facts_of(name).answer.text for name in pack.image_ids}
    assert said == {"a red fork", "a blue cup"}
    capsys.readouterr()
    assert main(["caption", str(clips[0]), *given[:2], "--together"]) == 2
    assert "leave out --together" in capsys.readouterr().err


def test_clips_that_cannot_be_explained_are_refused(clip_file, tmp_path, monkeypatch):
    def refused(match, images, kind="qwen2_vl", **options):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
            explain_tokens(images, loaded(kind), QUESTION, "a red fork", **options)
        assert "\n" not in str(caught.value)

    refused(
        "^images: a LlavaFor.* takes no clips; give photos, or a model of: Qwen2-VL",
        clip_file,
        "llava",
    )
    refused("^images: memory://bucket/clip.mp4 is a clip in a store", "memory://bucket/clip.mp4")
    refused("^frames: got 1; a Qwen3-VL needs 2 or more", clip_array(2), "qwen3_vl", frames=1)
    monkeypatch.setattr(explaining, "_need", lambda *_: pytest.fail("refused after all the work"))
    refused("^views: got 'tiles'", clip_array(2), views="tiles")
    monkeypatch.undo()
    refused("^images: a clip is in a tuple", (str(clip_file), tiny.photo()))
    refused("^images: no file gone.mp4", "gone.mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"none")
    refused("^images: OpenCV cannot read", broken)
    with pytest.warns(UserWarning, match="skipped|left out|could not"):
        found = explain_tokens([broken, clip_file], loaded("qwen2_vl"), QUESTION, "a red fork")
    assert len(found) == 1 and found.skipped[0][0] == "broken.mp4"
