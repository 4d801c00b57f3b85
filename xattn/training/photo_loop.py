"""The loop of all training on photos: steps, unreadable photos, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Protocol

from xattn.photos.base import Photos
from xattn.training import processes
from xattn.training.photo_batches import PhotoBatch
from xattn.training.run import Run


class Batches(Protocol):
    """The batches of a run, see :class:`~xattn.training.photo_batches.PhotoBatches`."""

    photos: Photos
    per_epoch: int
    total: int

    def describe(self) -> dict[str, Any]: ...
    def from_step(self, step: int, stopped: Callable[[], int]) -> Generator[Any, None, None]: ...


Step = Callable[[Any, list[int]], dict[str, float]]
"""Takes a step on a batch, of which each process has so many readable images; returns the losses."""


class PhotoLoopState:
    """(index, reason) of the images that could not be read; restored with a run."""

    keys: tuple[str, ...] = ("skipped",)

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.skipped: dict[int, str] = {}

    def state_dict(self) -> dict[str, Any]:
        self.merge_skipped()
        return {"skipped": sorted(self.skipped.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = dict(state["skipped"])

    def merge_skipped(self) -> None:
        """Let every process know what any of them could not read."""
        self.skipped = processes.merge(self.accelerator, self.skipped)

    def failure(self, batch: PhotoBatch) -> OSError | None:
        """The error that ends the run at ``batch``: its own, or images that are gone since."""
        gone = [reason for index, reason in batch.unreadable if index not in self.skipped]
        if batch.epoch and not len(batch) and len(gone) > 1:  # a single one may have been deleted
            return OSError(
                f"data: images that could be read before no longer can ({gone[0]}); bring them back, "
                f"then resume"
            )
        return batch.failure

    def names(self, batches: Batches) -> list[tuple[str, str]]:
        """Name and reason of every image that could not be read.

        Raises:
            ValueError: none could be.
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

    ``step`` is called where some process has a readable image; ``next_lr`` after every step, and gives the
    rate for the log.
    """
    every = run.config.checkpoint_every
    with run.steps(), closing(batches.from_step(run.step, run.interrupted)) as delivered:
        for batch in delivered:
            counts = run.agree(len(batch), state.failure(batch))
            state.skipped.update(batch.unreadable)
            if sum(counts):
                with run.naming_batch_size("images"):
                    run.losses = step(batch, counts)
            run.check_finite(run.step + 1, *run.losses.values())
            run.advance(batch.epoch, next_lr())
            if run.step % every == 0 or run.step % batches.per_epoch == 0:
                run.checkpoint()
