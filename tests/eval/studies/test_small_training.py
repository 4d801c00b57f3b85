"""Training of a study's own small networks: what it steps along, what it counts, what it leaves."""

import pytest
import torch
from torch import nn

from xattn.eval.studies import small_training
from xattn.eval.studies.small_training import minimize


def test_it_reaches_the_minimum_counts_the_seconds_and_leaves_evaluation_mode(monkeypatch):
    clock = iter([5.0, 7.5])
    monkeypatch.setattr(small_training.time, "process_time", lambda: next(clock))
    net, x = nn.Linear(3, 1), torch.eye(3)
    threads, modes = torch.get_num_threads(), []

    def losses(steps):
        for _ in range(steps):
            modes.append((net.training, torch.get_num_threads()))
            yield (net(x)[:, 0] - torch.tensor([1.0, 2.0, 3.0])).square().mean()

    assert minimize(net, losses(300), 300, lr=0.1, weight_decay=0.0) == 2.5
    assert next(losses(1)).item() == pytest.approx(0, abs=1e-4)
    assert set(modes[:300]) == {(True, 1)}
    assert not net.training and torch.get_num_threads() == threads
