"""Tensors, arrays, lists and loaders in ``explain`` and ``attribute``."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from small_explanations import photo
from torch.utils.data import DataLoader, TensorDataset

from xattn import evaluate, explain, load_pack
from xattn.explainers import create_explainer
from xattn.photos.view import prepare


@pytest.fixture(scope="module")
def inputs(backbone):
    """Three images of the network's size."""
    assert backbone.preprocessing.input_size == (64, 64)
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def maps(found):
    return [e.map for e in found]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.target == other.target
        np.testing.assert_array_equal(one.map, other.map)


def test_tensors_of_the_models_size_go_in_as_they_are(backbone, inputs):
    explainer = create_explainer("gradcam", backbone)
    found = explain(inputs, backbone, explainer=explainer)
    assert [e.image_id for e in found] == ["image 0", "image 1", "image 2"]
    logits = backbone.logits(inputs)
    assert [e.target for e in found] == logits.argmax(1).tolist()
    expected = explainer.attribute(inputs, logits.argmax(1))
    np.testing.assert_array_equal(np.stack(maps(found)), expected[:, 0].numpy())
    assert found[0].view.mode == found[0].protocol["view"] == "tensor"
    assert found[0].on_photo().shape == (64, 64)
    shown = np.asarray(found[1].photo(), dtype=np.float64) / 255
    np.testing.assert_allclose(shown, inputs[1].permute(1, 2, 0), atol=0.5 / 255 + 1e-6)


def test_tensors_of_another_size_arrays_and_photos_take_the_models_crop(backbone):
    picture = photo(1)  # 60 x 90 pixels
    pixels = np.asarray(picture)
    expected = explain(picture, backbone, explainer="gradcam")
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for given in (pixels, pixels / 255, pixels.astype(np.float32) / 255, chw, chw / 255, chw[None]):
        found = explain(given, backbone, explainer="gradcam")
        same(found, expected)
        assert found[0].view == expected[0].view
    square = photo(2, (64, 64))  # an array is a photo even at the model's size
    same(
        explain(np.asarray(square), backbone, explainer="gradcam"),
        explain(square, backbone, explainer="gradcam"),
    )


def test_lists_mix_every_kind_and_keep_their_order(backbone, inputs, tmp_path):
    photo(4).save(tmp_path / "file.png")
    named = [inputs[0], tmp_path / "file.png", np.asarray(photo(1)), photo(1), inputs[1:]]
    found = explain(named, backbone, explainer="cam", batch_size=2)
    ids = ["image 0", "file.png", *(f"image {i}" for i in range(2, 6))]
    assert [e.image_id for e in found] == ids
    np.testing.assert_array_equal(found[2].map, found[3].map)
    same(
        explain(list(inputs), backbone, explainer="cam"), explain(inputs, backbone, explainer="cam")
    )


def test_loaders_give_batches_with_or_without_labels(backbone, inputs):
    expected = explain(inputs, backbone, explainer="gradcam")
    labels = torch.tensor([6, 0, 1])
    for loader in (
        DataLoader(TensorDataset(inputs), batch_size=2),
        DataLoader(TensorDataset(inputs, labels), batch_size=2),
        DataLoader(list(inputs), batch_size=2),
        TensorDataset(inputs, labels),
        [inputs, labels],
        (batch for batch in inputs.split(1)),
    ):
        found = explain(loader, backbone, explainer="gradcam")
        same(found, expected)
        assert [e.image_id for e in found] == [e.image_id for e in expected]
    with pytest.raises(ValueError, match="^images: got none; the loader is empty$"):
        explain(DataLoader(TensorDataset(inputs[:0])), backbone, explainer="gradcam")


def test_a_loader_is_read_as_it_is_explained(backbone, inputs, monkeypatch):
    given = []

    def batches():
        for number in range(50):
            given.append(number)
            yield inputs[:1]

    explainer = create_explainer("cam", backbone)
    seen = []
    attribute = type(explainer).attribute_classes

    def counted(self, images, choose):
        seen.append(len(given))
        return attribute(self, images, choose)

    monkeypatch.setattr(type(explainer), "attribute_classes", counted)
    assert len(explain(batches(), backbone, explainer=explainer, batch_size=2)) == 50
    assert seen[0] <= 7


@pytest.mark.parametrize(
    "change", ["double", "half", "strided", "leaf", "inference", "slightly over"]
)
def test_types_graphs_and_memory_order_make_no_difference(backbone, inputs, change):
    expected = explain(inputs, backbone, explainer="gradcam")
    given = inputs.clone()
    if change == "double":
        given = given.double()
    elif change == "half":
        given = given.half()
        expected = explain(given.float(), backbone, explainer="gradcam")
    elif change == "strided":
        given = given.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert not given.is_contiguous()
    elif change == "leaf":
        given.requires_grad_()
    elif change == "slightly over":  # as resizing leaves it
        given[0, 0, 0, 0] = 1
        expected = explain(given, backbone, explainer="gradcam")
        given[0, 0, 0, 0] += 1e-5
    explainer = create_explainer("gradcam", backbone)
    with torch.inference_mode(change == "inference"):
        given = given.clone() if change == "inference" else given
        found = explain(given, backbone, explainer=explainer)
        attributed = explainer.attribute(given, torch.tensor([e.target for e in expected]))
    for one, other, third in zip(found, expected, attributed, strict=True):
        np.testing.assert_allclose(one.map, other.map, atol=1e-4)
        np.testing.assert_allclose(third[0], other.map, atol=1e-4)
    assert given.grad is None


def test_attribute_takes_one_image_and_arrays(backbone, inputs):
    explainer = create_explainer("gradcam", backbone)
    expected = explainer.attribute(inputs, 2)
    one = explainer.attribute(inputs[1], 2)
    assert one.shape == (1, 1, *expected.shape[2:])
    torch.testing.assert_close(one, expected[1:2])
    bytes_ = (inputs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    scaled = torch.from_numpy(bytes_).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(explainer.attribute(bytes_, 2), explainer.attribute(scaled, 2))
    torch.testing.assert_close(
        explainer.attribute(inputs.permute(0, 2, 3, 1).numpy()[0], 2), expected[:1]
    )


def test_read_only_and_backward_arrays_are_taken(backbone):
    pixels = np.array(photo(5))[..., ::-1]
    pixels.setflags(write=False)
    rgb = Image.fromarray(np.ascontiguousarray(pixels))
    same(explain(pixels, backbone, explainer="cam"), explain(rgb, backbone, explainer="cam"))
    seen, _ = prepare(rgb, backbone.preprocessing)
    assert seen.shape == (3, 64, 64)


def test_images_of_tensors_go_into_a_pack(backbone, inputs, tmp_path):
    found = explain(inputs, backbone, explainer="gradcam", output=tmp_path / "pack")
    back = load_pack(tmp_path / "pack")
    assert [e.image_id for e in back] == ["image 0", "image 1", "image 2"]
    same(back, found)
    with pytest.raises(ValueError, match="^labels: image 0 has no file name"):
        explain(inputs, backbone, explainer="gradcam", labels="folders")


def test_threads_explain_tensors_as_one_does(backbone, inputs):
    methods = ("gradcam", "saliency", "cam")
    expected = {m: explain(inputs, backbone, explainer=m, seed=1) for m in methods}
    with ThreadPoolExecutor(4) as pool:
        runs = [
            (m, pool.submit(explain, inputs, backbone, explainer=m, seed=1)) for m in methods * 2
        ]
        for method, run in runs:
            same(run.result(), expected[method])


def test_evaluate_takes_loaders_and_arrays(backbone, inputs):
    methods = {"gradcam": create_explainer("gradcam", backbone)}
    expected = evaluate(backbone, methods, inputs, progress=False).mean("gradcam", "AD", 0.5)
    loader = DataLoader(TensorDataset(inputs, torch.arange(3)), batch_size=2)
    found = evaluate(backbone, methods, loader, progress=False)
    assert found.mean("gradcam", "AD", 0.5) == pytest.approx(expected)
    pixels = np.asarray(photo(1))
    photos = [evaluate(backbone, methods, given, progress=False) for given in (pixels, photo(1))]
    assert photos[0].mean("gradcam", "AD", 0.5) == photos[1].mean("gradcam", "AD", 0.5)
