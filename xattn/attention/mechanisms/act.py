"""Calibrated attention (ACT) damps attention sinks: keys that get much attention without being important.

    a_j = mean_i P_ij,   S = {j : a_j > alpha / N} without protected tokens,   m_i = sum_{j in S} P_ij
    P'_ij = beta P_ij  for j in S,    P'_ij = P_ij (1 - beta m_i) / (1 - m_i)  for the other keys

P is softmax attention. The attention that the sinks lose is given to the other keys in proportion to P, so
each row still sums to 1. Let A_S be the softmax over the sinks only, and A_rest the softmax over all other
keys; then

    A = diag(g) P + diag((beta - g) m) A_S,   g = (1 - beta m) / (1 - m)         in rows with m <= 0.9
    A = diag(beta m) A_S + diag(1 - beta m) A_rest              in other rows, and on a GPU in all rows

Prefix tokens are protected, which means that they are never damped. If there are none, the first sink is
protected, which the paper finds useful. No gradient flows through the choice of sinks, and in a causal call
this choice also depends on later queries. The method is from Yu et al., arXiv 2406.15765.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs, may_read_values, on_cpu
from xattn.attention.operators.algebra import GatedOperator, SumOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.segments import Piece, SegmentsOperator
from xattn.attention.order import take_rows
from xattn.attention.plans import cache_plan
from xattn.attention.selection import Segment
from xattn.kernels.softmax.reference import widen

HEAVY = 0.9  # if sinks get more than this share of a row's attention, 1 - m loses precision


@register_attention(
    "act",
    paper="arXiv 2406.15765",
    complexity="N^2 D",
    causal=True,
    training_free=True,
    cases=({"alpha": 1.5}, {"alpha": 1.2, "beta": 0.0, "stride": 3}, {"alpha": 2.0, "heads": (1,)}),
    bench=({}, {"stride": 8}),
    studies={"attention-maps": {"depth": 1.0}},
)
class ACT(Mechanism):
    """Softmax attention with damped sinks, in all heads or in those selected by a search.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        alpha: a key is a sink if it receives more than ``alpha`` times the mean attention, 1 / N. In a
            causal call, the attention to a key is averaged over the queries that see it.
        beta: the share of its attention that a sink keeps, from 0 to 1.
        stride: only the prefix tokens and every ``stride``-th patch are used as queries to find the sinks;
            1 uses all patches.
        heads: the numbers of the heads to calibrate; all by default. The study
            :mod:`xattn.eval.studies.attention_sinks` searches for the best ones.

    Raises:
        ValueError: if ``alpha`` is not positive, ``beta`` is outside 0 to 1, or a head does not exist.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        alpha: float = 5.0,
        beta: float = 0.4,
        stride: int = 1,
        heads: Sequence[int] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if not alpha > 0:
            raise ValueError(f"alpha: got {alpha}; give a positive number, such as 5")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: got {beta}; give a share from 0 to 1")
        wrong = [h for h in heads or () if not 0 <= h < num_heads]
        if wrong:
            raise ValueError(f"heads: got {wrong[0]}; give numbers from 0 to {num_heads - 1}")
        self.alpha, self.beta, self.stride = alpha, beta, check_whole("stride", stride)
        self.heads = None if heads is None else tuple(heads)

    def operator(self, inputs: Inputs) -> Operator:
        softmax = SoftmaxOperator(
            inputs.q, inputs.k, inputs.scale, backend=self.backend, causal=inputs.causal
        )
        softmax.answer(inputs.v)
        with torch.no_grad():
            received = self.received_attention(softmax.detach(), inputs)
            sinks = self.sinks(received, inputs.prefix)
        operator: Operator = softmax
        if self.beta < 1 and (not may_read_values(sinks) or bool(sinks.any())):
            operator = self._calibrated(softmax, sinks, inputs)
        operator.context = received, sinks
        operator.selection = softmax.pairs / 2 / self.stride
        return operator

    def received_attention(
        self, softmax: SoftmaxOperator, inputs: Inputs, stride: int | None = None
    ) -> Tensor:
        """Compute a_j for all keys, (B, H, S): the mean attention that key j gets from the queries that see
        it."""
        q, n, lse = softmax.q, softmax.shape[2], softmax.lse
        stride = self.stride if stride is None else stride
        if stride == 1:
            counted = torch.arange(n, 0, -1, device=q.device) if inputs.causal else n
            return softmax.vecmat(lse.new_ones(1, 1, n).expand(len(q), -1, -1))[:, :, 0] / counted
        index, asked, seen = sample_tokens(n, inputs.prefix, stride, device=q.device)
        if not inputs.causal:
            some = SoftmaxOperator(
                q.index_select(2, index), softmax.k, softmax.scale, None, lse.index_select(2, index),
                self.backend,
            )  # fmt: skip
            ones = lse.new_ones(1, 1, len(index)).expand(len(q), -1, -1)
            return some.vecmat(ones)[:, :, 0] / len(index)
        if not on_cpu(q):  # one launch for all rows is faster than several for a part
            return softmax.vecmat(asked.expand(len(q), -1, -1))[:, :, 0] / seen
        total = widen(q.new_zeros(*q.shape[:3]))
        for part in index.split(softmax.row_chunks()[0].stop):
            total += softmax.rows(part).sum(2)
        return total / seen

    def sinks(self, received: Tensor, prefix: int) -> Tensor:
        """Return which keys are sinks to be damped, bool (B, H, S)."""
        found = received > self.alpha / received.shape[2]
        if prefix:
            found[..., :prefix] = False
        else:  # the first sink is protected
            found &= found.cumsum(-1) > 1
        if self.heads is not None:
            found &= head_mask(self.heads, self.num_heads, device=received.device)
        return found

    def sink_recall(self, inputs: Inputs) -> tuple[int, int]:
        """Compare the sinks found with every ``stride``-th query with those found with all queries.

        Returns:
            How many of the sinks found with all queries are also found with every ``stride``-th query, and
            how many sinks are found with all queries. Both counts include the protected first sink.
        """
        inputs = self.check_inputs(inputs)
        with torch.no_grad():
            softmax = SoftmaxOperator(inputs.q, inputs.k, inputs.scale, causal=inputs.causal)
            line = self.alpha / inputs.k.shape[2]
            every, some = (
                self.received_attention(softmax, inputs, stride)[..., inputs.prefix :] > line
                for stride in (1, self.stride)
            )
        return int((every & some).sum()), int(every.sum())

    def _calibrated(self, softmax: SoftmaxOperator, sinks: Tensor, inputs: Inputs) -> Operator:
        if not self.beta:
            return self._rest(sinks, inputs)
        on_sinks, lse = self._on_sinks(softmax, sinks, inputs)
        m = (lse - softmax.lse).exp()
        terms: list[Operator]
        if not may_read_values(sinks):
            share = self.beta * m
            terms = [
                GatedOperator(on_sinks, share, signed=False),
                GatedOperator(self._rest(sinks, inputs), 1 - share, signed=False),
            ]
            return SumOperator(terms, stochastic=True, signed=False)
        heavy = m.detach() > HEAVY
        look = bool(heavy.any())
        light = torch.where(heavy, 0.0, m) if look else m
        g = (1 - self.beta * light) / (1 - light)
        first = torch.where(heavy, 0.0, g) if look else g
        terms = [
            GatedOperator(softmax, first.to(m.dtype), signed=False),
            GatedOperator(on_sinks, torch.where(heavy, self.beta * m, (self.beta - g) * m)),
        ]
        if look:
            share = torch.where(heavy, 1 - self.beta * m, 0.0)
            rest = self._rest(sinks, inputs)
            terms.append(GatedOperator(rest, share, signed=False, sparse=True))
        return SumOperator(terms, stochastic=True, signed=False)

    def _rest(self, sinks: Tensor, inputs: Inputs) -> SoftmaxOperator:
        """Return A_rest, the softmax over the keys that are not sinks."""
        hidden = torch.zeros_like(sinks, dtype=inputs.q.dtype).masked_fill(sinks, -torch.inf)
        operator = SoftmaxOperator(
            inputs.q, inputs.k, inputs.scale, hidden[:, :, None], None, self.backend,
            every_row=True, causal=inputs.causal,
        )  # fmt: skip
        operator.hides = True
        return operator

    def _on_sinks(
        self, softmax: SoftmaxOperator, sinks: Tensor, inputs: Inputs
    ) -> tuple[Operator, Tensor]:
        """Return A_S and the log-sum-exp of its scores, which is -inf in rows that see no sink."""
        hidden = torch.zeros_like(sinks, dtype=inputs.q.dtype).masked_fill(~sinks, -torch.inf)
        if inputs.causal:
            masked = SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale, hidden[:, :, None], None, self.backend,
                causal=True,
            )  # fmt: skip
            masked.answer(inputs.v)
            return masked, masked.lse
        most = int(min(sinks.shape[2], sinks.shape[2] // self.alpha))  # since a has mean 1 / N
        if may_read_values(sinks):
            most = int(sinks.sum(-1).max())
        index = sinks.to(torch.uint8).topk(max(1, most), -1).indices
        segment = Segment(take_rows(inputs.k, index), bias=hidden.gather(2, index))
        piece = Piece(inputs.q, (segment,), (index,))
        operator = SegmentsOperator([piece], None, sinks.shape[2], inputs.scale, self.backend)
        return operator, operator.answer(inputs.v)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return three maps: ``received``, which is N a_j, where a_j is the attention that a patch receives
        before calibration, per head; ``sinks``, which is 1 where a patch is damped, per head; and
        ``calibrated``, the attention that patches receive after calibration, averaged over heads. Except in
        causal calls, the mean of ``received`` over all tokens is 1."""
        if inputs.grid is None or len(inputs.grid) != 2:
            return {}
        received, sinks = operator.context
        n = received.shape[2]
        ones = inputs.q.new_ones(len(received), 1, n)
        found = {
            "received": received * n,
            "sinks": sinks.to(received.dtype),
            "calibrated": operator.vecmat(ones, "mean"),
        }
        return {
            name: x[..., inputs.prefix :].unflatten(-1, inputs.grid) for name, x in found.items()
        }


@cache_plan
def sample_tokens(n: int, prefix: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the prefix tokens and every ``stride``-th other token.

    Returns:
        The numbers of the selected tokens; a mask of the selected among the ``n`` tokens, (1, 1, n); and
        for each token, how many of the selected see it in a causal call, at least 1.
    """
    index = torch.cat([torch.arange(prefix), torch.arange(prefix, n, stride)])
    asked = torch.zeros(n).index_fill(0, index, 1.0)
    return index, asked[None, None], asked.flip(0).cumsum(0).flip(0).clamp_min(1)


@cache_plan
def head_mask(heads: tuple[int, ...], count: int) -> Tensor:
    """Return which of ``count`` heads are in ``heads``, bool (count, 1)."""
    return (torch.arange(count)[:, None] == torch.tensor(heads, dtype=torch.long)).any(
        1, keepdim=True
    )
