"""Blocks that mix tokens: every block of the registry, the transformer block, and toys of one's own."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from xattn import create_explainer, load_backbone
from xattn.attention import LowRankOperator, SoftmaxOperator, create_attention, record
from xattn.blocks import Block, block_class, create_block, list_blocks, register_block
from xattn.blocks.base import BLOCKS

GRID = (5, 6)
CASES = [(name, case) for name in list_blocks() for case in block_class(name).entry.cases]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def tokens(prefix=1, batch=2, dim=32, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + 30, dim, generator=generator, dtype=dtype)


def made(name, options, dim=32):
    torch.manual_seed(0)
    return create_block(name, dim, **options).double().eval()


# ---------------------------------------------------------------------- every block


@every_case
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_recording_changes_nothing_and_calls_belong_to_the_graph(name, options, prefix):
    block, x = made(name, options), tokens(prefix)
    y = block(x, GRID, prefix)
    assert y.shape == x.shape and y.isfinite().all()
    with record(block) as calls:
        again = block(x, GRID, prefix)
    torch.testing.assert_close(again, y, rtol=1e-9, atol=1e-9)
    for call in calls:
        batch, heads, rows, columns = call.operator.shape
        assert (batch, rows, columns) == (2, prefix + 30, prefix + 30)
        assert call.output.shape[:3] == (batch, heads, rows)
        (gradient,) = torch.autograd.grad(again.sum(), call.output, retain_graph=True)
        assert gradient.shape == call.output.shape
        for maps in call.maps.values():
            assert maps.shape[0] == batch and maps.shape[2:] == GRID


@every_case
@pytest.mark.parametrize("prefix", [0, 2])
def test_its_operator_and_its_maps_are_of_its_tokens(name, options, prefix):
    block, x = made(name, options), tokens(prefix)
    operator = block.operator(x, GRID, prefix)
    if operator is not None:
        assert operator.shape[0] == 2 and operator.shape[2:] == (prefix + 30, prefix + 30)
        assert 32 % operator.shape[1] == 0, "heads divide the width"
        matrix = operator.rows(torch.arange(prefix + 30))
        r = torch.rand(2, 3, prefix + 30, generator=torch.Generator().manual_seed(1)).double()
        torch.testing.assert_close(operator.vecmat(r), r[:, None] @ matrix)
    for maps in block.maps(x, GRID, prefix).values():
        assert maps.shape[0] == 2 and maps.shape[2:] == GRID


@every_case
def test_gradients_are_those_of_the_definition(name, options):
    block, x = made(name, options), tokens(1, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x, GRID, 1), x, fast_mode=True)
    block(x, GRID, 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@every_case
def test_copies_pickles_and_loaded_weights_give_the_same(name, options):
    block, x = made(name, options), tokens()
    expected = block(x, GRID, 1)
    torch.manual_seed(1)
    loaded = create_block(name, 32, **options).double().eval()
    loaded.load_state_dict(block.state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(other(x, GRID, 1), expected)


@pytest.mark.parametrize("name", list_blocks())
def test_compiled_it_gives_the_same(name):
    block, x = made(name, block_class(name).entry.cases[0]), tokens()
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x, GRID, 1), block(x, GRID, 1))


@every_case
def test_half_precision_stays_near(name, options):
    block, x = made(name, options), tokens(dtype=torch.float32)
    expected = block.float()(x, GRID, 1)
    found = block.bfloat16()(x.bfloat16(), GRID, 1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


@every_case
def test_tokens_that_do_not_fit_are_refused(name, options):
    block, x = made(name, options), tokens()
    for args, words in (
        ((x[..., :30], GRID, 1), r"^x: got \(2, 31, 30\); .* needs \(B, N, 32\)"),
        ((x[0], GRID, 1), "^x: got"),
        ((x, (5, 5), 1), r"^grid: \(5, 5\) holds 25 tokens; got 31 with 1 prefix"),
        ((x, GRID, 0), "^grid: .* holds 30 tokens; got 31 with 0 prefix"),
        ((x, GRID, 31), "^prefix: got 31 of 31 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            block(*args)


# ---------------------------------------------------------------------- the transformer block


def test_it_is_timms_block_with_timms_weights():
    torch.manual_seed(0)
    theirs = TimmBlock(32, 4, qkv_bias=True).double().eval()
    ours = create_block("attention", 32, num_heads=4).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    torch.testing.assert_close(ours(x), theirs(x))


def test_any_mechanism_with_its_own_options():
    block = made("attention", {"mechanism": "gna", "num_heads": 2, "options": {"kernel": 3}})
    x = tokens()
    with record(block) as calls:
        block(x, GRID, 1)
    (call,) = calls
    assert call.operator.hides and call.operator.shape == (2, 2, 31, 31)
    rows = torch.arange(31)
    torch.testing.assert_close(block.operator(x, GRID, 1).rows(rows), call.operator.rows(rows))
    with pytest.raises(ValueError, match="grid: gna needs the grid"):
        block(x)


def test_without_an_mlp_and_with_fewer_key_heads():
    block = made("attention", {"num_heads": 4, "kv_heads": 2, "mlp_ratio": 0})
    x = tokens()
    torch.testing.assert_close(block(x), x + block.attn(block.norm1(x)))


# ---------------------------------------------------------------------- blocks of one's own


class TokenMixing(Block):
    """y = x + M x, with a square matrix M over 31 tokens."""

    def __init__(self, dim, heads=1):
        super().__init__(dim)
        self.heads = heads
        self.matrix = nn.Parameter(torch.rand(31, 31).softmax(-1))

    def run(self, x, grid, prefix):
        return x + self.matrix @ x

    def operator(self, x, grid, prefix):
        left = self.matrix.expand(len(x), self.heads, -1, -1)
        eye = torch.eye(31, dtype=x.dtype).expand_as(left)
        operator = LowRankOperator(left, eye, stochastic=True, signed=False)
        operator.aux = {"size": self.matrix.square().mean()}
        return operator

    def maps(self, x, grid, prefix):
        return {"received": self.matrix.mean(0)[prefix:].expand(len(x), 1, -1).unflatten(2, grid)}


class Gate(Block):
    """y = g(x) x: no tokens are mixed."""

    def __init__(self, dim):
        super().__init__(dim)
        self.gate = nn.Linear(dim, dim)

    def run(self, x, grid, prefix):
        return self.gate(x) * x


class Bare(Block):
    """y = A x with A = softmax(x x^T / sqrt(C)), by the block's own call."""

    def run(self, x, grid, prefix):
        x = x[:, None]
        operator = SoftmaxOperator(x, x)
        return self.mix(operator, x, lambda: {"class": operator.rows(torch.tensor([0]))[..., 1:]})[
            :, 0
        ]


class Nested(Block):
    """A block in a block."""

    def __init__(self, dim):
        super().__init__(dim)
        self.inner = create_block("bare", dim)

    def run(self, x, grid, prefix):
        return x + self.inner(x, grid, prefix)

    def operator(self, x, grid, prefix):
        raise AssertionError("the inner block has kept its call")


@pytest.fixture(autouse=True)
def toys():
    options = {"paper": "none", "complexity": "N^2 C"}
    for cls in (TokenMixing, Gate, Bare, Nested):
        register_block(cls.__name__.lower(), **options)(cls)
    yield
    for cls in (TokenMixing, Gate, Bare, Nested):
        BLOCKS.remove(cls.__name__.lower())


@pytest.mark.parametrize("heads", [1, 4])
def test_a_block_with_an_operator_keeps_one_call_with_its_maps_and_losses(heads):
    block, x = made("tokenmixing", {"heads": heads}), tokens()
    with record() as calls:
        y = block(x, GRID, 1)
    (call,) = calls
    torch.testing.assert_close(y, x + block.matrix @ x)
    torch.testing.assert_close(call.operator.rows(torch.arange(31))[0, heads - 1], block.matrix)
    torch.testing.assert_close(call.value.transpose(1, 2).flatten(2), x)
    torch.testing.assert_close(call.output.transpose(1, 2).flatten(2), y)
    assert not call.operator.left.requires_grad and call.maps["received"].shape == (2, 1, *GRID)
    (call.aux["size"] + y.sum()).backward()
    expected = 2 * block.matrix.detach() / 31**2 + x.sum((0, 2))
    torch.testing.assert_close(block.matrix.grad, expected)


def test_a_block_without_an_operator_keeps_no_call():
    with record() as calls:
        made("gate", {})(tokens(), GRID, 1)
    assert not calls


def test_a_block_that_mixes_by_an_operator_keeps_that_call_and_no_other():
    x = tokens()
    for name in ("bare", "nested"):
        with record() as calls:
            y = made(name, {})(x)
        (call,) = calls
        a = (x @ x.transpose(1, 2) / 32**0.5).softmax(-1)
        torch.testing.assert_close(call.operator.rows(torch.arange(31))[:, 0], a)
        torch.testing.assert_close(call.output[:, 0], a @ x)
        torch.testing.assert_close(call.maps["class"][:, 0, 0], a[:, 0, 1:])
        torch.testing.assert_close(y, a @ x + (x if name == "nested" else 0))


class InViT(nn.Module):
    """A block in the place of a timm ViT's."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.block = nn.Identity(), block

    def forward(self, x):
        return self.block(x, GRID, 1)


def vit_of_blocks():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(40, 48), patch_size=8, depth=2, embed_dim=32, num_heads=2,
        num_classes=7,
    )  # fmt: skip
    blocks = [create_block("tokenmixing", 32) for _ in range(2)]
    model.blocks = nn.Sequential(*map(InViT, blocks))
    return load_backbone(model.double(), taps=["head"]), [block.matrix.detach() for block in blocks]


def test_rollout_goes_through_blocks_as_through_layers_of_attention():
    backbone, matrices = vit_of_blocks()
    images = torch.rand(2, 3, 40, 48, dtype=torch.float64)
    found = create_explainer("rollout", backbone).attribute(images, 3)
    first, second = ((m + torch.eye(31)) / 2 for m in matrices)
    expected = (second @ first)[0, 1:].view(1, 1, *GRID).expand(2, -1, -1, -1)
    torch.testing.assert_close(found, expected)


def test_generic_relevance_reads_gradients_at_the_outputs_of_blocks():
    backbone, matrices = vit_of_blocks()
    images = torch.rand(2, 3, 40, 48, dtype=torch.float64)
    found = create_explainer("generic_relevance", backbone).attribute(images, 3)
    model, streams = backbone.model, []
    hooks = [b.register_forward_hook(lambda m, x, y: streams.extend([*x, y])) for b in model.blocks]
    score = backbone.logits(images.requires_grad_())[:, 3].sum()
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(score, streams[1::2])
    r = torch.eye(31, dtype=torch.float64)[:1].expand(2, 1, 31)
    for m, x, gradient in reversed(list(zip(matrices, streams[::2], gradients, strict=True))):
        r = r + r @ (m * (gradient @ x.transpose(1, 2))).clamp_min(0)
    torch.testing.assert_close(found, r[..., 1:].unflatten(2, GRID))


def test_names_and_options_that_are_not_there_are_refused():
    assert {"attention", "bare"} <= set(list_blocks())
    for call, words in (
        (lambda: create_block("atention", 32), "name: unknown block 'atention'; did you mean att"),
        (
            lambda: create_block("attention", 32, mlp=2),
            r"attention does not take that option \(mlp\)",
        ),
        (lambda: create_block("attention", 32, mechanism="gan"), "unknown attention 'gan'"),
        (lambda: create_block("attention", 32, options={"kernel": 3}), "options: softmax does not"),
        (lambda: create_block("attention", 32, mlp_ratio=-1), "mlp_ratio: got -1"),
        (lambda: create_block("attention", 0), "dim: got 0"),
        (
            lambda: register_block("attention", paper="", complexity="")(Bare),
            "name: 'attention' is t",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_layer_of_attention_within_any_block_is_recorded_once():
    class Around(Block):
        entry = block_class("bare").entry

        def __init__(self, dim):
            super().__init__(dim)
            self.layer = create_attention("softmax", dim, 2)

        def run(self, x, grid, prefix):
            return self.layer(x) + self.layer(x)

    with record() as calls:
        Around(32).double()(tokens())
    assert len(calls) == 2
