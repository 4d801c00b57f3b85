"""Controls: their limit cases, where their maps come from, and what they refuse."""

import copy
import pickle

import pytest
import torch
from PIL import Image
from small_transformers import tiny
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import ResPostBlock

from xattn.attention import (
    Inputs,
    convert,
    converted_copy,
    create_attention,
    create_mechanism,
    fit_static,
    record,
    revert,
)
from xattn.attention.mechanisms.controls import Static
from xattn.attention.operators.base import SoftmaxOperator
from xattn.explainers.relevance.operators import multiply


def inputs(prefix=1, grid=(5, 6), heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(
        3, 2, heads, prefix + grid[0] * grid[1], 8, generator=generator, dtype=torch.float64
    )
    return Inputs(q, k, v, None, grid, prefix)


def matrix(operator):
    return operator.rows(torch.arange(operator.shape[2]))


def images(network, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = network.patch_embed.img_size
    return torch.rand(count, 3, *size, generator=generator).to(next(network.parameters()))


@pytest.fixture
def network():
    return tiny().model


# ---------------------------------------------------------------------- limit cases


def test_non_approximate_weighs_keys_by_their_own_queries():
    asked = inputs()
    mechanism = create_mechanism("non_approximate", 16, 2)
    a = matrix(mechanism.operator(asked))
    g = (torch.nn.functional.silu(asked.q) * asked.k).sum(-1) / 8**0.5
    assert torch.allclose(a, g.softmax(-1)[:, :, None].expand_as(a))
    assert (torch.linalg.matrix_rank(a) == 1).all()
    causal = matrix(mechanism.operator(asked.replace(causal=True)))
    rows = a.tril() / a.tril().sum(-1, keepdim=True)
    assert torch.allclose(causal, rows)


def test_taylor_is_the_series_and_tends_to_softmax():
    asked = inputs()
    mechanism = create_mechanism("taylor", 16, 2)
    z = asked.q @ asked.k.transpose(-2, -1) / 8**0.5
    series = 1 + z + z.square() / 2
    assert (series >= 0.5).all()
    assert torch.allclose(matrix(mechanism.operator(asked)), series / series.sum(-1, keepdim=True))
    errors = []
    for size in (0.1, 0.05):  # of queries and keys, so that scores shrink by 4 and errors by 64
        near = asked.replace(q=size * asked.q, k=size * asked.k)
        softmax = SoftmaxOperator(near.q, near.k, near.scale)
        errors.append((matrix(mechanism.operator(near)) - matrix(softmax)).abs().max())
    assert 40 < errors[0] / errors[1] < 90


def test_without_mixing_no_token_reads_another():
    layer = create_attention("none", 16, 2)
    x = torch.randn(1, 31, 16, requires_grad=True)
    layer(x, (5, 6), 1)[0, 7].sum().backward()
    others = torch.arange(31) != 7
    assert (x.grad[0, others] == 0).all() and (x.grad[0, 7] != 0).any()


@pytest.mark.parametrize("variant", ["class", "registers", "none", "average"])
def test_static_maps_of_the_photo_itself_are_standard(variant):
    network = tiny(variant).model.double()
    x = images(network, 1)
    expected = network(x)
    convert(network, "static")
    assert not torch.allclose(network(x), expected)
    fit_static(network, [x])
    assert torch.allclose(network(x), expected)
    assert not torch.allclose(
        network(images(network, 1, 5)), revert(network)(images(network, 1, 5))
    )


def test_static_maps_are_the_mean_over_photos_whatever_the_batches(network):
    network.double()
    x = images(network, 5)
    with record(network) as calls, torch.no_grad():
        network(x)
    expected = [matrix(call.operator).mean(0) for call in calls]
    convert(network, "static")
    for batches in ([x], [x[:2], x[2:]]):
        fit_static(network, batches)
        for block, mean in zip(network.blocks, expected, strict=True):
            assert torch.allclose(block.attn.mechanism.kept, mean)


def test_static_maps_are_the_same_for_all_inputs_and_the_output_is_linear_in_values():
    mechanism = create_mechanism("static", 16, 2, tokens=40).double()
    one, other = inputs(), inputs(seed=1)
    assert torch.equal(matrix(mechanism.operator(one))[0], matrix(mechanism.operator(other))[1])
    both = mechanism.attend(one.replace(v=one.v + 2 * other.v))
    assert torch.allclose(both, mechanism.attend(one) + 2 * mechanism.attend(other))


def test_noise_goes_through_the_network_in_place_of_the_tokens(network):
    torch.manual_seed(3)
    convert(network, "static", options={"sigma": 2.0})
    torch.manual_seed(3)
    drawn = [torch.randn(2, 2, 1024, 8) for _ in range(3)]  # made and replaced
    noise = 2.0 * torch.randn(1, 16, 16)
    assert all(block.attn.mechanism.noise is None for block in network.blocks) and drawn
    revert(network)
    with record(network) as calls, torch.no_grad():
        x = noise
        for block in network.blocks:
            x = block(x)
    torch.manual_seed(3)
    convert(network, "static", options={"sigma": 2.0})
    for block, call in zip(network.blocks, calls, strict=True):
        assert torch.allclose(block.attn.mechanism.kept, matrix(call.operator)[0], atol=1e-6)


def test_learned_maps_start_uniform_and_learn(network):
    convert(network, "static", "0", {"source": "learned", "tokens": 16})
    uniform = converted_copy(revert(copy.deepcopy(network)), "uniform", "0")
    x = images(network)
    assert torch.allclose(network(x), uniform(x), atol=1e-5)
    network(x).square().sum().backward()
    logits = network.blocks[0].attn.mechanism.logits
    assert logits.shape == (2, 16, 16) and logits.grad.abs().sum() > 0


def test_static_embedding_in_the_first_block_is_standard(network):
    x = images(network)
    expected = network(x)
    assert torch.allclose(converted_copy(network, "static_embedding", "0")(x), expected, atol=1e-5)
    later = converted_copy(network, "static_embedding", "1")
    assert not torch.allclose(later(x), expected, atol=1e-3)
    bare = {"norm": False}
    assert not torch.allclose(
        converted_copy(network, "static_embedding", "0", bare)(x), expected, atol=1e-3
    )
    network.blocks[0].norm1 = torch.nn.Identity()
    found = converted_copy(network, "static_embedding", "0", bare)(x)
    assert torch.allclose(found, network(x), atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_static_embedding_reads_what_enters_the_first_block(network, norm):
    x = images(network)
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    twin = converted_copy(network.requires_grad_(), "static_embedding", "2", {"norm": norm})
    with record(twin) as calls, torch.no_grad():
        twin(x)
    block = twin.blocks[2]
    read = block.norm1(seen[-1]) if norm else seen[-1]
    q, k, _ = block.attn.qkv(read).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    assert torch.allclose(matrix(calls[2].operator), expected, atol=1e-6)
    twin(x).sum().backward()
    assert twin.blocks[2].norm1.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["static_embedding", "static"])
def test_copies_and_pickles_of_a_converted_network_compute_the_same(network, name):
    x = images(network)
    convert(network, name, "1,2")
    expected = network(x)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.allclose(twin(x), expected)
        twin.blocks[2].norm1.weight.data.zero_()  # its own, not that of the first
        assert torch.allclose(network(x), expected)
    names = {key for key in network.state_dict() if "mechanism" in key}
    assert names == (
        {f"blocks.{i}.attn.mechanism.kept" for i in (1, 2)} if name == "static" else set()
    )


def test_maps_that_were_fitted_can_be_saved_and_loaded(network):
    x = images(network)
    convert(network, "static")
    fit_static(network, [x])
    fresh = create_mechanism("static", 16, 2)
    fresh.load_state_dict(network.blocks[1].attn.mechanism.state_dict())
    assert torch.equal(fresh.kept, network.blocks[1].attn.mechanism.kept) and fresh.noise is None


@pytest.mark.parametrize(
    "name, part", [("uniform", 1), ("none", 1), ("static", 1), ("non_approximate", 0.5)]
)
def test_values_get_all_relevance_where_attention_does_not_depend_on_the_photo(name, part):
    asked = inputs()
    asked = asked.replace(q=asked.q.requires_grad_(), v=asked.v.requires_grad_())
    operator = create_mechanism(name, 16, 2).double().operator(asked)
    y, held = operator.matvec(asked.v), {}
    (expected,) = torch.autograd.grad(y.sum(), asked.v, retain_graph=True)
    (found,) = torch.autograd.grad(multiply(operator, asked.v, held).sum(), asked.v)
    assert torch.allclose(found, part * expected) and not held


# ---------------------------------------------------------------------- photos


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.effect_noise((20, 24), 40 + 30 * i).convert("RGB").save(tmp_path / f"{i}.png")
    return tmp_path


def test_static_maps_of_photos_in_a_folder(network, folder):
    mean = converted_copy(network, "static", None, {"source": "mean", "photos": str(folder)})
    one = converted_copy(
        network, "static", None, {"source": "photo", "photos": str(folder / "0.png")}
    )
    two = converted_copy(
        network, "static", None, {"source": "mean", "photos": str(folder), "count": 2}
    )
    kept = [twin.blocks[1].attn.mechanism.kept for twin in (mean, one, two)]
    assert all(torch.allclose(m.sum(-1), torch.ones(())) for m in kept)
    assert not torch.allclose(kept[0], kept[1]) and not torch.allclose(kept[0], kept[2])
    first = converted_copy(network, "static", None, {"source": "photo", "photos": str(folder)})
    assert torch.allclose(first.blocks[1].attn.mechanism.kept, kept[1])


# ---------------------------------------------------------------------- bad input


def bad_photo(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no photo")
    return str(tmp_path / "broken.png")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "mean"}, "photos: got None with source='mean'; give a photo"),
        ({"photos": "x.png"}, "photos: got 'x.png' with source='noise'; give"),
        ({"source": "learned"}, "tokens: got None; give their number for learned maps"),
        ({"source": "learned", "tokens": 0}, "tokens: got 0; give a whole number"),
        (
            {"tokens": 5000},
            "tokens: got 5000; give at most 4096, because static stores a matrix for each head",
        ),
        ({"sigma": -1.0}, "sigma: got -1.0; give a positive number"),
        ({"source": "dream"}, "source: got 'dream'"),
        (
            {"source": "learned", "tokens": 9},
            "grid: got 16 tokens; give 9, the number for which static has maps",
        ),
        (
            {"source": "photo", "photos": "nowhere.png"},
            "photos: cannot read nowhere.png .*; give a photo",
        ),
    ],
)
def test_options_of_static_that_do_not_fit_are_named(network, options, message):
    with pytest.raises(ValueError, match=message):
        convert(network, "static", options=options)
    assert not any(hasattr(block.attn, "mechanism") for block in network.blocks)


def test_an_unreadable_photo_is_one_line(network, tmp_path):
    with pytest.raises(ValueError, match="^photos: cannot read") as error:
        convert(network, "static", options={"source": "photo", "photos": bad_photo(tmp_path)})
    assert "\n" not in str(error.value)


def test_a_grid_unlike_that_of_the_maps_is_refused():
    model = tiny().model
    convert(model, "static")
    with pytest.raises(ValueError, match="grid: got 19 tokens; give 16, the number"):
        model.blocks[0].attn(torch.zeros(1, 19, 16))
    mechanism = model.blocks[0].attn.mechanism
    q, k, v = torch.zeros(3, 1, 2, 16, 8)
    with pytest.raises(ValueError, match=r"grid: got \(5, 3\); give \(3, 5\), for which"):
        mechanism(q, k, v, (5, 3), 1)


def test_more_tokens_than_a_matrix_is_stored_for_are_refused():
    mechanism = create_mechanism("static", 2, 1)
    with pytest.raises(ValueError, match="tokens: got 4097; give at most 4096"):
        mechanism(*torch.zeros(3, 1, 1, 4097, 2))
    with pytest.raises(ValueError, match="tokens: got 1025 tokens; static has noise for 1024"):
        mechanism(*torch.zeros(3, 1, 1, 1025, 2))


def test_static_embedding_refuses_what_it_cannot_read(network):
    post_norm = tiny(block_fn=ResPostBlock).model
    with pytest.raises(
        ValueError, match="^model: block 0 is a ResPostBlock, but static_embedding needs"
    ):
        convert(post_norm, "static_embedding")
    with pytest.raises(
        ValueError, match="^rotate: static_embedding computes its own queries and keys"
    ):
        convert(network, "static_embedding", options={"rotate": "axial"})
    convert(network, "static_embedding", "1")
    with pytest.raises(ValueError, match="^x: static_embedding got no tokens from the first block"):
        revert_layout(network)


def revert_layout(network):
    """The layer alone, without the pass that leaves the embedding."""
    network.blocks[1].attn.layout._own.carried = {}
    network.blocks[1].attn(torch.zeros(1, 16, 16))


def test_a_layer_without_qkv_is_named(network):
    class Split(TimmAttention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.qkv
            self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x, attn_mask=None, is_causal=False):
            q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    network.blocks[1].attn = Split(16, 2)
    with pytest.raises(ValueError, match=r"model: blocks.1.attn of its Block has no 'qkv' layer"):
        convert(network, "static_embedding")


def test_a_model_without_static_layers_cannot_be_fitted(network):
    with pytest.raises(ValueError, match="^model: no layer has static attention; convert it first"):
        fit_static(network, [images(network)])
    convert(network, "static")
    assert isinstance(network.blocks[0].attn.mechanism, Static)
