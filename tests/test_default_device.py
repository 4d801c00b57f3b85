"""Another default device of torch changes nothing: tensors are created on the device of their input.

``meta`` is the strictest choice: a tensor created there by mistake has no values.
"""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_networks import PAIRS, cheap, made

from xattn import evaluate, explain, load_backbone
from xattn.attention import Inputs, convert, create_mechanism, list_attention, record
from xattn.attention.base import MECHANISMS as REGISTERED
from xattn.attention.statistics import sample_queries, statistics
from xattn.eval import GROUPS, create_metric, randomized_backbone
from xattn.explainers import create_explainer
from xattn.heads import create_head, list_heads, load_head, save_head

MECHANISMS = {entry.name: entry.cases[0] for entry in REGISTERED.entries()}


@pytest.fixture
def meta():
    """Call it to make meta the default device."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_explainers(name, kind, images, meta):
    backbone = made(kind)
    fusion = "per_class" if kind == "masks" else "classifier"
    head = create_head("ttame", backbone, fusion=fusion).eval()

    def run():
        explainer = cheap(name, backbone, head)
        one = explainer.attribute(images, 3)
        return one, *explainer.attribute_classes(images, lambda z: z.topk(2).indices)

    expected = run()
    meta()
    assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))


# Others need annotations or networks of their own; see the test below.
@pytest.mark.parametrize(
    "probe",
    sorted(
        name
        for name, group in GROUPS.items()
        if not (group.metric.needs_annotation or group.metric.explains_randomized)
    ),
)
def test_metrics(probe, photos, meta):
    backbone = made("cnn")

    def run():
        methods = {name: create_explainer(name, backbone) for name in ("gradcam", "random")}
        found = evaluate(
            backbone, methods, photos, metrics=[create_metric(probe)], max_forward_batch=2
        )
        return [v for m in found.methods.values() for v in m.values.values()]

    expected = run()
    meta()
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(run(), expected, strict=True))


def test_randomised_networks(images, meta):
    backbone = made("cnn")
    expected = randomized_backbone(backbone, seed=3).logits(images)
    meta()
    assert torch.equal(randomized_backbone(backbone, seed=3).logits(images), expected)


def test_explaining_photos(photos, meta):
    backbone = made("cnn")
    expected = [e.map for e in explain(photos, backbone, explainer="gradcam", top=2)]
    meta()
    found = [e.map for e in explain(photos, backbone, explainer="gradcam", top=2)]
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", list_attention())
def test_mechanisms(name, meta):
    q, k, v = torch.randn(3, 1, 2, 31, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    x = torch.randn(1, 31, 32, generator=torch.Generator().manual_seed(2))
    layer = create_mechanism(name, 32, 2, **MECHANISMS[name])
    r = torch.rand(1, 3, 31, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 30])

    def run():
        with torch.no_grad():
            y = layer(q, k, v, (5, 6), 1, x=x)
            operator = layer.operator(Inputs(q, k, v, x, (5, 6), 1))
            found = statistics(operator, (5, 6), 1, absolute=operator.signed)
            few = sample_queries(31, 1, 4)
            return (
                y, operator.rows(index), operator.vecmat(r), operator.gradient_vecmat(v, v, r),
                operator.row_sums(), found.entropy, found.distance, found.received, few,
            )  # fmt: skip

    meta()
    found = run()
    torch.set_default_device(None)
    assert all(torch.equal(x, y) for x, y in zip(found, run(), strict=True))


@pytest.mark.parametrize("name", list_attention())
def test_converting(name, images, meta):
    backbone = made("vit")
    meta()
    convert(backbone, name, options=MECHANISMS[name])
    with record(backbone.model) as calls, torch.no_grad():
        logits = backbone.logits(images)
    assert logits.device.type == "cpu" and logits.isfinite().all() and len(calls) == 2


def test_loading_a_backbone(tmp_path, images, meta):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    expected = load_backbone("test_resnet", tmp_path / "w.pth").logits(images)
    meta()
    for found in (load_backbone("test_resnet", tmp_path / "w.pth"), load_backbone(model)):
        assert torch.equal(found.logits(images), expected)


@pytest.mark.parametrize("name", list_heads())
def test_heads(name, tmp_path, images, meta):
    backbone = made("vit")
    if name == "evidence":
        backbone = backbone.with_taps(["norm1.1"])
    meta()
    head = create_head(name, backbone).eval()
    save_head(head, tmp_path / name)
    again = load_head(tmp_path / name, backbone)
    with torch.no_grad():
        found = [
            h.explanation(h.tapped(backbone)(images), torch.tensor([1, 2], device="cpu"))
            for h in (head, again)
        ]
    assert found[0].isfinite().all() and torch.equal(*found)
