"""The localist dial: as trained at 0, local where beta is large, steered by a target, without N x N."""

import math

import pytest
import timm
import torch

from xattn.attention import Inputs, convert, create_mechanism, record, revert
from xattn.attention.mechanisms.localist import region_masses
from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import load_backbone

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(grid=(4, 6), prefix=1, batch=2, **more):
    n = prefix + math.prod(grid)
    q, k, v = (random(batch, HEADS, n, WIDTH, seed=i) for i in range(3))
    return Inputs(q, k, v, None, grid, prefix, **more)


def dial(**options):
    return create_mechanism("localist", DIM, HEADS, **options)


def concentration_bound(inside, keys, margin):
    """At most so much of a row's mass outside of a region of ``inside`` keys, and so much entropy, if each
    of its scores exceeds all others by ``margin``: e <= (N - n) / (N - n + n exp m), and
    H <= h(e) + (1 - e) ln n + e ln(N - n)."""
    outside = keys - inside
    e = outside / (outside + inside * margin.double().exp())
    most = e.clamp_max(outside / keys)  # where the entropy is largest, ln N
    own = -torch.special.xlogy(most, most) - torch.special.xlogy(1 - most, 1 - most)
    return e, own + (1 - most) * math.log(inside) + most * math.log(outside)


def quadrant(grid):
    """The region of each patch, counted by hand."""
    h, w = grid
    return [2 * (y >= (h + 1) // 2) + (x >= (w + 1) // 2) for y in range(h) for x in range(w)]


def cosines(asked, regions):
    """c (B, H, N, R), patch by patch, from the definition."""
    k = asked.k[:, :, asked.prefix :]
    numbers = torch.tensor(regions)
    mean = k.mean(2)
    anchors = [k[:, :, numbers == b].mean(2) - mean for b in range(int(numbers.max()) + 1)]
    return torch.stack(
        [torch.cosine_similarity(asked.q, a[:, :, None], dim=-1) for a in anchors], -1
    )


def dense(asked, bias):
    """softmax of the trained scores and a bias (B, H, N, R) of the quadrants."""
    scores = asked.q @ asked.k.transpose(-2, -1) * asked.scale
    numbers = torch.tensor(quadrant(asked.grid))
    scores[..., asked.prefix :] += bias[..., numbers]
    return scores.softmax(-1)


# ---------------------------------------------------------------------- what A is


@pytest.mark.parametrize("scale", [None, 0.2, -0.3])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (3, 2)])
def test_it_is_what_its_equations_say(grid, prefix, scale):
    asked = inputs(grid, prefix, scale=scale)
    a = dense(asked, 3 * cosines(asked, quadrant(grid)))
    every = torch.arange(a.shape[2])
    assert torch.allclose(dial(beta=3).operator(asked).rows(every), a)
    assert torch.allclose(dial(beta=3).attend(asked), a @ asked.v)
    steered = torch.zeros(2, HEADS, a.shape[2], 4, dtype=a.dtype)
    steered[..., 2] = 3
    found = dial(beta=3, target=2).operator(asked).rows(every)
    assert torch.allclose(found, dense(asked, steered))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"target": 1}, {"regions": "recruited"}])
def test_beta_0_is_plain_attention_bit_by_bit(options, dtype):
    asked = inputs()
    q, k, v = (x.to(dtype) for x in (asked.q, asked.k, asked.v))
    plain = create_mechanism("softmax", DIM, HEADS)(q, k, v, (4, 6), 1)
    assert torch.equal(dial(beta=0, **options)(q, k, v, (4, 6), 1), plain)


@pytest.mark.parametrize("beta", [1.0, 20.0, 1e3, 1e5])
def test_mass_outside_of_the_leading_region_keeps_within_the_bound(beta):
    for seed in range(20):
        q, k = random(2, 1, HEADS, 25, WIDTH, seed=seed)
        asked = Inputs(q, k, k, None, (4, 6), 1)
        c = cosines(asked, quadrant((4, 6)))
        scores = q @ k.transpose(-2, -1) * asked.scale
        prefix = torch.zeros_like(c[..., :1])  # its bias
        best = torch.cat([c, prefix], -1).topk(2).values
        m = beta * (best[..., 0] - best[..., 1]) - (scores.amax(-1) - scores.amin(-1))
        layer = dial(beta=beta)
        operator = layer.operator(asked)
        mass = region_masses(operator)
        leading = mass.gather(-1, c.argmax(-1, keepdim=True))[..., 0]
        ahead = c.amax(-1) > 0  # else the class token leads
        outside, entropy_bound = concentration_bound(6, 25, m)
        assert (1 - leading <= outside + 1e-9)[ahead].all()
        rows = operator.rows(torch.arange(25))
        entropy = torch.special.entr(rows).sum(-1)
        assert (entropy <= entropy_bound + 1e-9)[ahead].all()
    if beta == 1e5:
        assert leading[m > 100].numel() and (leading[m > 100] > 0.999).all()


def test_masses_are_sums_of_rows_and_grow_with_beta():
    asked, numbers = inputs(), torch.tensor(quadrant((4, 6)))
    before = 0.0
    for beta in (0.0, 2.0, 8.0, 32.0):
        layer = dial(beta=beta)
        operator = layer.operator(asked)
        mass = region_masses(operator)
        rows = operator.rows(torch.arange(25))[..., 1:]
        by_hand = torch.stack([rows[..., numbers == b].sum(-1) for b in range(4)], -1)
        assert torch.allclose(mass, by_hand)
        leading = float(mass.amax(-1).mean())
        assert leading > before
        before = leading


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [16.0, 1e6])
def test_half_precision_is_near_and_never_overflows(beta, dtype):
    asked = inputs()
    q, k, v = (x.to(dtype) for x in (asked.q, asked.k, asked.v))
    y = dial(beta=beta)(q, k, v, (4, 6), 1)
    assert y.isfinite().all()
    if beta == 16:
        expected = dial(beta=beta)(q.double(), k.double(), v.double(), (4, 6), 1)
        assert (y.double() - expected).abs().max() < 0.1


# ---------------------------------------------------------------------- regions


def test_regions_by_number_are_quadrants_a_grid_or_what_is_given():
    asked = inputs()
    given = dial(regions=quadrant((4, 6))).operator(asked)
    assert torch.equal(given.context, dial().operator(asked).context)
    assert torch.equal(given.matvec(asked.v), dial().operator(asked).matvec(asked.v))
    boxes = dial(regions="grid", sides=3).operator(asked).context
    assert boxes.shape == (1, 24, 9) and (boxes.sum(1) > 0).all()
    name, options = parse_mechanism("localist:beta=4,regions=[0,1,0,1]")
    assert create_mechanism(name, DIM, HEADS, **options).numbers == [0, 1, 0, 1]


def test_recruited_regions_are_the_clusters_of_each_images_keys():
    asked = inputs((6, 6), batch=3)
    numbers = torch.arange(36) % 3
    centres = 8 * random(3, 3, HEADS, 1, WIDTH, seed=4)
    k = asked.k.clone()
    for b in range(2):  # the last image keeps one cluster
        for c in range(3):
            k[b, :, 1:][:, numbers == c] += centres[b, c]
    asked = asked.replace(k=k)
    layer = dial(beta=16, regions="recruited", variance=0.3)
    members = layer.operator(asked).context
    for b in range(2):
        found = members[b].argmax(-1)
        assert (members[b].sum(0) > 0).sum() == 3
        assert all(len(found[numbers == c].unique()) == 1 for c in range(3))
    y = layer.attend(asked)
    if (members[2].sum(0) > 0).sum() == 1:  # nothing to choose from
        plain = create_mechanism("softmax", DIM, HEADS).attend(asked)
        assert torch.allclose(y[2], plain[2])
    for i in range(3):
        one = asked.replace(q=asked.q[i : i + 1], k=k[i : i + 1], v=asked.v[i : i + 1])
        assert torch.allclose(layer.attend(one), y[i : i + 1])


def vit(depth=8):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=DIM, num_heads=HEADS, depth=depth,
        num_classes=3,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_superpixels_are_those_of_each_photo_that_passes():
    net = vit(depth=2)
    x = torch.rand(2, 3, 64, 64)
    x[0, :, :, :32], x[0, :, :, 32:] = 0.1, 0.9
    x[1, :, :32], x[1, :, 32:] = 0.2, 0.8
    convert(net, "localist", "0-1", options={"regions": "slic", "segments": 4, "beta": 4.0})

    def halves(region, rows):
        region = region if rows else region.T
        return set(region[:2].flatten().tolist()), set(region[2:].flatten().tolist())

    for some in (x, x[1:]):  # another photo, other regions
        with record(net) as calls:
            net(some)
        for call in calls:
            above, below = halves(call.maps["region"][-1, 0], True)
            assert not above & below
            if len(some) == 2:
                left, right = halves(call.maps["region"][0, 0], False)
                assert not left & right
    revert(net)
    assert not hasattr(net.blocks[0].attn, "mechanism")


@torch.no_grad()
def test_a_model_gets_it_in_its_last_quarter_and_at_0_keeps_its_logits():
    net, x = vit(), torch.randn(2, 3, 64, 64)
    with record(net):  # fused, as the converted layers are
        before = net(x)
    convert(net, "localist", options={"beta": 0.0})
    assert [hasattr(block.attn, "mechanism") for block in net.blocks] == [False] * 6 + [True] * 2
    with record(net):
        assert torch.equal(net(x), before)
    convert(net, "localist")
    assert not torch.allclose(net(x), before, atol=1e-4)


def test_maps_show_regions_their_mass_and_what_leads():
    asked = inputs()
    layer = dial(beta=4)
    with record() as calls:
        layer.attend(asked)
    maps, operator = calls[0].maps, layer.operator(asked)
    mass = region_masses(operator)
    numbers = torch.tensor(quadrant((4, 6))).unflatten(0, (4, 6))
    assert torch.equal(maps["region"][0, 0], numbers.double())
    assert torch.allclose(maps["mass"], mass.mean(2)[..., numbers])
    assert torch.allclose(maps["leading"].flatten(2), mass[:, :, 1:].amax(-1))
    assert layer.maps(operator, asked.replace(grid=(24,))) == {}


# ---------------------------------------------------------------------- gradients, bad input


def test_a_single_region_or_a_query_of_0_passes_gradients_that_are_finite():
    asked = inputs(batch=1)
    q, k = (x.clone() for x in (asked.q, asked.k))
    q[:, :, 3] = 0
    q, k = q.requires_grad_(), k.requires_grad_()
    layer = dial(beta=8, regions="recruited", variance=4.0)
    y = layer.attend(asked.replace(q=q, k=k))
    grads = torch.autograd.grad(y.square().sum(), (q, k))
    assert all(g.isfinite().all() and g.abs().max() < 1e3 for g in grads)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dial(beta=-1.0), "beta: got -1.0; give 0"),
        (lambda: dial(beta=float("nan")), "beta: got nan"),
        (lambda: dial(regions="thirds"), "regions: got 'thirds'; choose quadrants"),
        (lambda: dial(target=-1), "target: got -1"),
        (lambda: dial(variance=0.0), "variance: got 0.0"),
        (lambda: dial(sides=0), "sides: got 0"),
        (lambda: dial(regions="grid", sides=1).attend(inputs()), "sides: got 1 .* give 2 or more"),
        (lambda: dial(regions="grid", sides=5).attend(inputs()), "sides: got 5 .* give at most 4"),
        (lambda: dial(target=4).attend(inputs()), "target: got 4; give 0 to 3"),
        (lambda: dial(regions=[0, 1]).attend(inputs()), "regions: got 2 .* 4 x 6 patches; give 24"),
        (
            lambda: dial(regions=[0] * 24).attend(inputs()),
            "regions: got one region for all patches; give at least 2",
        ),
        (
            lambda: dial(regions=[0, 2] * 12).attend(inputs()),
            "regions: region 1 is empty; number",
        ),
        (lambda: dial(regions="slic").attend(inputs()), "regions: 'slic' reads the photo"),
        (
            lambda: dial().attend(inputs().replace(k=torch.ones(2, HEADS, 25, WIDTH).double())),
            "k: the keys of all patches are alike, .* give",
        ),
        (lambda: dial().attend(inputs().replace(grid=None)), "grid: localist needs"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_backbone_takes_it_by_its_text(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(state, tmp_path / "w.pth")
    backbone = load_backbone("test_vit", tmp_path / "w.pth")
    name, options = parse_mechanism("localist:beta=2,target=3")
    convert(backbone, name, options=options)
    assert str(backbone.conversion[0]).startswith("localist:beta=2,target=3 in layers")
