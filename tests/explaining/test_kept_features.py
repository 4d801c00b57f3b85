"""What the classifier reads of each photo: kept from the passes that explain, written and read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import made
from torch import nn

from xattn.backbone import load_backbone
from xattn.explainers import create_explainer
from xattn.explaining.photos import explain
from xattn.packs.contained_files import PackError
from xattn.packs.reader import Pack
from xattn.photos.view import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*the same value everywhere")


def photos(count=5, side=48):
    """Noise on grounds that go from dark to light."""
    noise = np.random.default_rng(0).integers(0, 100, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(value + np.uint8(150 * i // count)) for i, value in enumerate(noise)]


def inputs(images, backbone):
    return torch.stack([prepare(image, backbone.preprocessing)[0] for image in images])


@pytest.fixture(scope="module", params=["cnn", "vit"])
def backbone(request):
    return made(request.param)


def close(found, expected):
    """Equal as far as float16 can tell, and different from photo to photo."""
    apart = np.abs(np.diff(expected, axis=0)).max(1).min()
    tolerance = 1e-3 * np.abs(expected).max()
    assert apart > 4 * tolerance
    return np.allclose(found, expected, atol=tolerance)


def definition(backbone, images):
    """timm's own: the final features, pooled and normalised, without the classifier."""
    x = backbone.normalize(inputs(images, backbone))
    with torch.no_grad():
        final = backbone.model.forward_features(x)
        return backbone.model.forward_head(final, pre_logits=True).numpy()


@pytest.mark.parametrize("method", ["gradcam", "occlusion", "input_x_gradient"])
def test_features_are_what_the_classifier_reads(backbone, method, tmp_path):
    images = photos()
    found = explain(
        images,
        backbone,
        explainer=[method, "random"],
        features=True,
        batch_size=2,
        output=tmp_path / "pack",
    )
    expected = definition(backbone, images)
    own = [e.facts.features for e in found if e.method == method]
    assert close(own, expected)
    pack = Pack(tmp_path / "pack")
    features = pack.features()
    assert features.dtype == np.float16 and features.shape == expected.shape
    assert np.array_equal(features, np.stack(own))


def test_no_pass_is_run_for_them(backbone, monkeypatch):
    passes = []
    for name in ("forward_features", "forward_intermediates"):
        real = getattr(backbone.model, name)

        def counted(x, *args, real=real, **options):
            passes.append(len(x))
            return real(x, *args, **options)

        monkeypatch.setattr(backbone.model, name, counted)
    explain(photos(), backbone, explainer="gradcam")
    without = passes.copy()
    passes.clear()
    explain(photos(), backbone, explainer="gradcam", features=True)
    assert passes == without


def test_classes_of_each_photo_and_other_targets_have_them_too(backbone, tmp_path):
    images = photos(3)
    expected = definition(backbone, images)
    target = torch.tensor([0, 3, 6])
    by_class = explain(images, backbone, explainer="gradcam", target=target, features=True)
    by_number = explain(
        images, backbone, explainer="gradcam", target=lambda logits: logits.sum(1), features=True
    )
    for found in (by_class, by_number):
        assert close([e.facts.features for e in found], expected)


def test_a_batch_that_ran_out_of_memory_counts_once(monkeypatch):
    backbone = made("cnn")
    method = create_explainer("gradcam", backbone, max_forward_batch=4)
    real, failed = type(method)._class_maps, []

    def full(self, images, classes):
        if len(images) > 2 and not failed:
            failed.append(len(images))
            raise torch.OutOfMemoryError("out of memory")
        return real(self, images, classes)

    monkeypatch.setattr(type(method), "_class_maps", full)
    images = photos(4)
    with pytest.warns(RuntimeWarning, match="out of memory with 4 images"):
        found = explain(images, backbone, explainer=method, features=True)
    assert failed == [4]
    own = [e.facts.features for e in found]
    assert close(own, definition(backbone, images))


class Plain(nn.Module):
    """A network of one's own that gives maps and logits and tells nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(3, 6, 3, stride=4), nn.Linear(6, 3)

    def forward_taps(self, x):
        maps = self.conv(x).relu()
        return self.last(maps.mean((2, 3))), (maps,)


def test_a_network_that_does_not_tell_falls_back_in_one_line():
    backbone = load_backbone(Plain(), mean=(0.5,) * 3, std=(0.5,) * 3, input_size=32)
    images = photos(2)
    with pytest.warns(
        UserWarning, match=r"^features: Plain does not reveal .* the mean of its last map is used"
    ) as w:
        found = explain(images, backbone, explainer="occlusion", features=True)
    assert len([m for m in w if "features" in str(m.message)]) == 1
    with torch.no_grad():
        maps = backbone(inputs(images, backbone)).maps[-1]
    own = [e.facts.features for e in found]
    assert close(own, maps.mean((2, 3)).numpy())


def test_packs_without_features_say_so(backbone, tmp_path):
    explain(photos(1), backbone, explainer="gradcam", output=tmp_path / "pack")
    pack = Pack(tmp_path / "pack")
    assert pack.features() is None and not pack.has_features
    assert not (tmp_path / "pack" / "features-00000.safetensors").exists()
    explain(photos(1), backbone, explainer="gradcam", output=tmp_path / "pack", features=True)
    assert Pack(tmp_path / "pack").has_features


def changed_byte(folder):
    file = folder / "features-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(folder):
    file = folder / "features-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def gone(folder):
    (folder / "features-00000.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [(changed_byte, "not the file that was written"), (cut, "is damaged"), (gone, "is missing")],
)
def test_damaged_features_are_refused(damage, said, tmp_path):
    explain(photos(1), made("cnn"), explainer="gradcam", output=tmp_path / "p", features=True)
    damage(tmp_path / "p")
    with pytest.raises(PackError, match=said):
        Pack(tmp_path / "p").features()


@pytest.mark.parametrize(
    "said", [[], {}, {"rows": 7}, {"file": "../features.safetensors"}], ids=str
)
def test_a_manifest_that_tells_wrong_things_of_features_is_refused(said, tmp_path):
    explain(photos(1), made("cnn"), explainer="gradcam", output=tmp_path / "p", features=True)
    file = tmp_path / "p" / "manifest.json"
    manifest = json.loads(file.read_text())
    record = manifest["shards"][0]["features"]
    manifest["shards"][0]["features"] = record | said if said else said
    file.write_text(json.dumps(manifest))
    with pytest.raises(PackError, match="features"):
        Pack(tmp_path / "p")
