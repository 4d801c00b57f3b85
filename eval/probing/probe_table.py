"""Writes the table of probed heads, with accuracy, calibration, parameters and operations of each head."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn.eval.bootstrap import Interval, mean_intervals
from xattn.eval.probing.probe_job import ProbeJob
from xattn.heads import AttentiveHead, Tokens
from xattn.photos.labels import Labels
from xattn.runtime import strict_json
from xattn.runtime.files import write_json, write_rows
from xattn.runtime.measuring import operations
from xattn.runtime.tables import markdown
from xattn.training.features import Features
from xattn.training.probe import ProbeScores


@dataclass
class ProbeRow:
    """One head of the table.

    Attributes:
        accuracy: the accuracy with its interval over photos.
        ece: the expected calibration error of all predictions together.
        macs: the number of multiply-adds for one photo, from tokens to logits.
        seconds: the median time of an epoch.
        best_epochs: the best epoch of each run.
        correct: (photos, seeds), 1 where the prediction was correct and 0 elsewhere.
        answers: one line for each photo and seed.
    """

    head: str
    accuracy: Interval
    ece: float
    parameters: int
    macs: int
    seconds: float
    best_epochs: list[int]
    correct: np.ndarray
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class HeadScores:
    """The predictions of all runs of one head, fold by fold, with ``seeds`` runs in each fold."""

    seeds: int
    tests: list[ProbeScores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epochs: list[int] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)


def table_row(name: str, head: AttentiveHead, features: Features, scores: HeadScores) -> ProbeRow:
    """Make the row of a head from the scores of all its runs; ``head`` can be the head of any run."""
    # Photos and not predictions are resampled, because all seeds are tested on the same photos.
    tests = scores.tests
    folds = [tests[i : i + scores.seeds] for i in range(0, len(tests), scores.seeds)]
    correct = np.concatenate(
        [np.stack([s.correct.numpy() for s in fold], 1).astype(np.float64) for fold in folds]
    )
    together = ProbeScores(
        torch.cat([s.logits for s in tests]), torch.cat([s.labels for s in tests])
    )
    return ProbeRow(
        head=name,
        accuracy=mean_intervals(correct.mean(1, keepdims=True))[0],
        ece=together.ece,
        parameters=sum(p.numel() for p in head.parameters()),
        macs=_macs(head, features),
        seconds=statistics.median(scores.seconds) if scores.seconds else math.nan,
        best_epochs=scores.best_epochs,
        correct=correct,
        answers=scores.answers,
    )


def _macs(head: AttentiveHead, features: Features) -> int:
    """The multiply-adds in matrix products and convolutions, from one photo's tokens to its logits."""
    tokens = move_tokens(head.tokens(features.taps([0])), head)
    return macs(head, tokens) + head.classifier.weight.numel()


def move_tokens(tokens: Tokens, head: AttentiveHead) -> Tokens:
    """Copy ``tokens`` to the device of ``head``."""
    device = head.classifier.weight.device
    patches = tuple(p.to(device) for p in tokens.patches)
    return Tokens(patches, tokens.prefix.to(device), tokens.grid)


COLUMNS = ("head", "accuracy %", "ECE %", "parameters", "MACs", "s an epoch")
RESULTS, TABLE, ANSWERS = "results.json", "results.csv", "answers.csv"


def format_rows(rows: Sequence[ProbeRow]) -> str:
    """A Markdown table of the heads.

    It shows the accuracy with its 95 % bootstrap interval over photos, ECE, parameters, MACs and seconds.
    """
    cells = [
        (
            row.head,
            row.accuracy.percent().text(1),
            f"{100 * row.ece:.1f}",
            f"{row.parameters:,}",
            f"{row.macs:,}",
            f"{row.seconds:.3f}",
        )
        for row in rows
    ]
    return "\n".join(markdown(COLUMNS, cells))


def check_results(folder: Path, heads: Sequence[str] | None = None, resume: bool = False) -> None:
    """Raise a ValueError if results in ``folder`` were not written by ``xattn probe``.

    If the ``heads`` of a new job are given, a ValueError is also raised if that job would overwrite
    results. A job overwrites results if it does not ``resume`` the earlier run, or if it leaves out a head
    of that run.
    """
    found: Any = None
    try:
        found = strict_json.parse((folder / RESULTS).read_bytes(), nan=True)
        own = isinstance(found, dict) and {"folds", "seeds", "split_seed", "heads"} <= found.keys()
    except FileNotFoundError:
        own = not (folder / TABLE).exists()
    except ValueError:
        own = False
    if not own:
        raise ValueError(
            f"output: {folder} contains results that are not from xattn probe; give another --output"
        )
    if heads is None or found is None:
        return
    before = [str(row.get("head")) for row in found["heads"] if isinstance(row, dict)]
    if not resume:
        raise ValueError(
            f"output: {folder} already contains results of {', '.join(before)}; continue with "
            "--resume, or give another --output"
        )
    if lost := [name for name in before if name not in heads]:
        raise ValueError(
            f"resume: the heads were {' '.join(before)} and are now {' '.join(heads)}; add "
            f"{', '.join(lost)}, or give another --output"
        )


def write_results(
    rows: Sequence[ProbeRow], labels: Labels, job: ProbeJob, folder: Path
) -> list[Path]:
    """Write ``results.json``, ``results.csv`` and ``answers.csv``; return their paths.

    ``answers.csv`` has one line per head, photo and seed.

    Raises:
        ValueError: such files exist but were not written by ``xattn probe``, see :func:`check_results`.
    """
    check_results(folder)
    records = [
        {
            "head": row.head,
            "accuracy": row.accuracy.mean,
            "accuracy_lo": row.accuracy.lo,
            "accuracy_hi": row.accuracy.hi,
            "photos": row.accuracy.n,
            "ece": row.ece,
            "parameters": row.parameters,
            "macs": row.macs,
            "seconds_an_epoch": None if math.isnan(row.seconds) else row.seconds,
        }
        for row in rows
    ]
    write_json(
        folder / RESULTS,
        {
            "backbone": {"name": job.backbone.name, "sha256": job.backbone.fingerprint},
            "classes": labels.names,
            "photos": len(labels.used),
            "folds": list(job.folds),
            "seeds": list(job.seeds),
            "split_seed": job.split_seed,
            "config": asdict(job.config),
            "heads": [
                {**record, "best_epochs": row.best_epochs}
                for record, row in zip(records, rows, strict=True)
            ],
        },
    )
    write_rows(folder / TABLE, records)
    write_rows(folder / ANSWERS, [answer for row in rows for answer in row.answers])
    return [folder / name for name in (RESULTS, TABLE, ANSWERS)]


def macs(head: AttentiveHead, tokens: Any) -> int:
    """The multiply-adds in matrix products and convolutions, from ``tokens`` to the pooled vector."""
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # operations of fused kernels cannot be counted
        return operations(lambda: head.pooled(head.attend(tokens))) // 2
