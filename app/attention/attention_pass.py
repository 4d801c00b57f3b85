"""Records the attention of one image of a pack in one forward pass, and caches it for the session.

Rows and rollouts are computed from the operators of the layers when they are needed. This takes O(N d) per
row and layer, and N x N matrices are never formed. A session caches the ``KEPT`` most recent images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from xattn.app import models
from xattn.app.triage import selection
from xattn.attention import Operator, converted_copy, list_attention, mechanism_class
from xattn.attention.base import Size
from xattn.attention.statistics import Statistics, row_shares, sample_queries, statistics
from xattn.explainers.relevance.attention import read_attention
from xattn.explainers.relevance.rollout import rollout_row
from xattn.photos.view import prepare
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.packs.reader import Pack

KEPT = 2  # cached images per session; q, k and v of all layers need 15 MB for a ViT-S
MOST_QUERIES = 512  # largest number of rows per layer for statistics
TRAINED = "trained"
_MADE = 72  # cached rows, rollouts and charts per image


@dataclass(frozen=True)
class Choice:
    """The mechanism that replaces the trained attention, with its ``size`` and ``target``, see
    :class:`~xattn.attention.base.Size`."""

    mechanism: str = TRAINED
    size: int | None = None
    target: int | None = None


AS_TRAINED = Choice()


@dataclass(eq=False)
class ImageAttention:
    """The attention of a model on one image.

    ``pixels`` is the image that the model saw. ``operators`` describe the attention of each layer over N
    tokens. ``maps`` are, for each layer, the maps (K, h, w) that the mechanism itself provides, by name.
    ``logits`` has shape (K,).
    """

    pixels: Image.Image
    operators: list[Operator]
    maps: list[dict[str, Tensor]]
    logits: Tensor
    grid: tuple[int, int]
    prefix: tuple[str, ...]
    """The names of the prefix tokens, which come first in the sequence."""
    _made: LRUCache = field(default_factory=lambda: LRUCache(_MADE))

    @property
    def layers(self) -> int:
        return len(self.operators)

    @property
    def hides(self) -> bool:
        """Whether some queries cannot attend to all keys, because of windows, selection or causality."""
        return any(operator.hides or operator.causal for operator in self.operators)

    @property
    def scaled(self) -> list[int]:
        """The layers whose rows are not shares; for these, rows of |A|, scaled to sum to 1, are shown."""
        return [i for i, o in enumerate(self.operators) if o.signed or not o.stochastic]

    def heads(self, layer: int) -> int:
        return self.operators[layer].shape[1]

    def rows(self, token: int) -> list[Tensor]:
        """The attention of ``token`` in each layer, (H, N), as shares; see also :attr:`scaled`."""

        def make() -> list[Tensor]:
            rows = (_row(operator, token) for operator in self.operators)
            return [
                row if operator.stochastic and not operator.signed else row_shares(row)
                for operator, row in zip(self.operators, rows, strict=True)
            ]

        return self._made.kept(("rows", token), make)

    def rollout(self, token: int, layer: int) -> Tensor:
        """The rollout of the first layers up to ``layer``, for the query ``token``, (N,)."""

        def make() -> Tensor:
            return rollout_row(self.operators[: layer + 1], token)[0].float().cpu()

        return self._made.kept(("rollout", token, layer), make)

    def chart(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A chart of this attention, which is cached because Altair takes long to make it."""
        return self._made.kept(("chart", key), make)

    @cached_property
    def statistics(self) -> list[Statistics]:
        """The statistics of each layer, for all patches as queries or for a sample of ``MOST_QUERIES``."""
        queries = sample_queries(self.operators[0].shape[2], len(self.prefix), MOST_QUERIES)
        return [
            statistics(o, self.grid, len(self.prefix), queries, absolute=o.signed)
            for o in self.operators
        ]

    def agent_shares(self, layer: int, token: int) -> Tensor | None:
        """How ``token`` attends to the agents of a layer, (H, n); None if the layer has no agents."""
        factors = self.operators[layer].factors
        return _row(factors[0], token) if factors else None


def _row(operator: Operator, token: int) -> Tensor:
    """The row of the attention matrix A for one token, (H, S)."""
    index = torch.tensor([token], device=operator.device)
    return operator.rows(index)[0, :, 0].float().cpu()


def trial_mechanisms() -> dict[str, Size]:
    """The mechanisms that can be used without training, with the option that the page offers for each."""
    entries = (mechanism_class(name).entry for name in list_attention())
    return {entry.name: entry.size for entry in entries if entry.size is not None}


def sizes(mechanism: str, grid: tuple[int, int]) -> list[int]:
    """The values of a mechanism's option that are possible for a grid."""
    size = trial_mechanisms().get(mechanism)
    if size is None:
        return []
    if size.unit == "steps":
        return list(size.values)
    most = min(grid) if size.unit == "patches a side" else grid[0] * grid[1]
    return [n for n in size.values if n <= most]


def default_size(mechanism: str, grid: tuple[int, int]) -> int | None:
    """The default value of a mechanism's option, or the nearest one that is possible for a grid."""
    usual = trial_mechanisms()[mechanism].usual
    return min(sizes(mechanism, grid), key=lambda n: abs(n - usual), default=None)


def grid_of(backbone: Backbone) -> tuple[int, int] | None:
    """The grid of patches at the model's own input size, if its patch embedding defines one."""
    if not hasattr(getattr(backbone.model, "patch_embed", None), "dynamic_feat_size"):
        return None
    rows, columns = backbone.grid(*backbone.preprocessing.input_size)
    return int(rows), int(columns)


def read(
    pack: Pack,
    image_id: str,
    backbone: Backbone,
    choice: Choice,
    kept: LRUCache,
) -> ImageAttention:
    """The attention of a model on an image, from the cache ``kept`` or from a forward pass.

    The photo is taken from the pack and preprocessed for the model.

    Raises:
        NoAttention: the model has no attention, or its tokens do not attend to all tokens.
        ValueError: the mechanism cannot be used in this model.
        PackError: the photo is missing or damaged.
    """
    key = (pack.id, pack.version, image_id, backbone.fingerprint, choice)
    return kept.kept(key, lambda: _read(pack, image_id, backbone, choice))


def _read(pack: Pack, image_id: str, backbone: Backbone, choice: Choice) -> ImageAttention:
    first = selection.table(pack).entries_of(image_id).index[0]
    mode = pack.view(first).mode
    images, _ = prepare(pack.photo(image_id), backbone.preprocessing, mode)
    with models.exclusive_pass(f"to read the attention of {backbone.name}"), torch.no_grad():
        model = backbone
        if choice != AS_TRAINED:
            own = trial_mechanisms()[choice.mechanism]
            options = {**own.options, own.option: choice.size}
            if choice.target is not None:
                options["target"] = choice.target
            model = converted_copy(backbone, choice.mechanism, options=options)
        found = read_attention(model, images[None].to(model.device, model.mean.dtype))
    return ImageAttention(
        pixels=Image.fromarray((images.permute(1, 2, 0) * 255).round().byte().numpy()),
        operators=[call.operator for call in found.layers],
        maps=[{name: m[0].float().cpu() for name, m in c.maps.items()} for c in found.layers],
        logits=found.logits[0].float().cpu(),
        grid=(found.grid[0], found.grid[1]),
        prefix=prefix_names(backbone, found.prefix),
    )


def prefix_names(backbone: Backbone, count: int) -> tuple[str, ...]:
    """The names of the ``count`` prefix tokens, in the order of timm's models."""
    model = backbone.model
    names = []
    if getattr(model, "cls_token", None) is not None:
        names.append("class token")
    if getattr(model, "dist_token", None) is not None:
        names.append("distillation token")
    registers = count - len(names)
    if registers > 0 and getattr(model, "reg_token", None) is not None:
        names += [f"register {i + 1}" for i in range(registers)]
    if len(names) != count:
        names = [f"prefix token {i + 1}" for i in range(count)]
    return tuple(names)
