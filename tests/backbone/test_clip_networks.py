"""Networks of clips and volumes: their own outputs, their maps on a grid in time and space, errors."""

import pytest
import torch
from clip_networks import TORCHVISION, TRANSFORMERS, Tiny, backbone, clips, network
from torch import nn

from xattn import load_backbone
from xattn.backbone.families.traced import as_map
from xattn.photos.preprocessing import ClipPreprocessing

FAMILIES = ["own", *TORCHVISION, *TRANSFORMERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_networks_own_and_maps_lie_in_time_and_space(family):
    net, places = network(family)
    made = backbone(family)
    assert made.reads_clips and made.preprocessing.places == places
    x = clips(made)
    normalised = (x - 0.4) / 0.3
    with torch.no_grad():
        if family in TRANSFORMERS:
            own = net.eval()(normalised.transpose(1, 2)).logits
        else:
            own = net.eval()(normalised)
        taps = made(x)
    torch.testing.assert_close(taps.logits, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.logits(x), own, rtol=1e-4, atol=1e-4)
    for tap, size in zip(taps.maps, made.tap_sizes, strict=True):
        assert tap.ndim == 5 and tuple(tap.shape[2:]) == size and size[0] <= places[0]


@pytest.mark.parametrize("name", ["mc3_18", "r2plus1d_18"])
def test_torchvision_networks_are_loaded_by_name(name):
    made = load_backbone(f"torchvision/{name}", None, input_size=32, frames=2)
    assert made.preprocessing == ClipPreprocessing(
        (32, 32), made.preprocessing.mean, made.preprocessing.std, "bilinear", 112 / 128, frames=2
    )
    assert made.pools_linearly and made.logits(torch.rand(1, 3, 2, 32, 32)).shape == (1, 400)
    assert made.class_names[0] == "abseiling"  # of Kinetics-400


def test_tokens_of_timesformer_go_through_time_before_places():
    made = backbone("Timesformer")
    x = clips(made, 1)
    other = x.clone()
    other[:, :, 2, 8:16] = 0  # the second row of patches of the third frame
    embeddings = made.model.net.network.timesformer.embeddings
    with torch.no_grad():
        change = embeddings(x.transpose(1, 2)) - embeddings(other.transpose(1, 2))
    moved = as_map(change, (4, 4, 4), made.model.time_last).abs().sum((0, 1)) > 1e-6
    expected = torch.zeros(4, 4, 4, dtype=torch.bool)
    expected[2, 1] = True
    assert torch.equal(moved, expected)


def test_taps_of_blocks_that_return_tuples_are_their_tokens():
    made = backbone("Timesformer")
    block = made.model.net.network.timesformer.encoder.layer[1]
    kept = []
    block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    tap = made(clips(made)).maps[-1]
    tokens = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    torch.testing.assert_close(tap, as_map(tokens, (4, 4, 4), True))


def test_blocks_that_return_tuples_have_taps():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.mix(x), None

    class Tuples(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.block, self.fc = nn.Conv2d(3, 6, 4, 4), Block(), nn.Linear(6, 5)

        def forward(self, x):
            if x.sum() == 1e9:  # which tracing cannot follow
                return x
            tokens, _ = self.block(self.patches(x).flatten(2).mT)
            return self.fc(tokens.mean(1))

    made = load_backbone(Tuples(), input_size=16, mean=0.5, std=0.5)
    assert made.taps[-1] == "block"
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        net = made.model.net
        tokens, _ = net.block(net.patches((x - 0.5) / 0.5).flatten(2).mT)
    torch.testing.assert_close(made(x).maps[-1], as_map(tokens, (4, 4)))


def test_a_volume_of_one_channel():
    made = load_backbone(Tiny(1), input_size=16, frames=8, mean=0.5, std=0.5)
    assert made(torch.rand(2, 1, 8, 16, 16)).maps[-1].shape == (2, 12, 4, 8, 8)


def test_a_module_with_taps_of_its_own():
    class Own(Tiny):
        def forward_taps(self, x):
            found = self.net(x)
            return self.fc(found.mean((2, 3, 4))), [found]

    made = load_backbone(Own(), input_size=16, frames=6, mean=0.5, std=0.5)
    assert made.reads_clips and made.tap_sizes == ((3, 8, 8),)
    assert made.preprocessing_record() == {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}


def test_a_network_that_does_not_say_reads_16_frames_of_112_pixels():
    with pytest.warns(UserWarning, match="does not define how photos were normalised in training"):
        assert load_backbone(Tiny()).preprocessing.places == (16, 112, 112)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: b.logits(torch.rand(1, 3, 28, 20)), r"takes \(B, 3, T, H, W\); put"),
        (lambda b: b.logits(torch.rand(1, 6, 3, 28, 20)), r"transpose\(-4, -3\)"),
        (lambda b: b.logits(torch.rand(1, 6, 28, 20, 3)), r"movedim\(-1, -4\)"),
        (lambda b: load_backbone(nn.Conv2d(3, 4, 3), frames=4), "give input_size= and frames="),
        (lambda b: load_backbone("resnet18", None, frames=4), "frames: resnet18 reads single photos"),
        (lambda b: load_backbone(Tiny(), frames=0), "frames: got 0"),
        (lambda b: b.logits(torch.rand(2, 6)), r"give \(3, T, H, W\) or \(B, 3, T, H, W\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_the_remedy(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(backbone("own"))
    assert "\n" not in str(error.value)
