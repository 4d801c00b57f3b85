"""Heads explained in several passes: mirrored and moved images, with maps brought back and averaged."""

import pytest
import torch
from small_networks import made

from xattn.backbone import load_backbone
from xattn.eval.evaluation.facts import describe
from xattn.explainers import create_explainer
from xattn.explainers import head as head_explainer
from xattn.explainers.base import options_by_name
from xattn.explainers.head import POSES, Pose, PoseTransform
from xattn.heads import create_head
from xattn.heads.probed import probed

TARGET = torch.tensor([3, 0, 6])
SHIFTS = [pose for pose in POSES if pose.shift]


def with_head(kind, name="ttame", **options):
    """A network of seven classes, and a head of it that is no longer the one it starts as."""
    backbone = made(kind)
    head = create_head(name, backbone, **options).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return (probed(backbone, head) if head.is_classifier else backbone), head


@pytest.fixture(
    scope="module", params=[("cnn", "ttame"), ("vit", "ttame"), ("cnn", "evidence")], ids="-".join
)
def pair(request):
    backbone, head = with_head(*request.param)
    return (
        backbone.double(),
        head.double(),
    )  # the last tap of the CNN has one cell: its spread is rounding


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


class PixelByPixel(torch.nn.Module):
    """A network that moves with its image: a tap of every pixel, and a coarse one that says what a cell is."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 6, 1), torch.nn.Linear(6, 7)

    def forward_taps(self, x):
        pixels = self.conv(x)
        return self.fc(pixels.mean((2, 3))), [torch.nn.functional.avg_pool2d(pixels, 4), pixels]


# ---------------------------------------------------------------------- one pass


def test_one_pass_is_what_the_head_gives_bit_for_bit(pair, images):
    backbone, head = pair
    for options in ({}, {"passes": 1}):
        explainer = create_explainer("head", backbone, head, **options)
        with torch.no_grad():
            expected = head.explanation(backbone(images), TARGET)
        assert torch.equal(explainer.attribute(images, TARGET), expected)
        assert explainer.forwards == 1


def test_records_tell_the_passes(pair):
    backbone, head = pair
    record = describe(create_explainer("head", backbone, head))["options"]
    assert record["passes"] == 1
    four = describe(create_explainer("head", backbone, head, passes=4))["options"]
    assert (four["passes"], four["forwards"]) == (4, 4)


# ---------------------------------------------------------------------- what is averaged


@pytest.mark.parametrize("passes", [2, 4])
def test_a_network_that_moves_with_its_image_gives_the_map_of_one_pass(passes):
    torch.manual_seed(0)
    backbone = load_backbone(PixelByPixel().double(), input_size=(32, 24))
    head = create_head("lcam", backbone, explain_with="scores").double().eval()
    x = torch.rand(2, 3, 32, 24, dtype=torch.float64)
    one, several = (create_explainer("head", backbone, head, passes=p) for p in (1, passes))
    expected, got = one.attribute(x, 5), several.attribute(x, 5)
    assert got.shape == (2, 1, 32, 24) and expected.std() > 0.01
    assert (got - expected).abs().max() < 1e-12


def test_images_move_by_half_a_cell_of_the_tap_with_the_fewest(pair, images, monkeypatch):
    backbone, head = pair
    made = []
    monkeypatch.setattr(
        head_explainer, "PoseTransform", lambda *a, **k: made.append(a) or PoseTransform(*a, **k)
    )
    create_explainer("head", backbone, head, passes=4).attribute(images, TARGET)
    with torch.no_grad():
        sizes = [tuple(tap.shape[2:]) for tap in backbone(images).maps]
    assert made == [((32, 32), sorted(sizes, key=lambda size: size[0] * size[1])[0])]


def test_a_picture_of_one_colour_has_a_constant_map_in_any_number_of_passes():
    torch.manual_seed(0)
    backbone = load_backbone(PixelByPixel(), input_size=32)
    head = create_head("lcam", backbone).eval()
    maps = create_explainer("head", backbone, head, passes=4).attribute(
        torch.full((1, 3, 32, 32), 0.3), 2
    )
    assert maps.max() - maps.min() < 1e-6


def test_the_mirror_image_gets_the_mirrored_map(pair, images):
    backbone, head = pair
    two = create_explainer("head", backbone, head, passes=2)
    there, back = two.attribute(images, TARGET), two.attribute(images.flip(3), TARGET).flip(3)
    assert torch.allclose(there, back, atol=1e-5)
    one = create_explainer("head", backbone, head)
    assert not torch.allclose(one.attribute(images, TARGET), there, atol=1e-4)


def test_the_mask_is_that_of_the_mean_of_the_scores(pair, images):
    backbone, head = pair
    scores, mask = (
        create_explainer("head", backbone, head, passes=4, maps=maps).attribute(images, TARGET)
        for maps in ("scores", "mask")
    )
    assert torch.allclose(mask, head.mask(scores), atol=1e-6)


@pytest.mark.parametrize("maps", ["scores", "mask", "attention"])
def test_attentive_heads_are_averaged_in_what_they_show(images, maps):
    backbone, head = with_head("vit", "efficient_probe", queries=2)
    two = create_explainer("head", backbone, head, passes=2, maps=maps)
    found = two.attribute(images, 1)
    with torch.no_grad():
        one = create_explainer("head", backbone, head, maps="scores" if maps == "mask" else maps)
        mean = (one.attribute(images, 1) + one.attribute(images.flip(3), 1).flip(3)) / 2
    assert torch.allclose(found, mean.sigmoid() if maps == "mask" else mean, atol=1e-6)


# ---------------------------------------------------------------------- the call


@pytest.mark.parametrize("passes", [2, 4])
def test_several_classes_cost_as_many_passes_as_one(pair, images, passes):
    backbone, head = pair
    explainer = create_explainer("head", backbone, head, passes=passes)
    assert explainer.forwards == passes
    calls = []
    layer = next(m for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        logits, classes, maps = explainer.attribute_classes(images, lambda z: z.topk(3).indices)
    finally:
        handle.remove()
    assert len(calls) == passes
    assert torch.allclose(logits, backbone.logits(images), atol=1e-5), "those of the image as it is"
    for j in range(3):
        single = explainer.attribute(images, classes[:, j])[:, 0]
        assert (maps[:, j] - single).abs().max() <= 1e-5 * single.abs().max()


def test_no_gradients_are_made_and_batches_do_not_matter(pair, images):
    backbone, head = pair
    inputs = images.clone().requires_grad_()
    explainer = create_explainer("head", backbone, head, passes=4)
    maps = explainer.attribute(inputs, TARGET)
    assert not maps.requires_grad and inputs.grad is None
    assert all(p.grad is None for module in pair for p in module.parameters())
    explainer.max_forward_batch = 2
    assert torch.allclose(explainer.attribute(images, TARGET), maps, atol=1e-5)


@pytest.mark.parametrize("passes", [3, True])
def test_other_numbers_of_passes_are_refused(pair, passes):
    with pytest.raises(ValueError, match=r"passes: got .*; give 1, 2 or 4"):
        create_explainer("head", *pair, passes=passes)


def test_options_are_those_of_a_name_that_is_there():
    assert options_by_name(["my.run.passes=2", "head.maps=mask"], ["head", "my.run"]) == {
        "my.run": {"passes": 2},
        "head": {"maps": "mask"},
    }
    for text in ("passes=4", "rise.masks=8", "head.passes", "head"):
        with pytest.raises(ValueError, match="options: got"):
            options_by_name([text], ["head"])


# ---------------------------------------------------------------------- images moved, and maps moved back


@pytest.mark.parametrize("pose", SHIFTS)
def test_an_image_is_moved_by_half_a_cell_with_its_edge_repeated(pose):
    x = torch.arange(2 * 3 * 12 * 20.0).view(2, 3, 12, 20)
    got = PoseTransform((12, 20), (3, 5), moves=True).posed(x, pose)
    for i in range(12):
        for j in range(20):
            column = 19 - j if pose.mirrored else j
            row, column = i - 2 * pose.shift, column - 2 * pose.shift
            expected = x[..., min(max(row, 0), 11), min(max(column, 0), 19)]
            assert torch.equal(got[..., i, j], expected)


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_slope_comes_back_where_it_was(pose, factor):
    """Maps of cells, or several places a cell: samples of a plane, whose up-sampling is exact inside."""
    size, cells = (24, 40), (3, 5)

    def plane(n, m, shift=0.0):
        y = (torch.arange(n) + 0.5) * size[0] / n - shift
        x = (torch.arange(m) + 0.5) * size[1] / m - shift
        return (0.3 * y[:, None] - 0.7 * x).double()[None, None]

    seen = plane(3 * factor, 5 * factor, shift=4 * pose.shift)
    seen = seen.flip(3) if pose.mirrored else seen
    maps, known = PoseTransform(size, cells, moves=True).aligned(seen, pose)
    even = 2 * -(-factor // 2)
    assert maps.shape[2:] == (3 * even, 5 * even) and known.shape == maps.shape[2:]
    lost = even // 2 * abs(pose.shift)
    assert known.sum() == (3 * even - lost) * (5 * even - lost)
    edge = 0 if even == factor else even // 2  # resizing repeats the edge within half a cell
    rows, columns = (slice(edge + lost, n * even - edge - lost) for n in cells)
    error = (maps - plane(3 * even, 5 * even)).abs()[..., rows, columns]
    assert error.numel() and error.max() < 1e-5


def test_sizes_that_no_half_cell_fits_are_moved_between_places():
    """21 pixels, 4 cells: 3 pixels are 4/7 of a place of a map of 4."""
    ramp = torch.arange(4.0).double().expand(1, 1, 4, 4)
    maps, _ = PoseTransform((21, 21), (4, 4), moves=True).aligned(ramp, Pose(shift=1))
    assert maps.shape[2:] == (8, 8)
    there = torch.nn.functional.interpolate(ramp, (8, 8), mode="bilinear")[0, 0, 0]
    place = 3 + 3 * 8 / 21
    whole, part = int(place), place % 1
    assert maps[0, 0, 0, 3].item() == pytest.approx(
        (there[whole] * (1 - part) + there[whole + 1] * part).item()
    )
