"""The Terminator on digits, as images and as sequences, compared with ResNets and ViTs of equal
epochs.

    python -m xattn.eval.studies terminator

Does it converge in fewer epochs, and with fewer parameters, than a ResNet and a ViT of equal
accuracy? As images, digits are 8 x 8 pixels. As sequences, their 64 pixels are shuffled in one
random order for all and folded to 8 x 8 again, so that no network knows which pixels are
neighbours. Each network's accuracy on the test digits is measured after every epoch. Controls:
training without the slow loss, and kernels K and k of 1, which have no slow loss. Intervals are
Student's t over the seeds. Networks of a family share one learning rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.blocks.hyperzzw import HyperZZWBlock, slow_loss
from xattn.eval.bootstrap import Interval, t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.digits import Digits, load_digits
from xattn.eval.studies.models.block_net import BlockNet
from xattn.eval.studies.models.terminator import ResNet, Terminator, TerminatorBlock
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize

TASKS = ("images", "sequences")
BATCHES = (64, 16, 1)  # batch sizes of the test
ENOUGH = 0.95  # accuracy; the report gives the first epoch that reaches it


@dataclass(frozen=True)
class TerminatorStudyConfig:
    """Settings of the training, on 1,437 digits."""

    seeds: int = 5  # Networks of each kind: seeds 0, 1, ...
    epochs: int = 8  # Passes over the digits, for every network.
    batch_size: int = 64  # Digits per step.
    lr: float = 1e-2  # Peak learning rate of AdamW.
    baseline_lr: float = 3e-2  # The same for ResNets and ViTs.
    weight_decay: float = 0.05  # Of AdamW.
    slow_loss: float = 0.01  # Weight of the difference between the Terminator's kernels.

    def quick(self) -> TerminatorStudyConfig:
        """One epoch, to check that everything runs; its figures mean nothing."""
        return replace(self, seeds=2, epochs=1)


DEFAULTS = TerminatorStudyConfig()
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "terminator": Terminator,
    "terminator-no-loss": Terminator,
    "terminator-ones": partial(Terminator, slow=False),
    "resnet-8": partial(ResNet, 8),
    "resnet-16": partial(ResNet, 16),
    "vit-16": partial(BlockNet, "attention", channels=1, dim=16),
    "vit-32": partial(BlockNet, "attention", channels=1, dim=32),
}
PAIRS = (
    *(("terminator", name) for name in NETWORKS if name != "terminator"),
    ("terminator-no-loss", "terminator-ones"),
)
"""Networks that are compared seed by seed, the first minus the second."""


def as_sequences(images: Tensor) -> Tensor:
    """Each image with its pixels in one random order for all, folded to its shape again."""
    count = images.shape[2] * images.shape[3]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return images.flatten(2)[:, :, order].reshape(images.shape)


def task_digits(task: str, digits: Digits) -> Digits:
    """``digits`` as ``task`` shows them."""
    images = as_sequences(digits.images) if task == "sequences" else digits.images
    return Digits(images, digits.labels)


def study(
    output: OutputAt = "runs/study-terminator",
    config: TerminatorStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test the networks not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    load_digits()
    rows: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        f"{task}-{name}": partial(measure, task, name, config)
        for task in TASKS
        for name in NETWORKS
    }
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(Path(output), settings, rows, config.seeds)
    lines = [*_report(found, config)]
    yield from reported(Path(output), lines, {"values": raw_rows(found)})


def measure(
    task: str, name: str, config: TerminatorStudyConfig, split: Split, seed: int
) -> dict[str, Any]:
    """Train a network and measure its accuracy (``right``) after every epoch, with all test digits
    in one batch. The Terminator's answers depend on the batch, so after the last epoch it is also
    tested in smaller ``batches``."""
    seen, held_out = (task_digits(task, digits) for digits in load_digits())
    seen, held_out = split.fit(seen), split.score(held_out)
    net = NETWORKS[name]()
    right: list[float] = []
    slow = config.slow_loss if name == "terminator" else 0.0
    seconds = train(net, seen, config, seed, slow, lambda: right.append(share_right(net, held_out)))
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": seconds,
        **{f"right after {epoch}": value for epoch, value in enumerate(right, 1)},
        "right": right[-1],
        "epochs": next((i for i, value in enumerate(right, 1) if value >= ENOUGH), None),
    }
    if name == "terminator":
        found["batches"] = {str(size): share_right(net, held_out, size) for size in BATCHES}
    return found


def train(
    net: nn.Module,
    seen: Digits,
    config: TerminatorStudyConfig,
    seed: int,
    slow: float,
    after_epoch: Callable[[], None],
) -> float:
    """Train ``net``, with weight ``slow`` on the slow loss; return CPU seconds of training alone."""
    generator = torch.Generator().manual_seed(seed)
    whole = len(seen.labels) - len(seen.labels) % config.batch_size
    spent = 0.0

    def measured() -> None:
        nonlocal spent
        start = time.process_time()
        net.eval()
        after_epoch()
        net.train()
        spent += time.process_time() - start

    def losses() -> Iterator[Tensor]:
        for epoch in range(config.epochs):
            if epoch:
                measured()
            order = torch.randperm(len(seen.labels), generator=generator)
            for batch in order[:whole].split(config.batch_size):
                loss = F.cross_entropy(net(seen.images[batch]), seen.labels[batch])
                yield loss + slow * kernel_gap(net) if slow else loss

    steps = config.epochs * (whole // config.batch_size)
    lr = config.lr if isinstance(net, Terminator) else config.baseline_lr
    seconds = minimize(net, losses(), steps, lr, config.weight_decay)
    seconds -= spent
    net.eval()
    after_epoch()
    return seconds


def kernel_gap(net: nn.Module, grid: tuple[int, int] = (8, 8)) -> Tensor:
    """The slow loss of a :class:`Terminator`: how much the kernels K differ between its blocks."""
    blocks = [block for block in net.modules() if isinstance(block, TerminatorBlock)]
    return slow_loss(cast(list[HyperZZWBlock], blocks), grid)


@torch.no_grad()
def share_right(net: nn.Module, digits: Digits, batch_size: int = 0) -> float:
    """Accuracy on ``digits``, in one batch or in batches of ``batch_size``."""
    batches = digits.images.split(batch_size or len(digits.labels))
    answers = torch.cat([net(batch).argmax(1) for batch in batches])
    return float((answers == digits.labels).double().mean())


# ---------------------------------------------------------------------- report


def _report(found: Found, config: TerminatorStudyConfig) -> Iterator[str]:
    yield (
        f"1,437 digits to train on, 360 to test; {config.epochs} epochs of {config.batch_size}, "
        f"{config.seeds} seeds"
    )
    epochs = [e for e in (1, 2, 3, 5) if e < config.epochs]
    for task in TASKS:
        titles = " | ".join(f"after {epoch}" for epoch in epochs)
        titles = f"{titles} | after {config.epochs}" if epochs else f"after {config.epochs}"
        yield f"\n| {task} | parameters | {titles} | epochs to {ENOUGH:.2f} | CPU seconds |"
        yield f"| :-- | --: |{' --: |' * (len(epochs) + 3)}"
        for name in NETWORKS:
            runs = found[f"{task}-{name}"]
            cells = [f"{_mean(runs, f'right after {epoch}').mean:.3f}" for epoch in epochs]
            cells += [_mean(runs, "right").text(3), _epochs(runs)]
            yield (
                f"| {name} | {runs[0]['parameters']:,} | {' | '.join(cells)} | "
                f"{_mean(runs, 'seconds').mean:.1f} |"
            )
    early = f"right after {min(3, config.epochs)}"
    titles = " | ".join(f"{task}, {when}" for task in TASKS for when in ("after 3", "last"))
    yield f"\n| network | minus | {titles} |"
    yield "| :-- | :-- | --: | --: | --: | --: |"
    for pair in PAIRS:
        cells = [_gap(found, task, *pair, name) for task in TASKS for name in (early, "right")]
        yield f"| {' | '.join([*pair, *cells])} |"
    titles = " | ".join(f"of {size}" for size in BATCHES)
    yield f"\n| terminator, test digits in batches | of all | {titles} |"
    yield f"| :-- | --: |{' --: |' * len(BATCHES)}"
    for task in TASKS:
        runs = found[f"{task}-terminator"]
        cells = [_mean([run["batches"] for run in runs], str(size)).text(3) for size in BATCHES]
        yield f"| {task} | {_mean(runs, 'right').text(3)} | {' | '.join(cells)} |"


def _mean(runs: list[dict[str, Any]], name: str) -> Interval:
    return t_interval([run[name] for run in runs])


def _epochs(runs: list[dict[str, Any]]) -> str:
    """The first epoch with enough accuracy, over the seeds; or how many seeds reach it."""
    reached = [run["epochs"] for run in runs if run["epochs"] is not None]
    if len(reached) < len(runs):
        return f"in {len(reached)} of {len(runs)} seeds"
    return t_interval(reached).text(1)


def _gap(found: Found, task: str, first: str, second: str, measured: str) -> str:
    pairs = zip(found[f"{task}-{first}"], found[f"{task}-{second}"], strict=True)
    gap = t_interval([a[measured] - b[measured] for a, b in pairs])
    return f"{gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}]"
