"""Attention weighted by the effect of masks: s_i = sum_lh w_lh A^lh[q_t, i], w trained on outcomes.

arXiv 2604.16587 ("attribution streaming"). For each word, random masks m_j hide image tokens, and

    L = 1 - corr_j( sum of s over what m_j hides,  log p(all) - log p(m_j) )

is averaged over words and minimised over w (L H numbers). Because L depends only on a correlation, s shows
which tokens matter more, but not by how many nats; a map shows how far s is above its mean over the image.
A trained explainer needs no additional pass: rows are read while the answer is generated.

    trainer = OutcomesTrainer(masks=32)
    xattn.explain_tokens(photos, vlm, "What is on the table?", explainer=trainer)
    head = trainer.fit()
    head.save("outcomes.json")
    xattn.explain_tokens(other_photos, vlm, "What is on the table?", explainer=head)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.correlation import pearson
from xattn.runtime.files import write_json
from xattn.runtime.option_checks import Count, NotNegative
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer
from xattn.vlm.explainers.layers import HeadRows
from xattn.vlm.explainers.rise import Rise
from xattn.vlm.model import VLM


@register_token_explainer(
    "outcomes",
    title="Trained attention",
    passes="none",
    source="arXiv 2604.16587",
    cases=({}, {"above_mean": False}),
)
@dataclass(kw_only=True, eq=False)
class Outcomes(TokenExplainer):
    """Rows of attention, weighted by one number per layer and head.

    Args:
        weights: L H numbers, layer by layer, or a file written by :meth:`save`; by default all are equal,
            that is, untrained.
        above_mean: if True, scores are max(s - mean s, 0) over image tokens only; otherwise they are s,
            including text tokens.
    """

    watches = True

    weights: Sequence[float] | str | None = None
    above_mean: bool = True
    about: Mapping[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.weights, str):
            self.weights, self.about = _read(Path(self.weights))

    def save(self, path: str | Path) -> None:
        """Write the weights, and what they were trained on, as JSON."""
        write_json(path, {"weights": list(self.weights or ()), **self.about})

    def watch(
        self, vlm: VLM, prompt_ids: Tensor, rows: Sequence[int] | None = None
    ) -> AbstractContextManager[HeadRows]:
        return HeadRows.watched(vlm, rows)

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        rows = (seen or HeadRows(context.vlm)).of_words(context, image=self.above_mean)
        found = torch.stack([self._weighted(context, own) for own in rows])
        if self.above_mean:
            return TokenScores((found - found.mean(1, keepdim=True)).clamp_min(0))
        text = found[:, context.text] if context.vlm.kind == "decoder" else None
        return TokenScores(HeadRows.of_image(context, found), text)

    def _weighted(self, context: Context, rows: Tensor) -> Tensor:
        """(S,) from the rows (L H, S) of a word."""
        if self.weights is None:
            return rows.mean(0)
        if len(self.weights) != len(rows):
            raise ValueError(
                f"weights: got {len(self.weights)}, but {len(rows)} heads of a "
                f"{type(context.vlm.model).__name__} attend to the image; train them on this model"
            )
        return _tensor(self.weights) @ rows

    def notes(self, context: Context) -> list[str]:
        return ["not trained: all heads have the same weight"] if self.weights is None else []


@dataclass(kw_only=True, eq=False)
class OutcomesTrainer(TokenExplainer):
    """Collects rows and outcomes for the words that it is asked to explain, and returns maps with equal
    weights. Then :meth:`fit` creates an explainer from what it has collected.

    Args:
        masks: random masks per conversation, one pass each; each hides half of the image.
        cells: None hides single tokens; otherwise cells of a grid with this many cells per side.
        needed: words that lose less than this without the image, in nats (or logits), are left out.
    """

    name = "outcomes_trainer"

    masks: Count = 32
    cells: Count | None = 4
    needed: NotNegative = 0.1
    examples: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    """(M, L H): for each mask, the sum of each head's row over the hidden tokens; and (M,), the nats
    lost."""

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        rows = HeadRows(context.vlm).of_words(context, image=True)
        draws = Rise(masks=self.masks, cells=self.cells, seed=self.seed + len(self.examples))
        hidden = draws.hidden(context)
        everything = torch.ones_like(hidden[:1])
        with torch.no_grad():
            whole = context.scores().cpu()
        lost = (
            whole - context.hidden(torch.cat([hidden, everything])).cpu()
        ).double()  # (M + 1, W)
        means = []
        for own, fell in zip(rows, lost.T, strict=True):  # (L H, n)
            means.append(own.mean(0))
            if fell[-1] >= self.needed and fell[:-1].std() > 0:
                self.examples.append((hidden.double() @ own.double().T, fell[:-1]))
        return TokenScores(torch.stack(means))

    def fit(self, decay: float = 1e-3) -> Outcomes:
        """The explainer whose sums correlate best with the outcomes.

        Args:
            decay: weight of the mean square of (w - w_0) / w_0, where w_0 = 1 / (L H) for every head.

        Raises:
            ValueError: no word that needs the image was seen.
        """
        examples = self._stacked()
        heads = examples[0].shape[2]
        scaled = torch.ones(heads, dtype=torch.float64, requires_grad=True)  # w / w_0
        search = torch.optim.LBFGS([scaled], max_iter=200, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            search.zero_grad()
            loss = self.loss(scaled, examples) + decay * (scaled - 1).square().mean()
            loss.backward()
            return loss

        with torch.enable_grad():
            search.step(step)
        made = Outcomes(weights=(scaled.detach() / heads).tolist(), seed=self.seed)
        made.about = {"words": len(self.examples), "correlation": self.correlation(made)}
        return made

    def loss(self, weights: Tensor, examples: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The loss L of weights (L H,), in float64, averaged over words; ``examples`` as returned by
        :meth:`_stacked`."""
        sums, outcomes = examples or self._stacked()
        return 1 - pearson(sums @ weights.to(sums), outcomes).mean()

    def correlation(self, explainer: Outcomes | None = None) -> float:
        """Mean correlation of sums with outcomes, for an explainer or for equal weights. If the explainer
        was trained on other conversations, this shows how well it predicts the effect of masks."""
        weights = None if explainer is None else explainer.weights
        heads = self._stacked()[0].shape[2]
        return 1 - float(self.loss(torch.ones(heads) if weights is None else _tensor(weights)))

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Sums of heads over what masks hide, (words, M, L H), and outcomes (words, M)."""
        if not self.examples:
            raise ValueError(
                f"examples: none of the words lost {self.needed} nats without the image; explain "
                f"other words, or lower needed"
            )
        sums, outcomes = zip(*self.examples, strict=True)
        return torch.stack(sums), torch.stack(outcomes)


def _tensor(weights: Any) -> Tensor:
    return torch.tensor(list(weights), dtype=torch.float32)


def _read(path: Path) -> tuple[list[float], dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
        weights = [float(w) for w in found.pop("weights")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights: {path} holds no weights ({type(error).__name__}); give a file that "
            "Outcomes.save wrote"
        ) from error
    return weights, found
