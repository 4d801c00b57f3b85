"""Makes sanity rows, the baselines with which a method must be compared before its numbers mean anything.

Random, centre-Gaussian and all-ones maps do not use the network. The row with randomised weights is the
method itself, run on a copy of the network with random weights (Adebayo et al., arXiv 1810.03292), while
the real network computes the scores. If a method does not beat these rows, its values do not show that it
explains the model.

A ViT has two more rows, in which only the attention is changed so that it no longer depends on the content:
the weights of queries and keys are permuted (qk_randomized_<method>), or the last third of the blocks uses
mean attention maps of photos (static_<method>). If a method's maps remain similar to those of either row,
the method does not depend on where the network attends. The correlation with the map of another photo shows
how similar two maps are by chance.
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

PHOTOS = 24  # number of photos for mean attention maps and for comparing maps
AT_ONCE = 8  # photos per pass
# Number of cached explainers for networks that see one half of a photo or classify one cell of a mosaic.
CHANGED = 2 * len(HALVES)


def randomized_backbone(backbone: Backbone, seed: int = 0) -> Backbone:
    """A deep copy of a frozen backbone with random weights, which depend only on ``seed``.

    Matrices and kernels are drawn from He's normal distribution, which preserves the scale of activations
    in ReLU networks. With PyTorch's default initialisation, the maps of a 50-layer CNN would underflow and
    become constant. Norm layers become the identity (statistics 0 and 1), biases become 0, and tokens and
    position embeddings are drawn from N(0, 0.02^2). The state of the global random generator is not
    changed.

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
        twin._fingerprint = None  # the cached fingerprint belongs to the trained weights
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
    """Create the explainer ``name`` (see ``xattn.list_explainers``) on the result of
    :func:`randomized_backbone`.

    A trained ``head`` keeps its weights, but it uses the features and the classifier of the random network.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import randomized_explainer
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> randomized_explainer("gradcam", net).attribute(torch.rand(1, 3, 64, 64), 3).shape
        torch.Size([1, 1, 2, 2])
    """
    return _explainer_on(randomized_backbone(backbone, seed), name, head, seed, options)


def _explainer_on(twin: Backbone, name: str, head: Any, seed: int, options: dict[str, Any]) -> Any:
    """Create an explainer for a network other than the one on which ``head`` was trained."""
    if isinstance(head, AttentiveHead):
        head = copy.deepcopy(head)
        head.backbone_fingerprint = twin.fingerprint  # the head is used on other weights on purpose
    elif head is not None:
        again = create_head(head.name, tapped(head.name, twin, head.backbone_taps), **head.options)
        again.load_state_dict(head.state_dict())
        again.summary = head.summary  # includes the training objective
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
    """Create the explainers of the sanity rows, by row name.

    The rows are random, centre, ones and, if there is a ``method``, randomized_<method>. For a ViT, there
    is also qk_randomized_<method>, and, with ``photos``, static_<method>. The last two are left out if the
    network's attention cannot be changed in this way or the method cannot be used on the changed network.

    Args:
        method: the name of an explainer; its ``options`` and its ``head`` are used in its rows.
        photos: (B, 3, H, W) in [0, 1], from which mean attention maps are computed.

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
        with suppress(
            ValueError
        ):  # raised, for example, if no mechanism can replace this attention
            rows[f"{name}_{method}"] = _explainer_on(twin(), method, head, seed, options)
    return rows


# ---------------------------------------------------------------- attention without content


def _projections(backbone: Backbone) -> list[tuple[Tensor, Tensor]]:
    """The weights W_q and W_k of each block of a ViT, block by block; empty for other networks."""
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
    """A deep copy of a ViT in which the entries of W_q and W_k of every block are permuted at random.

    Biases are not changed.

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
    """A copy whose last blocks use fixed attention maps, the means over ``photos`` (B, 3, H, W) in [0, 1].

    Args:
        share: the fraction of the blocks that are changed.

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
    """The similarity of a method's maps to the maps of a row.

    Attributes:
        row: the name of the row.
        correlation: the mean absolute rank correlation over photos.
        chance: the same for the method's own maps of two different photos.
        photos: the number of photos whose maps are not constant.
    """

    row: str
    correlation: float
    chance: float
    photos: int

    def __str__(self) -> str:
        return (
            f"{self.row}: |correlation| {self.correlation:.2f} with the method's maps, {self.chance:.2f} "
            f"with its map of another photo ({self.photos} photos)"
        )


def without_content(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Select the rows in which attention does not depend on the content, from the result of
    :func:`sanity_rows`."""
    return {name: row for name, row in rows.items() if name.startswith(WITHOUT_CONTENT)}


def likeness(
    backbone: Backbone, method: Any, rows: Mapping[str, Any], photos: Tensor
) -> list[Likeness]:
    """Compare the maps of an explainer with the maps of each row, for the predicted classes of ``photos``.

    Args:
        method: an explainer.
        rows: explainers by name, such as those from :func:`sanity_rows`.
        photos: (B, 3, H, W) in [0, 1], where B is at least 2.

    Raises:
        ValueError: there are fewer than 2 photos.
    """
    if len(photos) < 2:
        raise ValueError(
            f"photos: got {len(photos)}; give at least 2, so that they can be compared"
        )
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

    The result is None if no sanity row of this network needs photos, or if the images can be read only
    once.
    """
    if not _projections(backbone):
        return None
    stream = ImageStream(images, backbone.preprocessing, view, limit=PHOTOS)
    if stream.length is None and not isinstance(images, str | Path | Sequence | Tensor):
        return None
    block = next((block for block in stream.blocks(PHOTOS) if block), None)
    return None if block is None else torch.stack([item.image for item in block])


# ---------------------------------------------------------------- cascading randomisation


class _Block(NamedTuple):
    """A part of the network whose ``tensors`` are randomised together; ``layers`` of its modules have
    parameters."""

    name: str
    layers: int
    tensors: list[Tensor]


def cascade(backbone: Backbone, stages: int = 5, seed: int = 0) -> list[tuple[str, Backbone]]:
    """Copies of a backbone in which more and more layers, from the top down, have random weights.

    Returns a list of (name of the lowest random block, copy), one per stage. In the first copy, the
    classifier is random, and, for a probed backbone, the head as well. In each further copy, one more group
    of blocks is random; all groups have about the same number of layers. The weights of the last copy are
    exactly those of :func:`randomized_backbone`. Blocks are modules of ``backbone.model`` in the order of
    registration, which is the order of the forward pass in timm's networks: a block is an element of a
    sequence, or a part of such an element if the whole element has more layers than a group should have.

    The copies share all tensors with ``backbone`` or with each other, so the cascade needs memory for only
    one additional set of weights, whatever the number of stages.

    Raises:
        ValueError: there are fewer than 2 stages, or more than the network has layers.
    """
    if not isinstance(stages, int) or stages < 2:
        raise ValueError(
            f"stages: got {stages!r}; give at least 2, one for the classifier and one for the layers below"
        )
    groups = _groups(backbone, stages)
    random = randomized_backbone(backbone, seed)
    swap = dict(zip(map(id, _tensors(backbone)), _tensors(random), strict=True))
    memo = {id(t): t for t in _tensors(backbone)}
    twins = []
    for blocks in groups:
        memo.update({id(t): swap[id(t)] for block in blocks for t in block.tensors})
        # Copies share tensors but not modules.
        twin = copy.deepcopy(backbone, dict(memo))
        if hasattr(twin, "_fingerprint"):
            twin._fingerprint = None
        twins.append((blocks[-1].name, twin))
    return twins


class Cascade:
    """Runs methods on randomised copies of one backbone, for ``randomized`` in :func:`xattn.eval.evaluate`.

        cascade = Cascade(backbone)
        randomized = {"gradcam": cascade.method("gradcam"), "mine": cascade.method("head", head)}

    The copies are made on first use and shared by all methods. The most recently used explainers, one per
    stage, are cached, so that they can be reused for all images of a method.

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
        """The randomised copies, see :func:`cascade`."""
        if self._twins is None:
            self._twins = cascade(self.backbone, self.stages, self.seed)
        return self._twins

    def method(
        self, name: str, head: Any = None, **options: Any
    ) -> Callable[[int | str, Tensor, Tensor | int], Tensor]:
        """A function (stage, images (b, 3, H, W), targets) -> raw maps (b, 1, h, w) for one explainer.

        ``stage`` selects the network: the number of a randomised copy (-1 is the last one); the name of a
        half, for a network that sees only this half of a photo (:func:`xattn.backbone.halves.half_blind`);
        or a text such as "full 2 0", for a network that classifies one cell of a mosaic
        (:func:`xattn.eval.sanity.disconnected.disconnected`). A trained ``head`` keeps its weights, but it
        uses the features of the selected network. An option that is a module of the backbone, such as
        Grad-CAM's ``layer``, is replaced by the same module of the selected network.

        The function raises the errors of :func:`xattn.explainers.create_explainer` when it is called.
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
        """The network that sees only one half of a photo, or that classifies one cell of a mosaic."""
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
    """The groups that are randomised one after another: the classifier, and ``stages - 1`` groups of
    blocks.

    The groups are in order from the top of the network down.
    """
    model = backbone.model
    tops = _classifiers(model)
    inside = {module for top in tops for module in top.modules()}
    layers = sum(_is_layer(m) for m in model.modules() if m not in inside)
    if layers < stages - 1:
        raise ValueError(
            f"stages: got {stages}, but {backbone.name} has only {layers} layers below its classifier; "
            f"give at most {layers + 1}"
        )
    # No block has more layers than an average group, so no group is empty.
    below = list(_blocks("", model, tops, layers // (stages - 1)))[::-1]
    groups: list[list[_Block]] = [[] for _ in range(stages - 1)]
    done = 0
    for block in below:
        middle = (2 * done + block.layers) * (stages - 1) // (2 * layers)
        groups[min(middle, stages - 2)].append(block)  # min: a block of buffers counts no layers
        done += block.layers
    names = {module: name for name, module in model.named_modules()}
    first = [_Block(names[top], 1, _tensors(top)) for top in tops]
    probe = probe_of(backbone)
    if probe is not None:  # the trained head that replaces the classifier
        first.append(_Block("probe", 1, _tensors(probe)))
    return [first, *groups]


def _classifiers(model: Any) -> list[nn.Module]:
    """The modules that timm calls the classifier, or, if there are none, the last layer."""
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
    if own:  # such as the class token and the position embedding
        yield _Block(name or "embeddings", int(_is_layer(module)), own)
    for child, part in module.named_children():
        yield from _blocks(f"{name}.{child}".lstrip("."), part, tops, share)


def _is_layer(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
