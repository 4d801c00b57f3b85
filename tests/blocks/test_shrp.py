"""SHRP's block: routing, usage, the penalty, and pruning."""

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import record
from xattn.blocks import create_block
from xattn.blocks.shrp import usage_entropy

C, M, D, H = 32, 4, 8, 12


def tokens(batch=3, seed=0, n=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, C, generator=generator, dtype=torch.float64)


def made(**options):
    torch.manual_seed(0)
    return create_block("shrp", C, **{"heads": M, "hidden": H, **options}).double().eval()


def by_hand(block, x, head):
    """x + E(o_head), written out."""
    n = block.norm(x)
    q, k, v = block.qkv(n).unflatten(-1, (3, block.heads, D))[..., head, :].unbind(2)
    o = (q @ k.transpose(1, 2) / D**0.5).softmax(-1) @ v
    return x + block.expand_out(F.gelu(block.expand_in(block.expand_norm(o))))


def test_the_chosen_head_alone_with_a_gate_of_1():
    block, x = made(), tokens()
    y = block(x)
    for i, head in enumerate(block.route(x).argmax(-1).tolist()):
        torch.testing.assert_close(y[i : i + 1], by_hand(block, x[i : i + 1], head))


def test_soft_routing_is_the_mixture_of_all_heads():
    block, x = made(routing="soft"), tokens()
    shares = block.route(x)
    expected = x + sum(shares[:, j, None, None] * (by_hand(block, x, j) - x) for j in range(M))
    torch.testing.assert_close(block(x), expected)


def test_the_gradient_of_the_gate_is_that_of_its_share():
    block, x = made(), tokens()
    probe = torch.randn_like(x)
    (found,) = torch.autograd.grad((block(x) * probe).sum(), block.router.weight)
    shares = block.route(x)
    chosen = shares.argmax(-1)
    outputs = torch.cat(
        [by_hand(block, x[i : i + 1], int(j)) - x[i : i + 1] for i, j in enumerate(chosen)]
    ).detach()
    loss = (shares.gather(1, chosen[:, None])[..., None] * outputs * probe).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, block.router.weight)[0])


@pytest.mark.parametrize("head", [0, 2])
def test_pruned_equals_routed_when_the_router_always_chooses_one_head(head):
    block, x = made(decay=0.5), tokens()
    torch.nn.init.zeros_(block.router.weight)
    with torch.no_grad():
        block.router.bias.copy_(50 * F.one_hot(torch.tensor(head), M))
    block.train()
    for _ in range(60):
        block(x)
    assert block.usage[head] == 1 and abs(block.usage.sum() - 1) < 1e-12
    torch.testing.assert_close(block.eval().pruned()(x), block(x), rtol=0, atol=1e-12)


def test_pruning_keeps_one_head_and_its_shapes():
    block, x = made(), tokens()
    one = block.pruned(3)
    torch.testing.assert_close(one(x), by_hand(block, x, 3))
    assert one.router is None and one.heads == 1 and one.qkv.weight.shape == (3 * D, C)
    count = 3 * D * (C + 1) + 2 * C + 2 * D + (D + 1) * H + (H + 1) * C
    assert sum(p.numel() for p in one.parameters()) == count
    single = made(heads=1, head_dim=D)
    torch.testing.assert_close(single(x), by_hand(single, x, 0))
    assert torch.equal(one.pruned()(x), one(x))


def test_usage_counts_choices_in_training_alone():
    block, x = made(decay=0.75), tokens()
    before = block.usage.clone()
    block(x)
    assert torch.equal(block.usage, before)
    block.train()(x)
    counts = F.one_hot(block.route(x).argmax(-1), M).double().mean(0)
    torch.testing.assert_close(block.usage, 0.75 * before + 0.25 * counts)


def test_the_penalty_is_the_entropy_of_mean_shares_and_concentrates_them():
    assert usage_entropy(torch.eye(M)[:1].expand(5, -1)) == 0
    torch.testing.assert_close(usage_entropy(torch.eye(M)), torch.tensor(float(M)).log())
    block, x = made(), tokens(batch=16)
    optimizer = torch.optim.Adam(block.parameters(), 0.05)
    for _ in range(40):
        with record() as calls:
            block(x)
        loss = calls[0].aux["usage_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and len(set(block.route(x).argmax(-1).tolist())) == 1
    with record() as calls:
        made(heads=1, head_dim=D)(x)
    assert not calls[0].aux


def test_one_map_a_layer_after_routing():
    block, x = made(), tokens(n=13)
    with record() as calls:
        block(x, (3, 4), 1)
    (call,) = calls
    assert call.operator.shape == (3, 1, 13, 13) and call.maps["received"].shape == (3, 1, 3, 4)
    soft = made(routing="soft").operator(x, None, 0)
    assert soft.shape == (3, M, 13, 13)
    torch.testing.assert_close(
        block.operator(x, None, 0).rows(torch.arange(13))[:, 0],
        soft.rows(torch.arange(13))[torch.arange(3), block.route(x).argmax(-1)],
    )


def test_a_router_may_read_the_class_token():
    block, x = made(reads="class"), tokens()
    other = x.clone()
    other[:, 1:] = 0
    assert torch.equal(block.route(x), block.route(other))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: made(heads=0), "^heads: got 0"),
        (lambda: made(heads=5), "^heads: got 5; give a divisor of dim, 32, or head_dim"),
        (lambda: made(routing="top2"), "^routing: got 'top2'; give 'top1' or 'soft'"),
        (lambda: made(reads="max"), "^reads: got 'max'"),
        (lambda: made(decay=1), "^decay: got 1"),
        (lambda: made(hidden=0), "^hidden: got 0"),
        (lambda: made().pruned(4), "^head: got 4; give 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
