"""``prune``: cut heads of a ViT, and train the blocks that were cut to answer as the whole network.

    L = w_tokens |t' - t|^2 / |t|^2 + w_logits KL(softmax z || softmax z') + w_entropy H(mean_b r_b)

t and z are the last tokens and the logits of the network as it was, t' and z' those of the pruned one; no
labels are read. "heads" compares the heads first (:func:`~xattn.training.students.pruned.choose_heads`)
and trains what is left. "shrp" first trains a router r and one E for all heads; the entropy H of the
router's usage concentrates it on one head. Then it trains that head and E alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone import Backbone, load_backbone
from xattn.backbone.pruning import Pruning, check_keep, check_prunable, heads_of
from xattn.config import PruneConfig
from xattn.photos.base import Data, Photos
from xattn.photos.sources import PartOfPhotos, open_photos
from xattn.runtime.files import check_run_folder
from xattn.training import processes
from xattn.training.data import TrainImages, load_batches
from xattn.training.distilling import share_of_peak
from xattn.training.processes import Share
from xattn.training.run import Run, RunOptions
from xattn.training.students.pruned import (
    AT_ONCE,
    Answer,
    PrunedStudent,
    Seen,
    Tail,
    answers,
    check_tail,
    choose_heads,
    seen_by,
)

HELD_OUT = 5  # one of so many photos is measured on, not trained on
KEPT_BYTES = 8 << 30  # of tokens in memory
ROUTER_RATE = (
    10.0  # times the learning rate of the blocks: few steps have to settle which head stays
)


@dataclass(frozen=True)
class Answers:
    """What a network says of the held-out photos: their classes, for how many it is the class of the whole
    network, and the cosine of their last tokens with those of the whole network, each (n,)."""

    classes: Tensor
    same: Tensor
    cosine: Tensor


@dataclass
class PruneResult:
    """What :func:`prune` returns.

    ``answers`` of the held-out ``photos`` by stage: "whole", "routed" (shrp), "cut" before the rest of the
    training, and "trained". ``changes`` says for each block how much each head matters ("heads"), ``usage``
    how often routers chose it ("shrp").
    """

    backbone: Backbone
    pruning: Pruning
    answers: dict[str, Answers]
    photos: list[str]
    learned: int
    changes: dict[int, list[float]] = field(default_factory=dict)
    usage: dict[int, list[float]] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def prune(
    model: nn.Module,
    layers: Iterable[int] | str | None = None,
    *,
    data: Data,
    validation: Data | None = None,
    config: PruneConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PruneResult:
    """Prune a copy of ``model``, which stays as it is, bit for bit.

    Args:
        model: a backbone, or a timm ViT with pre-norm blocks.
        layers: numbers of the blocks, or a str such as "8-11"; the last one by default.
        data: photos, see :mod:`xattn.photos.sources`.
        validation: photos to measure on; by default one of five of ``data``, which is not trained on.
        config: see :class:`~xattn.config.PruneConfig`.
        output: folder for log and checkpoints; None keeps everything in memory.
        resume: go on from the last checkpoint in ``output``. The result is bit-identical to that of an
            uninterrupted run (on a CPU, with the same number of threads).

    Raises:
        ValueError: a model that cannot be pruned, heads or blocks that are not there, too few photos, or
            ``output`` holds another run.
        OSError: ``output`` cannot be written, or a file of ``data`` is missing.
    """
    config = config or PruneConfig()
    teacher = model if isinstance(model, Backbone) else load_backbone(model)
    numbers = check_prunable(teacher.model, layers)
    for i in numbers:
        check_keep(config.keep, heads_of(teacher.model, i), f"block {i}")
    photos, kept = split(data, validation)
    options = RunOptions(output, resume, progress)
    if options.folder is not None:
        check_run_folder(options.folder, resume)
    with processes.own_accelerator(teacher.device, config.precision) as accelerator:
        if accelerator.num_processes > 1:
            raise ValueError(
                "processes: a network is pruned by one process; start it without torchrun"
            )
        return _prune(teacher, numbers, photos, kept, config, accelerator, options)


def split(data: Data, validation: Data | None = None) -> tuple[Photos, Photos]:
    """The photos to train on, and those to measure on: every fifth from the first on unless given.

    Raises:
        ValueError: too few photos, or streamed ones.
    """
    photos = open_photos(data)
    held = photos if validation is None else open_photos(validation)
    if photos.streamed or held.streamed:
        raise ValueError("data: shards cannot be kept in memory; give a folder or a list of photos")
    if validation is not None:
        return photos, held
    if len(photos) < 2:
        raise ValueError(
            f"data: got {len(photos)} photos, one of {HELD_OUT} is kept to measure on; give more, or name "
            f"other photos to measure on (--validation)"
        )
    numbers = range(len(photos))
    rest = [i for i in numbers if i % HELD_OUT]
    return PartOfPhotos(photos, rest), PartOfPhotos(photos, list(numbers[::HELD_OUT]))


class _State:
    """Answers of stages that are over, and the seconds of training."""

    def __init__(self, started: float) -> None:
        self.answers: dict[str, Answers] = {}
        self.usage: dict[int, list[float]] = {}
        self._earlier, self._started = 0.0, started

    @property
    def seconds(self) -> float:
        """Of all threads of the process, with the runs that this one resumes."""
        return self._earlier + time.process_time() - self._started

    def state_dict(self) -> dict[str, Any]:
        kept = {name: [x.tolist() for x in vars(a).values()] for name, a in self.answers.items()}
        return {"answers": kept, "usage": self.usage, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (classes, same, cosine) in state["answers"].items():
            shares = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (same, cosine))
            self.answers[name] = Answers(torch.tensor(classes, device="cpu"), *shares)
        self.usage, self._earlier = dict(state["usage"]), float(state["seconds"])


def _prune(
    teacher: Backbone,
    layers: Sequence[int],
    photos: Photos,
    kept: Photos,
    config: PruneConfig,
    accelerator: Any,
    options: RunOptions,
) -> PruneResult:
    started = time.process_time()
    held, tail, skipped, names = read_photos(teacher, layers[0], kept, config, mirrored=False)
    learned, _, unread, _ = read_photos(teacher, layers[0], photos, config, config.mirrored)
    choices = {}
    if config.method == "heads":
        first = learned[0]
        choices = {
            i: choose_heads(teacher, tail, first, i, config.keep, config.scored) for i in layers
        }
    heads = {i: choice.kept for i, choice in choices.items()} if choices else None
    student = PrunedStudent(teacher, layers, heads, config)
    state = _State(started)
    optimizer = _optimizer(student, config)
    total = math.ceil(len(learned[0]) / config.batch_size) * config.epochs
    run = Run(student, optimizer, accelerator, config, state, total, options)
    facts = {
        "images": photos.describe(),
        "validation": kept.describe(),
        "preprocessing": asdict(teacher.preprocessing),
    }

    def measure(stage: str) -> None:
        found = answers(tail, student.eval().model, held[0], teacher.device)
        state.answers[stage] = Answers(*found)
        student.train()

    with run.open(facts):
        _learn(run, learned, tail, state, measure)
        if total:
            measure("trained")
    answer = held[0].answer
    ones = torch.ones(len(held[0]), dtype=torch.float64, device="cpu")
    whole = Answers(answer.logits.argmax(1).cpu(), ones, ones)
    network, pruning = student.finished()
    return PruneResult(
        teacher.with_converted(network),
        pruning,
        {"whole": whole, **state.answers},
        names,
        len(learned[0]),
        {i: list(choice.changes) for i, choice in choices.items()},
        state.usage,
        run.step,
        state.seconds,
        run.losses,
        skipped + unread,
    )


def read_photos(
    backbone: Backbone, first: int, photos: Photos, config: PruneConfig, mirrored: bool
) -> tuple[list[Seen], Tail, list[tuple[str, str]], list[str]]:
    """Photos as block ``first`` sees them, as they are and ``mirrored``; the tail; names and reasons of
    those that cannot be read, and names of the others.

    Raises:
        ValueError: none can be read, or their tokens do not fit into memory.
    """
    images = TrainImages(photos, backbone.preprocessing, config.seed, False, config.max_pixels)
    numbers = list(range(len(photos)))
    keys = [[(0, i) for i in numbers[s : s + AT_ONCE]] for s in range(0, len(numbers), AT_ONCE)]
    views: list[list[Seen]] = [[] for _ in range(1 + mirrored)]
    tail: Tail | None = None
    lost: dict[int, str] = {}
    dtype = next(backbone.model.parameters()).dtype
    with closing(load_batches(images, keys, config.workers)) as batches:
        for batch, unreadable in batches:
            lost.update(unreadable)
            if batch is None:
                continue
            pixels = batch.to(backbone.device, dtype)
            for view, found in zip(views, (pixels, pixels.flip(-1)), strict=False):
                seen, own = seen_by(backbone, first, found)
                if tail is None:
                    check_tail(backbone, own, seen)
                    _check_memory(seen, len(numbers), len(views))
                tail = tail or own
                view.append(seen.part(slice(None), torch.device("cpu")))
    if tail is None:
        raise ValueError(
            f"data: none of the {len(numbers)} images could be read; the first: {next(iter(lost.values()))}"
        )
    skipped = [(photos.name(i), reason) for i, reason in sorted(lost.items())]
    names = [photos.name(i) for i in numbers if i not in lost]
    return [_joined(view) for view in views], tail, skipped, names


def _check_memory(seen: Seen, photos: int, views: int) -> None:
    tensors = (seen.entering, *seen.answer)
    size = sum(t.numel() * t.element_size() for t in tensors) * photos * views / len(seen)
    if size > KEPT_BYTES:
        raise ValueError(
            f"data: the tokens of {photos} photos take {size / 2**30:.0f} GiB of memory, at most "
            f"{KEPT_BYTES >> 30} are used; give fewer photos, or leave out mirrored ones (--no-mirrored)"
        )


def _joined(parts: Sequence[Seen]) -> Seen:
    entering = torch.cat([part.entering for part in parts])
    tokens, logits = (torch.cat(x) for x in zip(*(part.answer for part in parts), strict=True))
    return Seen(entering, Answer(tokens, logits))


# ---------------------------------------------------------------------- steps


def _learn(
    run: Run[PrunedStudent], views: Sequence[Seen], tail: Tail, state: _State, measure: Any
) -> None:
    """Take the steps that are left; a router settles after its share of them."""
    student, config = run.head, run.config
    assert isinstance(config, PruneConfig)
    count = len(views[0])
    per_epoch = math.ceil(count / config.batch_size)
    switch = max(1, round(config.routed * run.total)) if student.routed() else 0
    with run.steps():
        while True:
            if run.step == switch and "cut" not in state.answers:
                if student.routed():
                    state.usage = student.usage()
                    measure("routed")
                    student.settle()
                measure("cut")
            if run.step >= run.total:
                break
            run.agree()
            with run.naming_batch_size("photos"):
                batch = _batch(views, run.step, per_epoch, config, student.teacher.device)
                run.losses = _step(run, batch, tail, config)
            run.check_finite(run.step + 1, *run.losses.values())
            run.advance(run.step // per_epoch, run.optimizer.param_groups[0]["lr"])
            if run.step % config.checkpoint_every == 0 or run.step == run.total:
                run.checkpoint()


def _optimizer(student: PrunedStudent, config: PruneConfig) -> torch.optim.Optimizer:
    named = list(student.named_parameters())
    routers = [p for name, p in named if ".router." in name]
    rest = [p for name, p in named if ".router." not in name]
    groups = [{"params": rest, "peak": config.lr}]
    if routers:
        groups.append({"params": routers, "peak": ROUTER_RATE * config.lr})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)


def _step(
    run: Run[PrunedStudent], batch: Seen, tail: Tail, config: PruneConfig
) -> dict[str, float]:
    """Take one step; the losses."""
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * share_of_peak(run.step, run.total)
    with run.forward(Share(range(len(batch)), len(batch))):
        losses = run.head.losses(tail, batch, config)
    return run.take_step(losses, 1.0)


def _batch(
    views: Sequence[Seen], step: int, per_epoch: int, config: PruneConfig, device: torch.device
) -> Seen:
    """The photos of a step, some of them mirrored: a pure function of seed and step."""
    epoch, at = divmod(step, per_epoch)
    count = len(views[0])
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % (1 << 63))
    order = torch.randperm(count, generator=generator, device="cpu")
    turned = torch.randint(len(views), (count,), generator=generator, device="cpu")
    index = order[at * config.batch_size : (at + 1) * config.batch_size]
    rows = [
        views[v].part(slice(i, i + 1), torch.device("cpu"))
        for i, v in zip(index.tolist(), turned[index].tolist(), strict=True)
    ]
    return _joined(rows).part(slice(None), device)
