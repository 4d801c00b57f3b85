"""Flows of Flow-Attention: equal to their definition, conserved, linear in memory, and blind to later tokens."""

import pytest
import torch

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.flows import flows, reference
from xattn.runtime.measuring import peak_memory

E = reference.EPS
SIZES = [(1, 1), (31, 31), (32, 32), (33, 33), (7, 50), (197, 197)]


def features(n, s, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(2, 3, tokens, width, generator=generator, dtype=torch.float64).to(dtype)
        for tokens in (n, s)
    ]


def defined(q, k, added, causal):
    """Token by token."""
    found = [torch.zeros(x.shape[:3], dtype=x.dtype) for x in (q, q, k, k)]
    incoming, refined, outgoing, conserved = found

    def upto(x, i):
        return x[:, :, : i + 1] if causal else x

    for i in range(q.shape[2]):
        incoming[:, :, i] = ((q[:, :, i] + E) * (upto(k, i).sum(2) + E)).sum(-1) + added
    for i in range(k.shape[2]):
        outgoing[:, :, i] = ((k[:, :, i] + E) * (upto(q, i).sum(2) + E)).sum(-1) + added
    each = torch.arange(1, 1 + k.shape[2]) if causal else 1
    shared, taken = (x * (each / y)[..., None] for x, y in ((k, outgoing), (q, incoming)))
    for x, total, out in ((q, shared, refined), (k, taken, conserved)):
        for i in range(x.shape[2]):
            out[:, :, i] = ((x[:, :, i] + E) * (upto(total, i).sum(2) + E)).sum(-1) + added
    return incoming, refined / each, conserved / each


@pytest.mark.parametrize("added", [0.0, 1e-2])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, s", SIZES)
def test_flows_are_those_of_the_definition(n, s, causal, backend, added):
    if causal and n != s:
        with pytest.raises(ValueError, match="causal: got 7 queries and 50 keys"):
            flows(*features(n, s), causal=True)
        return
    q, k = features(n, s)
    found = flows(q, k, added=added, causal=causal, backend=backend)
    for flow, exact in zip(found, defined(q, k, added, causal), strict=True):
        assert torch.allclose(flow, exact)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("added", [0.0, 1e-2])
@pytest.mark.parametrize("n", [1, 33, 150])
def test_causal_flows_by_kernels_are_those_of_the_definition(n, added):
    def run(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in features(n, n)]
        found = flows(*leaves, added=added, causal=True, backend=backend)
        return [*found, *torch.autograd.grad(sum(x.square().sum() for x in found), leaves)]

    for x, true in zip(run(torch.float32, "triton"), run(torch.float64, "reference"), strict=True):
        assert (x.double() - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("n, s", [(5, 5), (40, 40), (1, 1), (3, 70)])
def test_what_flows_in_and_out_is_conserved(n, s):
    q, k = features(n, s)
    found = flows(q, k)
    assert torch.allclose(found.refined.sum(-1), torch.tensor(float(s)).double(), rtol=1e-4)
    assert torch.allclose(found.conserved.sum(-1), torch.tensor(float(n)).double(), rtol=1e-4)
    into = (q / found.incoming[..., None] @ k.transpose(-2, -1)).sum(-1)
    assert torch.allclose(into, torch.ones_like(into), rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_summed_in_float32(dtype, error, causal):
    q, k = features(300, 300, dtype=dtype)
    found, exact = flows(q, k, causal=causal), flows(q.double(), k.double(), causal=causal)
    for flow, true in zip(found, exact, strict=True):
        assert flow.dtype == torch.float32
        assert torch.allclose(flow.double(), true, rtol=error)


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_square_is_stored(causal):
    q, k = (x[:1, :1].requires_grad_() for x in features(1024, 1024, dtype=torch.float32))
    peak = peak_memory(lambda: sum(flows(q, k, causal=causal)).sum().backward())
    assert peak < 4 * 1024**2 / 4


def test_what_does_not_fit_is_refused():
    q, k = features(6, 6)
    with pytest.raises(ValueError, match="k: got 1 heads; give 3"):
        flows(q, k[:, :1])
    with pytest.raises(ValueError, match="k: got shape"):
        flows(q, k[..., :2])
    with pytest.raises(ValueError, match="backend: got 'triton'"):
        flows(q, k, backend="triton")
