"""Explanations of clips: every method gives a map in time and space or says in one line that it cannot."""

import pytest
import torch
from clip_networks import backbone, clips, flat
from torch import nn

from xattn import load_backbone
from xattn.explainers import create_explainer, list_explainers
from xattn.explainers.base import EXPLAINERS, explainer_class

EVERY = [name for name in list_explainers() if explainer_class(name).clips]


@pytest.fixture(scope="module")
def networks():
    return {family: backbone(family) for family in ("own", "VideoMAE", "Timesformer")}


@pytest.mark.parametrize("family", ["own", "VideoMAE", "Timesformer"])
@pytest.mark.parametrize("name", list_explainers())
def test_a_map_or_one_line(name, family, networks):
    network = networks[family]
    x, options = clips(network), EXPLAINERS.entry(name).cases[0]
    try:
        method = create_explainer(name, network, **options)
    except ValueError as error:
        assert "\n" not in str(error)
        if name not in EVERY:
            assert "clips" in str(error) or "detections" in str(error) or "blocks" in str(error)
        return
    assert name in EVERY
    one = method.attribute(x, 1)
    grids = {network.tap_sizes[-1], network.preprocessing.places}
    assert one.shape[:2] == (2, 1) and tuple(one.shape[2:]) in grids and bool(one.isfinite().all())
    logits, _, maps = method.attribute_classes(x, lambda z: z.topk(2).indices)
    assert maps.shape == (2, 2, *one.shape[2:]) and torch.equal(logits, network.logits(x))
    alone = create_explainer(name, network, **options).attribute(x[:1], 1)
    torch.testing.assert_close(alone, one[:1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["r3d", "s3d", "mvit", "swin3d", "Vivit", "VJEPA2"])
def test_every_family_has_a_cam(family):
    network = backbone(family)
    found = create_explainer("gradcam", network, relu=False).attribute(clips(network, 1), 1)
    assert tuple(found.shape[2:]) == network.tap_sizes[-1] and float(found.std()) > 0


ROWS = (
    "rollout", "raw_attention", "column_mass", "generic_relevance", "legrad", "grad_eclip",
)  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", ["VideoMAE", "Vivit", "VJEPA2"])
def test_networks_that_attend_to_all_tokens_have_rows_in_time_and_space(family, name):
    network = backbone(family)
    rows = create_explainer(name, network).attribute(clips(network, 1), 1)
    assert rows.shape == (1, 1, 2, 4, 4) and float(rows.std()) > 0
    if name == "rollout":  # in ViViT the rest is the class token's
        total = float(rows.sum())
        assert 0 < total < 1 if family == "Vivit" else total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", ["own", "r3d", "mvit", "swin3d", "Timesformer"])
def test_other_networks_have_no_rows_and_say_so_in_one_line(family, name):
    with pytest.raises(ValueError, match="this explainer needs self-attention over all") as error:
        create_explainer(name, backbone(family))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    sorted(set(EVERY) - {"rise", "random", "smoothgrad", "gradient_shap", "lime", "kernel_shap"}),
)  # whose draws are of the input's shape
def test_one_frame_is_explained_as_a_photo(name):
    two, three = flat()
    photo = load_backbone(two, input_size=24, mean=0.5, std=0.5)
    clip = load_backbone(three, input_size=24, frames=1, mean=0.5, std=0.5)
    x, options = torch.rand(2, 3, 24, 24), EXPLAINERS.entry(name).cases[0]
    try:
        method = create_explainer(name, photo, **options)
    except ValueError:
        with pytest.raises(ValueError, match="backbone|cam|head"):
            create_explainer(name, clip, **options)
        return
    expected = method.attribute(x, 2)
    found = create_explainer(name, clip, **options).attribute(x[:, :, None], 2)
    torch.testing.assert_close(found[:, :, 0], expected, rtol=1e-4, atol=1e-6)


class Linear(nn.Module):
    """The sum of w x over all pixels of all frames."""

    def __init__(self, places):
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, *places))
        self.frame = nn.Conv3d(3, 3, 1, groups=3, bias=False)
        nn.init.ones_(self.frame.weight)

    def forward(self, x):
        return (self.frame(x) * self.w).sum((1, 2, 3, 4))[:, None]


def test_a_linear_scorer_is_explained_by_its_terms():
    places = (4, 6, 5)
    net = Linear(places)
    options = {"input_size": places[1:], "frames": 4, "mean": 0.0, "std": 1.0, "task": "regression"}
    network = load_backbone(net, **options)
    x = torch.rand(1, 3, *places)
    terms = (net.w * x).sum(1, keepdim=True).detach()

    def map_of(name, **options):
        return create_explainer(name, network, **options).attribute(x, 0)

    for name in ("input_x_gradient", "integrated_gradients"):
        torch.testing.assert_close(map_of(name), terms, rtol=1e-4, atol=1e-5)
    pixels = map_of("occlusion", size=1, stride=1, frames=1)
    torch.testing.assert_close(pixels, terms, rtol=1e-4, atol=1e-4)
    whole = map_of("occlusion", size=5, stride=1, frames=2)  # windows by their definition
    expected, count = torch.zeros(places), torch.zeros(places)
    for t in range(3):
        for y in range(2):
            window = slice(t, t + 2), slice(y, y + 5), slice(0, 5)
            expected[window] += terms[0, 0][window].sum()
            count[window] += 1
    torch.testing.assert_close(whole[0, 0], expected / count, rtol=1e-4, atol=1e-4)
    many = map_of("rise", masks=4000, cells=4)  # whose mean is linear in the terms, too
    assert torch.corrcoef(torch.stack([many.flatten(), terms.flatten()]))[0, 1] > 0.3


def test_rise_hides_in_time_and_space():
    network = backbone("own")
    masks = create_explainer("rise", network, masks=400)._random_masks(clips(network)[0])
    drawn = masks(torch.arange(400))
    assert drawn.shape == (400, 1, 6, 28, 20) and abs(float(drawn.mean()) - 0.5) < 0.02
    assert float(drawn.std(2).mean()) > 0.1 and float(drawn.std((3, 4)).mean()) > 0.1
    torch.testing.assert_close(drawn[7:9], masks(torch.tensor([7, 8])))


def test_attention_rows_of_videomae_are_those_of_its_own_weights():
    network = backbone("VideoMAE")
    x = clips(network)
    net = network.model.net.network
    found = create_explainer("raw_attention", network).attribute(x, 0)
    net.set_attn_implementation("eager")
    weights = net(network.normalize(x).transpose(1, 2), output_attentions=True).attentions
    own = weights[-1].mean(1).mean(1).unflatten(1, (2, 4, 4))  # the classifier averages all patches
    torch.testing.assert_close(found[:, 0], own, rtol=1e-4, atol=1e-6)


def test_legrad_of_a_clip_is_its_definition_by_explicit_weights():
    network = backbone("VideoMAE")
    x = clips(network)
    found = create_explainer("legrad", network, pool="model", layers=1).attribute(x, 2)
    net = network.model.net.network
    net.set_attn_implementation("eager")
    pixels = network.normalize(x).transpose(1, 2).requires_grad_()
    answer = net(pixels, output_attentions=True)
    (grad,) = torch.autograd.grad(answer.logits[:, 2].sum(), answer.attentions[-1])
    own = grad.clamp_min(0).mean((1, 2)).unflatten(1, (2, 4, 4))
    torch.testing.assert_close(found[:, 0], own, rtol=1e-3, atol=1e-7)


def test_rows_of_v_jepa_2_start_at_its_pooler_and_go_through_encoder_and_pooler():
    network = backbone("VJEPA2")
    x, net = clips(network), network.model.net.network
    found = create_explainer("rollout", network).attribute(x, 0)
    net.set_attn_implementation("eager")
    weights = []
    layers = [*(m.attention for m in net.vjepa2.encoder.layer)]
    pooler = net.pooler
    layers += [m.self_attn for m in pooler.self_attention_layers]
    for layer in (*layers, pooler.cross_attention_layer.cross_attn):
        layer.register_forward_hook(lambda m, args, output: weights.append(output[1]))
    with torch.no_grad():
        network.logits(x)
    assert len(weights) == 5
    *square, pool = [one.mean(1) for one in weights]
    row = pool
    for a in reversed(square):
        row = row @ (a + torch.eye(a.shape[-1])) / 2
    torch.testing.assert_close(found[:, 0], row[:, 0].unflatten(1, (2, 4, 4)))


def test_cams_of_a_clip_cost_one_forward_and_one_backward_pass():
    network = backbone("own")
    method = create_explainer("gradcam", network)
    calls = []
    handle = network.model.graph.fc.register_forward_hook(lambda *_: calls.append(1))
    method.attribute(clips(network), 1)
    handle.remove()
    assert len(calls) == 1


def test_cam_names_a_remedy_that_clips_have():
    with pytest.raises(
        ValueError, match=r"needs the classifier's rows.*; use 'gradcam' or"
    ) as error:
        create_explainer("cam", backbone("s3d"))
    assert "ttame" not in str(error.value)
