"""Images and settings that a backbone cannot use are refused, naming the argument and the remedy."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch

from xattn import evaluate, explain, load_backbone
from xattn.backbone import Preprocessing
from xattn.explainers import create_explainer
from xattn.heads import create_head
from xattn.heads.probed import probed

OTHERS = [
    "saliency",
    "gradcam",
    "rollout",
    "attn_lrp",
    "integrated_gradients",
    "rise",
    "ablationcam",
]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
        num_classes=5,
    )  # fmt: skip
    return load_backbone(model)


def ways(backbone):
    """Every way in for a tensor of images."""
    named = [(name, create_explainer(name, backbone)) for name in OTHERS]
    return [
        backbone,
        backbone.logits,
        *(lambda x, e=e: e.attribute(x, 1) for _, e in named),
        *(lambda x, e=e: e.attribute_classes(x, lambda z: z.topk(1).indices) for _, e in named),
        lambda x: evaluate(backbone, dict(named[:1]), x, metrics=["masking"]),
    ]


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (32, 32)])
def test_images_of_other_channels(vit, shape):
    for way in ways(vit):
        with pytest.raises(ValueError, match=r"^(images|inputs).*: got .*(expand\(|:3, :, :)"):
            way(torch.rand(shape))
    with pytest.raises(ValueError, match=r"images: got .*expand\(-1, 3, -1, -1\)"):
        vit(torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize("size", [(40, 32), (31, 32), (2, 2)])
def test_images_of_another_size_on_a_vit(vit, size):
    for way in ways(vit):
        with pytest.raises(ValueError, match=rf"32 x 32.*input_size=\({size[0]}, .*--input-size"):
            way(torch.rand(2, 3, *size))


def test_a_size_that_the_network_takes_goes_on():
    backbone = load_backbone(timm.create_model("test_resnet", num_classes=3), input_size=32)
    assert backbone(torch.rand(1, 3, 48, 40)).logits.shape == (1, 3)
    vit = timm.create_model("test_vit", num_classes=3)  # dynamic_img_size
    assert load_backbone(vit).logits(torch.rand(1, 3, 176, 160)).shape == (1, 3)


def test_errors_of_other_causes_keep_their_kind(vit):
    def fail(*_):
        raise MemoryError("out of memory")

    handle = vit.model.norm.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        vit(torch.rand(1, 3, 32, 32))
    handle.remove()
    with pytest.raises(RuntimeError, match="dtype|type"):
        vit(torch.rand(1, 3, 32, 32).double())


def test_at_another_size_too_errors_of_other_causes_keep_their_kind():
    def fail(*_):
        raise RuntimeError("my own bug")

    backbone = load_backbone("test_resnet", weights=None, num_classes=3, input_size=32)
    handle = backbone.model.layer2.register_forward_hook(fail)
    for way in (backbone, backbone.logits):
        with pytest.raises(RuntimeError, match="^my own bug$"):
            way(torch.rand(1, 3, 48, 40))
    handle.remove()
    with pytest.raises(RuntimeError, match="dtype|type"):
        backbone(torch.rand(1, 3, 48, 40).double())


@pytest.mark.parametrize(
    "shape, remedy",
    [
        ((2, 1, 32, 32), r"repeat the grey channel: images.expand\(-1, 3, -1, -1\)$"),
        ((1, 32, 32), r"repeat the grey channel: images.expand\(3, -1, -1\)$"),
        ((2, 4, 32, 32), r"drop the alpha channel: images\[..., :3, :, :\]$"),
        ((32, 32), r"images.expand\(3, -1, -1\)$"),
        ((2, 32, 32, 3), r"images.permute\(0, 3, 1, 2\)$"),
    ],
)
def test_the_remedy_for_a_wrong_number_of_channels_fits_the_shape(vit, shape, remedy):
    with pytest.raises(ValueError, match=remedy):
        vit.normalize(torch.rand(shape))


# ---------------------------------------------------------------------- attributes


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("preprocessing", Preprocessing((32, 32)), "mean=, std=, .*with_preprocessing"),
        ("taps", ("head",), "with_taps"),
        ("task", "multilabel", "task="),
        ("num_classes", 3, "num_classes="),
    ],
)
def test_what_was_settled_at_loading_cannot_be_assigned(vit, name, value, remedy):
    before = getattr(vit, name)
    for backbone in (vit, copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        with pytest.raises(AttributeError, match=rf"{name}: .*{remedy}"):
            setattr(backbone, name, value)
        assert getattr(backbone, name) == before


def test_with_preprocessing_normalises_by_it(vit):
    other = replace(vit.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    found, x = vit.with_preprocessing(other), torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (other.mean, other.std))
    assert found.preprocessing == other and torch.allclose(found.normalize(x), (x - mean) / std)
    assert found.model is vit.model and found.taps == vit.taps
    assert found.fingerprint != vit.fingerprint and found.class_names == vit.class_names


def test_with_preprocessing_keeps_a_probe(vit):
    head = create_head("gap", vit, classes=2)
    whole = probed(vit, head)
    found = whole.with_preprocessing(replace(vit.preprocessing, crop_pct=1.0))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.logits(x), whole.logits(x)) and found.class_names == [
        "class 0",
        "class 1",
    ]
    assert (found.name, found.fingerprint) == (whole.name, whole.fingerprint)


# ---------------------------------------------------------------------- no classes


def test_an_encoder_without_classes_is_not_explained(tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    backbone = load_backbone("test_vit", weights=None, num_classes=0, input_size=32)
    methods = {"saliency": create_explainer("saliency", backbone)}
    refused = r"num_classes=0.*leave out num_classes.*xattn probe.*--probe"
    with pytest.raises(ValueError, match=refused):
        explain(tmp_path, backbone, explainer="gradcam")
    with pytest.raises(ValueError, match=refused):
        explain(tmp_path, backbone, explainer="gradcam", classes=["feature 10"])
    with pytest.raises(ValueError, match=refused):
        evaluate(backbone, methods, tmp_path, metrics=["masking"])
    head = create_head("gap", backbone, classes=2)  # a classifier of its own
    (found,) = explain(tmp_path, probed(backbone, head), explainer="saliency")
    assert found.target_name in ("class 0", "class 1")


def test_an_explainer_gives_the_remedy_of_the_backbone(vit):
    with pytest.raises(ValueError, match=r"^inputs: .*drop the alpha channel: inputs\["):
        create_explainer("saliency", vit).attribute(torch.rand(2, 4, 32, 32), 1)
