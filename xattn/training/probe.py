"""``probe``: train an attentive head as a classifier on cached features of a frozen backbone.

The published recipe is efficient probing's (arXiv 2506.10178): LARS, a linear warm-up and a cosine,
without weight decay. Training stops early by photos held out, and the best weights are kept. A step
can also train against changes of the attention scores (:mod:`xattn.training.attention_training`).
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from xattn.config import ProbeConfig
from xattn.heads import AttentiveHead, Tokens, save_head
from xattn.heads.base import keeping_statistics
from xattn.photos.images import read_ahead
from xattn.runtime.distributed import gather
from xattn.runtime.interrupts import deferred_interrupt
from xattn.runtime.memory import is_out_of_memory
from xattn.training.attention_training import Perturbation, create_perturbation
from xattn.training.checkpoint import save_checkpoint
from xattn.training.features import Features
from xattn.training.labels import check_labels
from xattn.training.lars import LARS
from xattn.training.processes import (
    Share,
    agree,
    average_gradients,
    claim_together,
    own_accelerator,
    restoring,
    seeded,
    stopped,
    tensorboard,
    whole_batch,
)
from xattn.training.run_folder import CHECKPOINTS, HEAD_FOLDER, report

BINS = 15
STATE = ("step", "head", "optimizer", "scaler", "losses", "history", "best")  # of a checkpoint
Chunk = tuple[list[int], list[int]]  # numbers of photos, and the view of each


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """A head's answers: ``logits`` (n, K) float32 and the ``labels`` (n,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """(n,) bool: whether the most probable class is the label."""
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in [0, 1]."""
        return float(self.correct.double().mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(F.cross_entropy(self.logits.double(), self.labels))

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: |accuracy - confidence| of the most probable class
        over 15 bins of equal width, weighted by their photos (arXiv 1706.04599)."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        probabilities = self.logits.softmax(1)
        return float(
            multiclass_calibration_error(
                probabilities, self.labels, probabilities.shape[1], n_bins=BINS, norm="l1"
            )
        )


@dataclass
class ProbeResult:
    """What :func:`probe` returns: the head with its best weights (eval mode), how it answers the
    validation photos, one record an epoch, and seconds an epoch spent on training."""

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
        """Of the validation photos."""
        return self.validation.accuracy

    @property
    def ece(self) -> float:
        """Of the validation photos."""
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
    """Train ``head`` in place.

    Args:
        features: of the head's backbone, see :func:`~xattn.training.features.cache_features`.
        labels: LongTensor (n,), the class of every photo of ``features``; those of photos that are
            in neither part are not read.
        train, validation: numbers of photos; no photo is in both.
        output: folder for log, checkpoints and the trained head; None keeps everything in memory.
        resume: go on from the last checkpoint in ``output``; the end is bit-identical to a run that
            was never stopped (CPU, equal thread count).
        on_checkpoint: called in the first process with the step and the head, at step 0 and after each
            checkpoint.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint. In several processes
    each takes its share of a batch; BatchNorm sees the whole batch.

    Raises:
        ValueError: features of another backbone, labels out of range or of a single class, a part
            without photos, attention training of a head whose scores are fixed, a loss that is not
            finite, or ``output`` holds another run.
        OSError: ``output`` cannot be written.
    """
    config = config or ProbeConfig()
    _check(head, features, config)
    parts = {"train": list(train), "validation": list(validation)}
    shared = set(parts["train"]) & set(parts["validation"])
    if shared:
        raise ValueError(
            f"validation: {len(shared)} photos are in train, too, such as {min(shared)}; split them"
        )
    targets = {
        name: check_labels(labels.cpu(), index, head.num_classes, name)
        for name, index in parts.items()
    }
    device = next(head.parameters()).device
    with own_accelerator(device, config.precision) as accelerator:
        return _train(
            head,
            features,
            config,
            parts,
            targets,
            accelerator,
            output,
            resume,
            progress,
            on_checkpoint,
        )


def answers(
    head: AttentiveHead, features: Features, index: Sequence[int], batch_size: int = 256
) -> Tensor:
    """(n, K) float32 logits of the photos ``index``, in eval mode, on the CPU; each process of a
    group computes its share."""
    _check_pair(head, features)
    ranks = len(shares := gather(None))
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    share = -(-len(index) // len(shares))
    mine = list(index)[rank * share : (rank + 1) * share]
    training = head.training
    head.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(mine), batch_size):
                tokens = _on(head, head.tokens(features.taps(mine[start : start + batch_size])))
                parts.append(head.predict(head.attend(tokens)).float().cpu())
    finally:
        head.train(training)
    own = torch.cat(parts) if parts else torch.zeros(0, head.num_classes, device="cpu")
    return torch.cat(gather(own))


def _check(head: AttentiveHead, features: Features, config: ProbeConfig) -> None:
    if not isinstance(head, AttentiveHead):
        raise ValueError(f"head: {head.name!r} is no classifier; give an attentive head")
    _check_pair(head, features)
    if config.attention != "none" and not head.learns_scores:
        raise ValueError(
            f"attention: the scores of {head.name!r} are fixed, so training against changes of them "
            f"moves nothing; leave attention out, or choose a head that learns its scores"
        )


def _check_pair(head: AttentiveHead, features: Features) -> None:
    theirs = features.key["backbone"]["sha256"], features.key["taps"]
    own = head.backbone_fingerprint, head.backbone_taps
    if theirs != own:
        raise ValueError(
            f"features: {features.folder} (key {features.digest}) come from weights sha256 "
            f"{theirs[0]} and the taps {theirs[1]}, the head {head.name!r} reads {own[0]} and "
            f"{own[1]}; cache the features of the head's backbone"
        )


def _on(head: AttentiveHead, tokens: Tokens) -> Tokens:
    weight = head.classifier.weight
    patches = tuple(p.to(weight.device, weight.dtype) for p in tokens.patches)
    return Tokens(patches, tokens.prefix.to(weight.device, weight.dtype), tokens.grid)


# ---------------------------------------------------------------------- the loop


def chunks(count: int, views: int, size: int, ranks: int, seed: int, epoch: int) -> list[Chunk]:
    """Positions and views of an epoch's batches: equally large, or one apart, at most ``size`` x
    ``ranks`` but where 2 photos for BatchNorm, or one a process, need more.

    Raises:
        ValueError: fewer photos than that.
    """
    least = max(2, ranks)
    if count < least:
        raise ValueError(f"train: got {count} photos for {ranks} processes; give {least} or more")
    steps = min(math.ceil(count / (size * ranks)), count // least)
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(count))
    rng.shuffle(order)
    seen = [rng.randrange(views) if views > 1 else 0 for _ in order]
    ends = [count * i // steps for i in range(steps + 1)]
    return [(order[a:b], seen[a:b]) for a, b in pairwise(ends)]


def learning_rate(step: int, per_epoch: int, config: ProbeConfig, photos: int) -> float:
    """Of step 0, 1, ...: a linear rise over the warm-up, then half a cosine to 0."""
    peak = config.lr * (photos / 256 if config.optimizer == "lars" else 1.0)
    rise, total = config.warmup * per_epoch, config.epochs * per_epoch
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def _train(
    head: AttentiveHead,
    features: Features,
    config: ProbeConfig,
    parts: dict[str, list[int]],
    targets: dict[str, Tensor],
    accelerator: Any,
    output: str | Path | None,
    resume: bool,
    progress: bool,
    on_checkpoint: Callable[[int, AttentiveHead], None] | None,
) -> ProbeResult:
    from accelerate.utils import broadcast

    ranks, rank = accelerator.num_processes, accelerator.process_index
    main = accelerator.is_main_process
    if ranks > 1:
        head.to(accelerator.device)
        broadcast([p.data for p in (*head.parameters(), *head.buffers())])
    photos, seen = parts["train"], targets["train"]
    plan = (len(photos), features.views, config.batch_size, ranks, config.seed)
    per_epoch = len(chunks(*plan, 0))
    total = per_epoch * config.epochs
    optimizer = accelerator.prepare(create_optimizer(head, config), device_placement=[False])
    options = {} if config.attention == "none" else {"epsilon": config.epsilon}
    perturbation = create_perturbation(
        config.attention, **options, weight=config.attention_weight, seed=config.seed
    )
    folder = None if output is None else Path(output)
    run = {
        "train": asdict(config),
        "head": head.config(),
        "features": features.digest,
        "photos": {k: _digest(parts[k], targets[k].tolist()) for k in parts},
        "processes": ranks,
    }
    step, losses = 0, dict[str, float]()
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"epoch": -1, "value": [-math.inf, -math.inf], "head": {}}

    with ExitStack() as stack:
        log, state = claim_together(stack, folder, run, resume, accelerator, STATE)
        if state is not None:
            with restoring(folder):
                step = int(state["step"])
                losses = {name: float(value) for name, value in state["losses"].items()}
                history, best = list(state["history"]), state["best"]
                if best["epoch"] >= 0:  # the weights that the run ends with if none are better
                    head.load_state_dict(best["head"])
                head.load_state_dict(state["head"])
                for old, group in zip(
                    state["optimizer"]["param_groups"], optimizer.param_groups, strict=True
                ):
                    if "fused" in group:  # how a step is computed is this run's own
                        old["fused"] = group["fused"]
                optimizer.load_state_dict(state["optimizer"])
                if accelerator.scaler is not None:
                    accelerator.scaler.load_state_dict(state["scaler"])

        def checkpoint() -> None:
            if not main:
                return
            if folder is not None:
                save(folder)
            if on_checkpoint is not None:
                on_checkpoint(step, head)

        def save(folder: Path) -> None:
            scaler = accelerator.scaler
            state = {
                "step": step,
                "head": head.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "losses": losses,
                "history": history,
                "best": best,
            }
            save_checkpoint(folder / CHECKPOINTS, step, state)

        def ended() -> bool:
            late = config.patience and len(history) - 1 - best["epoch"] >= config.patience
            return step >= total or (bool(late) and step % per_epoch == 0 and bool(history))

        def read(chunk: Chunk) -> tuple[Tokens, Tensor, Share]:
            positions, views = chunk[0][rank::ranks], chunk[1][rank::ranks]
            index = [photos[i] for i in positions]
            rows = range(rank, len(chunk[0]), ranks)
            return (
                head.tokens(features.taps(index, torch.tensor(views, device="cpu"))),
                seen[positions],
                Share(rows, len(chunk[0])),
            )

        if state is None:
            checkpoint()  # a run killed before its first checkpoint starts from the same head
        writer = tensorboard(folder, step) if main else None
        bar = tqdm(total=total, initial=step, unit="step", disable=not (progress and main))
        stack.callback(bar.close)
        if writer is not None:
            stack.callback(writer.close)
        whole = stack.enter_context(whole_batch(head))
        seconds: list[float] = []
        with deferred_interrupt() as interrupted:
            while not ended():
                epoch, first = divmod(step, per_epoch)
                started = time.perf_counter()
                ahead = read_ahead(read, chunks(*plan, epoch)[first:], 2, threads=1)
                with closing(ahead) as batches:  # type: ignore[type-var]
                    for _, batch in batches:
                        stop, _ = agree(accelerator, interrupted(), 0)
                        if stop:
                            checkpoint()
                            raise stopped(stop, None)
                        tokens, target, share = batch.result()
                        lr = learning_rate(step, per_epoch, config, config.batch_size * ranks)
                        whole.rows, whole.count = share.rows, share.count
                        perturbation.examples = share.rows, share.count
                        weight = len(target) * ranks / share.count
                        loss = _step(
                            accelerator, head, optimizer, perturbation, tokens, target, weight, lr,
                            step, total, config,
                        )  # fmt: skip
                        losses = {"loss": loss}
                        step += 1
                        report(log, writer, bar, step, epoch, lr, losses)
                        if step % config.checkpoint_every == 0 and step % per_epoch:
                            checkpoint()
                if not first:
                    seconds.append(time.perf_counter() - started)
                scores = ProbeScores(
                    answers(head, features, parts["validation"]), targets["validation"]
                )
                record = {"epoch": epoch, "train": losses["loss"], "loss": scores.loss}
                record["accuracy"] = scores.accuracy
                if not math.isfinite(record["loss"]):
                    raise _not_finite(step, config)
                history = [*history, record]
                value = [-scores.loss, scores.accuracy]
                value = value if config.monitor == "loss" else value[::-1]
                if value > best["value"]:
                    weights = {k: v.detach().cpu().clone() for k, v in head.state_dict().items()}
                    best = {"epoch": epoch, "value": value, "head": weights}
                if step % config.checkpoint_every < per_epoch or ended():
                    checkpoint()
            stop, _ = agree(accelerator, interrupted(), 0)
            if stop:
                raise stopped(stop, None)
        head.load_state_dict(best["head"])
        head.eval()
        scores = ProbeScores(answers(head, features, parts["validation"]), targets["validation"])
        head.summary = {
            "photos": len(photos),
            "validation": len(parts["validation"]),
            "steps": step,
            "best_epoch": best["epoch"],
            "accuracy": round(scores.accuracy, 6),
            "ece": round(scores.ece, 6),
            "config": asdict(config),
        }
        if folder is not None and main:
            save_head(head, folder / HEAD_FOLDER)
    if ranks > 1:
        accelerator.wait_for_everyone()
    return ProbeResult(head, scores, step, best["epoch"], history, seconds, folder, main)


def _step(
    accelerator: Any,
    head: AttentiveHead,
    optimizer: Any,
    perturbation: Perturbation,
    tokens: Tokens,
    target: Tensor,
    weight: float,
    lr: float,
    step: int,
    total: int,
    config: ProbeConfig,
) -> float:
    """One step; the loss, averaged over the photos of all processes.

    The anchors of a head with ``reliability`` count as much as the share of the steps that is done.
    """
    head.train()
    head.trust = step / total
    tokens, target = _on(head, tokens), target.to(head.classifier.weight.device)
    perturbation.step = step
    for group in optimizer.param_groups:
        group["lr"] = lr
    try:
        with seeded(config.seed, step), accelerator.autocast():
            attended = head.attend(tokens)
            loss = perturbation.loss(
                attended.scores,
                lambda scores: head.predict(attended._replace(scores=scores)),
                target,
                module=head,
            )
            if head.balancing is not None:
                with keeping_statistics(head):
                    anchored = head.anchor_loss(attended, target)
                loss = loss + head.trust * anchored
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(weight * loss)
        for name in head.inert:  # rounding alone, of which LARS would make whole steps
            head.get_parameter(name).grad = None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"batch_size: out of memory with {config.batch_size} photos a step; train with fewer, or "
            f"on more processes"
        ) from error
    finally:
        head.trust = 1.0
    mean = weight * loss.detach().float()
    average_gradients(accelerator, head)
    if accelerator.num_processes > 1:
        mean = accelerator.reduce(mean, "mean")
    if not math.isfinite(float(mean)):
        raise _not_finite(step + 1, config)
    optimizer.step()
    return float(mean)


def create_optimizer(head: AttentiveHead, config: ProbeConfig) -> torch.optim.Optimizer:
    """LARS or AdamW; weight decay on tensors with two axes or more alone."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        # One pass over the weights: a step of efficient probing takes a quarter less on the CPU.
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    return LARS(groups, lr=config.lr)


def _not_finite(step: int, config: ProbeConfig) -> ValueError:
    return ValueError(
        f"lr: the loss is not finite at step {step}; train with a lower lr than {config.lr:g}"
    )


def _digest(*parts: list[int]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
