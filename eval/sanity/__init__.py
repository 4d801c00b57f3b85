"""Sanity rows: baselines that a method's numbers must be compared with before they mean anything.

Random, centre-Gaussian and all-ones maps use no network. The randomised-weights row is the method itself on
a copy of the network with random weights (Adebayo et al., arXiv 1810.03292), scored by the real network. A
method that does not beat these rows explains the metric, not the model.

A ViT has two more rows, in which only its attention loses its dependence on content: queries and keys
with permuted weights (qk_randomized_<method>), and mean attention maps of photos in the last third of
the blocks (static_<method>). If a method's maps stay similar to those of either row, the method does
not depend on what attention attends to. The correlation with the map of another photo shows how similar
maps are by chance.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xattn.attention import fit_static
from xattn.backbone import Backbone, converted
from xattn.backbone.families.transformers_networks import TransformersBlock
from xattn.backbone.halves import HALVES, half_blind
from xattn.correlation import spearman
from xattn.eval.evaluation.results import WITHOUT_CONTENT
from xattn.eval.evaluation.stream import ImageStream
from xattn.eval.sanity.disconnected import disconnected
from xattn.explainers import create_explainer
from xattn.explainers.base import probe_of
from xattn.heads import AttentiveHead, create_head
from xattn.heads.base import tapped

PHOTOS = 24  # photos for mean maps, and photos on which maps are compared
AT_ONCE = 8  # photos per pass
CHANGED = 2 * len(
    HALVES
)  # explainers kept on networks that see a half, or classify a cell of a mosaic


def randomized_backbone(backbone: Backbone, seed: int = 0) -> Backbone:
    """A deep copy of a frozen backbone with random weights, which depend only on ``seed``.

    Matrices and kernels are drawn from He's normal distribution, with which activations of ReLU networks
    keep their scale; with PyTorch's default bounds the maps of a 50-layer CNN would underflow to a
    constant. Norms become the identity (statistics 0 and 1), biases 0, tokens and position
    embeddings N(0, 0.02^2). The global random generator is not touched.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import randomized_backbone
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> other = randomized_backbone(net, seed=1)
        >>> other.fingerprint == net.fingerprint
        False
    """
    twin = copy.deepcopy(backbone)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in twin.modules():
            for name, weight in module.named_parameters(recurse=False):
                weight.copy_(_initial(module, name, weight, generator).to(weight))
            for name, statistic in module.named_buffers(recurse=False):
                if name == "running_mean":
                    statistic.zero_()
                elif name == "running_var":
                    statistic.fill_(1.0)
    if hasattr(twin, "_fingerprint"):
        twin._fingerprint = None  # cached for the trained weights
    return twin


def _initial(module: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if value.ndim < 2:
        return (
            torch.zeros(value.shape, device="cpu")
            if "bias" in name
            else torch.ones(value.shape, device="cpu")
        )
    std = 0.02
    if name == "weight" and not isinstance(module, nn.Embedding):
        std = (2.0 / value[0].numel()) ** 0.5
    return torch.randn(value.shape, generator=generator, device="cpu") * std


def randomized_explainer(
    name: str, backbone: Backbone, *, head: Any = None, seed: int = 0, **options: Any
) -> Any:
    """The explainer ``name`` (see ``xattn.list_explainers``) on :func:`randomized_backbone`.

    A trained ``head`` keeps its weights and uses the random network's features and classifier.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import randomized_explainer
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> randomized_explainer("gradcam", net).attribute(torch.rand(1, 3, 64, 64), 3).shape
        torch.Size([1, 1, 2, 2])
    """
    return _explainer_on(randomized_backbone(backbone, seed), name, head, seed, options)


def _explainer_on(twin: Backbone, name: str, head: Any, seed: int, options: dict[str, Any]) -> Any:
    """The explainer on a network other than the one that ``head`` was trained on."""
    if isinstance(head, AttentiveHead):
        head = copy.deepcopy(head)
        head.backbone_fingerprint = twin.fingerprint  # the mismatch is what this row is about
    elif head is not None:
        again = create_head(head.name, tapped(head.name, twin, head.backbone_taps), **head.options)
        again.load_state_dict(head.state_dict())
        again.summary = head.summary  # what it was trained for
        head = again.eval()
    return create_explainer(name, twin, head=head, seed=seed, **options)


def sanity_rows(
    backbone: Backbone,
    method: str | None = "gradcam",
    *,
    head: Any = None,
    seed: int = 0,
    photos: Tensor | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Explainers by row name: random, centre, ones and randomized_<method> with its ``options``.

    Without a method there are only the first three. A row is also left out if the method cannot be made
    on another network. A ViT also has qk_randomized_<method>, and static_<method> if there are photos
    and its attention can be converted.

    Args:
        photos: (B, 3, H, W) in [0, 1], from which mean attention maps are made.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import sanity_rows
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> sorted(sanity_rows(net, "gradcam"))
        ['centre', 'ones', 'random', 'randomized_gradcam']
    """
    rows = {
        name: create_explainer(name, backbone, seed=seed) for name in ("random", "centre", "ones")
    }
    if method is None:
        return rows
    rows[f"randomized_{method}"] = randomized_explainer(
        method, backbone, head=head, seed=seed, **options
    )
    twins: dict[str, Callable[[], Backbone]] = {}
    if _projections(backbone):
        twins["qk_randomized"] = lambda: qk_randomized_backbone(backbone, seed)
        if photos is not None:
            twins["static"] = lambda: static_backbone(backbone, photos)
    for name, twin in twins.items():
        with suppress(ValueError):  # no mechanism can replace this attention
            rows[f"{name}_{method}"] = _explainer_on(twin(), method, head, seed, options)
    return rows


# ---------------------------------------------------------------- attention without content


def _projections(backbone: Backbone) -> list[tuple[Tensor, Tensor]]:
    """The weights that make queries and keys in a ViT's blocks, in their order."""
    blocks = getattr(backbone.model, "blocks", None)
    found: list[tuple[Tensor, Tensor]] = []
    for block in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else ():
        made = getattr(getattr(block, "attn", None), "qkv", None)
        own = block.projections() if isinstance(block, TransformersBlock) else None
        if isinstance(made, nn.Linear):
            q, k, _ = made.weight.chunk(3)
            found.append((q, k))
        elif own is not None:
            found.append((own.q, own.k))
    return found


def qk_randomized_backbone(backbone: Backbone, seed: int = 0) -> Backbone:
    """A deep copy with the entries of W_q and W_k permuted in every block; biases are unchanged.

    Raises:
        ValueError: the network has no blocks with a ``qkv`` layer.
    """
    twin = copy.deepcopy(backbone)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layers = _projections(twin)
        if not layers:
            raise ValueError(
                f"backbone: {backbone.name} has no blocks with a 'qkv' layer; choose a ViT"
            )
        for parts in layers:
            for part in parts:
                order = torch.randperm(part.numel(), generator=generator, device="cpu")
                part.copy_(part.flatten()[order.to(part.device)].view_as(part).clone())
    if hasattr(twin, "_fingerprint"):
        twin._fingerprint = None
    return twin


def static_backbone(backbone: Backbone, photos: Tensor, share: float = 1 / 3) -> Backbone:
    """A copy whose last blocks use their mean attention maps over ``photos`` (B, 3, H, W) in [0, 1].

    Args:
        share: the share of blocks that are changed.

    Raises:
        ValueError: no mechanism can replace the network's attention.
    """
    blocks: Any = getattr(backbone.model, "blocks", ())
    last = max(1, round(share * len(blocks)))
    network = converted(backbone, "static", range(len(blocks) - last, len(blocks)))
    fit_static(network, photos.to(backbone.device, backbone.mean.dtype).split(AT_ONCE))
    if hasattr(network, "_fingerprint"):
        network._fingerprint = None
    return network


@dataclass(frozen=True)
class Likeness:
    """How similar a method's maps are to a row's maps: the mean |rank correlation| over photos."""

    row: str
    correlation: float
    chance: float
    """The same correlation with the method's map of another photo."""
    photos: int
    """The number of photos whose maps are not constant."""

    def __str__(self) -> str:
        return (
            f"{self.row}: |correlation| {self.correlation:.2f} with the method's maps, {self.chance:.2f} "
            f"with its map of another photo ({self.photos} photos)"
        )


def without_content(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of :func:`sanity_rows` that remove the content from attention."""
    return {name: row for name, row in rows.items() if name.startswith(WITHOUT_CONTENT)}


def likeness(
    backbone: Backbone, method: Any, rows: Mapping[str, Any], photos: Tensor
) -> list[Likeness]:
    """Compare the maps of an explainer with those of ``rows``, on ``photos`` and their predicted classes.

    Args:
        method: an explainer; ``rows``: explainers by name, such as those of :func:`sanity_rows`.
        photos: (B, 3, H, W) in [0, 1], at least 2.

    Raises:
        ValueError: there are fewer than 2 photos.
    """
    if len(photos) < 2:
        raise ValueError(f"photos: got {len(photos)}; give at least 2, to compare them")
    photos = photos.to(backbone.device, backbone.mean.dtype)
    with torch.no_grad():
        targets = torch.cat([backbone.logits(part) for part in photos.split(AT_ONCE)]).argmax(1)

    def maps(explainer: Any) -> Tensor:
        pairs = zip(photos.split(AT_ONCE), targets.split(AT_ONCE), strict=True)
        return torch.cat([explainer.attribute(*pair).detach().float() for pair in pairs])

    own = maps(method)
    other = spearman(own, own.roll(1, 0)).abs()
    found = []
    for name, row in rows.items():
        same = spearman(own, maps(row)).abs()
        valid = same.isfinite() & other.isfinite()
        mean, chance = (float(x[valid].mean()) for x in (same, other))
        found.append(Likeness(name, mean, chance, int(valid.sum())))
    return found


def first_photos(images: Any, backbone: Backbone, view: str = "crop") -> Tensor | None:
    """The readable images among the first 24, (B, 3, H, W) in [0, 1].

    None if no row of the network needs them, or if the images can be read only once."""
    if not _projections(backbone):
        return None
    stream = ImageStream(images, backbone.preprocessing, view, limit=PHOTOS)
    if stream.length is None and not isinstance(images, str | Path | Sequence | Tensor):
        return None
    block = next((block for block in stream.blocks(PHOTOS) if block), None)
    return None if block is None else torch.stack([item.image for item in block])


# ---------------------------------------------------------------- cascading randomisation


class _Block(NamedTuple):
    """A part of the network that is randomised as a whole; it has ``layers`` modules with parameters."""

    name: str
    layers: int
    tensors: list[Tensor]


def cascade(backbone: Backbone, stages: int = 5, seed: int = 0) -> list[tuple[str, Backbone]]:
    """Copies of a backbone randomised from the top down: (lowest random block, copy), one per stage.

    The first copy has a random classifier, and for a probed backbone also a random head. Each further copy
    adds a group of blocks below, with about equally many layers per group, down to the stem. The last is
    :func:`randomized_backbone`, weight for weight. Blocks are the modules of ``backbone.model`` in order of
    registration, which in timm's networks is the order of the forward pass: the elements of its sequences,
    or the parts of an element that has more layers than a group should.

    All tensors are shared, with ``backbone`` or among the copies, so the cascade holds only one further set
    of weights, whatever the number of stages.

    Raises:
        ValueError: there are fewer than 2 stages, or more than the network has layers.
    """
    if not isinstance(stages, int) or stages < 2:
        raise ValueError(
            f"stages: got {stages!r}; give at least 2: the classifier and the layers below"
        )
    groups = _groups(backbone, stages)
    random = randomized_backbone(backbone, seed)
    swap = dict(zip(map(id, _tensors(backbone)), _tensors(random), strict=True))
    memo = {id(t): t for t in _tensors(backbone)}
    twins = []
    for blocks in groups:
        memo.update({id(t): swap[id(t)] for block in blocks for t in block.tensors})
        # Each twin is a separate copy, whose modules differ from those of the next.
        twin = copy.deepcopy(backbone, dict(memo))
        if hasattr(twin, "_fingerprint"):
            twin._fingerprint = None
        twins.append((blocks[-1].name, twin))
    return twins


class Cascade:
    """Methods on randomised copies of one backbone, for the ``randomized`` of :func:`xattn.eval.evaluate`.

        cascade = Cascade(backbone)
        randomized = {"gradcam": cascade.method("gradcam"), "mine": cascade.method("head", head)}

    The copies are made at first use and serve all methods. The explainers of the latest ``stages`` uses are
    cached, so that they are reused for all images of a method.

    Args:
        stages, seed: see :func:`cascade`.
        max_forward_batch: images per forward pass of the explainers.
    """

    def __init__(
        self, backbone: Backbone, stages: int = 5, seed: int = 0, max_forward_batch: int = 32
    ) -> None:
        self.backbone, self.stages, self.seed = backbone, stages, seed
        self.max_forward_batch = max_forward_batch
        self._twins: list[tuple[str, Backbone]] | None = None
        self._methods = 0
        self._explainers: OrderedDict[tuple[int, int | str], Any] = OrderedDict()
        self._on_changed: OrderedDict[tuple[int, int | str], Any] = OrderedDict()

    @property
    def twins(self) -> list[tuple[str, Backbone]]:
        """See :func:`cascade`."""
        if self._twins is None:
            self._twins = cascade(self.backbone, self.stages, self.seed)
        return self._twins

    def method(
        self, name: str, head: Any = None, **options: Any
    ) -> Callable[[int | str, Tensor, Tensor | int], Tensor]:
        """A function (stage, images (b, 3, H, W), targets) -> raw maps (b, 1, h, w).

        The maps are made on the copy of that stage (-1: the last), or on the network that sees only one
        half (:func:`xattn.backbone.halves.half_blind`) or classifies one cell of a mosaic, such as
        "full 2 0" (:func:`xattn.eval.sanity.disconnected.disconnected`). A trained ``head`` keeps its
        weights and uses the random network's features. An option that is a module of the backbone
        (Grad-CAM's ``layer``) is replaced by the same module of the copy.

        Raises:
            ValueError: when called, as for :func:`xattn.explainers.create_explainer`.
        """
        self._methods += 1
        number = self._methods

        def explain(stage: int | str, images: Tensor, targets: Tensor | int) -> Tensor:
            stage = stage if isinstance(stage, str) else stage % self.stages
            key, changed = (number, stage), isinstance(stage, str)
            kept, most = (self._on_changed, CHANGED) if changed else (self._explainers, self.stages)
            if key not in kept:
                twin = self._changed(stage) if isinstance(stage, str) else self.twins[stage][1]
                kept[key] = self._create(name, head, options, twin)
                if len(kept) > most:
                    kept.popitem(last=False)
            kept.move_to_end(key)
            return kept[key].attribute(images, targets)  # type: ignore[no-any-return]

        return explain

    def _changed(self, stage: str) -> Backbone:
        """The network that sees one half, or that classifies one cell of a mosaic, "full n cell"."""
        if stage in HALVES:
            return half_blind(self.backbone, stage)
        kind, n, cell = stage.split()
        return disconnected(self.backbone, kind, int(n), int(cell))

    def _create(self, name: str, head: Any, options: dict[str, Any], twin: Backbone) -> Any:
        if head is not None:
            head = copy.copy(head)
            head.backbone_fingerprint = twin.fingerprint
        theirs = dict(zip(self.backbone.modules(), twin.modules(), strict=True))
        options = {
            key: theirs.get(value, value) if isinstance(value, nn.Module) else value
            for key, value in options.items()
        }
        shared = {"seed": self.seed, "max_forward_batch": self.max_forward_batch}
        return create_explainer(name, twin, head=head, **shared, **options)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _groups(backbone: Backbone, stages: int) -> list[list[_Block]]:
    """The classifier, followed by ``stages - 1`` groups of blocks, from the top down."""
    model = backbone.model
    tops = _classifiers(model)
    inside = {module for top in tops for module in top.modules()}
    layers = sum(_is_layer(m) for m in model.modules() if m not in inside)
    if layers < stages - 1:
        raise ValueError(
            f"stages: got {stages}, and {backbone.name} has {layers} layers below its classifier; "
            f"give at most {layers + 1}"
        )
    # No block is larger than its share, so no group is empty.
    below = list(_blocks("", model, tops, layers // (stages - 1)))[::-1]
    groups: list[list[_Block]] = [[] for _ in range(stages - 1)]
    done = 0
    for block in below:
        middle = (2 * done + block.layers) * (stages - 1) // (2 * layers)
        groups[min(middle, stages - 2)].append(block)  # a block with only buffers has no layer
        done += block.layers
    names = {module: name for name, module in model.named_modules()}
    first = [_Block(names[top], 1, _tensors(top)) for top in tops]
    probe = probe_of(backbone)
    if probe is not None:  # the trained head in the classifier's place
        first.append(_Block("probe", 1, _tensors(probe)))
    return [first, *groups]


def _classifiers(model: Any) -> list[nn.Module]:
    """What timm calls the classifier, or else the last layer."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        found = list(found) if isinstance(found, tuple | list) else [found]
        if found and all(isinstance(m, nn.Module) and _tensors(m) for m in found):
            return found
    return [m for m in model.modules() if _is_layer(m)][-1:]


def _blocks(name: str, module: nn.Module, tops: list[nn.Module], share: int) -> Iterator[_Block]:
    if module in tops:
        return
    layers = sum(_is_layer(m) for m in module.modules())
    whole = layers <= share and not any(m in tops for m in module.modules())
    if whole and not isinstance(module, nn.Sequential | nn.ModuleList):
        if _tensors(module):
            yield _Block(name, layers, _tensors(module))
        return
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if own:  # such as class token and position embedding
        yield _Block(name or "embeddings", int(_is_layer(module)), own)
    for child, part in module.named_children():
        yield from _blocks(f"{name}.{child}".lstrip("."), part, tops, share)


def _is_layer(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
