"""Run training in one or several processes, with an output folder, a resumable state, a log and signals.

    run = Run(head, optimizer, accelerator, config, loop_state, total, options)
    with run.open(record):               # claims the folder and restores the last checkpoint
        with run.steps():                # Ctrl-C and SIGTERM wait for the end of a step
            for batch in batches:
                run.agree()              # if one process must stop, all do, with a checkpoint
                run.losses = step(run, batch)
                run.advance(epoch, lr)
        run.save_head()

:func:`train_on_photos` is the loop for all training on photos; probing and pruning have their own loops.
"""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from xattn.config import DistillConfig, ProbeConfig, PruneConfig, TrainConfig
from xattn.heads import Head, save_head
from xattn.photos.base import Photos
from xattn.runtime.files import output_error, printable
from xattn.runtime.memory import raise_on_out_of_memory
from xattn.runtime.process import deferred_interrupt
from xattn.training import processes
from xattn.training.data import PhotoBatch
from xattn.training.processes import Share, whole_batch
from xattn.training.run_folder import CHECKPOINTS, HEAD_FOLDER, claim, save_checkpoint

FAILED = 1000  # a reason to stop, more severe than any signal number

HeadT = TypeVar("HeadT", bound=nn.Module)


class LoopState(Protocol):
    """The state that a loop must restore in addition to the head and its optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return values by name; called in all processes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values from the ``state`` of a complete checkpoint."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is stored and displayed, see :func:`~xattn.training.fitting.fit`."""

    output: str | Path | None = None
    resume: bool = False
    progress: bool = True
    on_checkpoint: Callable[[int, Any], None] | None = None

    @property
    def folder(self) -> Path | None:
        """The output folder; None keeps everything in memory."""
        return None if self.output is None else Path(self.output)


class Run(Generic[HeadT]):
    """One training run of ``head`` (or the student of a distillation or pruning) over ``total`` steps.

    ``step`` counts the steps taken, ``losses`` are the last losses, ``main`` is False in the processes
    that write nothing, and ``interrupted()`` returns the number of the signal that was received, or 0.
    """

    def __init__(
        self,
        head: HeadT,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        config: TrainConfig | ProbeConfig | DistillConfig | PruneConfig,
        loop_state: LoopState,
        total: int,
        options: RunOptions,
    ) -> None:
        self.head, self.accelerator, self.config = head, accelerator, config
        self.optimizer = accelerator.prepare(optimizer, device_placement=[False])
        self.loop_state, self.total, self.options = loop_state, total, options
        self.folder = options.folder
        self.ranks, self.rank = accelerator.num_processes, accelerator.process_index
        self.main: bool = accelerator.is_main_process
        self.step = 0
        self.losses: dict[str, float] = {}
        self.interrupted: Callable[[], int] = lambda: 0
        self._share = Share()
        self._log: TextIO | None = None
        self._writer: Any = None
        self._bar: Any = None

    @contextmanager
    def open(self, record: dict[str, Any]) -> Iterator[None]:
        """Lock the output folder within the block, restore its last checkpoint, and put the head in train
        mode.

        ``record`` holds what a resumed run must share with the original one, in addition to the config
        and the head.
        """
        record = {
            "train": asdict(self.config),
            "head": cast(Any, self.head).config(),
            **record,
            "processes": self.ranks,
        }
        with ExitStack() as stack:
            state = self._claim(stack, record)
            if state is not None:
                self._restore(state)
            processes.share_weights(self.accelerator, self.head)
            self._share = stack.enter_context(whole_batch(self.head))
            self.head.train()
            if state is None:
                self.checkpoint()  # a run killed before its next checkpoint starts from the same head
            yield
        if self.ranks > 1:
            self.accelerator.wait_for_everyone()

    def _claim(self, stack: ExitStack, record: dict[str, Any]) -> dict[str, Any] | None:
        """Claim the folder and open its log; returns the state to resume from, in all processes.

        An error in the main process is raised in all of them.
        """
        state, refusal = None, None
        try:
            claimed = claim(self.folder, record, self.options.resume, self.main)
            self._log, state = stack.enter_context(claimed)
        except (ValueError, OSError) as error:
            refusal = error
        refusal, state = processes.from_main(self.accelerator, refusal, state)
        if refusal is not None:
            raise refusal
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.losses = {name: float(value) for name, value in state["losses"].items()}
        self.loop_state.load_state_dict(state)
        self.head.load_state_dict(state["head"])
        saved = state["optimizer"]["param_groups"]
        for group, own in zip(saved, self.optimizer.param_groups, strict=True):
            if "fused" in own:  # each run decides anew how a step is computed
                group["fused"] = own["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def checkpoint(self) -> None:
        """Write a checkpoint and call ``on_checkpoint``; every process must call this."""
        own = self.loop_state.state_dict()
        if not self.main:
            return
        if self.folder is not None:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "head": self.head.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "losses": self.losses,
                **own,
            }
            save_checkpoint(self.folder / CHECKPOINTS, self.step, state)
        if self.options.on_checkpoint is not None:
            self.options.on_checkpoint(self.step, self.head)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Enclose the steps in this context, which shows a progress bar; after a first signal, the run
        continues until :meth:`agree`."""
        self._writer = _tensorboard(self.folder, self.step) if self.main else None
        self._bar = tqdm(
            total=self.total,
            initial=self.step,
            unit="step",
            disable=not (self.options.progress and self.main),
        )
        try:
            with deferred_interrupt() as self.interrupted:
                yield
                stop, _ = processes.agree_on_stop(self.accelerator, self.interrupted(), 0)
                if stop:  # after the last checkpoint
                    raise _stopped(stop, None)
        finally:
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def agree(self, count: int = 0, failure: OSError | None = None) -> list[int]:
        """Return the number of images in every process; ``count`` is this process's number.

        If a process was interrupted or has a ``failure``, all write a checkpoint and stop.
        """
        reason = self.interrupted() or (FAILED if failure else 0)
        stop, counts = processes.agree_on_stop(self.accelerator, reason, count)
        if stop:
            self.checkpoint()
            raise _stopped(stop, failure)
        return counts

    @contextmanager
    def forward(self, share: Share) -> Iterator[None]:
        """Use mixed precision, and random numbers that depend only on the step, within this context.

        ``share`` is this process's share of the batch.
        """
        self._share.rows, self._share.count = share.rows, share.count
        with processes.seed_step(self.config.seed, self.step), self.accelerator.autocast():
            yield

    def backward(self, loss: Tensor, without: Collection[str] = ()) -> None:
        """Compute the gradients of ``loss``, averaged over all processes; the gradients of parameters in
        ``without`` become None."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        for name in without:
            self.head.get_parameter(name).grad = None
        processes.average_gradients(self.accelerator, self.head)

    def take_step(self, losses: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Take a step down the gradient of ``losses["loss"]``; return all ``losses``, averaged over the
        processes.

        ``weight`` is this process's share of the batch, multiplied by the number of processes.
        """
        self.backward(weight * losses["loss"])
        self.optimizer.step()
        mean = self.mean(weight * torch.stack([v.detach().float() for v in losses.values()]))
        return dict(zip(losses, mean.tolist(), strict=True))

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean of the processes' ``losses``, each already weighted by the process's share."""
        return processes.average(self.accelerator, losses)

    def memory_errors(self, items: str) -> AbstractContextManager[None]:
        """Report exhausted memory as an error about ``batch_size``, which is the number of ``items``."""
        return raise_on_out_of_memory(
            MemoryError(
                f"batch_size: out of memory with {self.config.batch_size} {items} per step; "
                "train with a smaller one, or on more processes"
            )
        )

    def check_finite(self, step: int, *losses: float) -> None:
        """Raise a ``ValueError`` that names ``step`` and the learning rate unless ``losses`` are finite."""
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"lr: the loss is not finite at step {step}; train with an lr below "
                f"{self.config.lr:g}"
            )

    def advance(self, epoch: int, lr: float) -> None:
        """Count the step that was taken, and send its ``losses`` to the log, TensorBoard and the progress
        bar."""
        self.step += 1
        if self._log is not None:
            record = {"step": self.step, "epoch": epoch, "lr": lr, **self.losses}
            record["time"] = round(time.time(), 3)
            try:
                self._log.write(json.dumps(record) + "\n")
                self._log.flush()
            except OSError as error:
                raise output_error("output", self._log.name, error) from error
        if self._writer is not None:
            for name, value in self.losses.items():
                self._writer.add_scalar(f"train/{name}", value, self.step)
        self._bar.set_postfix({k[:4]: f"{v:.3f}" for k, v in self.losses.items()}, refresh=False)
        self._bar.update()

    def save_head(self) -> None:
        """Write the trained head into the output folder, from the main process."""
        if self.folder is not None and self.main and isinstance(self.head, Head):
            save_head(self.head, self.folder / HEAD_FOLDER)


def _stopped(stop: int, failure: OSError | None) -> BaseException:
    """The exception that ends all processes for the reason that they agreed on."""
    if stop == FAILED:
        return failure or ChildProcessError(
            "data: another process cannot continue reading; see its error"
        )
    return KeyboardInterrupt() if stop == signal.SIGINT else SystemExit(128 + stop)


def _tensorboard(folder: Path | None, step: int) -> Any:
    """A writer that drops what a killed run wrote after ``step``; None without TensorBoard or a folder."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    except UnicodeEncodeError:
        warnings.warn(
            f"output: {printable(str(folder))} is not a UTF-8 name, which TensorBoard needs; the losses "
            f"go only to log.jsonl",
            stacklevel=5,  # fit or probe
        )
        return None


# ---------------------------------------------------------------------- the loop over photos


class Batches(Protocol):
    """The batches of a run, see :class:`~xattn.training.data.PhotoBatches`."""

    photos: Photos
    per_epoch: int
    total: int

    def describe(self) -> dict[str, Any]: ...
    def from_step(self, step: int, stopped: Callable[[], int]) -> Generator[Any, None, None]: ...


Step = Callable[[Any, list[int]], dict[str, float]]
"""A function that takes a step on a batch, given its number of readable images in each process, and
returns the losses."""


class PhotoLoopState:
    """(index, reason) of the images that could not be read; restored when a run is resumed."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.skipped: dict[int, str] = {}

    def state_dict(self) -> dict[str, Any]:
        self.merge_skipped()
        return {"skipped": sorted(self.skipped.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = dict(state["skipped"])

    def merge_skipped(self) -> None:
        """Give every process the list of all images that could not be read in any of the processes."""
        self.skipped = processes.merge_dicts(self.accelerator, self.skipped)

    def failure(self, batch: PhotoBatch) -> OSError | None:
        """Return the error that ends the run at ``batch``: the batch's own failure, or one that says that
        images which could be read before have disappeared."""
        gone = [reason for index, reason in batch.unreadable if index not in self.skipped]
        if batch.epoch and not len(batch) and len(gone) > 1:  # a single one may have been deleted
            return OSError(
                f"data: images that could be read before can no longer be read ({gone[0]}); "
                "restore them, then resume"
            )
        return batch.failure

    def names(self, batches: Batches) -> list[tuple[str, str]]:
        """Return the name and reason for every image that could not be read.

        Raises:
            ValueError: no image could be read.
        """
        self.merge_skipped()
        photos = batches.photos
        if len(self.skipped) == len(photos):
            raise ValueError(
                f"data: none of the {len(photos)} images could be read; "
                f"the first: {next(iter(self.skipped.values()))}"
            )
        return [(photos.name(i), why) for i, why in sorted(self.skipped.items())]


def train_on_photos(
    run: Run[Any],
    batches: Batches,
    state: PhotoLoopState,
    step: Step,
    next_lr: Callable[[], float],
) -> None:
    """Train from ``run.step`` to the last batch.

    ``step`` is called if any process has a readable image; ``next_lr`` is called after every step and
    returns the learning rate for the log.
    """
    every = run.config.checkpoint_every
    with run.steps(), closing(batches.from_step(run.step, run.interrupted)) as delivered:
        for batch in delivered:
            counts = run.agree(len(batch), state.failure(batch))
            state.skipped.update(batch.unreadable)
            if sum(counts):
                with run.memory_errors("images"):
                    run.losses = step(batch, counts)
            run.check_finite(run.step + 1, *run.losses.values())
            run.advance(batch.epoch, next_lr())
            if run.step % every == 0 or run.step % batches.per_epoch == 0:
                run.checkpoint()
