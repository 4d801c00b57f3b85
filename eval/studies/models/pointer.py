"""Pointer networks: sequences of elements of their own input, of any number (arXiv 1506.03134).

    e = encoder(points),    d_t = LSTM(e of the point of step t - 1)
    p_t = softmax over j of v . tanh(W_1 e_j + W_2 d_t)

    net = PointerNet()
    loss = net.loss(points, answers)            # (B, n, 2) and (B, T), all steps in one batch
    net.answers(points, beam=4)                 # (B, T), -1 after the end

The encoder is a transformer without positions, which treats points as a set (1511.06391), or the paper's
LSTM, which reads them by index. Points that were visited have probability 0, and an end symbol, a learned
vector among the points, ends a sequence.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import whole
from xattn.heads.pointer import Pointing, left_over

ENCODERS = ("set", "lstm")
State = tuple[Tensor, Tensor]


class PointerNet(nn.Module):
    """Points (B, n, 2), of which each answer is a sequence.

    Args:
        width: of all vectors; ``layers`` and ``heads``: of the transformer.
        encoder: "set" or "lstm".
        memory: whether d_t is an LSTM over what was pointed to; without, it is the same at every step, and
            the network is a Plackett-Luce model.
        revisit: whether a point may be pointed to again, as for triangles.
        end: whether there is an end symbol; without, answers are permutations.

    Raises:
        ValueError: an unknown encoder, or sizes that do not fit.
    """

    def __init__(
        self,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
        encoder: Literal["set", "lstm"] = "set",
        memory: bool = True,
        revisit: bool = False,
        end: bool = True,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"encoder: got {encoder!r}; choose one of {', '.join(ENCODERS)}")
        if whole("width", width) % whole("heads", heads):
            raise ValueError(f"heads: got {heads}; give a divisor of width, {width}")
        if revisit and not end:
            raise ValueError("end: got False with revisit=True; such an answer would never end")
        self.memory, self.revisit, self.has_end = memory, revisit, end
        self.encoder: Any
        if encoder == "set":
            self.embed = nn.Linear(2, width)
            layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(
                layer, whole("layers", layers), nn.LayerNorm(width), enable_nested_tensor=False
            )
            self.start = nn.Linear(width, 2 * width)
        else:
            self.encoder = nn.LSTM(2, width, batch_first=True)
        self.first = nn.Parameter(torch.randn(width) * 0.1)  # what the decoder reads before a point
        self.end = nn.Parameter(torch.randn(width) * 0.1) if end else None
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.pointing = Pointing(width)

    def encoded(self, points: Tensor) -> tuple[Tensor, State]:
        """Points (B, n, 2) as (B, n, C), then the end symbol, if any; and the decoder's first state."""
        if points.ndim != 3 or points.shape[2] != 2 or points.shape[1] < 1:
            raise ValueError(f"points: got shape {tuple(points.shape)}; give (B, n, 2)")
        if isinstance(self.encoder, nn.LSTM):
            e, state = self.encoder(points)
        else:
            e = self.encoder(self.embed(points))
            h, c = self.start(e.mean(1)).chunk(2, -1)
            state = (h.tanh()[None], c[None])
        if self.end is not None:
            e = torch.cat([e, self.end.expand(len(e), 1, -1)], 1)
        return e, state

    def forward(self, points: Tensor, answers: Tensor) -> Tensor:
        """Log probabilities (B, T + 1, n + 1) of every step after those of ``answers`` (B, T); the
        end symbol is the last element, and without one they are (B, T, n)."""
        e, state = self.encoded(points)
        read = answers[:, :-1] if self.end is None else answers
        read = torch.where(
            read < 0, points.shape[1], read
        )  # the end symbol, whose steps count for nothing
        pointed = e.gather(1, read[..., None].expand(-1, -1, e.shape[2]))
        inputs = torch.cat([self.first.expand(len(e), 1, -1), pointed], 1)
        if self.memory:
            queries = self.decoder(inputs, state)[0]
        else:
            queries = state[0][0][:, None].expand_as(inputs)
        scores = self.pointing(e, queries)
        return self._allowed(scores, self.steps(answers)).log_softmax(-1)

    def steps(self, answers: Tensor) -> Tensor:
        """What each step of :meth:`forward` should point to: ``answers`` (B, T), then the end symbol as
        -2, then -1."""
        if self.end is None:
            return answers
        padded = F.pad(answers, (0, 1), value=-1)
        ends = (padded < 0).cumsum(1) == 1
        return torch.where(ends, -2, padded)

    def loss(self, points: Tensor, answers: Tensor) -> Tensor:
        """Negative log likelihood of ``answers`` (B, T), the mean over their steps."""
        log_p = self(points, answers)
        return F.nll_loss(log_p.flatten(0, 1), self._targets(points, answers).flatten())

    def log_likelihood(self, points: Tensor, answers: Tensor) -> Tensor:
        """(B,): of ``answers`` (B, T), end symbol included."""
        target = self._targets(points, answers)
        found = self(points, answers).gather(2, target.clamp_min(0)[..., None])[..., 0]
        return torch.where(target < 0, 0, found).sum(1)

    def _targets(self, points: Tensor, answers: Tensor) -> Tensor:
        steps = self.steps(answers)
        return torch.where(steps == -2, points.shape[1], torch.where(steps == -1, -100, steps))

    def _allowed(self, scores: Tensor, steps: Tensor) -> Tensor:
        if self.revisit:
            return scores
        return scores.masked_fill(~left_over(steps, scores.shape[2]), -torch.inf)

    @torch.no_grad()
    def answers(self, points: Tensor, beam: int = 1, longest: int | None = None) -> Tensor:
        """The likeliest answers (B, T) that a search with ``beam`` sequences finds, -1 after their ends; a
        beam of 1 takes the likeliest point of every step.

        Args:
            longest: steps at most; by default n, or 3 (2 n - 5), all corners of the most triangles.
        """
        whole("beam", beam)
        e, state = self.encoded(points)
        count, b, keys = points.shape[1], len(points), e.shape[1]
        most = longest or (max(1, 3 * (2 * count - 5)) if self.revisit else count)
        e = e.repeat_interleave(beam, 0)
        state = (state[0].repeat_interleave(beam, 1), state[1].repeat_interleave(beam, 1))
        inputs = self.first.expand(b * beam, 1, -1)
        found = points.new_full((b, beam, 0), -1, dtype=torch.long)
        free = torch.ones(b, beam, keys, dtype=torch.bool, device=points.device)
        done = torch.zeros(b, beam, dtype=torch.bool, device=points.device)
        total = points.new_full((b, beam), -torch.inf)
        total[:, 0] = 0
        for _ in range(most):
            query = state[0][0][:, None]
            if self.memory:
                query, state = self.decoder(inputs, state)
            scores = self.pointing(e, query).view(b, beam, keys)
            log_p = scores.masked_fill(~free, -torch.inf).log_softmax(-1)
            stay = torch.full_like(log_p, -torch.inf)
            stay[..., -1] = 0  # a sequence that has ended goes on as it is
            log_p = torch.where(done[..., None], stay, log_p)
            total, best = (total[..., None] + log_p).flatten(1).topk(beam, 1)
            parent, point = best // keys, best % keys
            found, free = (_of(x, parent) for x in (found, free))
            done = done.gather(1, parent)
            if self.end is not None:
                done = done | (point == count)
            found = torch.cat([found, point.masked_fill(done, -1)[..., None]], 2)
            if not self.revisit:
                ended = torch.arange(keys, device=points.device) == count
                free = free & ((point[..., None] != torch.arange(keys, device=e.device)) | ended)
            flat = (parent + beam * torch.arange(b, device=e.device)[:, None]).flatten()
            state = (state[0][:, flat], state[1][:, flat])
            inputs = e[torch.arange(b * beam, device=e.device), point.flatten()][:, None]
            if bool(done.all()):
                break
        return found[:, 0]  # the beam is sorted


def _of(x: Tensor, parent: Tensor) -> Tensor:
    """Rows (B, b, ...) of ``x`` by ``parent`` (B, b)."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))
