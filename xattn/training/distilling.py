"""``distill``: train the mechanism of a converted network to imitate the softmax attention that it
replaces.

    L = mean over layers and photos of   w |y' - y|^2 / |y|^2 + mean_i KL(P_i || A_i) + own losses

y and P are outputs and sampled rows of the trained softmax attention, and y' and A are those of the
mechanism; KL is left out for a mechanism whose rows are not shares of attention. In the first part of the
training, the softmax attention and the mechanism both receive the tokens that reach the layer in the
original network, so all layers learn in one pass. In the second part, which is optional, both receive the
tokens that reach the layer in the converted network, and these tokens include the errors of earlier layers.
In the last part, also optional, the mechanism is trained together with low-rank updates of the projections
or with the whole network, on KL(softmax z || softmax z'), where z are the logits of the original network.
No labels are used. The procedure follows Hedgehog (arXiv 2402.04347) and LoLCATs (arXiv 2410.10254).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xattn.attention import Operator, record
from xattn.attention.statistics import row_divergence
from xattn.backbone import Backbone, load_backbone
from xattn.backbone.conversion import save_conversion, with_trained_weights
from xattn.config import DistillConfig
from xattn.kernels.softmax.reference import widen
from xattn.photos.base import Data, Photos
from xattn.photos.sources import open_photos, split_every_nth
from xattn.runtime.files import write_json
from xattn.training import processes
from xattn.training.data import PhotoBatch, PhotoBatches
from xattn.training.optimizers import decay_groups, share_of_peak
from xattn.training.run import PhotoLoopState, Run, RunOptions, train_on_photos
from xattn.training.students.closeness import Closeness, closeness, divergence
from xattn.training.students.distilled import (
    LayerPass,
    Student,
    grid_of,
    layer_passes,
    run_mechanism,
    sampled_rows,
)

CONVERSION_FOLDER, REPORT = "conversion", "report.json"
HELD_OUT = 10  # one in this many photos is used for measuring and not for training
TEACHER, STUDENT, FINETUNE = range(3)  # the parts of training


@dataclass
class DistillResult:
    """The result of :func:`distill`.

    ``backbone`` is the converted network with its trained parameters; ``before`` and ``after`` measure
    how close it is to the original. ``main`` is False in the other processes of a distributed run.
    """

    backbone: Backbone
    before: Closeness
    after: Closeness
    steps: int
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    output: Path | None = None
    main: bool = True


def distill(
    model: nn.Module,
    name: str,
    layers: Iterable[int] | str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    data: Data,
    validation: Data | None = None,
    config: DistillConfig | None = None,
    start: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> DistillResult:
    """Convert a copy of ``model`` and train the mechanism's parameters; ``model`` itself is not
    changed.

    Args:
        model: a backbone, or a timm ViT.
        name, layers, options: the mechanism, the layers to convert and the mechanism's options, as in
            :func:`~xattn.attention.convert`.
        data: photos, see :mod:`xattn.photos.sources`. No labels are used.
        validation: photos to measure on; by default one in ten photos of ``data``, which are then not used
            for training.
        config: see :class:`~xattn.config.DistillConfig`.
        start: the folder of a trained conversion with the same mechanism and layers, from which training
            continues. It must contain no weights of the network itself.
        output: folder for log, checkpoints, ``report.json`` and the folder ``conversion``, see
            :func:`~xattn.backbone.load_conversion`; None keeps everything in memory.
        resume: continue from the last checkpoint in ``output``. The result is bit-identical to that of an
            uninterrupted run (on a CPU, with the same number of threads).

    Raises:
        ValueError: the model is already converted or cannot be converted, there is nothing to train, there
            are no photos, a loss is not finite, or ``output`` contains another run.
        OSError: ``output`` cannot be written, or a file of ``data`` is missing.

    Example:
        >>> import tempfile
        >>> from xattn import distill
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(4):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> config = xattn.DistillConfig(epochs=1, batch_size=2)
        >>> result = distill(net, "hedgehog", "5", data=photos, validation=photos,
        ...     config=config, progress=False)
        >>> result.backbone.conversion[0].layers
        (5,)
    """
    config = config or DistillConfig()
    teacher = model if isinstance(model, Backbone) else load_backbone(model)
    if teacher.conversion is not None:
        raise ValueError(f"model: {teacher.name} is already converted; give the original network")
    if config.finetune != "none" and not teacher.has_classes:
        raise ValueError(
            f"finetune: {teacher.name} has no classes, but finetune needs class logits; leave it "
            "out"
        )
    student = Student(teacher, name, layers, options, config)
    if not any(True for _ in student.mechanisms.parameters()):
        config = replace(config, epochs=0, student_epochs=0)
    if start is not None:
        student.start_from(start)
    photos, kept = split(data, validation)
    run_options = RunOptions(output, resume, progress)
    with processes.own_accelerator(teacher.device, config.precision) as accelerator:
        return _distill(student, photos, kept, config, accelerator, run_options)


def split(data: Data, validation: Data | None = None) -> tuple[Photos, Photos]:
    """Return the photos for training and for measuring; unless the latter are given, one photo in ten is
    used to measure."""
    photos = open_photos(data)
    return (
        split_every_nth(photos, HELD_OUT)
        if validation is None
        else (photos, open_photos(validation))
    )


class _State(PhotoLoopState):
    """Closeness of the network before training, training time in seconds, and unreadable photos."""

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        self.before: Closeness | None = None
        self._earlier, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time, including the runs that this one resumes."""
        return self._earlier + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        before = None if self.before is None else self.before.record()
        return {"before": before, "seconds": self.seconds, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._earlier = float(state["seconds"])
        if state["before"] is not None:
            self.before = Closeness.of_record(state["before"])


def _distill(
    student: Student,
    photos: Photos,
    kept: Photos,
    config: DistillConfig,
    accelerator: Any,
    options: RunOptions,
) -> DistillResult:
    teacher = student.teacher
    rank, ranks = accelerator.process_index, accelerator.num_processes
    resumed = options.folder if options.resume else None
    batches = PhotoBatches(photos, teacher.preprocessing, config, rank, ranks, resumed)
    state = _State(accelerator)
    optimizer = torch.optim.AdamW(
        decay_groups(student.parameters(), config.weight_decay), lr=config.lr
    )
    run = Run(student, optimizer, accelerator, config, state, batches.total, options)
    facts = {
        "images": batches.describe(),
        "validation": kept.describe(),
        "preprocessing": asdict(teacher.preprocessing),
    }

    def measure() -> Closeness:
        network = student.eval().network
        size = config.measured, config.batch_size, config.max_pixels
        return closeness(teacher, network, kept, *size)

    with run.open(facts):
        if state.before is None:
            state.before = measure()
            student.train()
        train_on_photos(
            run,
            batches,
            state,
            lambda batch, counts: _step(run, batch, counts, batches.per_epoch),
            lambda: learning_rate(run.step, batches.per_epoch, config),
        )
        skipped, after, trained = state.names(batches), measure(), student.trained()
        result = DistillResult(
            with_trained_weights(teacher, student.conversion, trained),
            state.before,
            after,
            run.step,
            state.seconds,
            run.losses,
            skipped,
            run.folder,
            run.main,
        )
        if run.folder is not None and run.main:
            _write(result, student, trained, run.folder, config)
    return result


def _write(
    result: DistillResult,
    student: Student,
    trained: Mapping[str, Tensor],
    folder: Path,
    config: DistillConfig,
) -> None:
    summary = {
        "steps": result.steps,
        "skipped": len(result.skipped),
        "losses": {name: round(value, 6) for name, value in result.losses.items()},
        "config": asdict(config),
    }
    conversion = student.conversion
    target = folder / CONVERSION_FOLDER
    save_conversion(target, student.teacher, conversion, trained, summary)
    write_json(folder / "skipped.json", result.skipped)
    write_json(
        folder / REPORT,
        {
            **student.config(),
            "before": result.before.record(),
            "after": result.after.record(),
            "seconds": round(result.seconds, 1),
            **summary,
        },
    )


# ---------------------------------------------------------------------- steps


def _step(
    run: Run[Student], batch: PhotoBatch, counts: list[int], per_epoch: int
) -> dict[str, float]:
    """Take one step; returns the losses, averaged over all images of all processes.

    A process without a readable image takes part with a grey image of weight 0.
    """
    student, config = run.head.train(), run.config
    assert isinstance(config, DistillConfig)
    teacher = student.teacher
    weight = counts[run.rank] * run.ranks / sum(counts)
    images = batch.images
    if images is None:
        images = torch.full((1, 3, *teacher.preprocessing.input_size), 0.5, device="cpu")
    dtype = next(teacher.parameters(), images).dtype
    images = images.to(teacher.device, dtype, non_blocking=True)
    part, _, _ = locate_step(run.step, per_epoch, config)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, per_epoch, config)
    with run.forward(batch.share):
        if part == FINETUNE:
            terms = logit_losses(student, images)
        else:
            terms = layer_losses(student, images, config, run.step, part == STUDENT)
    return run.take_step(terms, weight)


def layer_losses(
    student: Student, images: Tensor, config: DistillConfig, step: int, own_tokens: bool = False
) -> dict[str, Tensor]:
    """Compute ``loss`` and its terms, which are means over the layers; gradients reach only the
    mechanisms.

    The layers receive the tokens of the original network or, with ``own_tokens``, those of the converted
    one.
    """
    teacher, numbers = student.teacher, student.conversion.layers
    passes = softmax_passes(student, images, own_tokens)
    grid = grid_of(teacher, images)
    zero = torch.zeros((), device=images.device)
    outputs, rows, own = zero, zero, zero
    operators = []
    for i in numbers:
        inputs = passes[i].inputs(grid, teacher.prefix_tokens)
        target, softmax = widen(passes[i].call.output), passes[i].call.operator
        found = run_mechanism(student.mechanism(i), inputs)
        difference, size = (
            x.square().flatten(1).mean(1) for x in (widen(found.output) - target, target)
        )
        outputs = outputs + (difference / size.clamp_min(1e-12)).mean()
        operator = found.operator
        if config.rows and operator.stochastic and not operator.signed:
            index = sampled_rows(operator.shape[2], config.rows, config.seed, step)
            index = index.to(images.device)
            given, own_rows = widen(softmax.rows(index)), widen(operator.rows(index))
            rows = rows + row_divergence(given, own_rows).mean()
        own = own + sum(operator.aux.values(), zero)
        operators.append(operator)
    terms = {"outputs": outputs, "rows": rows, "own": own}
    terms = {name: term / len(numbers) for name, term in terms.items()}
    loss = config.outputs * terms["outputs"] + terms["rows"] + terms["own"]
    return {"loss": loss, **terms, **mean_logged(operators)}


@torch.no_grad()
def softmax_passes(student: Student, images: Tensor, own_tokens: bool) -> dict[int, LayerPass]:
    """Run the trained softmax layers on the tokens that reach them in the original network or, with
    ``own_tokens``, on the tokens that reach the converted layers in the converted network."""
    teacher, numbers = student.teacher, student.conversion.layers
    if not own_tokens:
        with layer_passes(teacher, numbers) as passes:
            teacher.logits(images)
        return passes
    with layer_passes(student.network, numbers) as found:
        student.network.logits(images)
    blocks: Any = teacher.model.blocks
    with layer_passes(teacher, numbers) as passes:
        for i in numbers:
            blocks[i].attn(*found[i].args, **found[i].kwargs)
    return passes


def logit_losses(student: Student, images: Tensor) -> dict[str, Tensor]:
    """Compute ``loss`` and its terms: KL from the original network's logits, and the mechanisms' own
    losses."""
    teacher, network = student.teacher, student.network
    with torch.no_grad():
        wanted = teacher.logits(images).float()
    with network.alone(), record(network.model, alone=True) as calls:
        logits = network.logits(images).float()
    kl = divergence(wanted, logits, teacher.task)
    zero = torch.zeros((), device=images.device)
    own = sum((value for call in calls for value in call.aux.values()), zero)
    own = own / len(student.conversion.layers)
    return {"loss": kl + own, "logits": kl, "own": own, **mean_logged(c.operator for c in calls)}


def mean_logged(operators: Iterable[Operator]) -> dict[str, Tensor]:
    """Return the values that operators have logged, by name; each is the mean over the operators that log
    it."""
    found: dict[str, list[Tensor]] = {}
    for operator in operators:
        for name, value in operator.logged.items():
            found.setdefault(name, []).append(value.detach().float())
    return {name: torch.stack(values).mean() for name, values in found.items()}


def locate_step(step: int, per_epoch: int, config: DistillConfig) -> tuple[int, int, int]:
    """Return the part of ``DistillConfig.parts`` to which ``step``, counted from 0, belongs: the index of
    the part, the number of earlier steps in that part, and the part's total number of steps. Steps after
    the end belong to the last part."""
    lengths = [epochs * per_epoch for epochs, _ in config.parts]
    last = max(i for i, length in enumerate(lengths) if length)
    for part, length in enumerate(lengths):
        if step < length or part == last:
            return part, step, length
        step -= length
    raise AssertionError("at least one part has steps")


def learning_rate(step: int, per_epoch: int, config: DistillConfig) -> float:
    """Return the learning rate at step 0, 1, ...: in each part a short linear rise, then half a cosine to
    0."""
    part, step, total = locate_step(step, per_epoch, config)
    peak = config.parts[part][1]
    return peak * share_of_peak(step, total)
