"""Random-feature attention: its kernel, its invariances, its ridge regression, exact maps, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch
from attentive_fakes import CLASSES, GRID, cnn, random_tokens, vit
from torch.nn import functional as F

import xattn
from xattn.cli import main
from xattn.config import ProbeConfig
from xattn.heads import create_head, load_head
from xattn.heads.attentive import LabelledTokens, Solvable
from xattn.heads.random_feature import (
    DEVIATION,
    DualRidge,
    TokenScale,
    append_one,
    best_temperature,
    features,
    queries_of,
    random_weights,
)
from xattn.training.features import cache_features
from xattn.training.probe import predict_logits, probe

N = GRID[0] * GRID[1]
LABELS = torch.arange(24) % CLASSES


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def photos(head, count=24, seed=3, dtype=torch.float64):
    """Tokens whose mean depends on their class, and their labels."""
    tokens = random_tokens(head, count, seed=seed, dtype=dtype)
    shift = draw(CLASSES, 1, 32, seed=9).to(dtype)[LABELS[:count]]
    tokens = tokens._replace(patches=(tokens.patches[0] + shift,), prefix=tokens.prefix + shift)
    parts = [
        tokens._replace(patches=(tokens.patches[0][part],), prefix=tokens.prefix[part])
        for part in (slice(0, 7), slice(7, None))
    ]
    return tokens, LabelledTokens(lambda: iter(parts), LABELS[:count])


def solved(dtype=torch.float64, backbone=None, **options):
    torch.manual_seed(0)
    head = create_head("random_feature", backbone or vit(), **{"heads": 6, **options})
    head = head.to(dtype).eval()
    tokens, train = photos(head, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = head.solve(train, train)
    return head, tokens, found


# ---------------------------------------------------------------------- features


@pytest.mark.parametrize("biased", [False, True])
def test_features_are_their_definition(biased):
    w = random_weights(5, 3, 5, biased, rng()).double()
    x_0, x = draw(2, 4, seed=1), draw(2, 7, 4, seed=2)
    found = features(queries_of(append_one(x_0), w), append_one(x))
    for b in range(2):
        for m in range(3):
            expected = torch.zeros(5, dtype=torch.float64)
            for i in range(7):
                query, key = (F.pad(v, (0, 1), value=1.0) for v in (x_0[b], x[b, i]))
                score = (w[:, m] * torch.outer(query, key)).sum()
                expected += score.clamp_min(0) * key / 7
            torch.testing.assert_close(found[b, m], expected)
    if biased:
        plain = random_weights(5, 3, 5, False, rng()).double()
        bias = torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64))
        torch.testing.assert_close(w - plain, bias[:, None].expand(-1, 3, -1))


def test_permuted_and_doubled_keys_change_nothing():
    w = random_weights(5, 4, 5, True, rng()).double()
    queries, keys = queries_of(append_one(draw(3, 4)), w), append_one(draw(3, 7, 4, seed=1))
    found = features(queries, keys)
    order = torch.randperm(7, generator=rng())
    torch.testing.assert_close(features(queries, keys[:, order]), found)
    torch.testing.assert_close(features(queries, torch.cat([keys, keys], 1)), found)


def arc_cosine(a, b):
    """E relu(<W, A>) relu(<W, B>) over W with independent normal entries (Cho and Saul 2009)."""
    sizes = a.norm(dim=-1) * b.norm(dim=-1)
    t = ((a * b).sum(-1) / sizes).clamp(-1, 1)
    return sizes * ((1 - t.square()).sqrt() + t * (math.pi - t.arccos())) / (2 * math.pi)


def test_products_of_scores_meet_the_kernel_of_arc_cosines():
    heads = 200_000
    w = random_weights(3, heads, 3, False, rng()).double()
    queries, keys = append_one(draw(2, 2)), append_one(draw(2, 1, 2, seed=1))
    scores = (queries_of(queries, w) @ keys.mT).relu()[..., 0]
    expected = arc_cosine(
        *(torch.outer(q, k[0]).flatten() for q, k in zip(queries, keys, strict=True))
    )
    found = (scores[0] * scores[1]).mean() / DEVIATION**2
    assert abs(float(found / expected) - 1) < 0.02


def test_the_spread_of_predictions_falls_as_one_over_the_heads():
    x_0, x = append_one(draw(1, 4)), append_one(draw(1, 6, 4, seed=1))

    def kernels(heads):
        return torch.stack(
            [
                features(queries_of(x_0, random_weights(5, heads, 5, False, rng(s)).double()), x)
                .square()
                .sum()
                / heads
                for s in range(200)
            ]
        )

    ratio = float(kernels(2).var() / kernels(32).var())
    assert 10 < ratio < 26


# ---------------------------------------------------------------------- ridge


@pytest.mark.parametrize("width", [3, 40], ids=["more examples", "more features"])
def test_the_dual_is_the_primal_and_left_out_what_refits_give(width):
    x, y = draw(15, width), draw(15, 2, seed=1)
    fit = DualRidge(x @ x.mT).fit(y, 0.1)
    shrunk = 0.1 * float(torch.linalg.eigvalsh(_centred(x)).mean())

    def primal(x, y):
        c = x - x.mean(0)
        weight = torch.linalg.solve(
            c.mT @ c + shrunk * torch.eye(width, dtype=torch.float64), c.mT @ (y - y.mean(0))
        )
        return weight, y.mean(0) - x.mean(0) @ weight

    weight, intercept = primal(x, y)
    torch.testing.assert_close(x.mT @ fit.alpha, weight)
    torch.testing.assert_close(fit.intercept, intercept)
    for i in (0, 7):
        kept = [j for j in range(15) if j != i]
        weight, intercept = primal(x[kept], y[kept])
        torch.testing.assert_close(fit.left_out[i], x[i] @ weight + intercept)


def _centred(x):
    c = x - x.mean(0)
    return c @ c.mT


def test_a_ridge_of_0_interpolates_and_is_the_limit():
    x, y = draw(9, 20), draw(9, 2, seed=1)
    solver = DualRidge(x @ x.mT)
    exact, near = solver.fit(y, 0), solver.fit(y, 1e-10)
    torch.testing.assert_close(x @ x.mT @ exact.alpha + exact.intercept, y)
    torch.testing.assert_close(exact.alpha, near.alpha, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(exact.left_out, near.left_out, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="ridge: got 0, but the kernel of 9 examples is singular"):
        DualRidge(x[:, :3] @ x[:, :3].mT).fit(y, 0)


def test_the_ridge_is_chosen_by_what_is_left_out():
    x = draw(40, 60)
    y = x[:, :1] + 3 * draw(40, 1, seed=2)
    solver = DualRidge(x @ x.mT)
    chosen = solver.fit(y)
    errors = [float((solver.fit(y, r).left_out - y).square().sum()) for r in (1e-5, 1e-2, 1.0)]
    assert float((chosen.left_out - y).square().sum()) <= min(errors)
    for kernel, words in (
        (torch.ones(5, 5), "all examples are alike"),
        (torch.full((5, 5), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            DualRidge(kernel)


def test_the_temperature_makes_calibrated_logits():
    logits = 3 * draw(4000, 3)
    labels = torch.multinomial(logits.softmax(1), 1, generator=rng(1))[:, 0]
    assert 2.2 < best_temperature(logits / 3, labels) < 4


def test_scaled_patches_have_mean_0_and_norm_1_in_their_principal_components():
    u, q = 3 * draw(4, 6, 5) + 2, draw(4, 5, seed=1) - 7
    u[..., 0] *= 9
    scale = TokenScale(5, 2, True).double()
    scale.fit([(u[:3], q[:3]), (u[3:], q[3:])])
    x, x_0 = scale.patches(u).flatten(0, 1), scale.query(q)
    for values in (x, x_0):
        assert values.shape[1] == 2 and values.mean(0).abs().max() < 1e-12
        assert abs(float(values.square().sum(1).mean()) - 1) < 1e-12
    flat = u.flatten(0, 1)
    singular = torch.linalg.svdvals(flat - flat.mean(0))
    spread = float(scale.factor) ** -2 * 24
    assert abs(spread / float(singular[:2].square().sum()) - 1) < 1e-10
    for patches, queries, words in (
        (torch.ones(2, 3, 5), q[:2], "patches"),
        (u[:2], q[:1], "queries"),
    ):
        with pytest.raises(ValueError, match=f"all {words} are alike"):
            scale.fit([(patches.double(), queries)])


# ---------------------------------------------------------------------- the head

OPTIONS = [
    {},
    {"query": "gap"},
    {"query": "cls"},
    {"query": "gap", "biased": True, "components": 5},
    {"components": 5, "norm": False},
    {"heads": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shares_and_the_mean_patch_sum_to_the_logits(options):
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 5e-5)):
        head, tokens, _ = solved(dtype, **options)
        with torch.no_grad():
            logits, (maps, rest) = head.logits(tokens), head.class_maps(tokens)
            alone = head.mean_patch_logits(tokens)
            mean = tokens._replace(patches=(head.scale.mean.expand_as(tokens.patches[0]),))
            held = dataclasses.replace(head.attend(tokens), values=head.attend(mean).values)
            base = held.context[..., None].expand(24, -1, N)
            z = (base @ held.values[:, 0] / N).flatten(1)
            expected = head.classifier(z if head.norm is None else head.norm(z))
        scale = logits.abs().max()
        assert (maps.sum((2, 3)) + alone - logits).abs().max() <= most * scale
        assert (rest - alone).abs().max() <= most * scale
        assert (alone - expected).abs().max() <= most * scale
        if head.query == "constant":
            assert (alone - alone[:1]).abs().max() <= most * scale


def test_the_solve_is_the_primal_ridge_regression_on_the_features():
    head, tokens, found = solved(ridge=0.3, norm=False)
    with torch.no_grad():
        phi = head.pooled(head.attend(tokens))
        targets = F.one_hot(LABELS, CLASSES).double()
        shrunk = 0.3 * float(torch.linalg.eigvalsh(_centred(phi)).mean())
        c = phi - phi.mean(0)
        gram = c.mT @ c + shrunk * torch.eye(phi.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, c.mT @ (targets - targets.mean(0)))
    t = found["temperature"]
    torch.testing.assert_close(head.classifier.weight.mT / t, weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        head.logits(tokens) / t, c @ weight + targets.mean(0), rtol=1e-7, atol=1e-8
    )
    assert found["ridge"] == 0.3 and 0 <= found["left_out"] <= 1
    normed, _, _ = solved(ridge=0.3)
    torch.testing.assert_close(normed.logits(tokens), head.logits(tokens))


def test_blocks_of_heads_change_nothing(monkeypatch):
    head, tokens, _ = solved(query="gap", heads=7)
    monkeypatch.setattr("xattn.heads.random_feature.BLOCK", 3 * 24 * 33)
    monkeypatch.setattr("xattn.heads.random_feature.KEPT", 0)
    other, _, _ = solved(query="gap", heads=7)
    torch.testing.assert_close(other.classifier.weight, head.classifier.weight)
    torch.testing.assert_close(other.logits(tokens), head.logits(tokens))


def test_repeated_patches_change_no_logit_and_a_single_head_is_a_block_of_one():
    head, tokens, _ = solved(query="gap")
    with torch.no_grad():
        twice = tokens._replace(patches=(torch.cat([tokens.patches[0]] * 2, 1),), grid=(6, 5))
        torch.testing.assert_close(head.logits(twice), head.logits(tokens))
        maps, rest = head.class_maps(twice)
        torch.testing.assert_close(rest, head.class_maps(tokens).rest)
        torch.testing.assert_close(2 * maps[:, :, :3], head.class_maps(tokens).maps)
        one, _, _ = solved(heads=1)
        q = one.random[0, 0]
        keys = append_one(one.scale.patches(tokens.patches[0]))
        z = ((keys @ q).relu()[:, :, None] * keys).mean(1)
        torch.testing.assert_close(one.logits(tokens), one.classifier(one.norm(z)))


def test_the_class_token_is_told_to_do_the_classifying():
    head = create_head("random_feature", vit(), heads=6, query="cls").double().eval()
    tokens, train = photos(head)
    with pytest.warns(
        UserWarning, match="query='cls': with every patch replaced by the mean patch"
    ):
        found = head.solve(train, train)
    kept = (head.mean_patch_logits(tokens).argmax(1) == LABELS).double().mean()
    assert found["without_patches"] == pytest.approx(float(kept))
    assert found["with_patches"] >= 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved(query="gap")


def test_what_does_not_fit_is_refused():
    for options, words in (
        ({"components": 33}, "components: got 33; tokens have 32 channels"),
        ({"biased": True}, "biased: the bias multiplies the query, and the constant one is 0"),
        ({"query": "mean"}, "query: got 'mean'; give 'constant', 'gap' or 'cls'"),
        ({"heads": 0}, "heads: got 0"),
        ({"ridge": -1.0}, "ridge: got -1.0; give a finite number of at least 0"),
        ({"heads": 10**6, "query": "gap"}, "heads=1000000: .* give fewer heads, or components"),
        ({"explain_with": "attention"}, "random_feature does not learn its weights"),
    ):
        with pytest.raises(ValueError, match=words):
            create_head("random_feature", vit(), **{"heads": 6, **options})
    with pytest.raises(ValueError, match="query='cls': .* has no class token; choose query='gap'"):
        create_head("random_feature", cnn(), heads=6, query="cls")
    for options, words in (
        ({"mixer": "softmax"}, "mixer: random_feature solves for its weights"),
        ({"reliability": {"anchors": 2}}, "reliability: random_feature solves"),
        ({"classes": 30}, "train: got 24 photos for 30 classes; give at least one per class"),
        (
            {"ridge": 0.0, "heads": 1, "components": 2},
            "ridge: got 0, but the kernel of 24 examples",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            solved(**options)
    head = create_head("random_feature", vit(), heads=6).double()
    tokens, train = photos(head)
    alike = tokens._replace(patches=(torch.ones_like(tokens.patches[0]),))
    with pytest.raises(ValueError, match="features: all patches are alike"):
        head.solve(train._replace(batches=lambda: [alike]), train)


# ---------------------------------------------------------------------- probing


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    import numpy as np
    from PIL import Image

    torch.manual_seed(0)
    backbone = xattn.load_backbone("test_vit", None, ["head"], input_size=64)
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        noise = np.random.default_rng(i).integers(0, 90, (10, 14, 3), dtype=np.uint8)
        noise[..., i % 3] += 120
        folder = root / "abc"[i % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(noise).resize((70, 50)).save(folder / f"{i:03d}.png")
    return backbone, root, cache_features(backbone, root, root / "f", progress=False)


def test_probe_calls_the_solve_and_resumes_without_it(cached, tmp_path, monkeypatch):
    backbone, _, features = cached
    labels = torch.tensor(["abc".index(name.split("/")[-2]) for name in features.names])

    def run(output=None, resume=False, **config):
        torch.manual_seed(1)
        head = create_head("random_feature", backbone, classes=3, heads=8)
        assert isinstance(head, Solvable)
        return probe(
            head, features, labels, ProbeConfig(**config), train=range(0, 18),
            validation=range(18, 24), output=output, resume=resume, progress=False,
        )  # fmt: skip

    found = run(tmp_path / "run")
    assert found.accuracy == 1 and found.steps == 1 and len(found.seconds) == 1
    config = json.loads((tmp_path / "run" / "head" / "config.json").read_text())
    assert config["training"]["solve"]["left_out"] == 1 and config["training"]["photos"] == 18
    loaded = load_head(tmp_path / "run" / "head", backbone)
    index = range(18, 24)
    assert torch.equal(
        predict_logits(loaded, features, index), predict_logits(found.head, features, index)
    )
    monkeypatch.setattr(type(found.head), "solve", None)
    again = run(tmp_path / "run", resume=True)
    assert torch.equal(again.head.classifier.weight, found.head.classifier.weight)
    assert again.history == found.history and not again.seconds
    with pytest.raises(ValueError, match="attention: the scores of 'random_feature' are fixed"):
        run(attention="at")


def test_the_command_prints_the_share_of_the_class_token(cached, tmp_path, monkeypatch, capsys):
    backbone, root, _ = cached
    monkeypatch.setattr("xattn.cli.model.BackboneArgs.load", lambda self: backbone)
    command = [
        "probe",
        str(root),
        "--heads",
        "gap",
        "random_feature",
        "--recipe",
        "small",
    ]
    command += ["--epochs", "2", "--options", "random_feature.heads=8", "random_feature.query=cls"]
    assert main([*command, "--output", str(tmp_path / "out")]) in (0, None)
    printed = capsys.readouterr()
    assert "| random_feature |" in printed.out
    assert "accuracy is left: the class token classifies" in printed.err
