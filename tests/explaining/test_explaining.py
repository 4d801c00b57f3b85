"""From photos to explanations: which classes, how many passes, what is skipped, what is written."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_explanations import CLASSES

import xattn.explaining.photos
from xattn.backbone import load_backbone
from xattn.cli import main
from xattn.explainers import Explainer, create_explainer
from xattn.explaining.photos import explain
from xattn.packs.format import read_manifest
from xattn.packs.reader import Pack, load_pack
from xattn.photos.view import prepare


def photo(seed, size=(50, 70)):
    values = np.random.default_rng(seed).integers(
        0, 256, (size[0] // 5, size[1] // 5, 3), dtype=np.uint8
    )
    return Image.fromarray(values).resize(size[::-1])


def many_photos(folder, count):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        photo(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for i, name in enumerate(["b.png", "a/b.jpg", "a/c.png", "b.jpg", "A__b.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(root / name)
    return root


def test_top_classes_come_by_falling_probability(backbone, head):
    image = photo(3)
    found = explain(image, backbone, head, top=3)
    tensor, view = prepare(image, backbone.preprocessing)
    p = backbone.logits(tensor[None]).softmax(1)[0]
    assert [e.target for e in found] == p.topk(3).indices.tolist()
    assert np.allclose([e.probability for e in found], p.topk(3).values, atol=1e-6)
    assert found[0].target_name == CLASSES[found[0].target] and found[0].view == view
    with torch.no_grad():
        scores = head.explanation(backbone(tensor[None]), found[1].target)[0, 0]
    assert np.allclose(found[1].map, scores, atol=1e-5) and found.skipped == []


def test_named_classes_come_in_the_order_given(backbone, head):
    found = explain(photo(3), backbone, head, classes=["rocket", 0, "tabby", "Golden Retriever"])
    assert [e.target for e in found] == [3, 0, 1]
    assert explain(photo(3), backbone, head, classes="owl")[0].target == 6
    assert explain(photo(3), backbone, head, classes=2)[0].target == 2


def test_all_classes_of_a_batch_cost_one_pass(backbone, head, folder):
    calls = []
    handle = backbone.model.conv_stem.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    try:
        found = explain(folder, backbone, head, top=4, batch_size=2)
    finally:
        handle.remove()
    assert calls == [2, 2, 1] and len(found) == 20


def test_a_batch_equals_one_by_one(backbone, head, folder):
    together = explain(folder, backbone, head, top=2, batch_size=5)
    single = [e for p in sorted(folder.rglob("*.*g")) for e in explain(p, backbone, head, top=2)]
    assert len(together) == len(single) == 10
    for e in together:
        same = [s for s in single if s.file_name == e.file_name and s.target == e.target]
        assert any(np.abs(s.map - e.map).max() <= 1e-5 * np.abs(e.map).max() for s in same)


def test_ids_are_relative_paths_and_unique(backbone, head, folder):
    found = explain(folder, backbone, head)
    assert [e.image_id for e in found] == ["A__b.png", "a/b.jpg", "a/c.png", "b.jpg", "b.png"]
    assert [e.file_name for e in found] == ["A__b.png", "b.jpg", "c.png", "b.jpg", "b.png"]
    assert len({e.id for e in found}) == 5
    given = explain([photo(0), str(folder / "b.png"), photo(1)], backbone, head)
    assert [e.image_id for e in given] == ["image 0", "b.png", "image 2"]


@pytest.mark.parametrize("name", ["cam", "gradcam", "random", "centre", "ones"])
def test_any_explainer_by_name_or_instance(backbone, head, name):
    by_name = explain(photo(2), backbone, head, explainer=name, top=2)
    explainer = create_explainer(name, backbone, head)
    by_instance = explain(photo(2), backbone, explainer=explainer, top=2)
    assert [e.method for e in by_name] == [name] * 2
    assert np.array_equal(by_name[1].map, by_instance[1].map)
    assert by_name[0].is_mask == (name == "ones")


def test_maps_come_back_on_the_original_photo(backbone, head):
    crop, whole = (explain(photo(1), backbone, head, view=v)[0] for v in ("crop", "whole"))
    assert crop.on_photo().shape == whole.on_photo().shape == (50, 70)
    assert np.isnan(crop.on_photo()).any() and not np.isnan(whole.on_photo()).any()
    assert crop.overlay().size == (70, 50)


@pytest.mark.parametrize("size", [(5, 5), (5, 8000), (8000, 20)])
def test_odd_photos_are_explained(backbone, head, tmp_path, size):
    image = photo(0, size) if size != (5, 5) else Image.new("L", (1, 1), 9)
    found = explain(image, backbone, head, output=tmp_path / "pack")
    assert np.isfinite(found[0].on_photo()).any()
    assert [p.name for p in (tmp_path / "pack" / "overlays").iterdir()] == [
        f"image_0@{found[0].target}.head.jpg"
    ]


def test_unreadable_photos_of_a_folder_are_skipped_counted_and_reported(
    backbone, head, folder, tmp_path
):
    (folder / "a" / "text.jpg").write_text("not an image")
    cut = folder / "cut.png"
    cut.write_bytes((folder / "b.png").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"explain: skipped 2 of 7 images: .*text\.jpg .*cut\.png"):
        found = explain(folder, backbone, head, output=tmp_path / "pack", batch_size=3)
    assert len(found) == 5 and [name for name, _ in found.skipped] == ["text.jpg", "cut.png"]
    manifest = read_manifest(tmp_path / "pack")
    assert [s["file_name"] for s in manifest["skipped"]] == ["text.jpg", "cut.png"]
    assert str(tmp_path) not in str(manifest)
    for name in ("b.png", "a/b.jpg", "a/c.png", "b.jpg", "A__b.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"images: none of the 2 images can be read"):
        explain(folder, backbone, head)
    with pytest.raises(ValueError, match=r"cut\.png is (truncated|not an image)"):
        explain(cut, backbone, head)
    with pytest.raises(ValueError, match=r"max_pixels=100"):
        explain(photo(0), backbone, head, max_pixels=100)


def test_a_photo_too_long_and_narrow_for_a_pack_is_left_out_by_name(
    backbone, head, folder, tmp_path
):
    Image.new("RGB", (20_000, 1)).save(folder / "strip.png")
    with pytest.warns(UserWarning, match=r"skipped 1 of 6 images: strip\.png: .*20000 x 1 pixels"):
        found = explain(folder, backbone, head, output=tmp_path / "pack")
    assert len(found) == 5 and [name for name, _ in found.skipped] == ["strip.png"]
    assert len(Pack(tmp_path / "pack").entries) == 5
    with pytest.raises(ValueError, match=r"20000 x 1 pixels has .* crop it"):
        explain(folder / "strip.png", backbone, head)


def test_a_pack_holds_provenance_and_no_paths(backbone, head, folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain(folder, backbone, head, top=2, output=str(tmp_path / "pack"))
    loaded = load_pack(tmp_path / "pack")
    assert [e.id for e in loaded] == [e.id for e in found]
    assert all(np.array_equal(a.map, b.map) for a, b in zip(found, loaded, strict=True))
    protocol = loaded[0].protocol
    assert protocol["backbone"]["sha256"] == backbone.fingerprint
    assert protocol["head"]["name"] == "ttame" and len(protocol["head"]["sha256"]) == 64
    assert protocol["explainer"] == "head" and protocol["view"] == "crop"
    for file in (tmp_path / "pack").iterdir():
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()


def test_a_bad_output_is_refused_before_any_work(backbone, head, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("xattn.explaining.photos.load_image", lambda *_: pytest.fail("worked"))
    with pytest.raises(OSError, match=r"output: cannot write"):
        explain(photo(0), backbone, head, output=tmp_path / "file" / "pack")
    with pytest.raises(ValueError, match=r"output: .* was not written by xattn"):
        explain(photo(0), backbone, head, output=tmp_path)


def test_bad_arguments_are_named(backbone, head, tmp_path):
    image = photo(0)
    for options, message in [
        ({"classes": 7}, r"class 7 is out of range"),
        ({"classes": "9" * 5000}, r"is not a class of"),
        ({"classes": "²"}, r"class '²' is not a class of"),
        ({"classes": "+-1"}, r"class '\+-1' is not a class of"),
        ({"classes": "tobby"}, r"class 'tobby' .*near matches"),
        ({"classes": []}, r"classes: got an empty list"),
        ({"top": 0}, r"top: got 0"),
        ({"top": 8}, r"top: got 8"),
        ({"view": "middle"}, r"view: got 'middle'"),
        ({"batch_size": 0}, r"batch_size: got 0"),
        ({"explainer": "gradcm"}, r"unknown explainer 'gradcm'; did you mean gradcam"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain(image, backbone, head, **options)
    with pytest.raises(ValueError, match=r"head: got none; give head=load_head"):
        explain(image, backbone)
    with pytest.raises(ValueError, match=r"images: got an empty list"):
        explain([], backbone, head)
    with pytest.raises(ValueError, match=r"images: got a int"):
        explain([3], backbone, head)
    with pytest.raises(FileNotFoundError, match=r"images: no file or folder"):
        explain(tmp_path / "nowhere", backbone, head)
    other = load_backbone("test_vit", weights=None, input_size=64)
    with pytest.raises(ValueError, match=r"explainer: ones was made for another backbone"):
        explain(image, backbone, explainer=create_explainer("ones", other))


def test_a_list_file_and_a_path_string_work(backbone, head, folder):
    (folder / "list.txt").write_text("b.png 3\na/c.png 1\n")
    found = explain(str(folder / "list.txt"), backbone, head)
    assert [e.image_id for e in found] == ["b.png", "a/c.png"]
    assert isinstance(found[0].source, Path)


# ---------------------------------------------------------------------- under load


class Stops(Explainer):
    """An explainer that a Ctrl-C, or another error, meets at the third batch."""

    name = "stops"

    def __init__(self, backbone, error, batches=2):
        super().__init__(backbone)
        self.error, self.left = error, batches

    def _attribute(self, images, target):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return images.mean(1, keepdim=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_run_leaves_a_valid_pack_of_what_was_explained(tmp_path, backbone, error):
    photos = many_photos(tmp_path / "photos", 7)
    whole = explain(photos, backbone, explainer=Stops(backbone, None, 99), batch_size=2)
    out = tmp_path / "pack"
    with (
        pytest.warns(
            RuntimeWarning,
            match=r"stopped after 3.png by .*pack contains what was explained so far",
        ),
        pytest.raises(type(error)),
    ):
        explain(photos, backbone, explainer=Stops(backbone, error), batch_size=2, output=out)
    pack = load_pack(out)
    assert [e.image_id for e in pack] == ["0.png", "1.png", "2.png", "3.png"]
    for found, expected in zip(pack, whole, strict=False):
        assert np.array_equal(found.map, expected.map)
    # a pack that is there is not given up for a part of another
    with (
        pytest.warns(RuntimeWarning, match="pack-interrupted contains"),
        pytest.raises(type(error)),
    ):
        explain(photos, backbone, explainer=Stops(backbone, error, 1), batch_size=2, output=out)
    assert len(load_pack(out)) == 4 and len(load_pack(tmp_path / "pack-interrupted")) == 2


def test_an_error_before_the_first_explanation_writes_nothing(tmp_path, backbone):
    photos = many_photos(tmp_path / "photos", 3)
    with pytest.raises(RuntimeError, match="broken"):
        explain(
            photos,
            backbone,
            explainer=Stops(backbone, RuntimeError("broken"), 0),
            output=tmp_path / "pack",
        )
    assert not (tmp_path / "pack").exists()


def test_no_more_photos_than_two_batches_are_decoded_ahead(tmp_path, backbone, monkeypatch):
    photos = many_photos(tmp_path / "photos", 12)
    decoded, seen = [], []
    load = xattn.explaining.photos.load_image
    monkeypatch.setattr(
        xattn.explaining.photos, "load_image", lambda *a: decoded.append(a[0]) or load(*a)
    )

    class Counts(Stops):
        def _attribute(self, images, target):
            seen.append(len(decoded))
            return super()._attribute(images, target)

    explain(photos, backbone, explainer=Counts(backbone, None, 99), batch_size=2)
    # at batch i (0-based) 2 i + 2 photos were taken and 4 more may be waiting or in work
    assert len(seen) == 6 and all(n <= 2 * i + 2 + 5 for i, n in enumerate(seen))


LIMITED = """
import resource, signal, sys
from xattn.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows too large: an OSError
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_disk_that_fills_up_while_a_pack_is_written_leaves_the_earlier_pack(tmp_path, backbone):
    photos = many_photos(tmp_path / "photos", 3)
    out = tmp_path / "pack"
    arguments = [str(photos), "-b", "test_resnet", "--weights", "random", "--explainers", "cam"]
    arguments += ["--output", str(out), "--device", "cpu"]
    assert main(["explain", *arguments]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "explain", *arguments, "--view", "whole", "--overwrite"],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 2
    assert "output: cannot write" in done.stderr and "earlier results are untouched" in done.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir() if "pack" in p.name] == ["pack"]


# ---------------------------------------------------------------------- several methods, labels


def test_several_explainers_give_their_own_maps_photo_by_photo(backbone, head, folder, tmp_path):
    output = tmp_path / "pack"
    both = explain(folder, backbone, head, ["head", "gradcam"], top=2, batch_size=2, output=output)
    methods = [e.method for e in both]
    assert methods[:4] == ["head", "head", "gradcam", "gradcam"] and len(both) == 20
    for name in ("head", "gradcam"):
        alone = explain(folder, backbone, head, name, top=2, batch_size=2)
        mine = [e for e in both if e.method == name]
        assert [e.id for e in mine] == [e.id for e in alone]
        assert all(np.array_equal(a.map, b.map) for a, b in zip(mine, alone, strict=True))
    images = Pack(output).images
    assert len(images) == 5 and images["disagreement"].between(0, 2).all()


@pytest.mark.parametrize("given", [[], ["gradcam", "gradcam"]])
def test_a_method_is_given_once(backbone, folder, given):
    with pytest.raises(ValueError, match=r"explainer: got (none|gradcam twice)"):
        explain(folder, backbone, explainer=given)


def test_a_pack_names_the_first_classes_of_every_photo(backbone, folder):
    found = explain(folder, backbone, explainer="gradcam", classes="fox")
    for e in found:
        pixels, _ = prepare(e.photo(), backbone.preprocessing)
        p = backbone.probabilities(backbone.logits(pixels[None]))[0]
        top = e.facts.top
        assert [i for i, _, _ in top] == p.topk(5).indices.tolist()
        assert [name for _, name, _ in top] == [CLASSES[i] for i, _, _ in top]
        assert [v for *_, v in top] == pytest.approx(p.topk(5).values.tolist(), abs=1e-5)


def test_labels_go_into_the_pack(backbone, folder, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("a/b.jpg,espresso\na/c.png,owl\nA__b.png,unicorn\nb.jpg,\nb.png,5\n")
    found = explain(folder, backbone, explainer="gradcam", labels=labels)
    facts = {e.image_id: (e.facts.label, e.facts.label_name) for e in found}
    want = {(2, "espresso"), (6, "owl"), (None, "unicorn"), (None, None), (5, "fox")}
    assert set(facts.values()) == want and len(facts) == 5
    with pytest.raises(ValueError, match="has no file name"):
        explain(photo(0), backbone, explainer="gradcam", labels=labels)


@pytest.mark.parametrize("explainer", ["head", "gradcam", "occlusion"])
def test_a_mistake_is_explained_by_the_predicted_and_the_true_class(
    backbone, head, folder, explainer
):
    photos = [folder / name for name in ("a/c.png", "A__b.png", "b.png")]
    plain = explain(photos, backbone, head, explainer=explainer)
    other = CLASSES[(plain[0].target + 1) % len(CLASSES)]
    labels = folder.parent / f"true-{explainer}.csv"
    true = [other, plain[1].target_name, ""]  # wrong, right, not known
    rows = [f'{path},"{name}"\n' for path, name in zip(photos, true, strict=True)]
    labels.write_text("".join(rows))
    found = explain(
        photos, backbone, head, explainer=explainer, labels=labels, classes="predicted,label"
    )
    assert [e.image_id for e in found] == [plain[0].image_id, *(e.image_id for e in plain)]
    assert found[1].target_name == other and found[0].target == plain[0].target
    by_hand = explain(photos[:1], backbone, head, explainer=explainer, classes=other)[0]
    assert np.allclose(found[1].map, by_hand.map, atol=1e-5)
    assert all(
        np.allclose(a.map, b.map, atol=1e-5) for a, b in zip(found[2:], plain[1:], strict=True)
    )


def test_predicted_and_label_need_labels(backbone, folder):
    with pytest.raises(ValueError, match=r"^classes: predicted and label need .* give labels"):
        explain(folder, backbone, explainer="gradcam", classes=["predicted", "label"])


def test_labels_of_other_classes_warn(backbone, folder):
    with pytest.warns(UserWarning, match=r"no photo has a class of test_efficientnet"):
        explain([folder / "a/b.jpg"], backbone, explainer="gradcam", labels="folders")


def test_maps_of_one_value_are_named_once(backbone, folder, monkeypatch):
    real = xattn.explaining.photos.explain_batch

    def blank(*arguments):
        return (replace(e, map=np.zeros_like(e.map)) for e in real(*arguments))

    monkeypatch.setattr(xattn.explaining.photos, "explain_batch", blank)
    with pytest.warns(UserWarning) as caught:
        explain(folder / "a" / "b.jpg", backbone, explainer="gradcam")
    (message,) = [str(w.message) for w in caught if "the same value" in str(w.message)]
    assert message.endswith(
        "on b.jpg has the same value everywhere, so its overlay highlights nothing."
    )
    with pytest.warns(UserWarning) as caught:
        explain(folder, backbone, explainer="gradcam")
    (message,) = [str(w.message) for w in caught if "the same value" in str(w.message)]
    assert message.startswith("explain: 5 maps have the same value") and message.endswith(
        " and 2 more."
    )


def test_the_mask_of_ones_is_constant_on_purpose(backbone, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(folder, backbone, explainer=["ones", "gradcam"])


def test_explaining_loads_only_what_it_needs(tmp_path):
    """No other heads, mechanisms or explainers: at most 140 modules of xattn."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (80, 60), "teal").save(photo)
    code = (
        "import sys; from xattn.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(*sys.modules, sep='\\n')"
    )
    words = ["explain", str(photo), "--weights", "package", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [name for name in done.stdout.splitlines() if f"{name}.".startswith("xattn.")]
    assert "xattn.heads.maps.evidence" in loaded and len(loaded) <= 140, (len(loaded), loaded)
