"""The attention that layers of a network give to photos or to noise, mean over the images.

M = mean over images of softmax(q k^T / sqrt(D)),   (H, N, N) for each layer
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xattn.attention.convertible import evaluating, run_one_image
from xattn.attention.inputs import Inputs
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.record import answering_by

MOST = 4096  # tokens for which a matrix of all pairs is stored
AT_ONCE = 16  # photos of a pass


class Map(NamedTuple):
    """The mean attention of a layer."""

    matrix: Tensor
    """(H, N, N), float32 or float64."""
    grid: tuple[int, ...] | None
    """Of the tokens behind the prefix."""


def check_tokens(count: int) -> None:
    """Raise a ``ValueError`` where a matrix of all pairs of ``count`` tokens would be too large."""
    if count > MOST:
        raise ValueError(
            f"tokens: got {count}; static stores a matrix for each head, give at most {MOST}"
        )


class _Averages:
    """Answers by softmax attention for some mechanisms, and adds up its matrices."""

    def __init__(self, mechanisms: Collection[nn.Module]) -> None:
        self.mechanisms = set(mechanisms)
        self.totals: dict[nn.Module, Tensor] = {}
        self.grids: dict[nn.Module, tuple[int, ...] | None] = {}
        self.images: dict[nn.Module, int] = {}

    def attend(self, mechanism: Any, inputs: Inputs) -> Tensor:
        inputs = mechanism.accepted(inputs)
        if mechanism not in self.mechanisms:
            local = mechanism.local(inputs)
            y = mechanism.operator(inputs).matvec(inputs.v)
            return y if local is None else y + local  # type: ignore[no-any-return]
        operator = SoftmaxOperator(inputs.q, inputs.k, inputs.scale)
        y = operator.matvec_and_keep(inputs.v)
        batch, heads, n, _ = operator.shape
        check_tokens(n)
        before = self.totals.get(mechanism)
        total = operator.lse.new_zeros(heads, n, n) if before is None else before
        if total.shape[1] != n:
            raise ValueError(f"batches: got {n} tokens after {total.shape[1]}; give one size")
        for part in operator.row_chunks():
            total[:, part] += operator.tile(part, slice(None)).sum(0)
        self.totals[mechanism], self.grids[mechanism] = total, inputs.grid
        self.images[mechanism] = self.images.get(mechanism, 0) + batch
        return y

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        return operator.matvec(value)

    def maps(self) -> dict[nn.Module, Map]:
        """By mechanism, of those that were reached."""
        return {m: Map(total / self.images[m], self.grids[m]) for m, total in self.totals.items()}


def mean_maps(
    model: nn.Module, mechanisms: Collection[nn.Module], batches: Iterable[Tensor]
) -> dict[nn.Module, Map]:
    """What the layers of ``mechanisms`` would attend to by softmax, mean over all images.

    Args:
        model: a module or a backbone, with the mechanisms in some of its layers.
        batches: of the model's inputs, all of one size.

    Raises:
        ValueError: inputs of different sizes, or too many tokens.
    """
    forward, averages = getattr(model, "logits", model), _Averages(mechanisms)
    with evaluating(model), answering_by(averages):
        for batch in batches:
            forward(batch)
    return averages.maps()


def noise_maps(
    model: nn.Module, mechanisms: Collection[nn.Module], sigma: float
) -> dict[nn.Module, Map]:
    """The same of one sequence of tokens N(0, sigma^2) in place of those that enter the first block."""

    def noise(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        drawn = torch.randn(x.shape, device="cpu").to(x)
        return (sigma * drawn, *args[1:])

    averages = _Averages(mechanisms)
    blocks: Any = model.blocks
    handle = blocks[0].register_forward_pre_hook(noise, prepend=True)
    try:
        with evaluating(model), answering_by(averages):
            run_one_image(model)
    finally:
        handle.remove()
    return averages.maps()


def photo_batches(model: nn.Module, photos: str | Path, count: int) -> Iterator[Tensor]:
    """Photos as inputs (b, 3, H, W) of ``model``, at most ``count``, spread evenly over the list.

    Args:
        model: a timm model; its configuration says how photos are prepared.
        photos: a photo, a folder or a .txt list of them.

    Raises:
        ValueError: they cannot be read.
    """
    from xattn.backbone.preprocessing import preprocessing_of
    from xattn.photos.images import list_images, load_image
    from xattn.photos.view import prepare

    preprocessing = preprocessing_of(model)
    weight = next(model.parameters())
    mean, std = (
        torch.tensor(x, device="cpu")[:, None, None]
        for x in (preprocessing.mean, preprocessing.std)
    )
    try:
        paths = list_images(photos)
        paths = (
            [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else paths
        )
        for start in range(0, len(paths), AT_ONCE):
            images = [load_image(path) for path in paths[start : start + AT_ONCE]]
            pixels = torch.stack([prepare(image, preprocessing)[0] for image in images])
            yield ((pixels - mean) / std).to(weight)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"photos: cannot read {photos} ({reason}); give a photo, a folder or a .txt list"
        ) from None
