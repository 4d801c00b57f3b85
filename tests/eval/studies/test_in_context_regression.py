"""In-context regression: the network by its definition, theory by simulation, resuming, the command."""

import dataclasses

import pytest
import torch

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import in_context_regression
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.in_context_regression import (
    LIMITS,
    InContext,
    InContextConfig,
    batches,
    bayes,
    best_eta,
    circuit,
    draw,
    errors,
    gradient_descent,
    measured,
    risk,
    study,
    train,
)

SMALL = InContextConfig(width=3, examples=6, longer=9, steps=250, batch_size=8, tests=64)


def test_contributions_are_their_definition_and_sum_to_the_predictions():
    model = InContext(3, (2, 1), torch.Generator().manual_seed(0)).double()
    prompts = draw(4, 6, SMALL, 1)
    prompts = type(prompts)(*(t.double() for t in prompts))
    found = model.contributions(prompts)
    z = torch.cat([prompts.x, prompts.y[..., None]], 2)
    for b in range(4):
        query = z[b, -1].clone()
        query[-1] = 0
        for h in range(3):
            weights = (z[b, :-1] @ model.kq[h] @ query).softmax(0)
            torch.testing.assert_close(found[b, h], weights * (z[b, :-1] @ model.ov[h]))
    sums = found.sum(2)
    torch.testing.assert_close(model(prompts), torch.stack([sums[:, :2].sum(1), sums[:, 2]]))
    changed = type(prompts)(prompts.x, torch.cat([prompts.y[:, :-1], 9 + prompts.y[:, -1:]], 1))
    assert torch.equal(model(changed), model(prompts))  # the answer is not read


def test_theory_meets_simulation():
    config = InContextConfig(tests=40_000)
    prompts = draw(40_000, 40, config, 3)
    for eta in (0.5, best_eta(config, 40)):
        error = (gradient_descent(prompts, eta) - prompts.y[:, -1]).square().mean()
        assert abs(float(error) - risk(config, 40, eta)) < 0.01
    assert best_eta(config, 40) == pytest.approx(40 / 45.5)
    assert risk(config, 40) == pytest.approx(1.1 - 39 / 45.5)
    best = (bayes(prompts, config.noise) - prompts.y[:, -1]).square().mean()
    assert 0.1 < best < 0.13
    steps = torch.linspace(0.7, 1.1, 41).tolist()
    assert min(steps, key=lambda eta: risk(config, 40, eta)) == pytest.approx(
        best_eta(config, 40), abs=0.01
    )


def test_the_ideal_circuit_is_gradient_descent_where_w_is_small():
    w, mu = 1e-3, 400.0
    model = InContext(3, (2, 1), torch.Generator()).double()
    with torch.no_grad():
        model.kq.zero_()
        model.ov.zero_()
        for head, sign in enumerate((1, -1)):
            model.kq[head].diagonal()[:3] = sign * w
            model.ov[head, -1] = sign * mu
        model.kq[:2, :, -1] = 5.0  # free: it meets the 0 of the query
        prompts = draw(16, 6, SMALL, 1)
        prompts = type(prompts)(*(t.double() for t in prompts))
        found = circuit(model.kq[:2], model.ov[:2])
        assert found.other_kq == found.other_ov == found.imbalance == 0
        assert found.eta == pytest.approx(2 * w * mu)
        expected = gradient_descent(prompts, found.eta)
        torch.testing.assert_close(model(prompts)[0], expected, rtol=1e-3, atol=1e-4)
        model.kq[0, 1, 0] = 0.2 * w
        model.ov[1, 0] = 0.1 * mu
        off = circuit(model.kq[:2], model.ov[:2])
        assert off.other_kq == pytest.approx(0.2) and off.other_ov == pytest.approx(0.1)


def test_prompts_are_those_of_the_step_wherever_training_begins():
    whole = list(batches(SMALL, 0))
    later = list(batches(SMALL, 130))
    assert len(whole) == 250 and len(later) == 120
    assert torch.equal(later[0].x, whole[130].x) and torch.equal(later[-1].y, whole[-1].y)
    assert not torch.equal(whole[0].x, whole[100].x)


def test_a_few_hundred_steps_bring_the_heads_to_opposite_signs():
    config = InContextConfig(steps=700, batch_size=128, lr=5e-3, tests=4096, slack=6)
    model = InContext(5, (2, 1), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    assert list(train(model, optimizer, config, progress=False))[-1] == 700
    found = circuit(model.kq[:2], model.ov[:2])
    assert found.omega.prod() < 0 and (found.omega * found.mu > 0).all()
    values = measured(found, config)
    assert all(values[key] < config.slack * limit for key, limit in LIMITS.items()), values
    (scores,) = errors(model, config, config.examples, Split("test"))
    assert scores["prompts"] == config.tests
    assert scores["2 heads"] < scores["a single head"] - 0.05
    assert scores["ridge regression with the true variances"] < scores["2 heads"]


def test_a_stopped_study_goes_on_and_gives_the_same_report(tmp_path, monkeypatch):
    monkeypatch.setattr(in_context_regression, "CHECKPOINT_EVERY", 100)
    expected = list(study(tmp_path / "whole", SMALL, progress=False))
    stopping = study(tmp_path / "cut", SMALL, progress=False)
    steps = train

    def cut(*args, **kwargs):
        for step in steps(*args, **kwargs):
            yield step
            if step == 200:
                raise KeyboardInterrupt

    monkeypatch.setattr(in_context_regression, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        next(stopping)
    monkeypatch.setattr(in_context_regression, "train", steps)
    assert list(study(tmp_path / "cut", SMALL, progress=False))[:-1] == expected[:-1]
    for name in ("report.md", "circuit.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "cut" / "circuit.png").is_file()
    with pytest.raises(ValueError, match="output: .* has other settings"):
        next(study(tmp_path / "cut", dataclasses.replace(SMALL, lr=0.1), progress=False))


def test_the_command_prints_the_circuit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(InContextConfig, "quick", lambda self: SMALL)
    assert main(["icl", "--quick", "--output", str(tmp_path / "out")]) in (0, None)
    printed = capsys.readouterr().out
    assert "| mean squared error | L = 6 | L = 9 |" in printed
    assert "| relative error of eta |" in printed
