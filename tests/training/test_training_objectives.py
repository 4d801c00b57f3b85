"""Objectives on tables and photos: their formulas, what they are least for, and games that are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_runs import write_photos

import xattn
from xattn.backbone.conversion import converted
from xattn.backbone.dropped import logits_of_patches
from xattn.backbone.scored import scored
from xattn.cli import main
from xattn.config import GAMES, ON_PHOTOS, TrainConfig
from xattn.heads import create_head
from xattn.training import fit
from xattn.training.objectives.base import (
    OBJECTIVES,
    Objective,
    Part,
    Step,
    create_objective,
    masks_as_game,
    objective_for,
    register_objective,
)
from xattn.training.objectives.greedy import order_loss
from xattn.training.objectives.labels import (
    banzhaf_labels,
    permutation_labels,
    place_in_order,
    regression_labels,
)
from xattn.training.objectives.mask import Mask
from xattn.training.objectives.outcomes import correlation
from xattn.training.objectives.rank import Rank, removed_fraction, soft_order
from xattn.training.objectives.select import log_policy, policy_loss
from xattn.training.objectives.shapley import normalize_sum
from xattn.training.outcome_rows import (
    MaskSettings,
    RowMaker,
    mask_pairs,
    patch_masks,
    size_weights,
)
from xattn.training.outcomes import OutcomeBatch, cache_outcomes

SIDE = 3
PLAYERS = SIDE**2


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_masks(players=PLAYERS):
    """Every mask but the empty and the full one, then its complement: (2^d - 2, d)."""
    half = [
        m for m in itertools.product((0.0, 1.0), repeat=players) if m[0] == 1 and sum(m) < players
    ]
    kept = torch.tensor(half, dtype=torch.float64)
    return torch.cat([kept, 1 - kept])


def batch_of(value, masks):
    """A table of one photo and two classes whose values by ``"logit"`` are ``value`` and minus it."""
    both = torch.cat(
        [torch.ones(1, masks.shape[1]).double(), masks, torch.zeros(1, masks.shape[1]).double()]
    )
    v = torch.stack([value(s) for s in both])
    return OutcomeBatch(
        masks.view(1, -1, SIDE, SIDE), torch.stack([v, -v], 1)[None], None, None, "multiclass", 2, ("a",),
        known=True,
    )  # fmt: skip


def shapley_values(value, players=PLAYERS):
    """By the definition, over all sets without a player."""
    found = torch.zeros(players, dtype=torch.float64)
    for n in range(players):
        others = [i for i in range(players) if i != n]
        for size in range(players):
            factor = (
                math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            )
            for chosen in itertools.combinations(others, size):
                without = torch.zeros(players, dtype=torch.float64)
                without[list(chosen)] = 1
                with_it = without.clone()
                with_it[n] = 1
                found[n] += factor * (value(with_it) - value(without))
    return found


WEIGHTS = rand(PLAYERS, seed=5)


def additive(s):
    return 0.3 + s @ WEIGHTS


def interacting(s):
    return torch.tanh(s @ WEIGHTS) + s[0] * s[1] - 0.5 * s[2] * s[3] * s[4]


INDEX = torch.tensor([[0, 1]])


@pytest.mark.parametrize("value", [additive, interacting])
def test_shapley_is_least_at_the_shapley_values(value):
    """With all masks, each counted as often as its size is drawn, the loss is a quadratic whose minimum,
    found by solving for it, is the Shapley values; a step on from there is worse in every direction."""
    masks = all_masks()
    kept = masks.sum(1).long()
    times = size_weights("shapley", PLAYERS)[kept - 1] / torch.tensor(
        [math.comb(PLAYERS, int(m)) for m in kept], dtype=torch.float64
    )
    table = batch_of(value, masks)
    truth = shapley_values(value)

    def loss(phi):
        scores = (PLAYERS * torch.stack([phi, -phi])).view(1, 2, SIDE, SIDE)
        found, s, v, nobody, everyone = masks_as_game(scores, table, INDEX, "logit")
        found = normalize_sum(found, everyone - nobody, "additive")
        error = nobody[..., None] + found @ s.transpose(1, 2) - v
        return PLAYERS * (error.square().mean((0, 1)) * times).sum()

    phi = truth.clone().requires_grad_()
    assert torch.autograd.grad(loss(phi), phi)[0].abs().max() < 1e-6
    assert all(
        loss(truth + 0.1 * step) > loss(truth)
        for step in (rand(PLAYERS, seed=i) - rand(1) for i in range(5))
    )


@pytest.mark.parametrize("normalization", ["additive", "none"])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_shapley_equals_its_formula(normalization, gamma):
    table = batch_of(interacting, all_masks()[:40])
    scores = rand(1, 2, SIDE, SIDE)
    terms = create_objective(
        "shapley", link="logit", normalization=normalization, gamma=gamma
    ).table_loss(scores, table, INDEX)
    errors, gaps = [], []
    for k, sign in enumerate((1, -1)):
        phi = scores[0, k].flatten() / PLAYERS
        total = sign * (
            interacting(torch.ones(PLAYERS).double()) - interacting(torch.zeros(PLAYERS).double())
        )
        if normalization == "additive":
            phi = phi + (total - phi.sum()) / PLAYERS
        for s in table.masks[0].flatten(1):
            nobody = sign * interacting(torch.zeros(PLAYERS).double())
            errors.append((nobody + s @ phi - sign * interacting(s)) ** 2)
        gaps.append((phi.sum() - total) ** 2)
    error, gap = (PLAYERS * torch.stack(v).mean() for v in (errors, gaps))
    torch.testing.assert_close(terms["loss"], error + gamma * gap, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["additive", "multiplicative"])
def test_normalised_values_are_efficient(how):
    phi, total = rand(2, 3, PLAYERS).abs() + 0.1, rand(2, 3, seed=1)
    torch.testing.assert_close(normalize_sum(phi, total, how).sum(-1), total)
    with pytest.raises(ValueError, match="normalization: the values of a map sum to about 0"):
        normalize_sum(phi - phi.mean(-1, keepdim=True), total, "multiplicative")


def test_a_constant_and_a_multiple_of_the_size_change_shapley_and_not_outcomes():
    masks, scores = all_masks()[60:120], rand(1, 2, SIDE, SIDE)
    tables = [
        batch_of(v, masks) for v in (interacting, lambda s: interacting(s) + 2 + 0.7 * s.sum())
    ]
    own = [t.log_odds(INDEX[:, :1]).double() for t in tables]
    found = [correlation(scores[:, :1], t.masks, v) for t, v in zip(tables, own, strict=True)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    shapley = create_objective("shapley", link="log_odds", normalization="none")
    before, after = (float(shapley.table_loss(scores, t, INDEX)["loss"]) for t in tables)
    assert abs(before - after) > 1


@pytest.mark.parametrize("value", [additive, interacting])
def test_regression_labels_are_unbiased(value):
    """Their mean over all masks, as often as they are drawn, is the Shapley values; also of pairs."""
    masks = all_masks()
    gains = torch.stack([value(s) for s in masks]) - value(torch.zeros(PLAYERS).double())
    total = value(torch.ones(PLAYERS).double()) - value(torch.zeros(PLAYERS).double())
    found = torch.stack(
        [
            regression_labels(s[None, None], g.view(1, 1, 1), total.view(1, 1))[0, 0]
            for s, g in zip(masks, gains, strict=True)
        ]
    )
    kept = masks.sum(1).long()
    times = size_weights("shapley", PLAYERS)[kept - 1] / torch.tensor(
        [math.comb(PLAYERS, int(m)) for m in kept], dtype=torch.float64
    )
    torch.testing.assert_close(times @ found, shapley_values(value))


def test_permutation_labels_are_what_cells_add_in_both_orders():
    order = torch.randperm(PLAYERS, generator=torch.Generator().manual_seed(2))
    kept = torch.stack(
        [(torch.arange(PLAYERS)[:, None] == order[:j]).any(1) for j in range(1, PLAYERS)]
    ).double()
    masks = torch.cat([kept, 1 - kept])
    assert torch.equal(place_in_order(masks[None])[0], order.argsort())
    ends = [
        interacting(torch.full((PLAYERS,), v, dtype=torch.float64)).view(1, 1) for v in (0.0, 1.0)
    ]
    values = torch.stack([interacting(s) for s in masks]).view(1, 1, -1)
    found = permutation_labels(masks[None], values, *ends)[0, 0]
    for n in range(PLAYERS):
        place, added = int(order.argsort()[n]), []
        for before in (order[:place], order[place + 1 :]):  # there, and back
            s = torch.zeros(PLAYERS).double()
            s[before] = 1
            with_it = s.clone()
            with_it[n] = 1
            added.append(interacting(with_it) - interacting(s))
        torch.testing.assert_close(found[n], sum(added) / 2)


@pytest.mark.parametrize("estimate", ["permutation", "banzhaf", "ridge"])
def test_labels_of_an_additive_game_are_its_weights(estimate):
    masks = torch.cat(
        [all_masks(), torch.zeros(1, PLAYERS).double(), torch.ones(1, PLAYERS).double()]
    )
    if estimate == "permutation":
        kept = torch.ones(PLAYERS - 1, PLAYERS).tril().double()
        masks = torch.cat([kept, 1 - kept])
    made = create_objective("labels", estimate=estimate, link="logit", penalty=1e-9)
    table = batch_of(additive, masks)
    _, s, v, nobody, everyone = masks_as_game(
        torch.zeros(1, 2, SIDE, SIDE).double(), table, INDEX, "logit"
    )
    found = made.labels(s, v, nobody, everyone)[0]
    torch.testing.assert_close(found, torch.stack([WEIGHTS, -WEIGHTS]), atol=1e-5, rtol=1e-5)
    assert made.table_loss((PLAYERS * found).view(1, 2, SIDE, SIDE), table, INDEX)["loss"] < 1e-9


def test_banzhaf_labels_equal_their_definition():
    masks = torch.cat(
        [all_masks(), torch.zeros(1, PLAYERS).double(), torch.ones(1, PLAYERS).double()]
    )
    values = torch.stack([interacting(s) for s in masks]).view(1, 1, -1)
    found = banzhaf_labels(masks[None], values)[0, 0]
    for n in range(PLAYERS):
        expected = values[0, 0][masks[:, n] == 1].mean() - values[0, 0][masks[:, n] == 0].mean()
        torch.testing.assert_close(found[n], expected)
    with pytest.raises(ValueError, match="Banzhaf values are not efficient"):
        create_objective("labels", estimate="banzhaf", normalization="additive")


def test_the_policy_gradient_of_an_additive_reward_is_known():
    """Over all Bernoulli masks it is -w_n pi_n (1 - pi_n); a mean over many draws of :func:`policy_loss` comes
    near it, and what is the same for all draws does not count."""
    masks = torch.cat(
        [all_masks(), torch.zeros(1, PLAYERS).double(), torch.ones(1, PLAYERS).double()]
    )
    scores = rand(1, PLAYERS, seed=3).requires_grad_()
    log_pi = log_policy(scores, masks[None])
    pi = log_pi.detach().exp()
    torch.testing.assert_close(pi.sum(), torch.ones(()).double())
    rewards = (masks @ WEIGHTS)[None]
    exact = torch.autograd.grad(-(pi * rewards * log_pi).sum(), scores)[0][0]
    p = scores.detach()[0].sigmoid()
    torch.testing.assert_close(exact, -WEIGHTS * p * (1 - p))
    drawn = masks[pi[0].multinomial(40_000, True, generator=torch.Generator().manual_seed(0))]
    found = [
        torch.autograd.grad(policy_loss(log_policy(scores, drawn[None]), r[None]), scores)[0][0]
        for r in (drawn @ WEIGHTS, drawn @ WEIGHTS + 7)
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("sizes", ["shapley", "half", "even", "curve"])
def test_masks_are_drawn_as_their_probability_says(sizes):
    players = 16
    masks = torch.cat([
        patch_masks(torch.zeros(4, 4), 4, str(i), ["cells"], sizes, (4, 4)).flatten(1)[:1] for i in range(3000)
    ])  # fmt: skip
    kept = masks.sum(1).long()
    assert int(kept.min()) >= 1 and int(kept.max()) <= players - 1
    if sizes in ("shapley", "half"):
        share = torch.bincount(kept, minlength=players)[1:players] / 3000
        p = size_weights(sizes, players)
        assert ((share - p).abs() < 4 * (p * (1 - p) / 3000).sqrt() + 1e-9).all()
    assert (masks.mean(0) - masks.mean()).abs().max() < 0.05, "no cell is preferred"


def test_the_order_of_an_additive_game_is_its_best_map():
    places = WEIGHTS[None].argsort(descending=True).argsort()
    right, wrong = order_loss(100 * WEIGHTS[None], places), order_loss(-100 * WEIGHTS[None], places)
    assert right < 1e-3 < 1 < wrong
    value = order_loss(torch.zeros(1, PLAYERS).double(), places)
    assert float(value) == pytest.approx(math.log(2))
    scores = rand(1, PLAYERS, seed=9)
    order = places[0].argsort()
    terms = [
        (1 / (i + 1), F.softplus(scores[0, order[j]] - scores[0, order[i]]))
        for i in range(PLAYERS)
        for j in range(i + 1, PLAYERS)
    ]
    expected = sum(w * t for w, t in terms) / sum(w for w, _ in terms)
    torch.testing.assert_close(order_loss(scores, places), expected)


def test_soft_orders_become_hard_ones():
    cells = torch.linspace(0, 1, 9).double()[
        torch.randperm(9, generator=torch.Generator().manual_seed(1))
    ][None]
    order = soft_order(cells, 1e-3, 200)
    assert torch.equal(order[0].argmax(1), cells[0].argsort(descending=True))
    torch.testing.assert_close(order.sum(2), torch.ones(1, 9).double())
    gone = removed_fraction(order, torch.tensor([0, 3 / 9, 0.5, 1.0]).double())
    torch.testing.assert_close(
        gone.sum(2)[0], torch.tensor([0, 3, 4.5, 9]).double(), atol=1e-3, rtol=0
    )
    top = cells[0].argsort(descending=True)[:3]
    assert gone[0, 1, top].min() > 0.999 and gone[0, 0].abs().max() == 0


def test_rank_equals_the_areas_of_an_additive_game():
    """At a low temperature, without noise: the rearrangement of spec 4.3, by the trapezoidal rule."""
    weights = torch.arange(1.0, PLAYERS + 1).double()[
        torch.randperm(PLAYERS, generator=torch.Generator().manual_seed(4))
    ]
    cells = ((weights - weights.min()) / (weights.max() - weights.min()))[None]
    shares = torch.linspace(0, 1, PLAYERS + 1).double()
    for sign, order in ((1, weights.sort(descending=True)[0]), (-1, weights.sort()[0])):
        c = cells if sign > 0 else 1 - cells
        left = weights.sum() - removed_fraction(soft_order(c, 1e-4, 200), shares)[0] @ weights
        area = torch.trapezoid(left, dx=1 / PLAYERS)
        exact = sum(
            w * (r + 0.5) / PLAYERS for r, w in enumerate(order)
        )  # cell r stays until its turn
        assert float(area) == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_removed_cell_takes_its_own_share_of_the_photo(place):
    """Each cell has the same weight, in a corner or not: of a white photo 15/16 of the light are left."""
    gone = torch.zeros(1, 2, 4, 4).double()
    gone[0, 1, place[0], place[1]] = 1
    network = SimpleNamespace(task="multilabel", logits=lambda x: 3 * x.mean((1, 2, 3))[:, None])
    step = SimpleNamespace(images=torch.ones(1, 3, 32, 32).double(), backbone=network)
    area = Rank(steps=2)._area(step, gone, torch.zeros(1, 3, 32, 32).double(), torch.tensor([0]))
    curve = torch.tensor([3.0, 3 * 15 / 16]).double().sigmoid()
    assert float(area) == pytest.approx(float(curve.mean()), abs=1e-9)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_resnet", None, input_size=64, num_classes=5)


@pytest.mark.parametrize(
    "objective",
    [
        "rank:steps=3,largest=9",
        "select:side=4,draws=2",
    ],
)
def test_objectives_on_photos_give_gradients_and_repeat_themselves(backbone, objective):
    made = objective_for(TrainConfig(objective=objective))
    head = create_head("evidence", backbone, components=2, hidden=3)
    nn.init.normal_(head.network[-1].weight)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    step = Step(head, backbone, images, TrainConfig("outcomes"), seed="0/1/0")
    assert made.reads == "photos"
    terms = made.on_photos(step)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.network.parameters())
    assert any(p.grad.any() for p in head.network.parameters())
    assert made.on_photos(step)["loss"] == terms["loss"]
    other = made.on_photos(replace(step, seed="0/2/0"))["loss"]
    assert other != terms["loss"]
    # A process that holds the second image alone draws for it what one process draws for both.
    whole, alone = (
        step.draws(),
        replace(step, images=images[1:], part=Part(torch.tensor([1]), [1, 1], 1)).draws(),
    )
    assert torch.equal(torch.rand(3, generator=whole[1]), torch.rand(3, generator=alone[0]))


def test_area_terms_of_masks():
    masks = torch.rand(2, 1, 4, 4).double()
    assert float(Mask("mean")._area(masks)) == pytest.approx(float(masks.mean()))
    ltx = Mask("ltx")._area(masks)
    expected = nn.BCEWithLogitsLoss()(masks, torch.zeros_like(masks))
    torch.testing.assert_close(ltx, expected)


def test_every_objective_says_what_it_reads():
    for name in OBJECTIVES:
        made = create_objective(name)
        assert made.reads in ("table", "photos") and OBJECTIVES.entry(name).title
        # What options belong to is said where nothing imports torch.
        assert ((made.reads == "photos"), made.players) == (name in ON_PHOTOS, name in GAMES)
    with pytest.raises(
        ValueError, match="objective: unknown objective 'shaply'; did you mean shapley"
    ):
        create_objective("shaply")
    with pytest.raises(ValueError, match="steps"):
        Rank(steps=1)


# ---------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", None, input_size=64, num_classes=5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 20)
    return folder


WHOLE = {"rank": "rank:steps=2,smallest=3,largest=4", "select": "select:side=4"}
RUNS = [
    *((WHOLE.get(name, name), None) for name in OBJECTIVES if name in ON_PHOTOS),
    *((name, fill) for name in OBJECTIVES if name not in ON_PHOTOS for fill in ("black", "drop")),
    *((f"labels:estimate={e}", f) for e in ("banzhaf", "permutation") for f in ("black", "drop")),
]


@pytest.mark.parametrize(("objective", "fill"), RUNS)
def test_every_objective_trains_and_says_how(vit, photos, tmp_path, objective, fill):
    game = objective.partition(":")[0] not in (*ON_PHOTOS, "outcomes")
    config = TrainConfig(
        "outcomes", objective, epochs=1, batch_size=10, workers=0, masks=8, weight_decay=0.0,
        fill=fill, cells=3 if game and fill == "black" else None,
    )  # fmt: skip
    torch.manual_seed(0)
    head = create_head("evidence", vit, components=4, hidden=5)
    before = {name: p.clone() for name, p in head.named_parameters()}
    head = fit(head, vit, photos, config, output=tmp_path / "run", progress=False).head
    # Without weight decay parameters move by gradients alone; the statistics of taps are buffers.
    moved = [name for name, p in head.named_parameters() if not torch.equal(p, before[name])]
    assert moved and head.summary["config"]["objective"] == objective
    if fill is not None:
        assert head.summary["table"]["fills"] == [fill]


def test_without_a_gradient_nothing_moves(vit, photos):
    """What the test above sees is the objective's own doing."""

    @register_objective("nothing")
    class Nothing(Objective):
        def table_loss(self, scores, outcomes, index):
            return {"loss": 0 * scores.sum()}

    try:
        head = create_head("evidence", vit, components=4, hidden=5)
        before = {name: p.clone() for name, p in head.named_parameters()}
        config = TrainConfig("outcomes", "nothing", epochs=1, workers=0, masks=4, weight_decay=0.0)
        fit(head, vit, photos, config, progress=False)
        assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())
    finally:
        OBJECTIVES.remove("nothing")


@pytest.mark.parametrize("grid", [(3, 3), (4, 4)])
def test_dropped_walks_are_the_beginnings_of_one_order(grid):
    players = math.prod(grid)
    masks = patch_masks(torch.zeros(grid), players - 1, "a", ["cells"], "walk", grid).flatten(1)
    assert masks.sum(1).tolist() == list(range(1, players))
    both = torch.cat([masks, 1 - masks])[None]
    assert sorted(place_in_order(both)[0].tolist()) == list(range(players))


@pytest.mark.parametrize("sizes", ["shapley", "curve", "half", "even"])
@pytest.mark.parametrize("kind", ["squares32", "squares16", "blobs", "evidence"])
def test_masks_of_other_sizes_are_never_empty_or_full(sizes, kind):
    image = torch.rand(3, 56, 56)
    for i in range(40):
        cells = mask_pairs(image, torch.rand(7, 7), 2, str(i), [kind], ["black"], sizes).cells
        kept = cells.float().mean((1, 2)) / 255
        assert sizes == "even" or (0 < kept.min() and kept.max() < 1), (sizes, kind, i)


def test_a_search_needs_one_class_among_others(photos, tmp_path):
    multi = xattn.load_backbone("test_vit", None, input_size=64, num_classes=5, task="multilabel")
    with pytest.raises(ValueError, match="objective: greedy follows the log-odds of one class"):
        cache_outcomes(
            multi,
            photos,
            tmp_path,
            fills=["black"],
            players=2,
            sizes="greedy",
            masks=6,
            progress=False,
        )
    with pytest.raises(ValueError, match="draws: got 1"):
        create_objective("select", draws=1)


def test_dropped_patches_leave_the_sequence(vit):
    """All kept is the network itself; the order of what is kept does not matter; and it equals attention
    that never looks at the others."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    count = math.prod(vit.grid(64, 64))
    with torch.no_grad():
        whole = vit.logits(image)
    torch.testing.assert_close(logits_of_patches(vit, image, torch.arange(count)[None]), whole)
    kept = torch.tensor([[3, 1, 7, 10], [0, 2, 5, 15]])
    found = logits_of_patches(vit, image, kept)
    torch.testing.assert_close(logits_of_patches(vit, image, kept.flip(1)), found)
    model, prefix = vit.model, vit.model.num_prefix_tokens
    for row, expected in zip(kept, found, strict=True):
        allowed = torch.zeros(prefix + count, dtype=torch.bool)
        allowed[:prefix], allowed[prefix + row] = True, True
        x = model.norm_pre(model._pos_embed(model.patch_embed(vit.normalize(image))))
        for block in model.blocks:
            x = block(x, attn_mask=allowed.expand(len(allowed), -1))
        torch.testing.assert_close(
            model.forward_head(model.norm(x))[0], expected, atol=1e-5, rtol=1e-4
        )
    assert logits_of_patches(vit, image, torch.empty(1, 0, dtype=torch.long)).shape == whole.shape


def test_patches_cannot_be_dropped_from_every_network(backbone, vit, photos, tmp_path):
    with pytest.raises(
        ValueError, match="fill: test_resnet cannot drop patches: it is not a timm ViT"
    ):
        cache_outcomes(backbone, photos, tmp_path, fills=["drop"], progress=False)
    with pytest.raises(ValueError, match="its output is not the network's own"):
        logits_of_patches(
            scored(vit, lambda z: z[:, 0]), torch.rand(1, 3, 64, 64), torch.tensor([[0]])
        )
    gna = converted(vit, "gna", options={"kernel": 3})
    with pytest.raises(ValueError, match="was converted"):
        logits_of_patches(gna, torch.rand(1, 3, 64, 64), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="cells: got 3 per side"):
        cache_outcomes(vit, photos, tmp_path, fills=["drop"], players=3, progress=False)


def test_a_greedy_table_holds_the_order_in_which_cells_help_most(vit, photos, tmp_path):
    def batch_of_cells(sizes):
        table = cache_outcomes(
            vit, photos, tmp_path / sizes, fills=["black"], players=2, sizes=sizes, masks=6, empty=True,
            progress=False,
        )  # fmt: skip
        batch = table.batch([0, 1])
        return batch, batch.values(batch.top(1), "log_odds")[:, 0]

    batch, values = batch_of_cells("greedy")
    first = batch.masks[:, :3].flatten(2)
    assert torch.equal(first.sum(2), torch.tensor([[1.0, 2, 3]] * 2))
    assert (first.diff(dim=1) >= 0).all()
    _, walked = batch_of_cells("walk")
    assert (values[:, 0] >= walked[:, 0] - 1e-3).all(), "no other single cell is better"


def test_the_search_of_a_row_maker_makes_as_many_passes_as_it_counts(vit, photos):
    """Each step tries the cells that are left; the search itself never shows the empty photo."""
    options = {"fills": ["black"], "players": 3, "sizes": "greedy", "masks": 16, "empty": True}
    maker = RowMaker(vit, MaskSettings(**options))
    counted = []
    hook = vit.model.patch_embed.register_forward_hook(lambda m, x, y: counted.append(len(y)))
    try:
        row = maker(torch.rand(3, 64, 64), "0/0/0", "a.png")
    finally:
        hook.remove()
    assert sum(counted) == maker.passes == 1 + sum(range(2, 10)) + 16 + 1
    kept = row["cells"].flatten(1) > 0
    assert kept.sum(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_finished_table_of_another_game_is_refused(vit, photos, tmp_path):
    table = cache_outcomes(vit, photos, tmp_path, masks=8, progress=False)
    head = create_head("evidence", vit)
    with pytest.raises(ValueError, match="objective shapley needs masks of players"):
        fit(head, vit, photos, TrainConfig("outcomes", "shapley"), table=table, progress=False)
    for asked in ({"fill": "blur"}, {"sizes": "curve"}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))}: got .*, but the table has "):
            fit(head, vit, photos, TrainConfig("outcomes", **asked), table=table, progress=False)
    with pytest.raises(ValueError, match="table: it has no outcomes of empty photos"):
        table.batch([0]).ends  # noqa: B018


def test_a_wrong_objective_is_refused_before_the_network_is_loaded(photos, tmp_path, capsys):
    (tmp_path / "w.pth").write_text("no weights")
    weights = ["--weights", str(tmp_path / "w.pth"), "--output", str(tmp_path / "run")]
    assert main(["train", str(photos), *weights, "--objective", "shaply"]) == 2
    assert "did you mean shapley" in capsys.readouterr().err
