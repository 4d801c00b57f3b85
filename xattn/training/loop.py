"""``fit``: train a head on photos with a frozen backbone, killable and resumable at any moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone, sha256
from xattn.config import TrainConfig
from xattn.heads import Head, save_head
from xattn.photos.base import Data, Photos
from xattn.photos.sources import open_photos
from xattn.runtime.files import write_json
from xattn.runtime.interrupts import deferred_interrupt
from xattn.runtime.memory import is_out_of_memory
from xattn.training.checkpoint import save_checkpoint
from xattn.training.data import TrainImages, epoch_batches, load_batches, steps_per_epoch
from xattn.training.objective import Part, objective
from xattn.training.processes import (
    FAILED,
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
from xattn.training.run_folder import CHECKPOINTS, HEAD_FOLDER, first_workers, report

STATE = ("step", "head", "optimizer", "scheduler", "scaler", "skipped", "losses")  # of a checkpoint


class Delivery(NamedTuple):
    """A batch of ``epoch``: its readable images (B, 3, H, W) or None, (index, reason) of the others,
    what this process has of the ``share`` of all, and the error that ends the run."""

    epoch: int
    images: Tensor | None
    unreadable: list[tuple[int, str]]
    share: Share
    failure: OSError | None = None


@dataclass
class FitResult:
    """What :func:`fit` returns: the trained head (eval mode), the steps taken, the last losses, and
    (name, reason) of every image that could not be read; ``main`` is False in the other processes of
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
        resume: go on from the last checkpoint in ``output``; the end is bit-identical to a run that
            was never stopped (CPU, equal thread count). Of shards (``wds/``) each worker reads the
            one it was in again from its beginning, and only decodes what was not trained on yet.
        on_checkpoint: called in the first process with the step and the head, at step 0 and after each
            checkpoint; it must leave the head and the random numbers as they were.

    Ctrl-C and SIGTERM end the run after the current step, in all processes at the same one, with a
    checkpoint. Loader processes that die are replaced, with a warning.

    Raises:
        ValueError: no images, or ``output`` holds another run (or a run, without ``resume``).
        OSError: ``output`` cannot be written, or a file of ``data`` is missing. After a checkpoint:
            the loader processes die again and again (``ChildProcessError``), or not one image of a
            batch can be read and earlier they could, as if a disk or server were gone.
    """
    config = config or TrainConfig()
    if head.backbone_fingerprint != backbone.fingerprint:
        raise ValueError(
            f"head: made for weights sha256 {head.backbone_fingerprint}, the backbone has "
            f"{backbone.fingerprint}; create the head with this backbone"
        )
    photos = open_photos(data)
    with own_accelerator(backbone.device, config.precision) as accelerator:
        return _fit(
            head, backbone, photos, config, accelerator, output, resume, progress, on_checkpoint
        )


def _fit(
    head: Head,
    backbone: Backbone,
    photos: Photos,
    config: TrainConfig,
    accelerator: Any,
    output: str | Path | None,
    resume: bool,
    progress: bool,
    on_checkpoint: Callable[[int, Head], None] | None,
) -> FitResult:
    from accelerate.utils import broadcast, gather_object

    before = sha256(backbone.model)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    if len(photos) < ranks:
        raise ValueError(f"data: got {len(photos)} images for {ranks} processes; give more images")
    main = accelerator.is_main_process
    device = backbone.device if ranks == 1 else accelerator.device
    backbone.to(device)
    head.to(device)
    images = TrainImages(
        photos, backbone.preprocessing, config.seed, config.augment, config.max_pixels
    )
    per_epoch = steps_per_epoch(len(photos), config.batch_size, ranks)
    total = per_epoch * config.epochs
    optimizer = _optimizer(head, config)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=max(total, 2), pct_start=0.3, final_div_factor=1e4
    )
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # moves nothing; else the scheduler warns where the first batch is unreadable
    folder = None if output is None else Path(output)
    seen, streams = photos.describe(), 1
    if photos.streamed:
        started = first_workers(folder if resume else None, config.workers)
        seen["streams"] = streams = max(started, 1)
        # With other workers than at the start a worker follows several streams, each of which may
        # be between two shards.
        followed = streams // math.gcd(streams, max(config.workers, 1))
        photos.open_shards = 1 if followed == 1 else 2 * followed
    run = {
        "train": asdict(config),
        "head": head.config(),
        "images": seen,
        "preprocessing": asdict(backbone.preprocessing),
        "processes": ranks,
    }
    step, skipped, losses = 0, dict[int, str](), dict[str, float]()

    def deliveries(step: int, stopped: Callable[[], int]) -> Generator[Delivery, None, None]:
        while step < total:
            epoch, first = divmod(step, per_epoch)
            keys = epoch_batches(
                photos, config.batch_size, config.seed, epoch, first, rank, ranks, streams
            )
            with closing(load_batches(images, keys, config.workers, stopped)) as batches:
                for own in keys:
                    try:
                        batch, unreadable = next(batches)
                    except ChildProcessError as error:
                        yield Delivery(epoch, None, [], Share(), error)
                        continue
                    lost = {index for index, _ in unreadable}
                    rows = [
                        rank + ranks * i for i, (_, index) in enumerate(own) if index not in lost
                    ]
                    share = Share(rows, config.batch_size * ranks)
                    yield Delivery(epoch, batch, unreadable, share)
            step += len(keys)

    with ExitStack() as stack:
        log, state = claim_together(stack, folder, run, resume, accelerator, STATE)
        if state is not None:
            with restoring(folder):
                head.load_state_dict(state["head"])
                optimizer.load_state_dict(state["optimizer"])
                scheduler.load_state_dict(state["scheduler"])
                step, skipped, losses = int(state["step"]), dict(state["skipped"]), state["losses"]
                losses = {name: float(value) for name, value in losses.items()}
                if accelerator.scaler is not None:
                    accelerator.scaler.load_state_dict(state["scaler"])
        optimizer = accelerator.prepare(optimizer, device_placement=[False])
        if ranks > 1:
            broadcast([p.data for p in (*head.parameters(), *head.buffers())])
        whole = stack.enter_context(whole_batch(head))
        head.train()

        def share_skipped() -> None:
            if ranks > 1:
                skipped.update(gather_object(list(skipped.items())))

        def checkpoint() -> None:
            share_skipped()
            if main:
                save()
                if on_checkpoint is not None:
                    on_checkpoint(step, head)

        def save() -> None:
            if folder is None:
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
        writer = tensorboard(folder, step) if main else None
        bar = tqdm(total=total, initial=step, unit="step", disable=not (progress and main))
        try:
            with (
                deferred_interrupt() as interrupted,
                closing(deliveries(step, interrupted)) as delivered,
            ):
                for epoch, batch, unreadable, share, failure in delivered:
                    count = 0 if batch is None else len(batch)
                    lost = [reason for i, reason in unreadable if i not in skipped]
                    if epoch and not count and len(lost) > 1:  # one alone may have been deleted
                        failure = OSError(
                            f"data: images that could be read before no longer can ({lost[0]}); "
                            f"bring them back, then resume"
                        )
                    reason = interrupted() or (FAILED if failure else 0)
                    stop, counts = agree(accelerator, reason, count)
                    if stop:
                        checkpoint()
                        raise stopped(stop, failure)
                    skipped.update(unreadable)
                    if sum(counts):
                        whole.rows, whole.count = share.rows, share.count
                        part = Part(torch.tensor(share.rows or [0], device="cpu"), counts, rank)
                        try:
                            losses = _step(
                                accelerator, head, backbone, optimizer, batch, part, step, config
                            )
                        except Exception as error:
                            if not is_out_of_memory(error):
                                raise
                            raise MemoryError(
                                f"batch_size: out of memory with {config.batch_size} images a step; "
                                f"train with fewer, or on more processes"
                            ) from error
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
                stop, _ = agree(accelerator, interrupted(), 0)
                if stop:
                    raise stopped(stop, None)
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        head.eval()
        if sha256(backbone.model) != before:
            raise RuntimeError("the backbone's weights changed during training: this is a bug")
        share_skipped()
        if len(skipped) == len(photos):
            raise ValueError(
                f"data: none of the {len(photos)} images could be read; "
                f"the first: {next(iter(skipped.values()))}"
            )
        listed = [(photos.name(i), why) for i, why in sorted(skipped.items())]
        result = FitResult(head, step, losses, listed, folder, main)
        head.summary = {
            "images": len(photos) - len(skipped),
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
    head: Head,
    backbone: Backbone,
    optimizer: Any,
    batch: Tensor | None,
    part: Part,
    step: int,
    config: TrainConfig,
) -> dict[str, float]:
    """One step; the losses, averaged over all images of all processes.

    Without a readable image a process takes part with a grey one and the weight 0.
    """
    weight = part.counts[part.rank] * len(part.counts) / sum(part.counts)
    if batch is None:
        batch = torch.full((1, 3, *backbone.preprocessing.input_size), 0.5, device="cpu")
    wide = next(backbone.parameters(), batch).dtype == torch.float64
    batch = batch.to(backbone.device, torch.float64 if wide else batch.dtype, non_blocking=True)
    with seeded(config.seed, step), accelerator.autocast():
        terms = objective(head, backbone, batch, config, head.mask_policy, part)
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(weight * terms.loss)
    average_gradients(accelerator, head)
    optimizer.step()
    losses = weight * torch.stack([term.detach().float() for term in terms])
    if accelerator.num_processes > 1:
        losses = accelerator.reduce(losses, "mean")
    return dict(zip(terms._fields, losses.tolist(), strict=True))
