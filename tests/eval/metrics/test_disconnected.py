"""DiFull and DiPart: networks that classify one cell of a mosaic, and maps of them."""

import pytest
import torch

import xattn
from xattn import load_backbone
from xattn.eval import evaluate
from xattn.eval.metrics.board.masks import join_cells, split_cells
from xattn.eval.metrics.board.mosaics.disconnected import own_cell_values
from xattn.eval.sanity import Cascade
from xattn.eval.sanity.disconnected import disconnected

SIDE = 32


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Colours(torch.nn.Module):
    """Four classes by colour, through a blur that crosses the borders of cells."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 4, 4, bias=False)
        self.blur = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.global_pool = torch.nn.AdaptiveAvgPool2d(1)
        self.flat = torch.nn.Flatten()
        self.fc = torch.nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            mix = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [0.5, 0.5, 0.5]])
            self.stem.weight.copy_(mix[:, :, None, None].expand(4, 3, 4, 4) / 16)
            self.blur.weight.fill_(1 / 9)
            self.fc.weight.copy_(30 * torch.eye(4))

    def forward(self, x):
        return self.fc(self.flat(self.global_pool(torch.relu(self.blur(self.stem(x))))))


@pytest.fixture(scope="module")
def network():
    colours = {"input_size": SIDE, "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop": 1.0}
    return load_backbone(Colours().eval(), class_names=["red", "green", "blue", "grey"], **colours)


@pytest.fixture(scope="module")
def photos():
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.7, 0.7, 0.7]])
    return (0.9 * colours[:, :, None, None] + 0.1 * rand(4, 3, SIDE, SIDE)).clamp(0, 1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_cells_are_split_row_by_row_and_joined_again(n):
    whole = rand(2, 3, 5 * n, 4 * n)
    cells = split_cells(whole, n)
    assert cells.shape == (2 * n * n, 3, 5, 4)
    assert torch.equal(cells[n * n - 1], whole[0, :, 5 * (n - 1) :, 4 * (n - 1) :])
    assert torch.equal(join_cells(cells, n), whole)
    with pytest.raises(ValueError, match="sides are multiples of 2"):
        split_cells(whole[:, :, :3], 2)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_fully_disconnected_network_is_the_network_on_the_cell(name):
    backbone = load_backbone(name, weights=None, input_size=64, num_classes=5)
    for n in (2, 3):
        mosaic = rand(2, 3, 64 * n, 64 * n)
        cell = n * n - 2
        alone = backbone.logits(split_cells(mosaic, n)[cell :: n * n])
        found = disconnected(backbone, "full", n, cell).logits(mosaic)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    before = backbone.logits(mosaic)
    assert torch.equal(before, backbone.logits(mosaic)) and not torch.allclose(before, found)


def test_a_disconnected_classifier_pools_its_part_of_the_last_features(network):
    mosaic = rand(1, 3, 2 * SIDE, 2 * SIDE)
    model = Colours().eval()  # its weights are fixed
    features = torch.relu(model.blur(model.stem(mosaic)))
    for cell in range(4):
        own = split_cells(features, 2)[cell].mean((1, 2))
        found = disconnected(network, "part", 2, cell).logits(mosaic)
        torch.testing.assert_close(found[0], model.fc(own), atol=1e-5, rtol=1e-5)
    alone = network.logits(split_cells(mosaic, 2)[3:])
    assert not torch.allclose(found, alone), "the blur reads across the border"


def test_networks_without_one_pooling_are_refused():
    vit = load_backbone("test_vit", weights=None, num_classes=5)
    with pytest.raises(ValueError, match="choose a CNN"):
        disconnected(vit, "full", 2, 0)
    resnet = load_backbone("test_resnet", weights=None, input_size=64)
    with pytest.raises(ValueError, match="give full or part"):
        disconnected(resnet, "full", 2, 4)


def test_values_of_known_maps():
    maps = torch.zeros(3, 2, 1, 4, 4)
    maps[0, 0, :, :2, :2], maps[0, 1, :, 2:, 2:] = 1, 1  # each in its own cell
    maps[1, :, :, :2, :2] = 1  # both in the first cell
    maps[2] = 1
    assert own_cell_values(maps, 2).tolist() == [1.0, 0.5, 0.25]
    assert own_cell_values(-maps, 2).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="give"):
        own_cell_values(maps[:, :1], 2)


def test_input_gradients_have_1_in_difull_and_maps_that_read_nothing_have_chance(network, photos):
    names = ("saliency", "gradcam", "centre", "cam")
    cascade = Cascade(network, max_forward_batch=4)
    found = evaluate(
        network, {name: xattn.create_explainer(name, network) for name in names}, photos,
        metrics=["disconnected"], progress=False, max_forward_batch=4,
        randomized={name: cascade.method(name) for name in names},
    )  # fmt: skip
    assert found.mean("saliency", "DiFull") == pytest.approx(1, abs=1e-6)
    assert 0.9 < found.mean("saliency", "DiPart") < 1, "the blur reads one cell beyond the border"
    assert found.mean("centre", "DiFull") == pytest.approx(0.25, abs=1e-6)
    assert found.mean("centre", "DiPart") == pytest.approx(0.25, abs=1e-6)
