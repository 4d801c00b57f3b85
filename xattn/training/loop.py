"""``fit``: train a head on photos with a frozen backbone, killable and resumable at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from tqdm.auto import tqdm

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.files import output_error, write_json
from xattn.heads import Head, save_head
from xattn.training.checkpoint import load_checkpoint, save_checkpoint
from xattn.training.data import TrainImages, epoch_batches, find_images, loader, steps_per_epoch
from xattn.training.objective import Terms, objective

RUN_FILE, LOG_FILE, HEAD_FOLDER, CHECKPOINTS = "run.json", "log.jsonl", "head", "checkpoints"


@dataclass
class FitResult:
    """What :func:`fit` returns: the trained head (eval mode), the steps taken, the last losses, and
    (path, reason) of every image that could not be read."""

    head: Head
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    output: Path | None = None


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
    from accelerate import Accelerator

    config = config or TrainConfig()
    if head.backbone_fingerprint != backbone.fingerprint:
        raise ValueError(
            f"head: made for weights sha256 {head.backbone_fingerprint}, the backbone has "
            f"{backbone.fingerprint}; create the head with this backbone"
        )
    paths = find_images(data)
    accelerator = Accelerator(
        cpu=backbone.device.type == "cpu",
        mixed_precision=config.precision,
        step_scheduler_with_optimizer=False,
    )
    backbone.to(accelerator.device)
    head.to(accelerator.device)
    images = TrainImages(
        paths, backbone.preprocessing, config.seed, config.augment, config.max_pixels
    )
    ranks, rank = accelerator.num_processes, accelerator.process_index
    per_epoch = steps_per_epoch(len(paths), config.batch_size, ranks)
    total = per_epoch * config.epochs
    optimizer = _optimizer(head, config)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=max(total, 2), pct_start=0.3, final_div_factor=1e4
    )
    folder = None if output is None else Path(output)
    run = {"train": asdict(config), "head": head.config(), "images": len(paths), "processes": ranks}
    step, skipped = 0, dict[int, str]()
    with _claim(folder, run, resume, accelerator.is_main_process) as log:
        state = load_checkpoint(folder / CHECKPOINTS) if folder is not None and resume else None
        if state is not None:
            head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            step, skipped = state["step"], dict(state["skipped"])
        model, optimizer = accelerator.prepare(head, optimizer)
        head.train()
        writer = _tensorboard(folder) if accelerator.is_main_process else None
        bar = tqdm(
            total=total,
            initial=step,
            unit="step",
            disable=not (progress and accelerator.is_main_process),
        )

        def checkpoint() -> None:
            if folder is not None and accelerator.is_main_process:
                save_checkpoint(
                    folder / CHECKPOINTS,
                    step,
                    {
                        "step": step,
                        "head": head.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "skipped": sorted(skipped.items()),
                    },
                )

        losses: dict[str, float] = {}
        saved = step
        try:
            while step < total:
                epoch, first = divmod(step, per_epoch)
                keys = epoch_batches(
                    len(paths), config.batch_size, config.seed, epoch, first, rank, ranks
                )
                for batch, unreadable in loader(images, keys, config.workers):
                    skipped.update(unreadable)
                    if batch is not None:
                        terms = _step(accelerator, model, head, backbone, optimizer, batch, config)
                        losses = {k: float(v) for k, v in terms._asdict().items()}
                    if step + 1 < scheduler.total_steps:
                        scheduler.step()
                    step += 1
                    _report(
                        log, writer, bar, step, epoch, float(scheduler.get_last_lr()[0]), losses
                    )
                    if step % config.checkpoint_every == 0 or step % per_epoch == 0:
                        checkpoint()
                        saved = step
        except KeyboardInterrupt:
            if saved != step:
                checkpoint()
            raise
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        head.eval()
        _check_untouched(backbone, head)
        result = FitResult(
            head, step, losses, [(str(paths[i]), why) for i, why in sorted(skipped.items())], folder
        )
        if not losses and state is None:
            raise ValueError(
                f"data: none of the {len(paths)} images could be read; "
                f"the first: {next(iter(skipped.values()))}"
            )
        head.summary = {
            "images": len(paths) - len(skipped),
            "skipped": len(skipped),
            "steps": step,
            "config": asdict(config),
            "losses": {k: round(v, 6) for k, v in losses.items()},
        }
        if folder is not None and accelerator.is_main_process:
            save_head(head, folder / HEAD_FOLDER)
            write_json(folder / "skipped.json", result.skipped)
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
    model: nn.Module,
    head: Head,
    backbone: Backbone,
    optimizer: Any,
    batch: torch.Tensor,
    config: TrainConfig,
) -> Terms:
    batch = batch.to(accelerator.device, non_blocking=True)
    with accelerator.autocast():
        terms = objective(model, backbone, batch, config, head.mask_policy)
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(terms.loss)
    optimizer.step()
    return Terms(*(t.detach() for t in terms))


def _check_untouched(backbone: Backbone, head: Head) -> None:
    backbone._fingerprint = None
    if backbone.fingerprint != head.backbone_fingerprint:
        raise RuntimeError(
            "the backbone's weights changed while its head was trained: this is a bug"
        )


@contextmanager
def _claim(
    folder: Path | None, run: dict[str, Any], resume: bool, main: bool
) -> Iterator[TextIO | None]:
    """Own ``folder`` for this run: refuse a second run, check that a resumed one is the same."""
    if folder is None:
        if resume:
            raise ValueError("resume: needs output, the folder of the run to go on with")
        yield None
        return
    if not main:
        yield None
        return
    path = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    if path.is_file():
        if not resume:
            raise ValueError(
                f"output: {folder} holds a run already; resume it, or choose a new folder"
            )
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            same = _comparable(old) == _comparable(json.loads(json.dumps(run)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"resume: {path} is damaged; choose a new output folder") from None
        if not same:
            raise ValueError(
                f"resume: {path} was started with other settings; use the same, or a new output folder"
            )
    elif resume:
        raise ValueError(f"resume: {folder} holds no run; check output, or train without resume")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output: {folder} is not empty and holds no run; choose a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("w")
    except OSError as error:
        raise output_error("output", folder, error) from error
    with lock:
        _lock(lock, folder)
        if not path.is_file():
            write_json(path, run)
        _cut_log(folder)
        try:
            log = (folder / LOG_FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise output_error("output", folder / LOG_FILE, error) from error
        with log:
            yield log


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on: all but settings that do not change the result."""
    train = {k: v for k, v in run["train"].items() if k not in ("workers", "checkpoint_every")}
    head = {k: v for k, v in run["head"].items() if k not in ("training", "xattn")}
    return {**run, "train": train, "head": head}


def _lock(lock: TextIO, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not POSIX
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"output: another run is writing to {folder}; choose a new folder"
        ) from None


def _cut_log(folder: Path) -> None:
    """Drop log lines later than the last checkpoint: the resumed run writes them again."""
    path = folder / LOG_FILE
    if not path.is_file():
        return
    state = load_checkpoint(folder / CHECKPOINTS)
    step = 0 if state is None else state["step"]
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the half line of a killed process
    path.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _report(
    log: TextIO | None,
    writer: Any,
    bar: Any,
    step: int,
    epoch: int,
    lr: float,
    losses: dict[str, float],
) -> None:
    if log is not None:
        record = {"step": step, "epoch": epoch, "lr": lr, **losses, "time": round(time.time(), 3)}
        log.write(json.dumps(record) + "\n")
        log.flush()
    if writer is not None:
        for key, value in losses.items():
            writer.add_scalar(f"train/{key}", value, step)
    bar.set_postfix({k[:4]: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
    bar.update()
