"""Modules with control flow run as they are; their taps, maps and refusals."""

import copy
import pickle
import threading

import pytest
import torch
import torchvision
from torch import nn

import xattn
from xattn import load_backbone
from xattn.backbone.families.hooked import HookedClassifier
from xattn.explainers import create_explainer
from xattn.heads import create_head

HALF = {"mean": 0.5, "std": 0.5}


class Branching(nn.Module):
    """``net`` behind a branch, which torch.fx cannot trace."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() > -1e9 else -self.net(x)


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


@pytest.fixture(scope="module")
def pair():
    """One network, run as it is and traced."""
    net = resnet()
    hooked = load_backbone(Branching(net), input_size=64, **HALF)
    assert isinstance(hooked.model, HookedClassifier)
    return hooked, load_backbone(net, input_size=64, **HALF)


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_logits_maps_and_classifier_are_those_of_the_traced_network(pair):
    hooked, traced = pair
    assert hooked.taps == ("net.layer2", "net.layer3", "net.layer4")
    for ours, theirs in zip(hooked(IMAGES).maps, traced(IMAGES).maps, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(hooked.logits(IMAGES), traced.logits(IMAGES))
    assert hooked.pools_linearly and hooked.classifier_weight.shape == (5, 512)
    assert torch.equal(hooked.classifier_bias, traced.classifier_bias)


@pytest.mark.parametrize(
    "name, options",
    [
        ("gradcam", {}),
        ("gradcam", {"layer": "layer3.1"}),
        ("hirescam", {"layers": "layer3,layer4"}),
        ("cam", {}),
        ("eigencam", {}),
        ("saliency", {}),
        ("guided_backprop", {}),
        ("integrated_gradients", {"steps": 2}),
        ("rise", {"masks": 4}),
        ("occlusion", {"size": 32, "stride": 32}),
    ],
    ids=str,
)
def test_maps_are_those_of_the_traced_network(pair, name, options):
    ours, theirs = (create_explainer(name, b, **options).attribute(IMAGES, 1) for b in pair)
    assert ours.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_head_reads_the_taps(pair, tmp_path):
    hooked, _ = pair
    head = create_head("ttame", hooked)
    xattn.save_head(head, tmp_path / "head")
    found = create_explainer("head", hooked, xattn.load_head(tmp_path / "head", hooked))
    assert found.attribute(IMAGES, 1).shape == (2, 1, 8, 8)


def test_what_needs_more_than_hooks_says_so(pair):
    hooked, _ = pair
    for name, reason in {"rollout": "makes no call to"}.items():
        with pytest.raises(ValueError, match=reason):
            create_explainer(name, hooked).attribute(IMAGES, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_has_hooks_of_its_own(pair, copied):
    twin = copied(pair[0])
    for ours, theirs in zip(twin(IMAGES).maps, pair[0](IMAGES).maps, strict=True):
        assert torch.equal(ours, theirs)


def test_passes_of_several_threads_keep_their_maps_apart(pair):
    hooked, _ = pair
    expected = [hooked(image[None]).maps[-1] for image in IMAGES]
    wrong, start = [], threading.Barrier(2)

    def run(i):
        start.wait()
        for _ in range(10):
            if not torch.allclose(hooked(IMAGES[i][None]).maps[-1], expected[i], atol=1e-6):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Loops(nn.Module):
    """A layer that is called as often as an image asks for, a branch that leads nowhere, and tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 6, 3, 1, 1)
        self.act, self.aside = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, 2, 1)
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3 if float(x.abs().sum()) > 0 else 2):
            x = self.layer(x)
            self.act(x)
        self.aside(x)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return self.fc(tokens.mean(1))


def loops(**options):
    torch.manual_seed(1)
    return load_backbone(Loops(), input_size=64, **HALF, **options)


def test_a_tap_is_the_output_of_the_last_call_also_before_an_in_place_activation():
    backbone, seen = loops(taps=["layer"]), []
    layer = backbone.model.net.layer
    handle = layer.register_forward_hook(lambda m, i, o: seen.append(o.clone()))
    (found,) = backbone(IMAGES).maps
    handle.remove()
    assert len(seen) == 3 and torch.equal(found, seen[-1]) and found.min() < 0


def test_tokens_are_taps_where_they_follow_the_maps():
    backbone = loops()
    assert backbone.taps == loops(taps="norm").taps == ("norm",)
    assert backbone.tap_sizes == ((8, 8),) and backbone.channels == (6,)
    assert create_explainer("gradcam", backbone).attribute(IMAGES, 1).shape == (2, 1, 8, 8)


def test_a_map_from_which_no_logit_follows_is_no_default():
    class Aside(Loops):
        def forward(self, x):
            x = self.layer(self.stem(x))
            if x.sum() > -1e9:
                self.aside(x)  # the last map, on the coarsest grid
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    assert load_backbone(Aside(), input_size=64, **HALF).taps == ("layer",)


def test_what_cannot_be_a_tap_is_refused():
    with pytest.raises(ValueError, match=r"calls no module 'layers' .*did you mean layer"):
        loops(taps=["layers"])
    with pytest.raises(ValueError, match="taps: 'fc' has shape"):
        loops(taps=["fc"])

    class Rarely(Loops):
        def forward(self, x):
            x = self.stem(x)
            return self.fc((self.layer(x) if len(x) > 1 else x).mean((2, 3)))

    with pytest.raises(ValueError, match="taps: 'layer' is not called in this pass of Rarely"):
        load_backbone(Rarely(), taps=["layer"], input_size=64, **HALF)


def test_a_module_without_logits_or_images_is_refused():
    class Map(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"model: Map does not end in logits \(B, K\)"):
        load_backbone(Map())
    with pytest.raises(
        ValueError, match=r"Linear fails on images \(2, 3, 224, 224\).*forward_taps"
    ):
        load_backbone(nn.Linear(3, 3))
