"""Baselines: attention that ignores the content, ignores the query, or does not mix tokens.

    uniform           A_ij = 1 / S
    static            A_ij = M_ij, the same for all images
    static_embedding  A = softmax of queries and keys computed from the input of the first block
    non_approximate   A_ij = softmax_j(g_j),  g_j = silu(q_j) . k_j / sqrt(D), the same for all queries
    taylor            A_ij proportional to 1 + z + z^2 / 2,  z = q_i . k_j / sqrt(D)
    none              A = I

The baselines follow "Deconstructing Attention" (arXiv 2510.11602), but are adapted to images and use no
causal mask by default. ``uniform`` is ``non_approximate`` with g = 0. If an explanation does not change
when ``static`` maps replace the network's attention, it explains positions, not content.

The module also computes the mean attention of a network's layers over photos or noise:

    M = mean over images of softmax(q k^T / sqrt(D)),   (H, N, N) for each layer
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms.based import Based, received_map
from xattn.attention.model.convert import evaluation_mode, run_one_image
from xattn.attention.operators.base import Operator, SoftmaxOperator, products
from xattn.attention.operators.fixed import IdentityOperator, SharedRowOperator, StoredOperator
from xattn.attention.record import replace_products
from xattn.kernels.softmax.reference import widen

MOST = 4096  # largest number of tokens for which a matrix of all pairs is stored
AT_ONCE = 16  # photos per forward pass


class Map(NamedTuple):
    """The mean attention of a layer."""

    matrix: Tensor
    """(H, N, N), float32 or float64."""
    grid: tuple[int, ...] | None
    """Grid of the tokens after the prefix, or None."""


def check_tokens(count: int) -> None:
    """Raise a ``ValueError`` if a matrix of all pairs of ``count`` tokens would be too large."""
    if count > MOST:
        raise ValueError(
            f"tokens: got {count}; give at most {MOST}, because static stores a matrix for each head"
        )


class _Averages:
    """Runs softmax attention in place of some mechanisms and sums its matrices over all images."""

    def __init__(self, mechanisms: Collection[nn.Module]) -> None:
        self.mechanisms = set(mechanisms)
        self.totals: dict[nn.Module, Tensor] = {}
        self.grids: dict[nn.Module, tuple[int, ...] | None] = {}
        self.images: dict[nn.Module, int] = {}

    def attend(self, mechanism: Any, inputs: Inputs) -> Tensor:
        inputs = mechanism.check_inputs(inputs)
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
            raise ValueError(f"batches: got {n} tokens after {total.shape[1]}; give equal sizes")
        for part in operator.row_chunks():
            total[:, part] += operator.tile(part, slice(None)).sum(0)
        self.totals[mechanism], self.grids[mechanism] = total, inputs.grid
        self.images[mechanism] = self.images.get(mechanism, 0) + batch
        return y

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        return operator.matvec(value)

    def maps(self) -> dict[nn.Module, Map]:
        """Return the mean attention of every mechanism that was called, keyed by mechanism."""
        return {m: Map(total / self.images[m], self.grids[m]) for m, total in self.totals.items()}


def mean_maps(
    model: nn.Module, mechanisms: Collection[nn.Module], batches: Iterable[Tensor]
) -> dict[nn.Module, Map]:
    """Compute the softmax attention of the layers with ``mechanisms``, averaged over all images.

    Args:
        model: a module or a backbone, with the mechanisms in some of its layers.
        mechanisms: the mechanisms in whose place softmax attention is computed.
        batches: inputs of the model, all of one size.

    Raises:
        ValueError: if inputs differ in size, or there are too many tokens.
    """
    forward, averages = getattr(model, "logits", model), _Averages(mechanisms)
    with evaluation_mode(model), replace_products(averages):
        for batch in batches:
            forward(batch)
    return averages.maps()


def noise_maps(
    model: nn.Module, mechanisms: Collection[nn.Module], sigma: float
) -> dict[nn.Module, Map]:
    """Do the same as :func:`mean_maps` for one sequence of tokens, which is drawn from N(0, sigma^2) and
    replaces the input of the first block."""

    def noise(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        drawn = torch.randn(x.shape, device="cpu").to(x)
        return (sigma * drawn, *args[1:])

    averages = _Averages(mechanisms)
    blocks: Any = model.blocks
    handle = blocks[0].register_forward_pre_hook(noise, prepend=True)
    try:
        with evaluation_mode(model), replace_products(averages):
            run_one_image(model)
    finally:
        handle.remove()
    return averages.maps()


def photo_batches(model: nn.Module, photos: str | Path, count: int) -> Iterator[Tensor]:
    """Yield photos as inputs (b, 3, H, W) of ``model``: at most ``count``, evenly spaced in the list.

    Args:
        model: a timm model; its configuration defines the preprocessing.
        photos: a photo, a folder, or a .txt list of photos.

    Raises:
        ValueError: if the photos cannot be read.
    """
    from xattn.photos.images import list_images, load_image
    from xattn.photos.preprocessing import preprocessing_of
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


PAPER = "arXiv 2510.11602"
LONGEST = 1024  # default number of noise tokens for a layer outside of a model


@register_attention("uniform", paper=PAPER, complexity="N D", control=True, cross=True)
class Uniform(Mechanism):
    """All keys get the same weight, A = 1 / S, which shows what the network does without attention."""

    def operator(self, inputs: Inputs) -> Operator:
        batch, heads, keys = inputs.k.shape[:3]
        row = widen(inputs.q.new_empty(0)).new_full((1, 1, 1), 1 / keys)
        return SharedRowOperator(row.expand(batch, heads, keys), inputs.q.shape[2], inputs.q)


@register_attention("none", paper=PAPER, complexity="N D", control=True)
class NoMixing(Mechanism):
    """Every token reads only its own value."""

    def operator(self, inputs: Inputs) -> Operator:
        return IdentityOperator(inputs.q)


@register_attention("non_approximate", paper=PAPER, complexity="N D", control=True, causal=True)
class SelfWeightedKeys(Mechanism):
    """Each key is weighted by the query of its own token, not by the query that reads it.

    All queries read the same weighted mean of the values, so A has rank 1. In a causal call, each query
    reads the mean over the tokens up to itself.
    """

    def operator(self, inputs: Inputs) -> Operator:
        scores = self.scores(inputs)
        if inputs.causal:
            zero = torch.zeros_like(inputs.q)
            return SoftmaxOperator(
                zero, zero, 1.0, scores[:, :, None].to(zero), backend=self.backend, causal=True
            )
        return SharedRowOperator(scores.softmax(-1), inputs.q.shape[2], inputs.q)

    def scores(self, inputs: Inputs) -> Tensor:
        """Compute g, (B, H, N)."""
        assert inputs.scale is not None
        return inputs.scale * (F.silu(widen(inputs.q)) * widen(inputs.k)).sum(-1)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, the attention that each patch gets from all tokens, averaged over heads."""
        return received_map(operator, inputs)


@register_attention(
    "taylor", paper="arXiv 2402.18668", complexity="N D^3", control=True, causal=True
)
class Taylor(Based):
    """Taylor linear attention as in ``based``, but in all layers and with unchanged queries and keys."""

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto") -> None:
        super().__init__(dim, num_heads, None, form="taylor", backend=backend)


@register_attention("static_embedding", paper=PAPER, complexity="N^2 D", control=True)
class StaticEmbedding(Mechanism):
    """Queries and keys come from the input tokens of the first block, values from the layer itself.

    In a converted model, the block's own ``qkv`` computes these queries and keys. In a layer outside of a
    model, the embedding is the layer's own input, so the mechanism is plain softmax attention.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        norm: in a converted model, whether to apply the block's ``norm1`` first; the paper does not apply
            it.
    """

    reads = ("embedding",)

    def __init__(
        self, dim: int, num_heads: int, norm: bool = True, *, backend: str = "auto"
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.norm = norm
        self.block: list[nn.Module] = []  # in a list, so that the block does not become a submodule

    @classmethod
    def prepare(cls, model: nn.Module, made: Mapping[int, Mechanism]) -> None:
        from timm.models.vision_transformer import Block

        blocks: Any = model.blocks
        for number, mechanism in made.items():
            assert isinstance(mechanism, StaticEmbedding)
            block = blocks[number]
            kind = type(block).__name__
            if not isinstance(block, Block):
                raise ValueError(
                    f"model: block {number} is a {kind}, but static_embedding needs the norm1 and qkv "
                    f"of timm's pre-norm Block; choose a plain ViT"
                )
            if not hasattr(block.attn, "qkv"):
                raise ValueError(
                    f"model: blocks.{number}.attn of its {kind} has no 'qkv' layer, which "
                    f"static_embedding needs; choose a plain ViT"
                )
            if mechanism.rotate is not None:
                raise ValueError(
                    "rotate: static_embedding computes its own queries and keys; leave out rotate"
                )
            mechanism.block = [block]

    def operator(self, inputs: Inputs) -> Operator:
        q, k = self._of_embedding(inputs) if self.block else (inputs.q, inputs.k)
        return SoftmaxOperator(q, k, inputs.scale, backend=self.backend)

    def _of_embedding(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x = (inputs.carried or {}).get("embedding")
        batch, heads, n, width = inputs.q.shape
        if x is None or x.shape[:2] != (batch, n):
            got = "no tokens" if x is None else f"shape {tuple(x.shape)}"
            raise ValueError(
                f"x: static_embedding got {got} from the first block, but needs ({batch}, {n}, C); "
                f"call the whole model, with all tokens in all blocks"
            )
        block: Any = self.block[0]
        layer = block.attn
        qkv = layer.qkv(block.norm1(x) if self.norm else x).unflatten(2, (3, heads, width))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return layer.q_norm(q), layer.k_norm(k)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, the attention that each patch gets from all tokens, averaged over heads."""
        return received_map(operator, inputs)


Source = Literal["noise", "drawn", "photo", "mean", "learned"]


@register_attention(
    "static",
    paper=PAPER,
    complexity="N^2 D",
    control=True,
    cases=({"tokens": 40},),
    bench=({"tokens": 4096},),
)
class Static(Mechanism):
    """Each head uses one stored matrix M for all images, which may have at most 4,096 tokens.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        source: where M comes from. "noise": the model's own attention on a sequence of Gaussian tokens,
            which replaces the input of the first block once, during conversion. "drawn": the attention of
            queries and keys that are drawn at random for each layer, independently of the model; a layer
            outside of a model also does this for "noise". "photo": the model's own attention on one photo.
            "mean": its mean over several photos. "learned": the softmax of parameters that start at 0.
        photos: a photo, a folder or a .txt list of photos, for "mean" and for "photo", which uses the first
            one.
        count: the largest number of photos used for "mean". If there are more, evenly spaced photos are
            chosen.
        tokens: N, for "learned". If M is drawn for a layer outside of a model, N is the length of the
            longest sequence.
        sigma: standard deviation of the noise, or of the drawn queries and keys.

    Raises:
        ValueError: if ``photos`` does not suit ``source``, "learned" has no ``tokens``, or a number is
            invalid.

    A matrix that was learned or computed with a model fits only the number of tokens and the grid for which
    it was made; any other call raises an error.
    """

    kept: Tensor | None
    noise: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        source: Source = "noise",
        photos: str | None = None,
        count: int = 100,
        tokens: int | None = None,
        sigma: float = 1.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if (source in ("photo", "mean")) != (photos is not None):
            raise ValueError(
                f"photos: got {photos!r} with source={source!r}; give a photo, a folder or a .txt list "
                f"for 'photo' and 'mean', and None for other sources"
            )
        if source == "learned" and tokens is None:
            raise ValueError("tokens: got None; give their number for learned maps, such as 197")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma: got {sigma}; give a positive number, such as 1")
        longest = check_whole("tokens", LONGEST if tokens is None else tokens)
        check_tokens(longest)
        self.source, self.photos, self.sigma = source, photos, sigma
        self.count = 1 if source == "photo" else check_whole("count", count)
        self.grid: tuple[int, ...] | None = None
        self.logits = None
        drawn = None
        if source == "learned":
            self.logits = nn.Parameter(torch.zeros(num_heads, longest, longest))
        elif source in ("noise", "drawn"):
            drawn = sigma * torch.randn(2, num_heads, longest, dim // num_heads)
        self.register_buffer("noise", drawn)
        self.register_buffer("kept", None)

    @classmethod
    def prepare(cls, model: nn.Module, made: Mapping[int, Mechanism]) -> None:
        layers = [m for m in made.values() if isinstance(m, Static)]
        first = layers[0]  # all have the same options
        if first.source == "noise":
            _keep(noise_maps(model, layers, first.sigma))
        elif first.photos is not None:
            _keep(mean_maps(model, layers, photo_batches(model, first.photos, first.count)))

    def keep(self, found: Map) -> None:
        """Use ``found`` as M from now on."""
        self.kept, self.grid, self.noise = found.matrix, found.grid, None

    def operator(self, inputs: Inputs) -> Operator:
        n = inputs.q.shape[2]
        check_tokens(n)
        return StoredOperator(self._matrix(n, inputs.grid), inputs.q)

    def _matrix(self, n: int, grid: tuple[int, ...] | None) -> Tensor:
        """Return M for ``n`` tokens, (H, n, n)."""
        own = self.logits if self.kept is None else self.kept
        if own is not None:
            if own.shape[1] != n:
                raise ValueError(
                    f"grid: got {n} tokens; give {own.shape[1]}, the number for which static has maps"
                )
            if None not in (grid, self.grid) and grid != self.grid:
                raise ValueError(f"grid: got {grid}; give {self.grid}, for which static has maps")
            return own if own is self.kept else widen(own).softmax(-1)
        assert self.noise is not None
        if n > self.noise.shape[2]:
            raise ValueError(
                f"tokens: got {n} tokens; static has noise for {self.noise.shape[2]}, so create it with "
                f"tokens={n}"
            )
        q, k = widen(self.noise[:, :, :n])
        return products(q, k, q.shape[-1] ** -0.5).softmax(-1)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, the attention that each patch gets from all tokens, averaged over heads. It
        is the same for all images."""
        return received_map(operator, inputs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Load noise or maps, whichever were saved."""
        for name in ("noise", "kept"):
            value = state_dict.get(prefix + name)
            self._buffers[name] = None if value is None else torch.empty_like(value)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)


def _keep(found: Mapping[Any, Map]) -> None:
    for mechanism, own in found.items():
        mechanism.keep(own)


def fit_static(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the maps of all static layers of ``model`` to the mean of its own softmax attention.

    Args:
        model: a model or backbone with ``static`` in some of its layers, for example from ``convert``.
        batches: inputs of the model, all of one size.

    Raises:
        ValueError: if no static layer was called, inputs differ in size, or there are too many tokens.

    Example:
        >>> import torch
        >>> from xattn.attention import create_attention, fit_static
        >>> layer = create_attention("static", 32, 4)
        >>> fit_static(layer, [torch.rand(2, 9, 32) for _ in range(3)])
        >>> layer(torch.rand(1, 9, 32)).shape
        torch.Size([1, 9, 32])
    """
    layers = [m for m in model.modules() if isinstance(m, Static)]
    found = mean_maps(model, layers, batches)
    if not found:
        raise ValueError("model: no layer has static attention; convert it first")
    _keep(found)
