"""Random-feature attention as a probe (NeurIPS 2023, arXiv 2307.11353): frozen heads, one ridge solve.

    logit_k = b_k + sum_m 1/N sum_i relu(x~_0^T W_m x~_i) <v_km, x~_i>,    x~ = [x; 1]

Of M heads, W_m is random and stays as it is; the v_km solve a ridge regression in closed form, see
:meth:`RandomFeature.solve`. So a logit is a sum over patches, of which each map shows what a patch adds
to that of the mean patch: logit_k = f_k(query, mean patch) + sum_i C_ki.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import Attended, Queries, Tokens, pool_by
from xattn.heads.attentive import AttentiveHead, Shared
from xattn.heads.base import register_head
from xattn.heads.random_attention import attention, queries_of, random_weights, with_one
from xattn.heads.ridge import DualRidge, best_temperature
from xattn.heads.solvable import LabelledTokens
from xattn.heads.token_scale import TokenScale
from xattn.runtime.option_checks import Count, Where

Query = Literal["constant", "gap", "cls"]
Ridge = Annotated[float, Where(lambda x: x >= 0, "0 or more")]
BLOCK, KEPT = (
    2**23,
    2**27,
)  # entries of features at once, and those kept from the kernel to the values
LARGEST = 2**28  # entries of W, 1 GB in float32
MOST = 20_000  # photos, whose kernel has 3 GB


@register_head(
    "random_feature",
    cases=(
        {"heads": 7},
        {"heads": 7, "query": "gap", "biased": True, "components": 5},
        {"heads": 7, "query": "cls"},
    ),
)
class RandomFeature(AttentiveHead):
    """M heads of random scores on the tokens of the last tap, and one on the query that all share.

    Patches are centred by the mean patch of the training photos and scaled to a mean square norm of 1, and
    so is the query by its own mean. ``train`` by steps works, too, but ``xattn probe`` calls
    :meth:`solve`. What is random is saved with the head.

    Args:
        heads: M; the classifier has M (D + 1) weights a class.
        query: x_0 is ``"constant"``, 0; ``"gap"``, the mean of the image's patches; or ``"cls"``, its class
            token, which then does most of the classifying: :meth:`solve` measures how much, and warns.
        biased: BRFA: W_m is drawn around the identity; not for a constant query, which it leaves at 0.
        components: principal components of the patches to keep, D; None keeps all channels.
        ridge: of the regression, see :class:`~xattn.heads.ridge.DualRidge`; None chooses it.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Raises:
        ValueError: more components than channels, a class token that the backbone has not, or ``biased``
            with a constant query.
    """

    learns_scores: ClassVar[bool] = False
    gated = True  # the rest depends on the query, and so on the image

    def __init__(
        self,
        backbone: Backbone,
        heads: Count = 1000,
        query: Query = "constant",
        biased: bool = False,
        components: Count | None = None,
        ridge: Ridge | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        channels = backbone.channels[-1]
        if components is not None and components > channels:
            raise ValueError(
                f"components: got {components}; tokens have {channels} channels, give at most that"
            )
        if biased and query == "constant":
            raise ValueError(
                "biased: the bias multiplies the query, and the constant one is 0; choose query='gap' "
                "or 'cls'"
            )
        options = {
            "heads": heads,
            "query": query,
            "biased": biased,
            "components": components,
            "ridge": ridge,
        }
        width = components or channels
        rows = 1 if query == "constant" else width + 1  # [0; 1] meets the last row alone
        if rows * heads * (width + 1) > LARGEST:
            raise ValueError(
                f"heads={heads}: their matrices have {rows * heads * (width + 1):,} entries for tokens of "
                f"width {width}; give fewer heads, or components=128"
            )
        super().__init__(
            backbone, options, heads * (width + 1), reads_prefix=query == "cls", **shared
        )
        if query == "cls" and not self.has_class_token:
            raise ValueError(
                f"query='cls': {backbone.name} has no class token; choose query='gap' or 'constant'"
            )
        self.query, self.ridge = query, ridge
        self.scale = TokenScale(channels, components, query != "constant")
        self.random: Tensor
        self.register_buffer("random", random_weights(rows, heads, width + 1, biased))

    def scores_and_values(self, tokens: Tokens) -> Attended:
        return self._attended(tokens, slice(None))

    def _attended(self, tokens: Tokens, heads: slice) -> Attended:
        keys = with_one(self.scale.patches(tokens.patches[-1]))
        queries = queries_of(self._query(tokens), self.random[:, heads])
        # The mean patch is [0; 1], so its score is the last entry of a query.
        return Attended(Queries(queries, keys), keys[:, None], queries[..., -1].relu())

    def _raw_query(self, tokens: Tokens) -> Tensor | None:
        """(B, C), before it is scaled; None for the constant one."""
        patches = tokens.patches[-1]
        if self.query == "gap":
            return patches.mean(1)
        return tokens.prefix[:, 0].to(patches.dtype) if self.query == "cls" else None

    def _query(self, tokens: Tokens) -> Tensor:
        """x~_0, of which a constant query has the 1 alone."""
        raw = self._raw_query(tokens)
        return self.random.new_ones(1, 1) if raw is None else with_one(self.scale.query(raw))

    def weights(self, scores: Tensor) -> Tensor:
        return attention(scores)

    def reference_shares(self, rows: Tensor, attended: Attended) -> Tensor:
        """The mean patch's share of each class, as one patch of the image: (B or 1, M)."""
        shares = (rows[..., -1] * attended.context[:, None]).sum(-1)
        return shares / attended.values.shape[2]

    def mean_patch_logits(self, tokens: Tokens) -> Tensor:
        """(B, K): the logits of images whose every patch is the mean patch, each with its own query."""
        attended = self.attend(tokens)
        weights = attended.context.expand(len(attended.values), -1)[..., None]
        patch = with_one(weights.new_zeros(len(weights), 1, self.random.shape[-1] - 1))
        z = pool_by(weights, patch[:, None]).flatten(1)
        return self.classifier(z if self.norm is None else self.norm(z))

    # ------------------------------------------------------------------ the solve

    @torch.no_grad()
    def solve(self, train: LabelledTokens, validation: LabelledTokens) -> dict[str, Any]:
        """Solve for v and b: the indicators of the classes by a ridge regression on the features of
        ``train``, in the dual and in float64, times the factor that makes logits of them.

        Returns:
            ``ridge``, ``temperature`` (the factor) and the share ``left_out`` of training photos that the
            fits to all others classify right. Unless the query is constant also the accuracy on
            ``validation``, ``with_patches``, and ``without_patches``: once every patch is the mean patch.

        Raises:
            ValueError: fewer photos than classes, or more than :data:`MOST`; photos that are all alike;
                ``ridge=0`` with a singular kernel; a mixer or anchors, which no solve trains.
        """
        self._check(len(train.labels))
        self.scale.fit((t.patches[-1], self._raw_query(t)) for t in train.batches())
        labels = train.labels.cpu()
        kept = len(labels) * self.classifier.in_features <= KEPT
        blocks: Iterable[Tensor] = self._features(train)
        blocks = list(blocks) if kept else blocks
        kernel = torch.zeros(len(labels), len(labels), dtype=torch.float64)
        for block in blocks:
            wide = block.double()
            kernel += (wide @ wide.mT).cpu()
        fit = DualRidge(kernel).fit(F.one_hot(labels, self.num_classes), self.ridge)
        temperature = best_temperature(fit.left_out, labels)
        if self.norm is not None:
            self.norm.reset_running_stats()
        gain = 1.0 if self.norm is None else (1 + self.norm.eps) ** -0.5
        values = (temperature * fit.alpha.mT).to(self.classifier.weight.device)
        start = 0
        for block in blocks if kept else self._features(train):
            part = slice(start, start + block.shape[1])
            self.classifier.weight[:, part] = ((values / gain) @ block.double()).to(block.dtype)
            start = part.stop
        self.classifier.bias.copy_(temperature * fit.intercept)
        right = float((fit.left_out.argmax(1) == labels).double().mean())
        found = {"ridge": fit.ridge, "temperature": temperature, "left_out": right}
        return found if self.query == "constant" else {**found, **self._without_patches(validation)}

    def _check(self, photos: int) -> None:
        if photos < self.num_classes:
            raise ValueError(
                f"train: got {photos} photos for {self.num_classes} classes; give at least one a class"
            )
        if photos > MOST:
            raise ValueError(
                f"train: got {photos} photos, and the kernel grows with their square; give at most {MOST}"
            )
        for name, part in (("mixer", self.mixer), ("reliability", self.balancing)):
            if part is not None:
                raise ValueError(
                    f"{name}: {self.name} solves for its weights in closed form, which does not train "
                    f"this; leave it out"
                )

    def _features(self, photos: LabelledTokens) -> Iterator[Tensor]:
        """Phi of all ``photos``, (n, m (D + 1)) for m heads after the others."""
        heads, width = self.random.shape[1:]
        size = max(1, BLOCK // (len(photos.labels) * width))
        for first in range(0, heads, size):
            parts = []
            for tokens in photos.batches():
                attended = self._attended(tokens, slice(first, first + size))
                parts.append(pool_by(self.weights(attended.scores), attended.values).flatten(1))
            yield torch.cat(parts)

    def _without_patches(self, photos: LabelledTokens) -> dict[str, float]:
        """The accuracy on ``photos``, and that with the mean patch alone; a warning for a class token."""
        full, alone = [], []
        for tokens in photos.batches():
            full.append(self.logits(tokens).argmax(1).cpu())
            alone.append(self.mean_patch_logits(tokens).argmax(1).cpu())
        labels = photos.labels.cpu()
        right, kept = (float((torch.cat(x) == labels).double().mean()) for x in (full, alone))
        if self.query == "cls":
            warnings.warn(
                f"query='cls': with every patch replaced by the mean patch, {kept:.3f} of {right:.3f} "
                f"accuracy is left: the class token classifies, and no map shows where it got that from",
                stacklevel=2,
            )
        return {"with_patches": right, "without_patches": kept}
