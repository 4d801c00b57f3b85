"""What a pruning trains, and by which heads it is judged: the end of a ViT, from its first pruned block on.

Blocks before that one are not changed, so the tokens that reach it are computed once for each photo. The
end of the network, its :class:`Tail`, runs from there in the network as it was, without some heads, and in
the pruned one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.backbone.pruning import (
    Pruning,
    RoutedBlock,
    check_keep,
    heads_of,
    mark_pruned,
    prune_in_place,
)
from xattn.blocks.routing_usage import usage_entropy
from xattn.config import PruneConfig
from xattn.photos.classes import Task, as_classes
from xattn.runtime.copies import shared_copy
from xattn.training.students.closeness import divergence, last_tokens

AT_ONCE = 32  # photos a pass that trains nothing


class Answer(NamedTuple):
    """The last tokens (B, N, C), normalised as the classifier reads them, and the logits (B, K)."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Seen:
    """Photos as the first pruned block sees them, tokens (n, N, C), and what the network answers."""

    entering: Tensor
    answer: Answer

    def __len__(self) -> int:
        return len(self.entering)

    def part(self, index: Any, device: torch.device) -> Seen:
        """Some of them, on ``device``."""
        answer = Answer(*(x[index].to(device) for x in self.answer))
        return Seen(self.entering[index].to(device), answer)

    def parts(self, device: torch.device, most: int | None = None) -> Iterator[Seen]:
        """All of them, or the first ``most``, a few at once."""
        count = len(self) if most is None else min(most, len(self))
        for start in range(0, count, AT_ONCE):
            yield self.part(slice(start, min(start + AT_ONCE, count)), device)


class Tail:
    """``tail(tokens, model) -> Answer``: blocks of ``model`` from ``first`` on, its norm and classifier.

    ``arguments`` is what blocks get beside their tokens, such as a rotary embedding.
    """

    def __init__(
        self, first: int, task: Task, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self.first, self.task, self.arguments, self.keywords = first, task, arguments, keywords

    def __call__(self, tokens: Tensor, model: Any, first: int | None = None) -> Answer:
        count = len(model.blocks)
        tokens = self.through(tokens, model, self.first if first is None else first, count)
        final = model.norm(tokens)
        return Answer(final, as_classes(model.forward_head(final), self.task))

    def through(self, tokens: Tensor, model: Any, first: int, last: int) -> Tensor:
        """Tokens after the blocks ``first`` to ``last`` - 1."""
        for block in model.blocks[first:last]:
            tokens = block(tokens, *self.arguments, **self.keywords)
        return tokens


@torch.no_grad()
def seen_by(backbone: Backbone, first: int, images: Tensor) -> tuple[Seen, Tail]:
    """``images`` (B, 3, H, W) as block ``first`` sees them, and the tail from there."""
    calls: list[Any] = []
    block: Any = backbone.model.blocks[first]  # type: ignore[index,union-attr]
    with backbone.alone():
        hook = block.register_forward_pre_hook(
            lambda _, a, k: calls.append((a, k)), with_kwargs=True
        )
        try:
            answer = Answer(*last_tokens(backbone, images))
        finally:
            hook.remove()
    (entering, *rest), keywords = calls[0]
    return Seen(entering, answer), Tail(first, backbone.task, tuple(rest), keywords)


def check_tail(backbone: Backbone, tail: Tail, seen: Seen) -> None:
    """Raise a ``ValueError`` unless the tail gives the network's own answer."""
    with torch.no_grad(), backbone.alone():
        try:
            own = tail(seen.entering, backbone.model)
            same = torch.allclose(own.logits, seen.answer.logits, rtol=1e-3, atol=1e-3)
        except (TypeError, AttributeError, RuntimeError):
            same = False
    if not same:
        raise ValueError(
            f"backbone: {backbone.name} does more after its blocks than a norm and a classifier; choose a "
            f"ViT such as vit_tiny_patch16_224"
        )


def difference(wanted: Answer, found: Answer, task: Task, classes: bool) -> Tensor:
    """How far an answer is from that of the network: KL of its logits, or without ``classes`` the relative
    error of its last tokens."""
    if classes:
        return divergence(wanted.logits.float(), found.logits.float(), task)
    return token_error(wanted, found)


def token_error(wanted: Answer, found: Answer) -> Tensor:
    """|found - wanted|^2 / |wanted|^2 over the last tokens, mean over images."""
    error = (found.tokens - wanted.tokens).float().square().flatten(1).mean(1)
    return (error / wanted.tokens.float().square().flatten(1).mean(1).clamp_min(1e-12)).mean()


# ---------------------------------------------------------------------- which heads stay


class HeadChoice(NamedTuple):
    """``kept`` heads of a block, and for each head how much the answer changes if it alone is left out."""

    kept: tuple[int, ...]
    changes: tuple[float, ...]


@torch.no_grad()
def choose_heads(
    backbone: Backbone, tail: Tail, seen: Seen, layer: int, keep: int, photos: int
) -> HeadChoice:
    """Heads of block ``layer`` leave one by one, each time the one whose loss changes the network's answer
    least, until ``keep`` are left; the other blocks stay whole."""
    model: Any = backbone.model
    heads = heads_of(model, layer)
    check_keep(keep, heads, f"block {layer}")
    parts = [
        Seen(tail.through(part.entering, model, tail.first, layer), part.answer)
        for part in seen.parts(backbone.device, photos)
    ]

    def change(left: Sequence[int]) -> float:
        total = 0.0
        with backbone.alone(), heads_only(model.blocks[layer].attn, left):
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
def heads_only(attention: Any, kept: Sequence[int]) -> Iterator[None]:
    """In the block, an attention layer of timm adds nothing from its other heads."""
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
    """The pruned blocks of a copy of ``teacher``; the rest of the copy is frozen and no submodule.

    Args:
        kept: the heads of each block for "heads"; None for "shrp", whose routers choose.
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
        """The whole network that is trained."""
        return self._unregistered[0]

    @property
    def teacher(self) -> Backbone:
        return self._unregistered[1]

    def routed(self) -> dict[int, RoutedBlock]:
        """The blocks with a router, by number."""
        return {int(i): b for i, b in self.blocks.items() if isinstance(b, RoutedBlock)}

    def train(self, mode: bool = True) -> PrunedStudent:
        """Only routers count; the network drops nothing."""
        self.training = mode
        for block in self.routed().values():
            block.router.train(mode)
        return self

    def config(self) -> dict[str, Any]:
        """What a resumed run must agree with."""
        kept = None if self._kept is None else {str(i): list(h) for i, h in self._kept.items()}
        return {
            "pruning": {"layers": self.layers, "kept": kept, "hidden": self.hidden},
            "backbone": {"name": self.teacher.name, "sha256": self.teacher.fingerprint},
        }

    def usage(self) -> dict[int, list[float]]:
        """How often each head was chosen lately, by block."""
        return {i: block.router.usage.tolist() for i, block in self.routed().items()}

    @property
    def settled(self) -> bool:
        """Whether no router chooses any more."""
        return all(int(block.router.kept) >= 0 for block in self.routed().values())

    def settle(self) -> None:
        """Keep the most used head of each router from now on."""
        for block in self.routed().values():
            block.router.settle()

    def losses(self, tail: Tail, batch: Seen, config: PruneConfig) -> dict[str, Tensor]:
        """``loss`` and its terms."""
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
        """The pruned network, and what was cut."""
        model, kept = self.model, self._kept
        if kept is None:
            if not self.settled:
                self.settle()
            kept = {i: (int(b.router.kept),) for i, b in self.routed().items()}
            for i, block in self.routed().items():
                model.blocks[i] = block.pruned(*kept[i])
        pruning = Pruning(self.method, kept, self.hidden)
        mark_pruned(model, pruning)
        return model.eval().requires_grad_(False), pruning


@torch.no_grad()
def answers(
    tail: Tail, model: Any, seen: Seen, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of n photos: the most probable class, whether it is that of the whole network, and the mean cosine of
    the last tokens with those of the whole network."""
    classes, same, cosines = [], [], []
    for part in seen.parts(device):
        found = tail(part.entering, model)
        classes.append(found.logits.argmax(1).cpu())
        same.append((classes[-1] == part.answer.logits.argmax(1).cpu()).double())
        cosine = F.cosine_similarity(found.tokens.double(), part.answer.tokens.double(), dim=-1)
        cosines.append(cosine.mean(1).cpu())
    return torch.cat(classes), torch.cat(same), torch.cat(cosines)
