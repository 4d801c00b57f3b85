"""The engine and the sanity rows on real timm architectures with random weights."""

import numpy as np
import pytest
import torch

from xattn.eval import Column, evaluate, randomized_explainer, sanity_rows


@pytest.fixture(scope="module", params=["test_efficientnet", "test_vit"])
def backbone(request):
    from xattn.backbone import load_backbone

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_backbone(request.param, weights=None, num_classes=7, input_size=64)


@pytest.fixture(scope="module")
def images(backbone):
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(3, 3, 6, 6, generator=generator)
    size = backbone.preprocessing.input_size
    return torch.nn.functional.interpolate(low, size, mode="bicubic").clamp(0, 1)


def test_a_table_with_all_sanity_rows(backbone, images):
    from xattn.explainers import create_explainer

    rows = {"gradcam": create_explainer("gradcam", backbone), **sanity_rows(backbone)}
    options = {"max_forward_batch": 4, "progress": False, "levels": (1.0, 0.15)}
    results = evaluate(backbone, rows, images, **options)
    expected = ["gradcam", "random", "centre", "ones", "randomized_gradcam"]
    if backbone.name == "test_vit":  # without photos it has no row of mean maps
        expected.append("qk_randomized_gradcam")
    assert list(results.methods) == expected
    for level in (1.0, 0.15):
        for metric in ("AD", "IC", "AG"):
            assert results.mean("ones", metric, level) == 0
    for name, method in results.methods.items():
        assert method.valid.all(), f"{name} has a constant map"
        for (metric, _), values in method.values.items():
            assert np.isfinite(values).all()
            assert metric == "ADD" or ((values >= 0) & (values <= 100)).all()
    again = evaluate(backbone, rows, images[:1], **options)
    for name in results.methods:
        for key in results.columns:
            whole, part = (r.methods[name].values[key] for r in (results, again))
            assert np.array_equal(whole[:1], part), f"{name} {Column(*key).key}"


def test_the_randomized_row_of_a_head_reads_the_random_network(backbone, images):
    from xattn.explainers import create_explainer
    from xattn.heads import create_head

    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = create_head("ttame", backbone).eval()
    mine = head.backbone_fingerprint
    row = randomized_explainer("head", backbone, head=head)
    target = torch.tensor([0, 1, 2])
    maps = row.attribute(images, target)
    real = create_explainer("head", backbone, head=head).attribute(images, target)
    assert maps.shape == real.shape and not torch.allclose(maps, real)
    assert head.backbone_fingerprint == mine == backbone.fingerprint
