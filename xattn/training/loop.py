"""``fit``: train a head on photos with a frozen backbone, killable and resumable at any moment."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from xattn.backbone import Backbone, sha256
from xattn.config import TrainConfig
from xattn.files import write_json
from xattn.heads import Head, save_head
from xattn.training.checkpoint import load_checkpoint, save_checkpoint
from xattn.training.data import TrainImages, epoch_batches, find_images, loader, steps_per_epoch
from xattn.training.objective import objective
from xattn.training.run_folder import CHECKPOINTS, HEAD_FOLDER, claim, describe_images, report


@dataclass
class FitResult:
    """What :func:`fit` returns: the trained head (eval mode), the steps taken, the last losses, and
    (path, reason) of every image that could not be read; ``main`` is False in the other processes of
    a distributed run, which write nothing."""

    head: Head
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    output: Path | None = None
    main: bool = True


def fit(
    head: Head,
    backbone: Backbone,
    data: str | Path | Sequence[str | Path],
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train ``head`` in place; the backbone stays as it is, bit for bit.

    Args:
        data: a folder, a list file, or paths of images. No labels are read.
        config: see :class:`~xattn.config.TrainConfig`.
        output: folder for log, checkpoints and the trained head; None keeps everything in memory.
        resume: go on from the last checkpoint in ``output``; the end is bit-identical to a run that
            was never stopped (CPU, equal thread count).

    Raises:
        ValueError: no images, or ``output`` holds another run (or a run, without ``resume``).
        OSError: ``output`` cannot be written.
    """
    config = config or TrainConfig()
    if head.backbone_fingerprint != backbone.fingerprint:
        raise ValueError(
            f"head: made for weights sha256 {head.backbone_fingerprint}, the backbone has "
            f"{backbone.fingerprint}; create the head with this backbone"
        )
    paths = find_images(data)
    with _accelerator(backbone, config) as accelerator:
        return _fit(head, backbone, paths, config, accelerator, output, resume, progress)


@contextmanager
def _accelerator(backbone: Backbone, config: TrainConfig) -> Iterator[Any]:
    """An Accelerator that a single process gives back: a next fit may ask for another precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(
        cpu=backbone.device.type == "cpu",
        mixed_precision=config.precision,
        step_scheduler_with_optimizer=False,
        device_placement=False,
    )
    try:
        yield accelerator
    finally:
        if accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


def _fit(
    head: Head,
    backbone: Backbone,
    paths: Sequence[Path],
    config: TrainConfig,
    accelerator: Any,
    output: str | Path | None,
    resume: bool,
    progress: bool,
) -> FitResult:
    from accelerate.utils import gather_object

    before = sha256(backbone.model)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    if len(paths) < ranks:
        raise ValueError(f"data: got {len(paths)} images for {ranks} processes; give more images")
    main = accelerator.is_main_process
    device = backbone.device if ranks == 1 else accelerator.device
    backbone.to(device)
    head.to(device)
    images = TrainImages(
        paths, backbone.preprocessing, config.seed, config.augment, config.max_pixels
    )
    per_epoch = steps_per_epoch(len(paths), config.batch_size, ranks)
    total = per_epoch * config.epochs
    optimizer = _optimizer(head, config)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=max(total, 2), pct_start=0.3, final_div_factor=1e4
    )
    folder = None if output is None else Path(output)
    run = {
        "train": asdict(config),
        "head": head.config(),
        "images": describe_images(paths),
        "preprocessing": asdict(backbone.preprocessing),
        "processes": ranks,
    }
    step, skipped, losses = 0, dict[int, str](), dict[str, float]()
    with claim(folder, run, resume, main) as log:
        state = load_checkpoint(folder / CHECKPOINTS) if folder is not None and resume else None
        if state is not None:
            head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            step, skipped, losses = state["step"], dict(state["skipped"]), state["losses"]
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
        model, optimizer = accelerator.prepare(head, optimizer, device_placement=[False, False])
        head.train()

        def checkpoint() -> None:
            if folder is None or not main:
                return
            scaler = accelerator.scaler
            state = {
                "step": step,
                "head": head.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "skipped": sorted(skipped.items()),
                "losses": losses,
            }
            save_checkpoint(folder / CHECKPOINTS, step, state)

        if state is None:
            checkpoint()  # a run killed before its first checkpoint starts from the same head
        writer = _tensorboard(folder, step) if main else None
        bar = tqdm(total=total, initial=step, unit="step", disable=not (progress and main))
        try:
            with deferred_interrupt() as interrupted:
                while step < total:
                    epoch, first = divmod(step, per_epoch)
                    keys = epoch_batches(
                        len(paths), config.batch_size, config.seed, epoch, first, rank, ranks
                    )
                    for batch, unreadable in loader(images, keys, config.workers):
                        skipped.update(unreadable)
                        if batch is not None or ranks > 1:
                            losses = _step(
                                accelerator, model, head, backbone, optimizer, batch, config
                            )
                        if not all(map(math.isfinite, losses.values())):
                            raise ValueError(
                                f"lr: the loss is not finite at step {step + 1}; train with a lower "
                                f"lr than {config.lr:g}"
                            )
                        if step + 1 < scheduler.total_steps:
                            scheduler.step()
                        step += 1
                        lr = float(scheduler.get_last_lr()[0])
                        report(log, writer, bar, step, epoch, lr, losses)
                        if step % config.checkpoint_every == 0 or step % per_epoch == 0:
                            checkpoint()
                        if interrupted():
                            checkpoint()
                            raise KeyboardInterrupt
        finally:
            bar.close()
            if writer is not None:
                writer.close()
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        head.eval()
        if sha256(backbone.model) != before:
            raise RuntimeError("the backbone's weights changed during training: this is a bug")
        if ranks > 1:
            skipped = dict(gather_object(list(skipped.items())))
        if len(skipped) == len(paths):
            raise ValueError(
                f"data: none of the {len(paths)} images could be read; "
                f"the first: {next(iter(skipped.values()))}"
            )
        result = FitResult(
            head,
            step,
            losses,
            [(str(paths[i]), why) for i, why in sorted(skipped.items())],
            folder,
            main,
        )
        head.summary = {
            "images": len(paths) - len(skipped),
            "skipped": len(skipped),
            "steps": step,
            "config": asdict(config),
            "losses": {k: round(v, 6) for k, v in losses.items()},
        }
        if folder is not None and main:
            save_head(head, folder / HEAD_FOLDER)
            write_json(folder / "skipped.json", result.skipped)
    if ranks > 1:
        accelerator.wait_for_everyone()
    return result


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until the caller asks; a second one interrupts at once.

    A checkpoint taken in the middle of a step would not be a state that a whole run passes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _optimizer(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay on everything but biases, BatchNorm gains included, as T-TAME's code does."""
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


def _step(
    accelerator: Any,
    model: nn.Module,
    head: Head,
    backbone: Backbone,
    optimizer: Any,
    batch: torch.Tensor | None,
    config: TrainConfig,
) -> dict[str, float]:
    """One step; the losses. A process without a readable image takes part with zero gradients."""
    weight = 1.0
    if batch is None:
        weight, batch = 0.0, torch.full((1, 3, *backbone.preprocessing.input_size), 0.5)
    batch = batch.to(backbone.device, non_blocking=True)
    with accelerator.autocast():
        terms = objective(model, backbone, batch, config, head.mask_policy)
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(weight * terms.loss)
    optimizer.step()
    return {name: float(value.detach()) for name, value in terms._asdict().items()}


def _tensorboard(folder: Path | None, step: int) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
