"""``prune``: remove heads of a ViT, and train the pruned blocks to reproduce the original network's
output.

    L = w_tokens |t' - t|^2 / |t|^2 + w_logits KL(softmax z || softmax z') + w_entropy H(mean_b r_b)

t and z are the last tokens and the logits of the original network, and t' and z' those of the pruned one;
no labels are used. The method "heads" first compares the heads (:func:`choose_heads`) and then trains the
remaining ones. The method "shrp" first trains a router r and one matrix E for all heads; the term with the
entropy H of the router's usage makes it concentrate on one head. Then it trains only that head and E.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, load_backbone
from xattn.backbone.pruning import (
    Pruning,
    RoutedBlock,
    check_keep,
    check_prunable,
    heads_of,
    mark_pruned,
    prune_in_place,
)
from xattn.blocks.routing_usage import usage_entropy
from xattn.config import PruneConfig
from xattn.photos.base import Data, Photos
from xattn.photos.classes import Task, as_classes
from xattn.photos.sources import PartOfPhotos, open_photos
from xattn.runtime.copies import shared_copy
from xattn.runtime.files import check_run_folder
from xattn.training import processes
from xattn.training.data import TrainImages, load_batches
from xattn.training.optimizers import share_of_peak
from xattn.training.processes import Share
from xattn.training.run import Run, RunOptions
from xattn.training.students.closeness import divergence, last_tokens

AT_ONCE = 32  # photos per pass without training


class NetworkOutput(NamedTuple):
    """The last tokens (B, N, C), normalised as the classifier reads them, and the logits (B, K)."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class CachedPhotos:
    """Photos as tokens (n, N, C) at the input of the first pruned block, and the network's outputs for
    them."""

    entering: Tensor
    answer: NetworkOutput

    def __len__(self) -> int:
        return len(self.entering)

    def part(self, index: Any, device: torch.device) -> CachedPhotos:
        """Return some of the photos, on ``device``."""
        answer = NetworkOutput(*(x[index].to(device) for x in self.answer))
        return CachedPhotos(self.entering[index].to(device), answer)

    def parts(self, device: torch.device, most: int | None = None) -> Iterator[CachedPhotos]:
        """Yield all photos, or the first ``most``, in small batches."""
        count = len(self) if most is None else min(most, len(self))
        for start in range(0, count, AT_ONCE):
            yield self.part(slice(start, min(start + AT_ONCE, count)), device)


class Tail:
    """The blocks of ``model`` from ``first`` on, followed by its norm and classifier: ``tail(tokens,
    model) -> NetworkOutput``.

    ``arguments`` are the inputs of the blocks other than their tokens, such as a rotary embedding.
    """

    def __init__(
        self, first: int, task: Task, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self.first, self.task, self.arguments, self.keywords = first, task, arguments, keywords

    def __call__(self, tokens: Tensor, model: Any, first: int | None = None) -> NetworkOutput:
        count = len(model.blocks)
        tokens = self.through(tokens, model, self.first if first is None else first, count)
        final = model.norm(tokens)
        return NetworkOutput(final, as_classes(model.forward_head(final), self.task))

    def through(self, tokens: Tensor, model: Any, first: int, last: int) -> Tensor:
        """Return the tokens after the blocks ``first`` to ``last`` - 1."""
        for block in model.blocks[first:last]:
            tokens = block(tokens, *self.arguments, **self.keywords)
        return tokens


@torch.no_grad()
def tail_inputs(backbone: Backbone, first: int, images: Tensor) -> tuple[CachedPhotos, Tail]:
    """Return ``images`` (B, 3, H, W) as tokens at the input of block ``first``, and the tail from there
    on."""
    calls: list[Any] = []
    block: Any = backbone.model.blocks[first]  # type: ignore[index,union-attr]
    with backbone.alone():
        hook = block.register_forward_pre_hook(
            lambda _, a, k: calls.append((a, k)), with_kwargs=True
        )
        try:
            answer = NetworkOutput(*last_tokens(backbone, images))
        finally:
            hook.remove()
    (entering, *rest), keywords = calls[0]
    return CachedPhotos(entering, answer), Tail(first, backbone.task, tuple(rest), keywords)


def check_tail(backbone: Backbone, tail: Tail, seen: CachedPhotos) -> None:
    """Raise a ``ValueError`` unless the tail reproduces the network's output."""
    with torch.no_grad(), backbone.alone():
        try:
            own = tail(seen.entering, backbone.model)
            same = torch.allclose(own.logits, seen.answer.logits, rtol=1e-3, atol=1e-3)
        except (TypeError, AttributeError, RuntimeError):
            same = False
    if not same:
        raise ValueError(
            f"backbone: {backbone.name} has more after its blocks than a norm and a classifier; choose a "
            f"ViT such as vit_tiny_patch16_224"
        )


def difference(wanted: NetworkOutput, found: NetworkOutput, task: Task, classes: bool) -> Tensor:
    """Compute the difference between an output and the original network's output: the KL divergence of the
    logits or, without ``classes``, the relative error of the last tokens."""
    if classes:
        return divergence(wanted.logits.float(), found.logits.float(), task)
    return token_error(wanted, found)


def token_error(wanted: NetworkOutput, found: NetworkOutput) -> Tensor:
    """|found - wanted|^2 / |wanted|^2 over the last tokens, mean over images."""
    error = (found.tokens - wanted.tokens).float().square().flatten(1).mean(1)
    return (error / wanted.tokens.float().square().flatten(1).mean(1).clamp_min(1e-12)).mean()


# ---------------------------------------------------------------------- choosing the heads


class HeadChoice(NamedTuple):
    """The ``kept`` heads of a block and, for each head, how much the output changes if only that head is
    removed."""

    kept: tuple[int, ...]
    changes: tuple[float, ...]


@torch.no_grad()
def choose_heads(
    backbone: Backbone, tail: Tail, seen: CachedPhotos, layer: int, keep: int, photos: int
) -> HeadChoice:
    """Remove heads of block ``layer`` one by one until ``keep`` are left, each time the head whose removal
    changes the network's output least; no other block is changed."""
    model: Any = backbone.model
    heads = heads_of(model, layer)
    parts = [
        CachedPhotos(tail.through(part.entering, model, tail.first, layer), part.answer)
        for part in seen.parts(backbone.device, photos)
    ]

    def change(left: Sequence[int]) -> float:
        total = 0.0
        with backbone.alone(), only_heads(model.blocks[layer].attn, left):
            for part in parts:
                found = tail(part.entering, model, layer)
                total += len(part) * float(
                    difference(part.answer, found, tail.task, backbone.has_classes)
                )
        return total / sum(map(len, parts))

    left = list(range(heads))
    first: list[float] = []
    while not first or len(left) > keep:
        without = [change([h for h in left if h != head]) for head in left]
        first = first or without
        if len(left) > keep:
            left.pop(min(range(len(left)), key=without.__getitem__))
    return HeadChoice(tuple(left), tuple(first))


@contextmanager
def only_heads(attention: Any, kept: Sequence[int]) -> Iterator[None]:
    """Let only the heads ``kept`` contribute to a timm attention layer, within this context."""
    heads = int(attention.num_heads)
    mask = torch.zeros(heads, 1, device="cpu")
    mask[list(kept)] = 1

    def without(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        o = arguments[0].unflatten(-1, (heads, -1))
        return ((o * mask.to(o)).flatten(-2),)

    hook = attention.proj.register_forward_pre_hook(without)
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------------- what is trained


class PrunedStudent(nn.Module):
    """The pruned blocks of a copy of ``teacher``; the rest of the copy is frozen and is not a submodule.

    Args:
        kept: the heads of each block for "heads"; None for "shrp", where the routers choose.
    """

    def __init__(
        self,
        teacher: Backbone,
        layers: Sequence[int],
        kept: dict[int, tuple[int, ...]] | None,
        config: PruneConfig,
    ) -> None:
        super().__init__()
        model: Any = shared_copy(teacher.model)
        self.layers, self.method = list(layers), config.method
        self.hidden = 0
        if kept is not None:
            prune_in_place(model, Pruning("heads", kept))
        else:
            width = model.blocks[self.layers[0]].attn.qkv.in_features
            self.hidden = config.hidden or 2 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for i in self.layers:
                block = model.blocks[i]
                model.blocks[i] = (
                    copy.deepcopy(block) if kept is not None else RoutedBlock(block, self.hidden)
                )
        self._kept = kept
        self._unregistered = (model, teacher)
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in self.layers})
        self.blocks.requires_grad_(True)

    @property
    def model(self) -> Any:
        """The complete network that is being trained."""
        return self._unregistered[0]

    @property
    def teacher(self) -> Backbone:
        return self._unregistered[1]

    def routed(self) -> dict[int, RoutedBlock]:
        """The blocks with a router, by number."""
        return {int(i): b for i, b in self.blocks.items() if isinstance(b, RoutedBlock)}

    def train(self, mode: bool = True) -> PrunedStudent:
        """Set the mode of the routers only; the network uses no dropout."""
        self.training = mode
        for block in self.routed().values():
            block.router.train(mode)
        return self

    def config(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the original one."""
        kept = None if self._kept is None else {str(i): list(h) for i, h in self._kept.items()}
        return {
            "pruning": {"layers": self.layers, "kept": kept, "hidden": self.hidden},
            "backbone": {"name": self.teacher.name, "sha256": self.teacher.fingerprint},
        }

    def usage(self) -> dict[int, list[float]]:
        """Return, for each block, how often each head was chosen recently."""
        return {i: block.router.usage.tolist() for i, block in self.routed().items()}

    @property
    def is_settled(self) -> bool:
        """Return whether all routers have stopped choosing."""
        return all(int(block.router.kept) >= 0 for block in self.routed().values())

    def settle(self) -> None:
        """Fix each router to its most used head from now on."""
        for block in self.routed().values():
            block.router.settle()

    def losses(self, tail: Tail, batch: CachedPhotos, config: PruneConfig) -> dict[str, Tensor]:
        """Compute ``loss`` and its terms."""
        found = tail(batch.entering, self.model)
        zero = torch.zeros((), device=batch.entering.device)
        terms = {"tokens": token_error(batch.answer, found), "logits": zero, "entropy": zero}
        if self.teacher.has_classes:
            terms["logits"] = difference(batch.answer, found, tail.task, True)
        routers = [b for b in self.routed().values() if int(b.router.kept) < 0]
        if routers:
            terms["entropy"] = sum((usage_entropy(b.choice.shares) for b in routers), zero) / len(
                routers
            )
        return {
            "loss": sum((getattr(config, k) * v for k, v in terms.items() if v is not zero), zero),
            **terms,
        }

    @torch.no_grad()
    def finished(self) -> tuple[nn.Module, Pruning]:
        """Return the pruned network and a record of the removed parts."""
        model, kept = self.model, self._kept
        if kept is None:
            if not self.is_settled:
                self.settle()
            kept = {i: (int(b.router.kept),) for i, b in self.routed().items()}
            for i, block in self.routed().items():
                model.blocks[i] = block.pruned(*kept[i])
        pruning = Pruning(self.method, kept, self.hidden)
        mark_pruned(model, pruning)
        return model.eval().requires_grad_(False), pruning


@torch.no_grad()
def compare_outputs(
    tail: Tail, model: Any, seen: CachedPhotos, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for n photos, the most probable class, whether it is the same as for the original network,
    and the mean cosine of the last tokens with those of the original network."""
    classes, same, cosines = [], [], []
    for part in seen.parts(device):
        found = tail(part.entering, model)
        classes.append(found.logits.argmax(1).cpu())
        same.append((classes[-1] == part.answer.logits.argmax(1).cpu()).double())
        cosine = F.cosine_similarity(found.tokens.double(), part.answer.tokens.double(), dim=-1)
        cosines.append(cosine.mean(1).cpu())
    return torch.cat(classes), torch.cat(same), torch.cat(cosines)


# ---------------------------------------------------------------------- the run


HELD_OUT = 5  # one in this many photos is used for measuring and not for training
KEPT_BYTES = 8 << 30  # limit for tokens in memory
ROUTER_RATE = 10.0  # multiple of the blocks' learning rate: few steps must settle which head stays


@dataclass(frozen=True)
class OutputComparison:
    """A network's outputs for the held-out photos, each (n,): the most probable class, whether it is the
    same as for the original network, and the cosine of the last tokens with those of the original
    network."""

    classes: Tensor
    same: Tensor
    cosine: Tensor


@dataclass
class PruneResult:
    """The result of :func:`prune`.

    ``answers`` are the outputs for the held-out ``photos`` by stage: "whole", "routed" (shrp), "cut"
    (before the rest of the training), and "trained". For each block, ``changes`` gives the importance of
    each head ("heads"), and ``usage`` gives how often routers chose it ("shrp").
    """

    backbone: Backbone
    pruning: Pruning
    answers: dict[str, OutputComparison]
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
    """Prune a copy of ``model``; ``model`` itself is not changed.

    Args:
        model: a backbone, or a timm ViT with pre-norm blocks.
        layers: block numbers, or a string such as "8-11"; the last block by default.
        data: photos, see :mod:`xattn.photos.sources`.
        validation: photos to measure on; by default one in five photos of ``data``, which are then not
            used for training.
        config: see :class:`~xattn.config.PruneConfig`.
        output: folder for the log and the checkpoints; None keeps everything in memory.
        resume: continue from the last checkpoint in ``output``. The result is bit-identical to that of an
            uninterrupted run (on a CPU, with the same number of threads).

    Raises:
        ValueError: the model cannot be pruned, heads or blocks do not exist, there are too few photos, or
            ``output`` contains another run.
        OSError: ``output`` cannot be written, or a file of ``data`` is missing.

    Example:
        >>> import tempfile, torch
        >>> from xattn import prune
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(4):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> config = xattn.PruneConfig(keep=1, scored=2, epochs=0)
        >>> result = prune(net, "5", data=photos, config=config, progress=False)
        >>> result.backbone.logits(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 1000])
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
                "processes: only one process can prune a network; start it without torchrun"
            )
        return _prune(teacher, numbers, photos, kept, config, accelerator, options)


def split(data: Data, validation: Data | None = None) -> tuple[Photos, Photos]:
    """Return the photos for training and for measuring; unless the latter are given, every fifth photo,
    from the first on, is used to measure.

    Raises:
        ValueError: there are too few photos, or they are streamed.
    """
    photos = open_photos(data)
    held = photos if validation is None else open_photos(validation)
    if photos.streamed or held.streamed:
        raise ValueError("data: shards cannot be kept in memory; give a folder or a list of photos")
    if validation is not None:
        return photos, held
    if len(photos) < 2:
        raise ValueError(
            f"data: got {len(photos)} photos, but one in {HELD_OUT} is set aside to measure on; "
            "give more photos, or separate ones to measure on (--validation)"
        )
    numbers = range(len(photos))
    rest = [i for i in numbers if i % HELD_OUT]
    return PartOfPhotos(photos, rest), PartOfPhotos(photos, list(numbers[::HELD_OUT]))


class _State:
    """Answers of completed stages, and the training time in seconds."""

    def __init__(self, started: float) -> None:
        self.answers: dict[str, OutputComparison] = {}
        self.usage: dict[int, list[float]] = {}
        self._earlier, self._started = 0.0, started

    @property
    def seconds(self) -> float:
        """Time of all threads of the process, including the runs that this one resumes."""
        return self._earlier + time.process_time() - self._started

    def state_dict(self) -> dict[str, Any]:
        kept = {name: [x.tolist() for x in vars(a).values()] for name, a in self.answers.items()}
        return {"answers": kept, "usage": self.usage, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (classes, same, cosine) in state["answers"].items():
            shares = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (same, cosine))
            self.answers[name] = OutputComparison(torch.tensor(classes, device="cpu"), *shares)
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
        found = compare_outputs(tail, student.eval().model, held[0], teacher.device)
        state.answers[stage] = OutputComparison(*found)
        student.train()

    with run.open(facts):
        _learn(run, learned, tail, state, measure)
        if total:
            measure("trained")
    answer = held[0].answer
    ones = torch.ones(len(held[0]), dtype=torch.float64, device="cpu")
    whole = OutputComparison(answer.logits.argmax(1).cpu(), ones, ones)
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
) -> tuple[list[CachedPhotos], Tail, list[tuple[str, str]], list[str]]:
    """Return the photos at the input of block ``first``, unchanged and ``mirrored``; the tail; names and
    reasons for the photos that cannot be read; and the names of all others.

    Raises:
        ValueError: no photo can be read, or their tokens do not fit into memory.
    """
    images = TrainImages(photos, backbone.preprocessing, config.seed, False, config.max_pixels)
    numbers = list(range(len(photos)))
    keys = [[(0, i) for i in numbers[s : s + AT_ONCE]] for s in range(0, len(numbers), AT_ONCE)]
    views: list[list[CachedPhotos]] = [[] for _ in range(1 + mirrored)]
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
                seen, own = tail_inputs(backbone, first, found)
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


def _check_memory(seen: CachedPhotos, photos: int, views: int) -> None:
    tensors = (seen.entering, *seen.answer)
    size = sum(t.numel() * t.element_size() for t in tensors) * photos * views / len(seen)
    if size > KEPT_BYTES:
        raise ValueError(
            f"data: the tokens of {photos} photos take {size / 2**30:.0f} GiB of memory, but the "
            f"limit is {KEPT_BYTES >> 30}; give fewer photos, or leave out mirrored ones (--no-mirrored)"
        )


def _joined(parts: Sequence[CachedPhotos]) -> CachedPhotos:
    entering = torch.cat([part.entering for part in parts])
    tokens, logits = (torch.cat(x) for x in zip(*(part.answer for part in parts), strict=True))
    return CachedPhotos(entering, NetworkOutput(tokens, logits))


# ---------------------------------------------------------------------- steps


def _learn(
    run: Run[PrunedStudent], views: Sequence[CachedPhotos], tail: Tail, state: _State, measure: Any
) -> None:
    """Take the remaining steps; a router settles after its share of them."""
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
            with run.memory_errors("photos"):
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
    run: Run[PrunedStudent], batch: CachedPhotos, tail: Tail, config: PruneConfig
) -> dict[str, float]:
    """Take one step; returns the losses."""
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * share_of_peak(run.step, run.total)
    with run.forward(Share(range(len(batch)), len(batch))):
        losses = run.head.losses(tail, batch, config)
    return run.take_step(losses, 1.0)


def _batch(
    views: Sequence[CachedPhotos],
    step: int,
    per_epoch: int,
    config: PruneConfig,
    device: torch.device,
) -> CachedPhotos:
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
