"""aug_smooth: for every explainer the mean over six copies, and the plain map where copies say the same."""

import pytest
import torch
from small_networks import PAIRS, cheap, made
from test_gradient_explainers import Net, backbone, close

from xattn.eval.evaluation.facts import describe
from xattn.explainers import create_explainer, explainer_class
from xattn.explainers.base import EXPLAINERS
from xattn.heads import create_head

KINDS = sorted({kind for _, kind in PAIRS})


@pytest.fixture(scope="module")
def nets():
    return {kind: made(kind).double() for kind in KINDS}


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)


def explainers(name, net):
    """The explainer of that name, plain and with aug_smooth."""
    head = create_head("ttame", net).double() if explainer_class(name).needs_head else None
    options = EXPLAINERS.entry(name).cases[0]
    smooth = create_explainer(name, net, head, aug_smooth=True, **options)
    return cheap(name, net, head), smooth


@pytest.mark.parametrize("name, kind", PAIRS)
def test_the_map_is_the_mean_over_six_copies_mapped_back(nets, images, name, kind):
    net, target = nets[kind], torch.tensor([3, 0])
    plain, smooth = explainers(name, net)
    total, mean = 0, net.mean.double()
    for contrast in (0.9, 1.0, 1.1):
        x = mean + contrast * (images - mean)
        total = total + plain._attribute_noisy(x, target)
        total = total + plain._attribute_noisy(x.flip(3), target).flip(3)
    got = smooth.attribute(images, target)
    assert close(got, total / 6, 1e-6) and smooth.is_mask == plain.is_mask
    logits, _, maps = smooth.attribute_classes(images, lambda z: target[:, None])
    assert close(maps, got, 1e-6) and close(logits, net.logits(images))
    if plain.forwards is not None:
        assert smooth.total_forwards == 6 * plain.total_forwards == 6 * plain.forwards
    assert [note for note in smooth.notes if note not in plain.notes] == [
        "mean over 6 copies of the photo (aug_smooth)"
    ]


@pytest.mark.parametrize("name", ["saliency", "gradcam", "hirescam", "xgradcam", "fullgrad"])
def test_it_changes_nothing_where_the_network_sees_mirrored_and_bright_photos_alike(name):
    """Kernels that are their own mirror image, and no biases: f(k x) = k f(x), f(mirror(x)) = f(x)."""
    net, options = backbone(bias=False), {"layer": "act2"} if "cam" in name else {}
    with torch.no_grad():
        for layer in (net.model.stem, net.model.depthwise, net.model.point):
            layer.weight.add_(layer.weight.flip(3))
    images = torch.rand(2, 3, 13, 10, generator=torch.Generator().manual_seed(1)).double()
    plain = create_explainer(name, net, **options).attribute(images, 3)
    smooth = create_explainer(name, net, aug_smooth=True, **options).attribute(images, 3)
    assert close(smooth, plain) and plain.std() > 0
    other = backbone(Net, bias=False)  # whose kernels are not
    plain = create_explainer(name, other, **options).attribute(images, 3)
    smooth = create_explainer(name, other, aug_smooth=True, **options).attribute(images, 3)
    assert not close(smooth, plain, 0.01)


def test_records_tell_whether_it_is_used(nets):
    for name in ("saliency", "gradcam"):
        plain, smooth = explainers(name, nets["cnn"])
        assert describe(plain)["options"]["aug_smooth"] is False
        assert describe(smooth)["options"]["aug_smooth"] is True


def test_several_layers_are_smoothed_once(nets, images):
    net = nets["cnn"]
    options = {"layers": ("layer2", "layer3")}
    plain = create_explainer("gradcam", net, **options)
    smooth = create_explainer("gradcam", net, aug_smooth=True, **options)
    assert smooth.total_forwards == 6 * plain.total_forwards == 12
    mirrored = smooth.attribute(images.flip(3), 1).flip(3)  # the copies are the same six
    assert close(smooth.attribute(images, 1), mirrored, 1e-6)


def test_it_reaches_other_targets_and_is_refused_unless_it_is_yes_or_no(nets, images):
    smooth = create_explainer("saliency", nets["cnn"], aug_smooth=True)
    score = smooth.attribute(images, lambda z: z[:, 1] - z[:, 2])
    assert close(score, smooth.attribute(images.flip(3), lambda z: z[:, 1] - z[:, 2]).flip(3), 1e-6)
    with pytest.raises(ValueError, match="aug_smooth: got 3; give True or False"):
        create_explainer("saliency", nets["cnn"], aug_smooth=3)
