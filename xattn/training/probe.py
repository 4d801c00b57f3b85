"""``probe``: train an attentive head as a classifier on cached features of a frozen backbone.

The recipe was published with efficient probing (arXiv 2506.10178): LARS, a linear warm-up followed by a
cosine, and no weight decay. Held-out photos determine early stopping, and the weights of the best epoch
are used. A step can also train against changes of the attention scores
(:mod:`xattn.training.attention_training`). A head with a method ``solve`` is not trained in steps; its
weights are computed in closed form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.config import ProbeConfig
from xattn.heads import AttentiveHead, Tokens
from xattn.heads.attentive import LabelledTokens, Solvable
from xattn.heads.base import frozen_statistics
from xattn.training.attention_training import (
    METHODS,
    Perturbation,
    create_perturbation,
    head_loss,
)
from xattn.training.features import Features
from xattn.training.labelled import (
    FeatureBatch,
    FeatureBatches,
    LabelledPhotos,
    ProbeScores,
    check_features,
    check_labels,
    predict_logits,
    to_head,
)
from xattn.training.optimizers import LARS, decay_groups
from xattn.training.processes import own_accelerator
from xattn.training.run import Run, RunOptions

AT_ONCE = 64  # photos whose tokens a solver reads at once

__all__ = [
    "ProbeResult",
    "ProbeScores",
    "create_optimizer",
    "learning_rate",
    "predict_logits",
    "probe",
]


@dataclass
class ProbeResult:
    """The result of :func:`probe`: the head with the weights of its best epoch, in eval mode.

    ``validation`` holds its predictions for the validation photos, ``history`` one record per epoch, and
    ``seconds`` the training time of each complete epoch. ``main`` is False in the other processes of a
    distributed run, which write nothing.
    """

    head: AttentiveHead
    validation: ProbeScores
    steps: int
    best_epoch: int
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    output: Path | None = None
    main: bool = True

    @property
    def accuracy(self) -> float:
        """Accuracy on the validation photos."""
        return self.validation.accuracy

    @property
    def ece(self) -> float:
        """Expected calibration error on the validation photos."""
        return self.validation.ece


def probe(
    head: AttentiveHead,
    features: Features,
    labels: Tensor,
    config: ProbeConfig | None = None,
    *,
    train: Sequence[int],
    validation: Sequence[int],
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_checkpoint: Callable[[int, AttentiveHead], None] | None = None,
) -> ProbeResult:
    """Train ``head`` in place, or compute its weights in closed form, which counts as one epoch of one
    step.

    Args:
        features: features of the head's backbone, see :func:`~xattn.training.features.cache_features`.
        labels: LongTensor (n,), the class of every photo of ``features``; only those of ``train`` and
            ``validation`` are read.
        train, validation: numbers of photos; no photo may be in both.
        output: folder for the log, the checkpoints and the trained head; None keeps everything in memory.
        resume: continue from the last checkpoint in ``output``. The result is bit-identical to that of an
            uninterrupted run (on a CPU, with the same number of threads).
        on_checkpoint: called in the first process with the step and the head, at step 0 and after each
            checkpoint.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint. With several processes, each
    takes a share of every batch, and BatchNorm uses the statistics of the whole batch.

    Raises:
        ValueError: the features come from another backbone, labels are out of range or all the same, there
            is no photo for training or validation, attention training is given for a head whose scores are
            fixed, a loss is not finite, or ``output`` contains another run.
        OSError: ``output`` cannot be written.

    Example:
        >>> import tempfile
        >>> from xattn import probe
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(8):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> folder = f"{tempfile.mkdtemp()}/features"
        >>> features = xattn.cache_features(net, photos, folder, progress=False)
        >>> head = xattn.create_head("gap", net, classes=2)
        >>> labels = torch.tensor([0, 1] * 4)
        >>> config = xattn.ProbeConfig(recipe="small", epochs=1)
        >>> parts = {"train": range(6), "validation": [6, 7]}
        >>> result = probe(head, features, labels, config, **parts, progress=False)
        >>> result.head is head
        True
    """
    config = config or ProbeConfig()
    if (name := METHODS.name(config.attention)) != config.attention:  # "AT" is at
        config = replace(config, attention=name)
    _check_head(head, features, config)
    shared = set(train) & set(validation)
    if shared:
        raise ValueError(
            f"validation: {len(shared)} photos are also in train, such as {min(shared)}; give "
            "each photo to only one of the two"
        )
    parts = {
        name: LabelledPhotos(index, check_labels(labels.cpu(), index, head.num_classes, name))
        for name, index in (("train", list(train)), ("validation", list(validation)))
    }
    options = RunOptions(output, resume, progress, on_checkpoint)
    run = _solve if isinstance(head, Solvable) else _train
    with own_accelerator(next(head.parameters()).device, config.precision) as accelerator:
        return run(head, features, parts, config, accelerator, options)


def _check_head(head: AttentiveHead, features: Features, config: ProbeConfig) -> None:
    if not isinstance(head, AttentiveHead):
        raise ValueError(f"head: {head.name!r} is not a classifier; give an attentive head")
    check_features(head, features)
    if config.attention != "none" and not head.learns_scores:
        raise ValueError(
            f"attention: the scores of {head.name!r} are fixed, so training against changes of them "
            f"has no effect; leave attention out, or choose a head that learns its scores"
        )


class _EpochHistory:
    """The validation of every epoch, and the best epoch's weights."""

    def __init__(self, head: AttentiveHead, config: ProbeConfig) -> None:
        self.head, self.config = head, config
        self.records: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"epoch": -1, "value": [-math.inf, -math.inf], "head": {}}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.records, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records, self.best = list(state["history"]), state["best"]
        if (
            self.best["epoch"] >= 0
        ):  # they must fit, because the run ends with them if no later epoch is better
            self.head.load_state_dict(self.best["head"])

    def add(self, epoch: int, train_loss: float, scores: ProbeScores, **more: float) -> None:
        """Record an epoch that ended with ``scores``, and keep its weights if it is the best."""
        record = {"epoch": epoch, "train": train_loss, "loss": scores.loss}
        self.records = [*self.records, {**record, "accuracy": scores.accuracy, **more}]
        value = [-scores.loss, scores.accuracy]
        value = value if self.config.monitor == "loss" else value[::-1]
        if value > self.best["value"]:
            weights = {k: v.detach().cpu().clone() for k, v in self.head.state_dict().items()}
            self.best = {"epoch": epoch, "value": value, "head": weights}

    @property
    def out_of_patience(self) -> bool:
        """Whether training should end because too many epochs have passed since the best one."""
        passed = len(self.records) - 1 - self.best["epoch"]
        return bool(self.config.patience and self.records) and passed >= self.config.patience


def _train(
    head: AttentiveHead,
    features: Features,
    parts: dict[str, LabelledPhotos],
    config: ProbeConfig,
    accelerator: Any,
    options: RunOptions,
) -> ProbeResult:
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if ranks > 1:
        head.to(accelerator.device)
    batches = FeatureBatches(head, features, parts["train"], config, rank, ranks)
    per_epoch, total = batches.per_epoch, batches.per_epoch * config.epochs
    perturbation = _perturbation(config)
    history = _EpochHistory(head, config)
    optimizer = create_optimizer(head, config)
    run = Run(head, optimizer, accelerator, config, history, total, options)
    photos = {name: part.digest for name, part in parts.items()}
    seconds: list[float] = []

    def ended() -> bool:
        return run.step >= total or history.out_of_patience

    with run.open({"features": features.digest, "photos": photos}):
        with run.steps():
            while not ended():
                epoch, first = divmod(run.step, per_epoch)
                started = time.perf_counter()
                with closing(batches.of_epoch(epoch, first)) as ahead:
                    for batch in ahead:
                        run.agree()
                        lr = learning_rate(run.step, per_epoch, config, config.batch_size * ranks)
                        with run.memory_errors("photos"):
                            run.losses = {"loss": _step(run, perturbation, batch.result(), lr)}
                        run.advance(epoch, lr)
                        if run.step % config.checkpoint_every == 0 and run.step % per_epoch:
                            run.checkpoint()
                if not first:
                    seconds.append(time.perf_counter() - started)
                scores = _validate(head, features, parts["validation"])
                run.check_finite(run.step, scores.loss)
                history.add(epoch, run.losses["loss"], scores)
                if run.step % config.checkpoint_every < per_epoch or ended():
                    run.checkpoint()
        head.load_state_dict(history.best["head"])
        return _finish(run, history, features, parts, seconds)


def _solve(
    head: AttentiveHead,
    features: Features,
    parts: dict[str, LabelledPhotos],
    config: ProbeConfig,
    accelerator: Any,
    options: RunOptions,
) -> ProbeResult:
    """As :func:`_train`, for a head with a solver; with several processes, each solves for itself."""
    assert isinstance(head, Solvable)
    history, seconds = _EpochHistory(head, config), []
    optimizer = create_optimizer(head, config)
    run: Run[AttentiveHead] = Run(head, optimizer, accelerator, config, history, 1, options)
    photos = {name: part.digest for name, part in parts.items()}
    with run.open({"features": features.digest, "photos": photos}):
        head.eval()
        if not run.step:
            train, validation = (
                LabelledTokens(partial(_token_batches, head, features, part.index), part.labels)
                for part in parts.values()
            )
            started = time.perf_counter()
            found = head.solve(train, validation)
            seconds.append(time.perf_counter() - started)
            loss = _validate(head, features, parts["train"]).loss
            scores = _validate(head, features, parts["validation"])
            run.check_finite(1, loss, scores.loss)
            with run.steps():
                run.losses = {"loss": loss}
                run.advance(0, 0.0)
            history.add(0, loss, scores, **found)
            run.checkpoint()
        return _finish(run, history, features, parts, seconds)


def _token_batches(
    head: AttentiveHead, features: Features, index: Sequence[int]
) -> Iterator[Tokens]:
    for start in range(0, len(index), AT_ONCE):
        yield to_head(head, head.tokens(features.taps(index[start : start + AT_ONCE])))


def _finish(
    run: Run[AttentiveHead],
    history: _EpochHistory,
    features: Features,
    parts: dict[str, LabelledPhotos],
    seconds: list[float],
) -> ProbeResult:
    """Validate and save the head in its current state."""
    head = run.head.eval()
    scores = _validate(head, features, parts["validation"])
    head.summary = {
        "photos": len(parts["train"].index),
        "validation": len(parts["validation"].index),
        "steps": run.step,
        "best_epoch": history.best["epoch"],
        "accuracy": round(scores.accuracy, 6),
        "ece": round(scores.ece, 6),
        "config": asdict(run.config),
    }
    if isinstance(head, Solvable):
        head.summary["solve"] = history.records[0]
    run.save_head()
    best, records = history.best["epoch"], history.records
    return ProbeResult(head, scores, run.step, best, records, seconds, run.folder, run.main)


def _validate(head: AttentiveHead, features: Features, photos: LabelledPhotos) -> ProbeScores:
    return ProbeScores(predict_logits(head, features, photos.index), photos.labels)


def _perturbation(config: ProbeConfig) -> Perturbation:
    options: dict[str, float] = {}
    if config.attention != "none":
        options = {"epsilon": config.epsilon, "weight": config.attention_weight}
    return create_perturbation(config.attention, **options, seed=config.seed)


def _step(
    run: Run[AttentiveHead], perturbation: Perturbation, batch: FeatureBatch, lr: float
) -> float:
    """Take one step; returns the loss, averaged over the photos of all processes.

    The anchors of a head with ``reliability`` gain weight in proportion to the completed steps.
    """
    head = run.head.train()
    head.trust = run.step / run.total
    tokens, target = to_head(head, batch.tokens), batch.target.to(head.classifier.weight.device)
    weight = len(target) * run.ranks / batch.share.count
    perturbation.step = run.step
    perturbation.examples = batch.share.rows, batch.share.count
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    try:
        with run.forward(batch.share):
            attended = head.attend(tokens)
            loss = head.auxiliary_loss() + head_loss(perturbation, head, attended, target)
            if head.balancing is not None:
                with frozen_statistics(head):
                    anchored = head.anchor_loss(attended, target)
                loss = loss + head.trust * anchored
        run.backward(weight * loss, without=head.inert)  # only rounding, which LARS would scale up
    finally:
        head.trust = 1.0
    mean = float(run.mean(weight * loss.detach().float()))
    run.check_finite(run.step + 1, mean)
    run.optimizer.step()
    return mean


def learning_rate(step: int, per_epoch: int, config: ProbeConfig, photos: int) -> float:
    """Return the learning rate at step 0, 1, ...: a linear rise over the warm-up, then half a cosine to 0.

    ``photos`` is the number of photos per step; the rate of LARS is proportional to it.
    """
    peak = config.lr * (photos / 256 if config.optimizer == "lars" else 1.0)
    rise, total = config.warmup * per_epoch, config.epochs * per_epoch
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def create_optimizer(head: AttentiveHead, config: ProbeConfig) -> torch.optim.Optimizer:
    """Create LARS or AdamW, with weight decay only on tensors with two axes or more."""
    groups = decay_groups(head.parameters(), config.weight_decay)
    if config.optimizer == "adamw":
        # One pass over the weights: this saves a quarter of a step of efficient probing on a CPU.
        fused = next(head.parameters()).device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    return LARS(groups, lr=config.lr)
