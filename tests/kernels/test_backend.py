"""The choice of a path: kernels where they fit, plain PyTorch elsewhere, and on the tensors' own device."""

import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xattn.kernels import backend, op
from xattn.kernels.backend import BACKENDS, HAS_TRITON, choose
from xattn.kernels.block_sparse import block_sparse_attention
from xattn.kernels.block_sparse.block_lists import check_index, check_numbers
from xattn.kernels.block_topk import block_topk
from xattn.kernels.covariance_solve import covariance_solve
from xattn.kernels.grouped import grouped_attention
from xattn.kernels.local_linear import local_linear
from xattn.kernels.pooling import softmax_pooling
from xattn.kernels.ragged_queries import ragged_attention
from xattn.kernels.softmax import cpu, softmax_attention
from xattn.kernels.softplus import softplus_attention
from xattn.kernels.vecmat import gradient_vecmat, vecmat

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
INDEX = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
CALLS = {
    "softmax": lambda x, **o: softmax_attention(x, x, x, **o),
    "block_sparse": lambda x, **o: block_sparse_attention(
        x, x, x, INDEX, q_block=1, k_block=1, **o
    ),
    "grouped": lambda x, **o: grouped_attention(x, x, x, x, INDEX, q_block=1, k_block=1, **o),
    "block_topk": lambda x, **o: block_topk(x, x, s=1, **o),
    "ragged_queries": lambda x, **o: ragged_attention(x, x, x, x[..., 0] > 0, **o),
    "vecmat": lambda x, **o: vecmat(x, x, x[..., 0], x[..., 0], **o),
    "gradient_vecmat": lambda x, **o: gradient_vecmat(x, x, x, x[..., 0], x, x[..., 0], **o),
    "covariance_solve": lambda x, **o: covariance_solve(x, x, x, x[..., 0], x, x, x[..., 0], **o),
    "local_linear": lambda x, **o: local_linear(x, x, x, x, x[..., 0], x, x, **o),
    "softplus": lambda x, **o: softplus_attention(x, x, x, scale=1.0, **o),
    "pooling": lambda x, **o: softmax_pooling(None, None, x, x[:, 0, :, :4], **o),
}


@needs_triton
@pytest.mark.parametrize("name", CALLS)
def test_what_kernels_do_not_take_is_refused_if_they_are_asked_for_and_else_computed(name):
    for shape, dtype in ((4, 16), torch.float64), ((4, 272), torch.float32):
        if name == "pooling" and dtype == torch.float32:
            continue  # any width
        x = torch.ones(1, 1, *shape, dtype=dtype)
        CALLS[name](x)
        says = "float64; give float32" if dtype == torch.float64 else "width 272; give at most"
        with pytest.raises(
            ValueError, match=rf"backend='triton': got (torch\.)?{says}[^\n]*'auto'"
        ):
            CALLS[name](x, backend="triton")


@needs_triton
def test_long_blocks_and_lists_are_refused_if_kernels_are_asked_for():
    x, index = torch.ones(1, 1, 300, 16), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    options = {"q_block": 300, "k_block": 65, "backend": "triton"}
    with pytest.raises(ValueError, match="key blocks of 65 tokens; give at most 64"):
        grouped_attention(x, x, x, x[:, :, :5], index, **options)
    with pytest.raises(ValueError, match="got s = 257; give at most 256"):
        block_topk(x, x, s=257, backend="triton")
    assert block_topk(x[:, :, :20], x[:, :, :20], s=257, backend="triton")[0].shape[3] == 257


def test_auto_on_a_gpu_is_triton_where_it_fits_and_says_once_where_not(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    gpu, major = torch.device("cuda:1"), [8]
    properties = lambda device: SimpleNamespace(major=major[0])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert choose("auto", gpu, torch.bfloat16) == "triton"
    for limit, dtype, given in (
        ("got torch.float64", torch.float64, None),
        ("too wide", torch.float32, "too wide"),
        ("too little shared memory", torch.float32, None),
    ):
        major[0] = 7 if "memory" in limit else 8
        backend._say_slow.cache_clear()
        with pytest.warns(UserWarning, match=f"plain PyTorch on this GPU: .*{limit}") as said:
            assert choose("auto", gpu, dtype, given) == "cpu"
        assert said[0].filename == __file__  # of the op that chooses
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose("auto", gpu, dtype, given) == "cpu"
        with pytest.raises(ValueError, match=f"backend='triton': .*{limit}"):
            choose("triton", gpu, dtype, given)
        assert choose("reference", gpu, dtype, given) == "reference"
    backend._say_slow.cache_clear()


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"vecmat", "gradient_vecmat"}))
def test_plain_pytorch_asks_how_much_to_take_at_a_time_on_its_device(name, monkeypatch):
    x, asked = torch.rand(1, 1, 4, 16, generator=torch.Generator().manual_seed(0)), []
    expected = CALLS[name](x, backend="cpu")
    monkeypatch.setattr(cpu, "_fused", lambda *_: None)  # of a CPU alone
    few = lambda device, cached: (asked.append(device), 1)[1]  # noqa: E731
    for module in [m for key, m in sys.modules.items() if key.startswith("xattn.kernels.")]:
        if module is not backend and hasattr(module, "tile_entries"):
            monkeypatch.setattr(module, "tile_entries", few)
    for found, true in zip(CALLS[name](x, backend="cpu"), expected, strict=True):
        assert torch.allclose(found, true, atol=1e-5)
    assert {*asked} == {x.device}


@pytest.mark.parametrize("check", [check_index, check_numbers])
def test_numbers_on_a_gpu_are_read_only_if_asked(check, monkeypatch):
    x = torch.empty(1, 2, dtype=torch.int32, device="meta")  # which has none to read
    check(x, 3, "index")
    monkeypatch.setenv("XATTN_CHECK", "1")
    with pytest.raises(RuntimeError, match="meta"):
        check(x, 3, "index")


@needs_triton
def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    device = torch.device("cpu")
    assert [choose(b, device) for b in BACKENDS] == ["cpu", "reference", "cpu", "triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="Triton does not run on cpu"):
        choose("triton", device)


def test_ops_run_on_the_device_of_their_tensors_forward_and_backward(monkeypatch):
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:1")
        assert backend.on_device(x).idx == 1
    inside = []

    @contextmanager
    def on_device(x):
        inside.append("in")
        yield
        inside.append("out")

    monkeypatch.setattr(op, "on_device", on_device)
    for name in ("forward", "backward"):
        given = getattr(cpu, name)
        noted = lambda *args, f=given, n=name: (inside.append(n), f(*args))[1]  # noqa: E731
        monkeypatch.setattr(cpu, name, noted)
    q = torch.ones(1, 1, 4, 16, requires_grad=True)
    softmax_attention(q, q, q)[0].sum().backward()
    assert inside == ["in", "forward", "out", "in", "backward", "out"]
