"""``fit``: train a head on photos with a frozen backbone. A run can be killed at any time and resumed
later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from xattn.backbone import Backbone, Taps
from xattn.config import TrainConfig
from xattn.heads import Head
from xattn.photos.base import Data, Photos
from xattn.photos.sources import open_photos
from xattn.runtime.files import check_run_folder, write_json
from xattn.training import processes
from xattn.training.data import PhotoBatch, PhotoBatches
from xattn.training.objectives.base import Objective, Part, Step, objective_for
from xattn.training.optimizers import head_optimizer, one_cycle
from xattn.training.outcome_fitting import OutcomesJob, first_taps, table_for
from xattn.training.outcomes import Outcomes
from xattn.training.run import Batches, PhotoLoopState, Run, RunOptions, train_on_photos
from xattn.training.run_folder import CHECKPOINTS, has_checkpoint

CALIBRATED = 256  # number of photos from which a head computes statistics of taps


@dataclass
class FitResult:
    """The result of :func:`fit`: the trained head (in eval mode), the number of steps taken and the last
    losses.

    ``skipped`` lists (name, reason) for every image that could not be read. ``main`` is False in the other
    processes of a distributed run, which write nothing.

    Example:
        >>> import tempfile
        >>> from xattn import fit
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(4):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> config = xattn.TrainConfig(recipe="small", epochs=1, batch_size=2)
        >>> result = fit(xattn.create_head("ttame", net), net, photos, config, progress=False)
        >>> result.steps, sorted(result.losses)[:1]
        (2, ['area'])
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
    table: str | Path | Outcomes | None = None,
    say: Callable[[str], object] | None = None,
) -> FitResult:
    """Train ``head`` in place; the backbone is not changed.

    Args:
        data: a folder, a list file, paths of images or clips, ``"hfds/NAME_OR_PATH:SPLIT"`` or
            ``"wds/PATH:SPLIT"``, see :mod:`xattn.photos.sources`. No labels are read.
        config: see :class:`~xattn.config.TrainConfig`.
        output: folder for the log, the checkpoints and the trained head; None keeps everything in memory.
        resume: continue from the last checkpoint in ``output``. The result is bit-identical to that of an
            uninterrupted run (on a CPU, with the same number of threads). With shards (``wds/``) each
            worker rereads its current shard from the start, but decodes only the photos that are still
            to be trained on.
        on_checkpoint: called in the first process with the step and the head, at step 0 and after each
            checkpoint. The function must not change the head or the random number generators.
        table: table of outcomes, for the objective ``outcomes`` and others that read one: a folder, whose
            missing rows are computed first (:func:`~xattn.training.outcomes.cache_outcomes`), or a
            finished table that has the photos of ``data``. The default is a folder beside ``output``, with
            the suffix ``-outcomes``.
        say: called before a table is computed, with one line that states the cost.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; all processes end after
    the same step. Loader processes that die are replaced, with a warning.

    Raises:
        ValueError: there are no images, or ``output`` contains another run (or any run, without
            ``resume``). With a table, this error is also raised if ``head`` is a classifier, if ``table``
            belongs to other weights, photos or masks, or if there is no photo whose class reacts to masks.
        OSError: ``output`` cannot be written, or a file of ``data`` is missing. The run also ends with an
            error, after a checkpoint, if loader processes die repeatedly (``ChildProcessError``), or if a
            batch has no readable image although its images could be read before, for example because a
            disk or server is no longer available.

    Example:
        >>> import tempfile
        >>> from xattn import fit
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(4):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("ttame", net)
        >>> config = xattn.TrainConfig(recipe="small", epochs=1, batch_size=2)
        >>> fit(head, net, photos, config, progress=False).steps
        2
    """
    config = config or TrainConfig()
    if head.backbone_fingerprint != backbone.fingerprint:
        raise ValueError(
            f"head: it was made for weights sha256 {head.backbone_fingerprint}, but the backbone "
            f"has {backbone.fingerprint}; create the head with this backbone"
        )
    objective = objective_for(config)
    if head.is_classifier and objective.reads == "table":
        raise ValueError(
            f"head: {head.name!r} is a classifier, whose maps divide its logits among patches; "
            f"train it with xattn probe, or use {config.objective} with an explanation head such "
            "as 'evidence' or 'ttame'"
        )
    if table is not None and objective.reads != "table":
        raise ValueError(
            f"table: got a table, but objective={config.objective!r} does not read one; train "
            "with TrainConfig('outcomes'), --recipe outcomes"
        )
    photos = open_photos(data, backbone.reads_clips)
    options = RunOptions(output, resume, progress, on_checkpoint)
    with processes.own_accelerator(backbone.device, config.precision) as accelerator:
        tapped = head.tapped(backbone)  # tables do not depend on what the head reads
        with ExitStack() as stack:
            resumed = options.folder if options.resume else None
            if objective.reads == "photos":
                job: Job = PhotosJob(tapped, photos, config, objective, accelerator, resumed)
            else:
                if options.folder is not None:  # before a table is computed in vain
                    check_run_folder(options.folder, resume)
                ranks = accelerator.num_processes
                found, numbers = stack.enter_context(
                    table_for(backbone, photos, config, objective, table, options, ranks, say)
                )
                terms = objective.table_loss
                job = OutcomesJob(tapped, photos, found, numbers, config, accelerator, terms)
            return fit_job(head, tapped, job, config, accelerator, options)


def fit_job(
    head: Head,
    backbone: Backbone,
    job: Job,
    config: TrainConfig,
    accelerator: Any,
    options: RunOptions,
) -> FitResult:
    """Train ``head`` in place on a ``job``; :func:`fit` creates the jobs of objectives."""
    device = backbone.device if accelerator.num_processes == 1 else accelerator.device
    backbone.to(device)
    head.to(device)
    folder = options.folder
    resumes = options.resume and folder is not None and has_checkpoint(folder / CHECKPOINTS)
    if head.reads_statistics and not resumes:  # a checkpoint contains the head's statistics, too
        head.calibrate(job.calibration(backbone))
    optimizer = head_optimizer(head, config)
    scheduler = one_cycle(optimizer, job.batches.total)
    state = FitState(scheduler, accelerator)
    run = Run(head, optimizer, accelerator, config, state, job.batches.total, options)
    record = {"images": job.batches.describe(), "preprocessing": asdict(backbone.preprocessing)}
    with run.open(record):
        train_on_photos(
            run,
            job.batches,
            state,
            lambda batch, counts: job.step(run, backbone, batch, counts),
            state.next_lr,
        )
        head.eval()
        skipped = [*job.left_out, *state.names(job.batches)]
        head.summary = {**_summary(run, len(job.batches.photos), len(skipped)), **job.about}
        run.save_head()
        if run.folder is not None and run.main:
            write_json(run.folder / "skipped.json", skipped)
    return FitResult(head, run.step, run.losses, skipped, run.folder, run.main)


class FitState(PhotoLoopState):
    """The learning rate schedule, and the images that could not be read."""

    def __init__(self, scheduler: LRScheduler, accelerator: Any) -> None:
        super().__init__(accelerator)
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        super().load_state_dict(state)

    def next_lr(self) -> float:
        """Advance to the next step's learning rate."""
        if self.scheduler.last_epoch + 1 < self.scheduler.total_steps:  # type: ignore[attr-defined]
            self.scheduler.step()
        return float(self.scheduler.get_last_lr()[0])


class Job(Protocol):
    """The part of a run that depends on the objective: its batches, the photos that it leaves out, and
    its training step."""

    left_out: list[tuple[str, str]]
    about: dict[str, Any]  # for the head's record of its training

    @property
    def batches(self) -> Batches: ...

    def calibration(self, backbone: Backbone) -> Iterable[Taps]:
        """Return the taps of photos, for a head that computes statistics before it is trained."""

    def step(
        self, run: Run[Head], backbone: Backbone, batch: Any, counts: list[int]
    ) -> dict[str, float]:
        """Take a step on a batch, given the number of its images in each process; return the losses,
        averaged over all images of all processes."""


class PhotosJob:
    """A job whose ``objective`` passes photos through the frozen network in each step."""

    def __init__(
        self,
        backbone: Backbone,
        photos: Photos,
        config: TrainConfig,
        objective: Objective,
        accelerator: Any,
        resumed: Path | None,
    ) -> None:
        if backbone.reads_clips:
            raise ValueError(
                f"objective: {config.objective!r} trains on photos, but {backbone.name} reads clips; use "
                f"'outcomes', TrainConfig('outcomes')"
            )
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self.batches = PhotoBatches(photos, backbone.preprocessing, config, rank, ranks, resumed)
        self.left_out: list[tuple[str, str]] = []
        self.about: dict[str, Any] = {}
        self.config, self.objective = config, objective

    def calibration(self, backbone: Backbone) -> Iterable[Taps]:
        """Return the taps of the first photos."""
        return first_taps(backbone, self.batches.photos, self.config, CALIBRATED)

    def step(
        self, run: Run[Head], backbone: Backbone, batch: PhotoBatch, counts: list[int]
    ) -> dict[str, float]:
        """Take a step; a process without a readable image takes part with a grey image of weight 0."""
        weight = counts[run.rank] * run.ranks / sum(counts)
        images = batch.images
        if images is None:
            images = torch.full((1, 3, *backbone.preprocessing.input_size), 0.5, device="cpu")
        wide = next(backbone.parameters(), images).dtype == torch.float64
        images = images.to(
            backbone.device, torch.float64 if wide else images.dtype, non_blocking=True
        )
        part = Part(torch.tensor(batch.share.rows or [0], device="cpu"), counts, run.rank)
        progress, seed = run.step / self.batches.total, f"{self.config.seed}/{run.step}"
        step = Step(run.head, backbone, images, self.config, part, progress, seed)
        with run.forward(batch.share):
            terms = self.objective.on_photos(step)
            terms["loss"] = terms["loss"] + run.head.auxiliary_loss()
        return run.take_step(terms, weight)


def _summary(run: Run[Head], images: int, skipped: int) -> dict[str, Any]:
    return {
        "images": images - skipped,
        "skipped": skipped,
        "steps": run.step,
        "config": asdict(run.config),
        "losses": {name: round(value, 6) for name, value in run.losses.items()},
    }
