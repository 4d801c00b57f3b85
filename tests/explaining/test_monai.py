"""3-D classifiers of MONAI: their own outputs, and maps of volumes."""

import pytest
import torch

from xattn import explain_clip, load_backbone
from xattn.explainers import create_explainer

nets = pytest.importorskip("monai.networks.nets")


def network(name):
    """A tiny classifier with three classes, and the (T, H, W) that it reads."""
    torch.manual_seed(0)
    if name == "ViT":
        pytest.importorskip("einops")
        sizes = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 3, "num_heads": 2}
        return nets.ViT(
            1, (16, 24, 24), 8, **sizes, classification=True, num_classes=3, post_activation=""
        ), (16, 24, 24)
    if name == "ResNet":
        return nets.ResNet("basic", (1,) * 4, (4, 8, 8, 8), 3, 1, num_classes=3), (16, 32, 32)
    deep = name == "DenseNet121"
    sizes = {"init_features": 8, "growth_rate": 4, "block_config": (1,) * 4 if deep else (2, 2)}
    return getattr(nets, name)(3, 1, 3, **sizes), (64, 64, 64) if deep else (16, 32, 32)


@pytest.mark.parametrize("name", ["DenseNet", "DenseNet121", "ResNet", "ViT"])
def test_volumes_are_explained(name):
    net, places = network(name)
    made = load_backbone(net, input_size=places[1:], frames=places[0], mean=0.4, std=0.3)
    x = torch.rand(1, 1, *places)
    with torch.no_grad():
        own = net.eval()((x - 0.4) / 0.3)
    own = own[0] if name == "ViT" else own  # which also returns the outputs of its blocks
    torch.testing.assert_close(made.logits(x), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(x).logits, own, rtol=1e-4, atol=1e-4)
    options = {
        "gradcam": {"relu": False},
        "saliency": {},
        "integrated_gradients": {"steps": 2},
        "occlusion": {"size": 16, "stride": 16, "frames": 8},
    }
    for method, given in options.items():
        found = create_explainer(method, made, **given).attribute(x, 1)
        grid = made.tap_sizes[-1] if method == "gradcam" else places
        assert found.shape == (1, 1, *grid) and float(found.std()) > 0
    (one,) = explain_clip(x[0], made, "saliency")
    assert one.map.shape == places and one.by_frame.sum() == pytest.approx(1)
