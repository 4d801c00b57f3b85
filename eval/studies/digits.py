"""scikit-learn's 8 x 8 digits: 1,437 to train on and 360 to test, and networks trained on them in seconds.

The split is stratified, the same for every study. Training runs on one thread, so that seconds compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.record import Call, record
from xattn.eval.studies.kept import kept_record, kept_values
from xattn.runtime.files import check_folder, write_text


class Digits(NamedTuple):
    """``images`` (n, 1, 8, 8) in [0, 1] and ``labels`` (n,)."""

    images: Tensor
    labels: Tensor


@cache
def load_digits() -> tuple[Digits, Digits]:
    """Digits to train on, and to test.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError(
            "digits: they come with scikit-learn, which is not installed; pip install scikit-learn"
        ) from None
    found = load()
    parts = train_test_split(
        found.images / 16, found.target, test_size=360, random_state=0, stratify=found.target
    )
    seen, held_out, of_seen, of_held_out = (torch.as_tensor(part) for part in parts)
    return (
        Digits(seen.float()[:, None], of_seen.long()),
        Digits(held_out.float()[:, None], of_held_out.long()),
    )


def pixels_right() -> float:
    """Share of the test digits that logistic regression on pixels classifies right."""
    seen, held_out = load_digits()
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=5000).fit(seen.images.flatten(1), seen.labels)
    return float(model.score(held_out.images.flatten(1), held_out.labels))


@dataclass(frozen=True)
class Training:
    """AdamW with cross-entropy; the rate rises for a tenth of the steps, then half a cosine to 0."""

    epochs: int = 20
    lr: float = 3e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    seed: int = 0
    aux: float = 0.0
    """Weight of the losses that recorded operators ask for."""


def train(
    net: nn.Module,
    settings: Training,
    extra: Callable[[nn.Module], Tensor] | None = None,
) -> float:
    """Train ``net`` on the digits, and give the CPU seconds; ``extra(net)`` is added to each loss."""
    seen, _ = load_digits()
    steps = settings.epochs * (len(seen.labels) // settings.batch_size)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(net.parameters(), settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    net.train()
    with single_thread():
        start = time.process_time()
        for _ in range(settings.epochs):
            order = torch.randperm(len(seen.labels), generator=generator)
            whole = len(order) - len(order) % settings.batch_size
            for batch in order[:whole].split(settings.batch_size):
                recording: AbstractContextManager[list[Call]] = (
                    record(alone=True) if settings.aux else nullcontext([])
                )
                with recording as calls:
                    logits = net(seen.images[batch])
                loss = F.cross_entropy(logits, seen.labels[batch])
                if settings.aux:
                    loss = loss + settings.aux * sum(sum(call.aux.values()) for call in calls)
                if extra is not None:
                    loss = loss + extra(net)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        seconds = time.process_time() - start
    net.eval()
    return seconds


@torch.no_grad()
def right(logits: Callable[[Tensor], Tensor]) -> float:
    """Share of the test digits that ``logits`` of their images tells right."""
    _, held_out = load_digits()
    return float((logits(held_out.images).argmax(1) == held_out.labels).double().mean())


@contextmanager
def single_thread() -> Iterator[None]:
    """Inside, torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Found = dict[str, list[dict[str, Any]]]
"""What was measured of each row, seed by seed."""


def measure_rows(
    output: Path,
    settings: dict[str, Any],
    rows: Mapping[str, Callable[[int], dict[str, Any]]],
    seeds: int,
) -> Found:
    """Measure every row with every seed; a file in ``output`` keeps each, and is read the next time.

    Raises:
        ValueError: ``output`` holds results of other settings, or a damaged file.
    """
    check_folder(output)
    kept_record(output / "record.json", settings)
    found: Found = {}
    for name, measure in rows.items():
        for seed in range(seeds):
            file = output / f"{name}-{seed}.json"

            def drawn(measure: Any = measure, seed: int = seed) -> Any:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    return measure(seed)

            found.setdefault(name, []).append(kept_values(file, drawn))
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Values that print alike as one, others as "mean (least to most)"."""
    least, most = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return (
        least if least == most else f"{sum(values) / len(values):,.{digits}f} ({least} to {most})"
    )


def write_report(output: Path, lines: list[str]) -> Path:
    """``lines`` as report.md."""
    path = output / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def reported(output: Path, lines: list[str]) -> Iterator[str]:
    """Write ``lines`` as report.md, and give them and where they are."""
    path = write_report(output, lines)
    yield from lines
    yield f"\nreport: {path}"
