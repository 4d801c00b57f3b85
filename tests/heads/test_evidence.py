"""The evidence head: CAM where its other parts are off, statistics of taps, numeric formats, files."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from number_formats import assert_formats_agree
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import xattn
from xattn.explaining.exporting import export
from xattn.heads import create_head, load_head, save_head
from xattn.heads.maps.evidence import PARTS, Components, standardise
from xattn.heads.probed import probed

CLASSES = 5


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(kind, **options):
    torch.manual_seed(0)
    if kind == "vit":
        model = VisionTransformer(
            img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=CLASSES
        )
    else:
        model = timm.create_model("test_resnet", num_classes=options.pop("num_classes", CLASSES))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return xattn.load_backbone(model, input_size=64, **options)


@pytest.fixture(scope="module")
def cnn():
    return made("cnn")


@pytest.fixture(scope="module")
def vit():
    return made("vit")


def taps_of(backbone, count=3, size=64, seed=0):
    dtype = next(backbone.parameters()).dtype
    with torch.no_grad():
        return backbone(rand(count, 3, size, size, seed=seed, dtype=dtype))


def trained(backbone, **options):
    """A head that has all parts by default, and whose parts all say something."""
    options = {"parts": PARTS, "hidden": 6, "components": 4, **options}
    head = create_head("evidence", backbone, **options)
    with torch.no_grad():
        head.calibrate([taps_of(backbone)])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return head.eval()


def cam_by_definition(backbone, taps, classes):
    """CAM (B, M, r, r) standardised over each photo."""
    maps = torch.einsum("mc,bchw->bmhw", backbone.classifier_weight[classes], taps.maps[-1])
    size = max(f.shape[-1] for f in taps.maps)
    maps = F.interpolate(maps, (size, size), mode="bilinear", align_corners=False)
    mean = maps.mean((2, 3), keepdim=True)
    return (maps - mean) / maps.flatten(2).std(2, unbiased=False)[..., None, None]


# ---------------------------------------------------------------- limit cases


@pytest.mark.parametrize("off", ["left out", "zero"])
def test_without_its_other_parts_a_head_is_a_times_the_standardised_cam(cnn, off):
    cnn = made("cnn").to(torch.float64)
    head = create_head("evidence", cnn, **({"parts": []} if off == "left out" else {}))
    head = head.to(torch.float64).eval()
    with torch.no_grad():
        head.cam.fill_(1.7)
        taps = taps_of(cnn)
        found = head(taps, torch.tensor([[4, 2]]))
    expected = 1.7 * cam_by_definition(cnn, taps, [4, 2])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_changes_the_map(vit, part):
    head, plain = trained(vit, parts=[part]), trained(vit, parts=[])
    taps = taps_of(vit)
    with torch.no_grad():
        plain.cam.copy_(head.cam)
        assert not torch.allclose(head(taps, 1), plain(taps, 1), atol=1e-3)


def test_the_contrast_is_the_row_less_the_mean_of_the_other_rows(cnn):
    head = create_head("evidence", cnn, parts=["contrast"]).eval()
    taps = taps_of(cnn)
    with torch.no_grad():
        head.cam.zero_()
        head.contrast.fill_(1)
        found = head(taps, 3)[:, 0]
        p = taps.logits.softmax(1)
        others = [k for k in range(CLASSES) if k != 3]
        weight = cnn.classifier_weight
        rows = weight[3] - (p[:, others] @ weight[others]) / p[:, others].sum(1, keepdim=True)
        maps = torch.einsum("bc,bchw->bhw", rows, taps.maps[-1])[:, None]
        size = tuple(found.shape[1:])
        expected = standardise(F.interpolate(maps, size, mode="bilinear"))[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_classes_asked_for_are_slices_of_all(kind, request):
    backbone = request.getfixturevalue(kind)
    head, taps = trained(backbone), taps_of(backbone)
    with torch.no_grad():
        whole = head(taps)
        assert whole.shape[:2] == (3, CLASSES)
        torch.testing.assert_close(head(taps, 2), whole[:, 2:3])
        torch.testing.assert_close(head(taps, torch.tensor([[4, 1]])), whole[:, [4, 1]])
        each = head(taps, torch.tensor([0, 3, 4]))[:, 0]
    torch.testing.assert_close(each, torch.stack([whole[i, k] for i, k in enumerate((0, 3, 4))]))


def test_no_parameter_belongs_to_a_class_or_a_place():
    shapes = [
        {n: p.shape for n, p in create_head("evidence", b).state_dict().items()}
        for b in (made("cnn"), made("cnn", num_classes=9))
    ]
    assert shapes[0] == shapes[1]
    head = trained(made("cnn"))
    taps = taps_of(made("cnn"))
    flipped = taps._replace(maps=tuple(f.flip(3) for f in taps.maps))
    with torch.no_grad():
        for layer in head.network:
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.weight.copy_((layer.weight + layer.weight.flip(3)) / 2)
        torch.testing.assert_close(head(flipped, 1), head(taps, 1).flip(3), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("size", [1e-4, 1, 1e4])
def test_standardised_maps_have_mean_0_and_deviation_1(size):
    maps = rand(2, 3, 5, 7) * size
    found = standardise(maps)
    assert found.mean((2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(found.flatten(2).std(2, unbiased=False), torch.ones(2, 3))


@pytest.mark.parametrize("value", [0.0, 1e-20, 0.1, 1e6])
def test_constant_maps_are_0_and_have_finite_gradients(value):
    maps = torch.full((1, 2, 5, 7), value, requires_grad=True)
    found = standardise(maps)
    found.sum().backward()
    assert (found == 0).all() and maps.grad.isfinite().all()


def test_components_have_unit_variance_over_the_photos_they_were_fitted_on():
    mixed = rand(9, 3, dtype=torch.float64) @ rand(3, 6, seed=1, dtype=torch.float64)
    f = (mixed * torch.tensor([1, 100, 1e-3, 1, 1, 1]) + 4).t().reshape(1, 6, 3, 3)
    f = torch.cat([f, torch.full((1, 2, 3, 3), 2.5)], 1)  # channels that never change
    components = Components(8, 3).double()
    vectors = f[0].flatten(1)
    components.fit(9, vectors.sum(1), vectors @ vectors.t())
    found = components(f)[0].flatten(1)
    torch.testing.assert_close(found @ found.t() / 9, torch.eye(3).double(), rtol=1e-6, atol=1e-6)
    assert (components.basis[:, 6:] == 0).all()
    scaled = components.basis * vectors.std(1)
    assert (scaled.gather(1, scaled.abs().argmax(1)[:, None]) > 0).all()


def test_a_network_is_there_only_where_a_part_needs_it(cnn, vit):
    """By default not where a class token is read."""
    head = create_head("evidence", vit)
    assert head.options["parts"] == ["contrast", "features"]
    assert {name for name, _ in head.named_parameters()} == {"cam", "contrast", "features"}
    head.calibrate([taps_of(vit)])
    assert create_head("evidence", cnn).options["parts"] == list(PARTS)
    assert len(create_head("evidence", vit, parts=["g"]).network) == 5


def test_calibrating_in_parts_is_calibrating_at_once(vit):
    taps = taps_of(vit, 5)
    heads = [create_head("evidence", vit, parts=["u"], components=6) for _ in range(2)]
    heads[0].calibrate([taps])
    heads[1].calibrate(taps.each(lambda t, s=s: t[s]) for s in (slice(0, 2), slice(2, 5)))
    for a, b in zip(heads[0].components, heads[1].components, strict=True):
        torch.testing.assert_close(a.mean, b.mean)
        torch.testing.assert_close(a(taps.maps[0]), b(taps.maps[0]), rtol=1e-3, atol=1e-3)
    untouched = create_head("evidence", vit, parts=["u"])
    untouched.calibrate([])
    assert (untouched.components[0].mean == 0).all()


# ---------------------------------------------------------------- numeric formats, sizes


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_double_precision_compiled_and_bf16_agree(kind):
    backbone = made(kind)
    assert_formats_agree(trained(backbone), taps_of(backbone), torch.tensor([1, 2, 3]))


def test_channels_last_changes_nothing_but_rounding(cnn):
    head, images = trained(cnn), rand(2, 3, 64, 64)
    last = made("cnn")
    last.model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = head(last(images.contiguous(memory_format=torch.channels_last)), 1)
        torch.testing.assert_close(found, head(cnn(images), 1), rtol=1e-3, atol=1e-3)


def test_photos_of_another_size_give_maps_of_their_taps_size(cnn):
    head = trained(cnn)
    with torch.no_grad():
        sizes = [head(taps_of(cnn, 1, size), 1).shape[2] for size in (64, 96, 448)]
        wide = head(cnn(rand(1, 3, 64, 96)), 1)
    finest = cnn.tap_sizes[0][0]
    assert sizes == [finest, finest * 96 // 64, 28] and wide.shape[2:] == (
        finest,
        finest * 96 // 64,
    )


# ---------------------------------------------------------------- options, tasks, files


def test_bad_options_and_classes_are_refused(cnn):
    with pytest.raises(ValueError, match=r"parts: got \['v'\]; choose among contrast"):
        create_head("evidence", cnn, parts=["v", "u"])
    with pytest.raises(ValueError, match="hidden"):
        create_head("evidence", cnn, hidden=0)
    head, taps = create_head("evidence", cnn), taps_of(cnn)
    for bad in (CLASSES, torch.tensor([0, 1, -1]), torch.tensor([[0, 9]])):
        with pytest.raises(ValueError, match=r"class_index: .* is out of range 0..4"):
            head(taps, bad)


def test_masks_rank_pixels_as_scores_do(cnn):
    head, taps = trained(cnn, explain_with="mask"), taps_of(cnn)
    with torch.no_grad():
        shown, scores = head.explanation(taps, 1), head(taps, 1)
    assert 0 < shown.min() and shown.max() < 1
    assert torch.equal(shown.flatten(1).argsort(), scores.flatten(1).argsort())
    torch.testing.assert_close(shown, (2 * standardise(scores) + 1).sigmoid())


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_multilabel_and_binary_networks_are_explained(task):
    backbone = made("cnn", task=task, num_classes=1 if task == "binary" else CLASSES)
    head, taps = trained(backbone), taps_of(backbone)
    with torch.no_grad():
        found = head(taps)
        cam = create_head("evidence", backbone, parts=[])(taps)
    assert found.shape[1] == backbone.num_classes and found.isfinite().all()
    if task == "binary":  # rows -w/2 and w/2
        torch.testing.assert_close(cam[:, 0], -cam[:, 1])


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_saved_heads_load(cnn, tmp_path, dtype):
    head, taps = trained(cnn), taps_of(cnn)
    save_head(head, tmp_path / "h", dtype=dtype)
    loaded = load_head(tmp_path / "h", cnn)
    assert loaded.options == head.options
    with torch.no_grad():
        found, expected = loaded(taps, 1), head(taps, 1)
    assert torch.equal(found, expected) if dtype is None else (found - expected).abs().max() < 0.05


@pytest.mark.parametrize(("kind", "name"), [("vit", "efficient_probe"), ("cnn", "abmilp")])
def test_own_classes_after_probing_are_explained(kind, name, tmp_path):
    backbone = made(kind).with_taps(["head"])
    probe = create_head(name, backbone, classes=3).eval()
    nn.init.normal_(probe.classifier.weight)
    both = probed(backbone, probe)
    head = trained(both)
    assert not any("probe" in key or "reading" in key for key in head.state_dict())
    taps = taps_of(both)
    with torch.no_grad():
        found = head(taps, torch.tensor([2, 0, 1]))
        plain = create_head("evidence", both, parts=[])(taps, 2)
        torch.testing.assert_close(plain, standardise(probe(taps, 2)))
    save_head(head, tmp_path / "h")
    with torch.no_grad():
        assert torch.equal(load_head(tmp_path / "h", both)(taps, torch.tensor([2, 0, 1])), found)
    with pytest.raises(ValueError, match="sha256"):
        load_head(tmp_path / "h", backbone)


def test_backbone_and_head_are_exported_as_one_graph(vit, tmp_path):
    head = trained(vit)
    path = export(vit, head, tmp_path / "m.pt2")  # compares the file with the head
    images = rand(2, 3, 64, 64, seed=5)
    with torch.no_grad():
        logits, _ = torch.export.load(path).module()(images, torch.tensor([1, 4]))
        torch.testing.assert_close(logits, vit.logits(images), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_backbone_and_head_go_into_onnx(kind, request, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    backbone = request.getfixturevalue(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not compared")
        export(backbone, trained(backbone), tmp_path / "m.onnx")
