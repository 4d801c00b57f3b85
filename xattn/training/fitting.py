"""``fit``: train a head on photos with a frozen backbone; a run can be killed at any moment and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from xattn.backbone import Backbone, sha256
from xattn.config import TrainConfig
from xattn.heads import Head
from xattn.photos.base import Data, Photos
from xattn.photos.sources import open_photos
from xattn.runtime.files import write_json
from xattn.training import processes
from xattn.training.objective import Part, objective
from xattn.training.photo_batches import PhotoBatch, PhotoBatches
from xattn.training.photo_loop import PhotoLoopState, train_on_photos
from xattn.training.run import Run, RunOptions


@dataclass
class FitResult:
    """What :func:`fit` returns: the trained head (in eval mode), the steps taken and the last losses.

    ``skipped`` holds (name, reason) of every image that could not be read. ``main`` is False in the
    other processes of a distributed run, which write nothing.
    """

    head: Head
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    output: Path | None = None
    main: bool = True


def fit(
    head: Head,
    backbone: Backbone,
    data: Data,
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_checkpoint: Callable[[int, Head], None] | None = None,
) -> FitResult:
    """Train ``head`` in place; the backbone stays as it is, bit for bit.

    Args:
        data: a folder, a list file, paths of images, ``"hfds/NAME_OR_PATH:SPLIT"`` or
            ``"wds/PATH:SPLIT"``, see :mod:`xattn.photos.sources`. No labels are read.
        config: see :class:`~xattn.config.TrainConfig`.
        output: folder for log, checkpoints and the trained head; None keeps everything in memory.
        resume: go on from the last checkpoint in ``output``. The result is bit-identical to that of an
            uninterrupted run (on a CPU, with the same number of threads). With shards (``wds/``) each
            worker rereads its current shard from the start, and decodes only what is still to be
            trained on.
        on_checkpoint: called in the first process with the step and the head, at step 0 and after each
            checkpoint. It must leave the head and the random number generators as they were.

    Ctrl-C and SIGTERM end the run after the current step, the same one in all processes, with a
    checkpoint. Loader processes that die are replaced, with a warning.

    Raises:
        ValueError: no images, or ``output`` holds another run (or any run, without ``resume``).
        OSError: ``output`` cannot be written, or a file of ``data`` is missing. After a checkpoint:
            loader processes die repeatedly (``ChildProcessError``), or a batch has no readable image
            although its images could be read before, as if a disk or server were gone.
    """
    config = config or TrainConfig()
    if head.backbone_fingerprint != backbone.fingerprint:
        raise ValueError(
            f"head: made for weights sha256 {head.backbone_fingerprint}, the backbone has "
            f"{backbone.fingerprint}; create the head with this backbone"
        )
    photos = open_photos(data)
    options = RunOptions(output, resume, progress, on_checkpoint)
    with processes.own_accelerator(backbone.device, config.precision) as accelerator:
        return _fit(head, backbone, photos, config, accelerator, options)


class _FitState(PhotoLoopState):
    """The learning rate schedule, and the images that could not be read."""

    keys: tuple[str, ...] = ("scheduler", "skipped")

    def __init__(self, scheduler: LRScheduler, accelerator: Any) -> None:
        super().__init__(accelerator)
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        super().load_state_dict(state)

    def next_lr(self) -> float:
        if self.scheduler.last_epoch + 1 < self.scheduler.total_steps:  # type: ignore[attr-defined]
            self.scheduler.step()
        return float(self.scheduler.get_last_lr()[0])


def _fit(
    head: Head,
    backbone: Backbone,
    photos: Photos,
    config: TrainConfig,
    accelerator: Any,
    options: RunOptions,
) -> FitResult:
    before = sha256(backbone.model)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    resumed = options.folder if options.resume else None
    batches = PhotoBatches(photos, backbone.preprocessing, config, rank, ranks, resumed)
    device = backbone.device if ranks == 1 else accelerator.device
    backbone.to(device)
    head.to(device)
    optimizer = _optimizer(head, config)
    scheduler = _one_cycle(optimizer, config.lr, batches.total)
    state = _FitState(scheduler, accelerator)
    run = Run(head, optimizer, accelerator, config, state, batches.total, options)
    record = {"images": batches.describe(), "preprocessing": asdict(backbone.preprocessing)}
    with run.open(record):
        train_on_photos(
            run,
            batches,
            state,
            lambda batch, counts: _step(run, backbone, batch, counts, config),
            state.next_lr,
        )
        head.eval()
        if sha256(backbone.model) != before:
            raise RuntimeError("the backbone's weights changed during training: this is a bug")
        skipped = state.names(batches)
        head.summary = _summary(run, len(photos), len(skipped))
        run.save_head()
        if run.folder is not None and run.main:
            write_json(run.folder / "skipped.json", skipped)
    return FitResult(head, run.step, run.losses, skipped, run.folder, run.main)


def _step(
    run: Run[Head], backbone: Backbone, batch: PhotoBatch, counts: list[int], config: TrainConfig
) -> dict[str, float]:
    """Take one step; the losses, averaged over all images of all processes.

    A process without a readable image takes part with a grey one, of weight 0.
    """
    weight = counts[run.rank] * run.ranks / sum(counts)
    images = batch.images
    if images is None:
        images = torch.full((1, 3, *backbone.preprocessing.input_size), 0.5, device="cpu")
    wide = next(backbone.parameters(), images).dtype == torch.float64
    images = images.to(backbone.device, torch.float64 if wide else images.dtype, non_blocking=True)
    part = Part(torch.tensor(batch.share.rows or [0], device="cpu"), counts, run.rank)
    with run.forward(batch.share):
        terms = objective(run.head, backbone, images, config, run.head.mask_policy, part)
        terms = terms._replace(loss=terms.loss + run.head.auxiliary_loss())
    run.backward(weight * terms.loss)
    run.optimizer.step()
    losses = run.mean(weight * torch.stack([term.detach().float() for term in terms]))
    return dict(zip(terms._fields, losses.tolist(), strict=True))


def _summary(run: Run[Head], images: int, skipped: int) -> dict[str, Any]:
    return {
        "images": images - skipped,
        "skipped": skipped,
        "steps": run.step,
        "config": asdict(run.config),
        "losses": {name: round(value, 6) for name, value in run.losses.items()},
    }


def _one_cycle(optimizer: torch.optim.Optimizer, lr: float, total: int) -> OneCycleLR:
    scheduler = OneCycleLR(
        optimizer, max_lr=lr, total_steps=max(total, 2), pct_start=0.3, final_div_factor=1e4
    )
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # moves nothing; else the scheduler warns where the first batch is unreadable
    return scheduler


def _optimizer(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay on everything but biases, BatchNorm gains included, as in T-TAME's code."""
    named = [(n, p) for n, p in head.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for n, p in named if not n.endswith("bias")],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
