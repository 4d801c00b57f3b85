"""The study of the Terminator: its parts in their limits, what it depends on, the two tasks, the command."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from xattn.blocks.hyper_kernel import plane_product, standardise
from xattn.eval.evaluation.split import Split
from xattn.eval.studies import digits, terminator
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.models.terminator import (
    LOCAL,
    LocalBranch,
    Residual,
    Terminator,
    TerminatorBlock,
    batch_standardised,
    depthwise,
    group_standardised,
)
from xattn.eval.studies.terminator import (
    NETWORKS,
    PAIRS,
    TASKS,
    TerminatorStudyConfig,
    as_sequences,
    kernel_gap,
)

SHORT = TerminatorStudyConfig().quick()


@pytest.fixture
def few_digits(monkeypatch):
    seen, held_out = digits.load_digits()
    some = tuple(digits.Digits(*(x[:n] for x in part)) for part, n in ((seen, 128), (held_out, 20)))
    monkeypatch.setattr(terminator, "load_digits", lambda: some)


def block(width=3, out=8, earlier=0, slow=True):
    torch.manual_seed(0)
    return TerminatorBlock(width, out, earlier, hidden=8, slow=slow, dropout=0.05).eval()


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("size", LOCAL)
def test_matrices_of_a_depthwise_convolution_are_the_convolution(size):
    x, kernel = torch.randn(2, 5, 7, 6).double(), torch.randn(5, size, size).double()
    expected = F.conv2d(x, kernel[:, None], padding=size // 2, groups=5)
    torch.testing.assert_close(depthwise(x, kernel), expected)


def test_group_standardisation_is_by_image_in_every_other_group():
    x = torch.randn(6, 8, 4, 4).double() * 3 + torch.arange(6)[:, None, None, None]
    parts = group_standardised(x, groups=4).chunk(4, 1)
    for part in parts[::2]:
        assert part.mean((1, 2, 3)).abs().max() < 1e-12
        torch.testing.assert_close(
            part.var((1, 2, 3), correction=0), torch.ones(6).double(), atol=1e-4, rtol=0
        )
    for part in parts[1::2]:
        assert part.mean().abs() < 1e-12 < part.mean((1, 2, 3)).abs().max()
    alone = group_standardised(x[:1], groups=1)
    torch.testing.assert_close(alone, F.layer_norm(x[:1], (8, 4, 4)))


def test_batch_standardisation_of_one_image_is_by_image():
    x = torch.randn(4, 3, 5, 5).double()
    torch.testing.assert_close(batch_standardised(x[:1]), standardise(x[:1]))
    assert not torch.allclose(batch_standardised(x), standardise(x))


def test_kernels_of_one_leave_the_input_as_context():
    made = block(slow=False)
    assert not any("kernel" in name and "local" not in name for name, _ in made.named_parameters())
    x = torch.randn(2, 3, 6, 6)
    kernel, channel = made.kernels(x)
    assert torch.equal(x * kernel, x) and channel.tolist() == [1, 1, 1]
    assert torch.equal(plane_product(x * kernel, x), x @ x / 6)
    slow = block()
    assert slow.kernels(x)[0].shape == (3, 6, 6)
    assert torch.equal(slow.kernels(x)[0], slow.kernels(torch.zeros(1, 3, 6, 6))[0])  # of no image


def test_a_block_has_no_residual():
    """Where its join is 0, nothing of the input passes."""
    made = block(out=3)
    torch.nn.init.zeros_(made.join.weight)
    torch.nn.init.zeros_(made.join.bias)
    assert made(torch.randn(2, 3, 6, 6)).abs().max() == 0


def test_the_local_context_is_a_mean_over_the_batch():
    torch.manual_seed(0)
    branch = LocalBranch(4, 3, 8)
    x = torch.randn(5, 4, 6, 6)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(branch(x)[order], branch(x[order]))
    assert not torch.allclose(branch(x)[:2], branch(x[:2]), atol=1e-3)


def test_an_answer_depends_on_the_batch_and_not_on_its_order():
    torch.manual_seed(0)
    net, x = Terminator().eval(), torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(net(x).flip(0), net(x.flip(0)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(net(x)[:1], net(x[:1]), atol=1e-3)
    assert net(torch.rand(2, 1, 5, 7)).shape == (2, 10)  # a grid of other sides


def test_the_slow_loss_is_0_where_kernels_agree_and_trains_slow_networks_alone():
    torch.manual_seed(0)
    net = Terminator(widths=(2, 4))
    kernel_gap(net).backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_gradient and all(".kernel." in f".{name}" for name in with_gradient)
    assert all("local" not in name for name in with_gradient)
    for made in net.blocks:
        torch.nn.init.zeros_(made.kernel.out.weight)
        torch.nn.init.ones_(made.kernel.out.bias)
    assert kernel_gap(net) == 0


def test_a_residual_block_of_zero_passes_what_is_positive():
    made = Residual(4, 4, 1).eval()
    torch.nn.init.zeros_(made.body[-1].weight)
    x = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(made(x), x)


# ---------------------------------------------------------------------- study


def test_sequences_are_the_pixels_in_one_order_for_all():
    x = torch.rand(3, 1, 8, 8)
    moved = as_sequences(x)
    assert torch.equal(moved.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    place = torch.arange(64.0).reshape(1, 1, 8, 8)
    order = as_sequences(place).flatten().long()
    assert torch.equal(moved.flatten(1), x.flatten(1)[:, order]) and order[:3].tolist() != [0, 1, 2]


def test_the_command_runs_quickly(few_digits, tmp_path, capsys):
    command = ["terminator", "--quick", "--output", str(tmp_path)]
    assert main(command) in (0, None)
    shown = capsys.readouterr().out
    for name in NETWORKS:
        assert shown.count(f"\n| {name} | ") >= 2
    for pair in PAIRS:
        assert f"\n| {' | '.join(pair)} |" in shown
    for task in TASKS:
        assert shown.count(f"\n| {task} |") == 2
    found = json.loads((tmp_path / "images-terminator-0.json").read_text())
    assert set(found["batches"]) == {"1", "16", "64"} and found["right after 1"] == found["right"]
    assert found["split"]["scored"]["count"] == 20
    with pytest.raises(ValueError, match="other settings"):  # what was measured after one epoch
        list(terminator.study(tmp_path, replace(SHORT, epochs=2)))


def test_every_network_is_trained_alike_and_repeats(few_digits):
    config = replace(SHORT, slow_loss=0.0)
    for name in ("terminator", "resnet-8", "vit-16"):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(terminator.measure("images", name, config, Split("test"), 0))
        assert runs[0].pop("seconds") > 0 < runs[1].pop("seconds") and runs[0] == runs[1]
