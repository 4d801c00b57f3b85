"""AttnLRP through attention of every kind: what sums are conserved, and what is held constant."""

import pytest
import torch
import torch.nn.functional as F
from small_transformers import TARGET, assert_equal, photos, share, tiny
from torch import nn

from xattn.attention import (
    CausalLowRankOperator,
    ColumnsOperator,
    Entry,
    GatedOperator,
    Inputs,
    LocalLinearOperator,
    LowRankOperator,
    Mechanism,
    Operator,
    PoolOperator,
    ProductOperator,
    SegmentsOperator,
    SoftmaxOperator,
    SoftplusOperator,
    SubsetsOperator,
    SumOperator,
    TaylorOperator,
    convert,
    create_mechanism,
)
from xattn.attention.base import MECHANISMS
from xattn.attention.operators.segments import Ordered
from xattn.attention.record import replace_products
from xattn.blocks.base import Block, BlockEntry
from xattn.explainers import create_explainer
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.operators import multiply, receives_relevance
from xattn.explaining.provenance import provenance_of
from xattn.kernels.causal_product import causal_product
from xattn.kernels.pooling import softmax_pooling

B, H, D = 2, 3, 4
PREFIXES = [0, 1, 2, 5]
FIXED = ("none", "static", "uniform")  # A is made of constants: values get all relevance
CASES = [
    pytest.param(
        entry.name, options, id="-".join([entry.name, *(f"{k}={v}" for k, v in options.items())])
    )
    for entry in MECHANISMS.entries()
    if entry.name not in FIXED
    for options in entry.cases
]
FIRST_CASES = [
    pytest.param(e.name, e.cases[0], id=e.name)
    for e in MECHANISMS.entries()
    if e.name != "static_embedding"  # its queries and keys are not those that it is given
]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def relevance(y, dy, leaves):
    """x * grad, summed, of the output and of each leaf; hidden keys, whose bias is -inf, have none."""
    grads = torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)
    pairs = zip(
        leaves, (0 * x if g is None else g for x, g in zip(leaves, grads, strict=True)), strict=True
    )
    sums = [torch.where(g == 0, 0.0, x * g).sum().item() for x, g in pairs]
    return (y * dy).sum().item(), sums


def same_gradients(y, expected, leaves, dy):
    pairs = (torch.autograd.grad(z, leaves, dy) for z in (y, expected))
    return all(torch.allclose(a, b) for a, b in zip(*pairs, strict=True))


def low_rank(n, s, seed):
    return LowRankOperator(draw(B, H, n, 5, seed=seed), draw(B, H, 5, s, seed=seed + 1))


# ---------------------------------------------------------------------- kinds of operator


@pytest.mark.parametrize("kind", [LowRankOperator, CausalLowRankOperator])
@pytest.mark.parametrize("n", [1, 7, 19])
def test_a_product_of_two_gives_a_quarter_to_each_and_half_to_the_values(kind, n):
    left, right = draw(B, H, n, 5), draw(B, H, 5, n, seed=1)
    v, dy = draw(B, H, n, D, seed=2), draw(B, H, n, D, seed=3).detach()
    y = multiply(kind(left, right), v, {})
    assert torch.allclose(y, kind(left, right).matvec(v))
    whole, (rl, rr, rv) = relevance(y, dy, [left, right, v])
    assert [rl, rr, rv] == pytest.approx([whole / 4, whole / 4, whole / 2])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 9, 17])
def test_softmax_gives_half_to_the_values_and_a_quarter_of_its_gradient_to_queries_and_keys(
    causal, n
):
    q, k, v = (draw(B, H, n, D, seed=i) for i in range(3))
    bias, dy = draw(B, H, n, n, seed=3), draw(B, H, n, D, seed=4).detach()
    y = multiply(SoftmaxOperator(q, k, bias=bias, causal=causal), v, {})
    scores = share(q, 0.5) @ share(k, 0.5).mT / 2 + bias
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) if causal else torch.zeros(n, n).bool()
    by_hand = share(scores.masked_fill(hidden, -torch.inf).softmax(-1), 0.5) @ share(v, 0.5)
    assert torch.allclose(y, by_hand)
    assert same_gradients(y, by_hand, (q, k, v, bias), dy)
    whole, (rv,) = relevance(multiply(SoftmaxOperator(q, k), v, {}), dy, [v])
    assert rv == pytest.approx(whole / 2)


def test_products_of_stages_share_the_half_of_the_matrix_equally():
    a, b, v = low_rank(9, 4, 0), low_rank(4, 7, 2), draw(B, H, 7, D, seed=5)
    c, dy = low_rank(7, 7, 6), draw(B, H, 9, D, seed=9).detach()
    leaves = [a.left, a.right, b.left, b.right, c.left, c.right, v]
    whole, parts = relevance(multiply(ProductOperator([a, b, c]), v, {}), dy, leaves)
    assert parts == pytest.approx([whole / 12] * 6 + [whole / 2])
    twice = multiply(ProductOperator([c, c]), v, {})
    whole, parts = relevance(twice, torch.ones_like(twice), [c.left, c.right, v])
    assert parts == pytest.approx([whole / 4, whole / 4, whole / 2])


def test_agents_share_as_the_rules_written_out():
    q, k, v = (draw(B, H, 9, D, seed=i) for i in range(3))
    agents, dy = draw(B, H, 4, D, seed=3), draw(B, H, 9, D, seed=4).detach()
    y = multiply(ProductOperator([SoftmaxOperator(q, agents), SoftmaxOperator(agents, k)]), v, {})

    def map_of(x, y):  # a quarter of the relevance, and of that half to each
        return share((share(x, 0.5) @ share(y, 0.5).mT / 2).softmax(-1), 0.25)

    by_hand = map_of(q, agents) @ (map_of(agents, k) @ share(v, 0.5))
    assert torch.allclose(y, by_hand)
    assert same_gradients(y, by_hand, (q, agents, k, v), dy)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_pooling_gives_all_to_the_values(prefix):
    n = prefix + 17
    v, weight = draw(B, H, n, D), draw(H, 4, seed=1).detach()
    for pool in (PoolOperator(v, 4, 3, prefix=prefix), PoolOperator(v, 4, weight=weight)):
        y = multiply(pool, v, {})
        whole, (rv,) = relevance(y, draw(*y.shape, seed=2).detach(), [v])
        assert rv == pytest.approx(whole)


def test_pooled_keys_share_with_the_values_only():
    n = 17
    pool, v = PoolOperator(draw(B, H, n, D), 4), draw(B, H, n, D, seed=1)
    a, dy = low_rank(n, 4, 2), draw(B, H, n, D, seed=4).detach()
    whole, parts = relevance(multiply(ProductOperator([a, pool]), v, {}), dy, [a.left, a.right, v])
    assert parts == pytest.approx([whole / 4, whole / 4, whole / 2])


def test_each_term_of_a_sum_shares_its_own_product():
    n = 9
    v, dy = draw(B, H, n, D), draw(B, H, n, D, seed=1).detach()
    a, constant = (
        low_rank(n, n, 2),
        LowRankOperator(draw(B, H, n, 2).detach(), draw(B, H, 2, n).detach()),
    )
    whole, parts = relevance(multiply(SumOperator([a, constant]), v, {}), dy, [a.left, a.right, v])
    of_a = (a.matvec(v) * dy).sum().item()
    assert parts == pytest.approx([of_a / 4, of_a / 4, whole - of_a / 2])
    assert sum(parts) == pytest.approx(whole)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gate_is_a_constant(sparse):
    n = 9
    v, dy = draw(B, H, n, D), draw(B, H, n, D, seed=1).detach()
    gate, a = draw(B, H, n, seed=2), low_rank(n, n, 3)
    y = multiply(GatedOperator(a, gate, sparse=sparse), v, {})
    whole, parts = relevance(y, dy, [a.left, a.right, v, gate])
    assert parts == pytest.approx([whole / 4, whole / 4, whole / 2, 0.0])


def test_what_depends_on_no_activation_leaves_its_part_to_the_others():
    n = 9
    v, dy = draw(B, H, n, D), draw(B, H, n, D, seed=1).detach()
    left, right = draw(B, H, n, 5, seed=2), draw(B, H, 5, n, seed=3)
    whole, parts = relevance(multiply(LowRankOperator(left, right.detach()), v, {}), dy, [left, v])
    assert parts == pytest.approx([whole / 2, whole / 2])
    held = {}
    whole, parts = relevance(
        multiply(LowRankOperator(left.detach(), right.detach()), v, held), dy, [v]
    )
    assert parts == pytest.approx([whole]) and not held


class Scores(Operator):
    """A = q k^T, of a kind that no rule knows."""

    def __init__(self, q, k):
        self.q, self.k = q, k
        self.shape = (*q.shape[:3], k.shape[2])

    def matvec(self, x):
        return self.q @ (self.k.mT @ x)

    def rows(self, index):
        return self.q[:, :, index] @ self.k.mT

    def _anchor(self):
        return self.q


def test_any_other_operator_is_held_constant_and_says_so():
    q, k, v = (draw(B, H, 9, D, seed=i) for i in range(3))
    dy, held = draw(B, H, 9, D, seed=3).detach(), {}
    y = multiply(Scores(q, k), v, held)
    whole, parts = relevance(y, dy, [q, k, v])
    assert parts == pytest.approx([0, 0, whole]) and list(held) == ["Scores"]
    mixed = multiply(ProductOperator([low_rank(9, 9, 4), Scores(q, k)]), v, held)
    whole, parts = relevance(mixed, dy, [q, v])
    assert parts == pytest.approx([0, whole / 2])


def test_the_note_says_if_only_a_part_is_held_constant():
    class Both(Linear):
        def operator(self, inputs):
            return SumOperator([super().operator(inputs), Scores(inputs.q, inputs.k)])

    class Powers(Linear):
        def operator(self, inputs):
            return LowRankOperator(inputs.q.abs() ** inputs.k.abs(), inputs.k.mT)

    rules, x = Engine(), draw(B, 2, 9, 8)
    with replace_products(rules), rules:
        for cls in (Both, Linear, Powers, Both):
            cls(16, 2)(x, x, x)
    assert rules.notes == [
        "layers 0, 3: A of linear is held constant in part (no rule for Scores)",
        "layer 2: A of linear is held constant (no rule for powers whose exponent is a tensor)",
    ]


# ---------------------------------------------------------------------- every registered mechanism


def mechanism_and_inputs(name, options, prefix=1, grid=(5, 6), dim=32, heads=2):
    torch.manual_seed(0)
    layer = create_mechanism(name, dim, heads, **options).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    n = prefix + grid[0] * grid[1]
    q, k, v = (draw(B, heads, n, dim // heads, seed=i) for i in range(3))
    return layer, Inputs(q, k, v, draw(B, n, dim, seed=3), grid, prefix)


def matrix(operator):
    return operator.rows(torch.arange(operator.shape[2])).detach()


def has_landmarks(operator):
    return any(s.marks is not None for piece in operator.pieces for s in piece.segments)


def kept(operator, x, dy, part):
    """The relevance that reaches what A is made of, from dense matrices: softmax gives its scores
    sum s_ij A_ij (dA_ij - sum_k A_ik dA_ik), of which those of a constant bias stay out."""
    if isinstance(operator, GatedOperator):
        return kept(operator.operator, x, dy * operator.factor[..., None], part)
    if isinstance(operator, SumOperator):
        return sum(kept(term, x, dy, part) for term in operator.terms)
    if isinstance(operator, ColumnsOperator):
        return kept(operator.operator, operator.scaled(x), dy, part)
    if isinstance(operator, SubsetsOperator):
        y = operator.inner.matvec(operator.gather(x)).detach().requires_grad_()
        (own,) = torch.autograd.grad(operator.scatter(y), y, dy)
        others = kept(operator.inner, operator.gather(x), own, part)
        if operator.first is None:
            return others
        return others + kept(operator.first, x, dy[:, :, : operator.first.shape[2]], part)
    if isinstance(operator, ProductOperator):
        maps = [matrix(factor) for factor in operator.factors]
        own = part / sum(map(receives_relevance, operator.factors))
        total = 0.0
        for i, factor in enumerate(operator.factors):
            after, before = x, dy
            for a in reversed(maps[i + 1 :]):
                after = a @ after
            for a in maps[:i]:
                before = a.mT @ before
            total += kept(factor, after, before, own)
        return total
    if not receives_relevance(operator):
        return 0.0
    if isinstance(operator, SegmentsOperator) and has_landmarks(operator):
        # Two softmaxes absorb; scores of keys and of landmarks grow with the queries alike.
        queries = [piece.q for piece in operator.pieces]
        y = operator.rows(torch.arange(operator.shape[2])) @ x
        grads = torch.autograd.grad((dy * y).sum(), queries)
        return part * sum((q * g).sum().item() for q, g in zip(queries, grads, strict=True))
    if isinstance(operator, LocalLinearOperator):  # softmax, with values that each query weighs
        a = matrix(operator.softmax)
        da = (matrix(operator) / a) * (dy @ x.mT)
        return part * (a.log() * a * (da - (a * da).sum(-1, keepdim=True))).sum().item()
    if isinstance(
        operator, SoftplusOperator | TaylorOperator
    ):  # scores grow with the queries here, too
        y = operator.rows(torch.arange(operator.shape[2])) @ x
        (grad,) = torch.autograd.grad((dy * y).sum(), operator.q)
        return part * (operator.q * grad).sum().item()
    a = matrix(operator)
    if not isinstance(operator, SoftmaxOperator | SegmentsOperator):
        return part * (dy * (a @ x)).sum().item()
    da = dy @ x.mT
    ds = a * (da - (a * da).sum(-1, keepdim=True))
    scores = torch.where(a > 0, a.log(), 0.0)
    bias = constants(operator) if isinstance(operator, SegmentsOperator) else operator.bias
    if bias is not None and not bias.requires_grad:
        scores = scores - torch.where(a > 0, bias, 0.0)
    return part * (scores * ds).sum().item()


def constants(operator):
    """What segments add to the scores of each key without a gradient, (1, 1, 1, S)."""
    found = torch.zeros(operator.shape[3], dtype=torch.float64)
    piece = operator.pieces[-1]
    for segment, columns in zip(piece.segments, piece.columns, strict=True):
        added = torch.full((segment.k.shape[2],), segment.shift, dtype=torch.float64)
        if segment.bias is not None and segment.bias.shape[:2] == (1, 1):
            added += segment.bias[0, 0].detach().nan_to_num(neginf=0.0)
        if isinstance(columns, Ordered):
            index = columns.order.index
            found[index[index >= 0] + columns.prefix] = added[index >= 0]
        elif isinstance(columns, range):
            found[torch.as_tensor(columns)] = added
    return found[None, None, None]


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name, options", CASES)
def test_relevance_of_every_mechanism_is_conserved_but_for_what_softmax_absorbs(
    name, options, prefix
):
    layer, inputs = mechanism_and_inputs(name, options, prefix)
    with torch.enable_grad():
        made = layer.operator(inputs)
    assert receives_relevance(made), "nothing of A has a rule"
    # Its tensors as leaves: what they get, the rules of functions share out among q, k, v and x.
    leaves = []

    def leaf(x):
        leaves.append(x.detach().requires_grad_(x.requires_grad))
        return leaves[-1]

    operator, held = made.apply(leaf), {}
    v = draw(*inputs.v.shape, seed=7)
    y = multiply(operator, v, held)
    assert torch.allclose(y, made.matvec(v)) and not held
    dy = draw(*y.shape, seed=8).detach()
    live = [x for x in leaves if x.requires_grad]
    whole, (of_values, *parts) = relevance(y, dy, [v, *live])
    assert of_values == pytest.approx(whole / 2)
    expected = kept(operator, v.detach(), dy, 0.5)
    assert sum(parts) == pytest.approx(float(expected), rel=1e-6, abs=1e-9 * abs(whole))


@pytest.mark.parametrize("name, options", FIRST_CASES)
def test_the_map_of_a_converted_network_accounts_for_its_logit(name, options):
    backbone = tiny("average", (5, 6), depth=2, embed_dim=32).double()
    convert(backbone, name, range(2), options)
    explainer = create_explainer("attn_lrp", backbone)
    images = photos(backbone)
    maps = explainer.attribute(images, TARGET)
    assert maps.shape == (2, 1, 5, 6) and maps.isfinite().all() and maps.std() > 0
    held = f"layers 0, 1: A of {name} is held constant (it is made of constants)"
    assert explainer.notes == ((held,) if name in FIXED else ())
    # Relevance is in the tokens, in what is added to them, and in what attention absorbs.
    added = [p for n, p in backbone.model.named_parameters() if _is_added(n)]
    steps = []

    class Kept(Engine):
        def attend(self, mechanism, inputs):
            y = super().attend(mechanism, inputs)
            steps.append((y, inputs))
            return y

    rules = Kept()
    backbone.requires_grad_(False)
    tokens = []
    backbone.model.patch_embed.register_forward_hook(
        lambda m, a, y: tokens.append(y.detach().requires_grad_()) or tokens[0]
    )
    for p in added:
        p.requires_grad_()
    with replace_products(rules), rules:
        logits = backbone.logits(images)
    score = logits.gather(1, TARGET[:, None]).sum()
    outer = [tokens[0], *added, *(y for y, _ in steps)]
    inner = [x for _, i in steps for x in (i.q, i.k, i.v)]
    _, sums = relevance(score, torch.ones_like(score), [*outer, *inner])
    n = 1 + len(added)
    absorbed = sum(sums[n : n + len(steps)]) - sum(sums[n + len(steps) :])
    assert len(steps) == 2 and sums[0] == pytest.approx(float(maps.sum()))
    assert sum(sums[:n]) + absorbed == pytest.approx(score.item())
    for p in added:
        p.requires_grad_(False)


def _is_added(name):
    return name in ("cls_token", "reg_token", "pos_embed") or (
        name.endswith("bias") and "mechanism" not in name
    )


# ---------------------------------------------------------------------- toy mechanisms


class Linear(Mechanism):
    """A = q k^T: no softmax, no normaliser."""

    entry = Entry("linear", "none", "N D^2")

    def operator(self, inputs):
        return LowRankOperator(inputs.q, inputs.k.mT * inputs.scale)


class Features(Mechanism):
    """Rows of exp features, normalised."""

    entry = Entry("features", "none", "N D^2")

    def operator(self, inputs):
        left, right = inputs.q.exp(), inputs.k.exp()
        left = left / (left * right.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return LowRankOperator(left, right.mT, stochastic=True, signed=False)


class Unknown(Linear):
    entry = Entry("unknown", "none", "N D^2")

    def operator(self, inputs):
        return Scores(inputs.q, inputs.k)


class Refused(Linear):
    entry = Entry("refused", "none", "N D^2")

    def operator(self, inputs):
        return LowRankOperator(inputs.q.cumprod(-1), inputs.k.mT)


class Gates(Linear):
    """Features that are gates."""

    entry = Entry("gates", "none", "N D^2")

    def operator(self, inputs):
        return LowRankOperator(inputs.q.sigmoid(), inputs.k.sigmoid().mT)


def attending(cls, layers=(0, 1, 2), **options):
    backbone = tiny(**options).double()
    convert(backbone, "softmax")
    for i in layers:
        backbone.model.blocks[i].attn.mechanism = cls(16, 2)
    return backbone


def test_a_network_without_biases_and_softmax_conserves_its_logit():
    backbone = attending(Linear, variant="none")
    for name, parameter in backbone.model.named_parameters():
        if name.endswith("bias") or name == "pos_embed":
            parameter.zero_()
    images = photos(backbone)
    explainer = create_explainer("attn_lrp", backbone)
    logits = backbone.logits(images).gather(1, TARGET[:, None])
    assert torch.allclose(explainer.attribute(images, TARGET).sum((2, 3)), logits)
    assert explainer.notes == ()


def test_normalisers_of_features_are_constants_and_features_keep_their_gradient():
    q, k, v = (draw(B, H, 9, D, seed=i) for i in range(3))
    dy, rules = draw(B, H, 9, D, seed=3).detach(), Engine()
    with replace_products(rules), rules:
        y = Features(H * D, H)(q, k, v)
    a = q.exp() @ k.exp().mT
    left, right = share(q.exp(), 0.5), share(k.exp(), 0.5)
    by_hand = share(left @ right.mT / a.sum(-1, keepdim=True).detach(), 0.5) @ share(v, 0.5)
    assert torch.allclose(y, by_hand) and rules.notes == []
    assert same_gradients(y, by_hand, (q, k, v), dy)


@pytest.mark.parametrize(
    "cls, note",
    [
        (Unknown, "layers 0, 2: A of unknown is held constant (no rule for Scores)"),
        (Refused, "layers 0, 2: A of refused is held constant (no rule for cumprod)"),
        (Gates, "layers 0, 2: A of gates is held constant (it is made of constants)"),
    ],
)
def test_the_provenance_of_a_map_says_what_was_held_constant(cls, note):
    backbone, images = attending(cls, [0, 2]), photos(tiny())
    explainer = create_explainer("attn_lrp", backbone)
    assert explainer.notes == (note,)
    assert provenance_of(backbone, explainer, "crop")["notes"] == [note]
    maps = explainer.attribute(images, TARGET)

    class Held(cls):
        """The same with a constant A."""

        def operator(self, inputs):
            constant = {name: getattr(inputs, name).detach() for name in ("q", "k")}
            return super().operator(inputs.replace(**constant))

    assert_equal(
        maps, create_explainer("attn_lrp", attending(Held, [0, 2])).attribute(images, TARGET)
    )
    assert create_explainer("attn_lrp", attending(Linear, [0, 2])).notes == ()


def test_a_mechanism_of_the_module_list_alone_is_attention_enough():
    class Mixer(nn.Module):
        """One layer of xattn, and no other attention."""

        def __init__(self):
            super().__init__()
            self.inner = Linear(8, 2)

        def forward_taps(self, x):
            tokens = x.flatten(2).mT.repeat(1, 1, 3)[..., :8]
            q = tokens.unflatten(2, (2, 4)).transpose(1, 2)
            y = self.inner(q, q, q).transpose(1, 2).flatten(2)
            return y.mean(1), [y.mT.unflatten(2, x.shape[-2:])]

    from xattn.backbone import load_backbone

    backbone = load_backbone(Mixer(), input_size=4)
    images = torch.rand(1, 3, 4, 4)
    maps = create_explainer("attn_lrp", backbone, at="pixels").attribute(images, 3)
    logit = float(backbone.logits(images)[0, 3])
    assert float(maps.sum()) == pytest.approx(logit, rel=1e-4)


def test_local_terms_keep_their_own_gradient():
    q, k, v = (draw(B, 2, 30, 16, seed=i) for i in range(3))
    rules, layer = Engine(), create_mechanism("agent", 32, 2, agents=4, training_free=True)
    with replace_products(rules), rules:
        y = layer.double()(q, k, v, (5, 6))
    assert torch.allclose(y, layer(q, k, v, (5, 6)))
    dy = F.normalize(draw(*y.shape, seed=4).detach(), dim=-1)
    whole, (rv,) = relevance(y, dy, [v])
    local = (0.075 * v * dy).sum().item()
    assert rv == pytest.approx((whole - local) / 2 + local)


# ---------------------------------------------------------------------- blocks and heads


def test_what_a_block_mixes_is_one_step_too():
    class Mixes(Block):
        entry = BlockEntry("mixes", "none", "N D^2")

        def run(self, x, grid, prefix):
            heads = x.unflatten(2, (2, -1)).transpose(1, 2)
            y = self.mix(LowRankOperator(heads, heads.mT), heads)
            return x + y.transpose(1, 2).flatten(2)

    x, rules = draw(B, 9, 8), Engine()
    with replace_products(rules), rules:
        y = Mixes(8)(x)
    assert torch.allclose(y, Mixes(8)(x)) and rules.notes == []
    whole, (rx,) = relevance(y, draw(*y.shape, seed=1).detach(), [x])
    assert rx == pytest.approx(whole)
    heads = x.unflatten(2, (2, -1)).transpose(1, 2)
    by_hand = share(share(heads, 0.5) @ share(heads, 0.5).mT, 0.5) @ share(heads, 0.5)
    by_hand = x + by_hand.transpose(1, 2).flatten(2)
    assert same_gradients(y, by_hand, [x], draw(*y.shape, seed=2).detach())


@pytest.mark.parametrize("live", ["kv", "qkv", "vb", "qkvb", "k", "v", "b"])
def test_pooling_in_one_op_has_the_relevance_of_the_products_written_out(live):
    shapes = {"q": (B, 2, 5), "k": (B, 9, 5), "v": (B, 1, 9, 4), "b": (B, 2, 9)}
    x = {n: draw(*s, seed=i).detach() for i, (n, s) in enumerate(shapes.items())}
    leaves = [x[n].requires_grad_() for n in live]
    dy = draw(B, 2, 4, seed=5).detach()
    with Engine():
        y = softmax_pooling(x["q"], x["k"], x["v"], x["b"], scale=0.5)[0]
        scores = 0.5 * (x["q"] @ x["k"].mT) + x["b"]
        by_hand = scores.softmax(-1) @ x["v"][:, 0]
    assert torch.allclose(y, by_hand) and same_gradients(y, by_hand, leaves, dy)


@pytest.mark.parametrize("live", ["lrx", "lr", "lx", "x", "r"])
def test_causal_products_in_one_op_are_shared_as_products_written_out(live):
    shapes = {"l": (B, 9, 5), "r": (B, 9, 5), "x": (B, 9, 4)}
    t = {n: draw(*s, seed=i).detach() for i, (n, s) in enumerate(shapes.items())}
    leaves = [t[n].requires_grad_() for n in live]
    with Engine():
        y = causal_product(t["l"], t["r"], t["x"])
        by_hand = (t["l"] @ t["r"].mT).tril() @ t["x"]
    dy = draw(B, 9, 4, seed=5).detach()
    assert torch.allclose(y, by_hand) and same_gradients(y, by_hand, leaves, dy)
