"""Runs mechanisms on tensors of a GPU that is not there, and counts what they would launch and wait for.

    python tests/attention/dry_run.py [NAME...]        a table
    python tests/attention/dry_run.py --json           what test_dry_run.py reads

Tensors are fake ones of a backend that Python makes up, so branches for GPUs are taken and devices may not
mix. PyTorch's operations count as one launch each, views as none, PyTorch's own attention as one in each
direction; of our ops the kernels' host code runs, and its launches and other operations count. It runs in a
process of its own: the backend cannot be taken back.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.kernels import op as kernel_op

RUNS = {}  # the host code of our ops


def _defined(name, schema, run, fake, define=kernel_op.define):
    RUNS[name] = run
    define(name, schema, run, fake)


kernel_op.define = _defined  # before any op is imported

from xattn.attention import create_mechanism, plans, record  # noqa: E402
from xattn.attention.base import MECHANISMS  # noqa: E402
from xattn.kernels import backend  # noqa: E402

DEVICE, WIDTH, HEADS, MOST = "npu", 64, 6, 400
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"static": (1024, 2048)}  # of its maps at most 4,096 tokens are stored
NSA = {"block": 32, "stride": 16, "select_block": 64, "selected": 16, "window": 512}


@dataclass(frozen=True)
class Case:
    """One form of a mechanism."""

    name: str
    options: dict
    causal: bool = False
    prefix: int = 0
    sizes: tuple[int, ...] = (4096, 8192)
    heads: int = HEADS
    kv_heads: int = HEADS
    width: int = WIDTH

    def __str__(self) -> str:
        words = [self.name, *(f"{key}={value}" for key, value in self.options.items())]
        return " ".join([*words, *["causal"] * self.causal, *["prefix"] * bool(self.prefix)])


@dataclass
class Found:
    """Launches of a later call for each of the sizes, and where it waits or copies."""

    case: str
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    """Launches by the question that a recorded call answers."""
    waits: list[str] = field(default_factory=list)
    """Where an answer waits or copies, the name of the question first."""
    errors: list[str] = field(default_factory=list)


def cases() -> list[Case]:
    made = []
    for entry in MECHANISMS.entries():
        sizes = SIZES.get(entry.name, (4096, 8192))
        for options in entry.bench:
            for causal in (False, True) if entry.causal else (False,):
                made += [Case(entry.name, dict(options), causal, p, sizes) for p in (0, 1)]
    return [*made, Case("nsa", NSA, True, 0, (65536,), 64, 4, 128)]


# ------------------------------------------------------------------ the device


FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "lift_fresh", "detach", "_reshape_alias", "unsafe_split",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}


class Counts(TorchDispatchMode):
    """Counts launches, and notes what waits for the device or copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.by_op, self.stops, self.most = 0, Counter(), [], MOST

    def launch(self, name: str) -> None:
        self.launches += 1
        self.by_op[name] += 1
        if self.launches > self.most:
            raise RuntimeError(f"more than {self.most} launches")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name.partition("::")[2]
        if op.namespace == "xattn":  # the host code of its kernels
            with self:
                return RUNS[op._schema.name](*args, **kwargs)
        if op.namespace == "prim":  # no more than x.device
            return op(*args, **kwargs)
        if op._can_decompose():  # host code runs below autograd, where contiguous() comes as one op
            with self:
                return op.decompose(*args, **kwargs)
        given = [x for x in tensors(args, kwargs)]
        here = any(x.device.type == DEVICE for x in given)
        if name in WAITS and any(isinstance(x, FakeTensor) for x in given):
            self.stop(f"waits in {name}")
            if name == "_local_scalar_dense":
                return {torch.bool: True}.get(
                    given[0].dtype, 1 if not given[0].is_floating_point() else 1.0
                )
            if name == "nonzero":
                return given[0].new_empty(1, given[0].ndim, dtype=torch.int64)
        out = op(*args, **kwargs)
        made = [x for x in tensors(out)]
        there = here or any(x.device.type == DEVICE for x in made)
        if there and any(x.device.type == "cpu" and x.ndim for x in [*given, *made]):
            self.stop(f"copies in {name}")
        view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns
        )
        if there and not view and name not in FREE:
            self.launch(op._schema.name)
        return out

    def stop(self, what: str) -> None:
        frame, at = sys._getframe(2), "?"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if ROOT in path.parents and ".venv" not in path.parts and "tests" not in path.parts:
                at = f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
                break
            frame = frame.f_back
        self.stops.append(f"{at} {what}")


class Copies(TorchFunctionMode):
    """``x.new_tensor`` of a list, which fake tensors cannot make."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.new_tensor and args[0].device.type == DEVICE:
            self.counts.stop("copies in new_tensor")
            return args[0].new_empty(torch.tensor(args[1], device="cpu").shape)
        return function(*args, **(kwargs or {}))


def tensors(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors(*value)
        elif isinstance(value, dict):
            yield from tensors(*value.values())


MODE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(x: torch.Tensor) -> torch.Tensor:
    """A tensor like ``x`` on the device."""
    with MODE:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
    return torch.nn.Parameter(made, x.requires_grad) if isinstance(x, torch.nn.Parameter) else made


def set_up() -> None:
    """Make the device, and have what chooses paths, attends or launches take it for a GPU."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    from triton.runtime.jit import JITFunction

    _setup_privateuseone_for_python_backend(DEVICE)
    torch.npu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=8, minor=0)
    choose = backend.choose

    def chosen(name, device, *more, **options):
        device = torch.device("cuda") if torch.device(device).type == DEVICE else device
        return choose(name, device, *more, **options)

    def moved(made, device):
        if torch.device(device).type != DEVICE:
            return made
        with plans.real_tensors():
            return plans.map_tensors(made, fake)

    for module in list(sys.modules.values()):
        if getattr(module, "choose", None) is choose and module.__name__.startswith("xattn"):
            module.choose = chosen
    plans.move_plan = moved
    JITFunction.run = lambda self, *args, **options: ACTIVE[-1].launch(self.__name__)
    _own_attention()


def _own_attention() -> None:
    torch.library.define("dry::sdpa", "(Tensor q, Tensor k, Tensor v, Tensor? bias) -> Tensor")
    torch.library.define(
        "dry::sdpa_back",
        "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    )
    torch.library.register_fake(
        "dry::sdpa", lambda q, k, v, bias: q.new_empty(*q.shape[:3], v.shape[3])
    )
    torch.library.register_fake(
        "dry::sdpa_back", lambda g, *x: tuple(torch.empty_like(t) for t in x[:3])
    )

    def back(ctx, grad):
        return *torch.ops.dry.sdpa_back(grad, *ctx.saved_tensors), None

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    torch.library.register_autograd("dry::sdpa", back, setup_context=save)

    def attention(q, k, v, attn_mask=None, **options):
        if not options.get("enable_gqa") and k.shape[1] != q.shape[1]:
            raise ValueError("fewer key heads without enable_gqa")
        return torch.ops.dry.sdpa(q, k, v, attn_mask)

    F.scaled_dot_product_attention = attention


ACTIVE: list[Counts] = []


@contextmanager
def counting():
    counts = Counts()
    ACTIVE.append(counts)
    try:
        with MODE, Copies(counts), counts:
            yield counts
    finally:
        ACTIVE.pop()


# ------------------------------------------------------------------ what is run


def made(case: Case):
    layer = create_mechanism(case.name, case.heads * case.width, case.heads, **case.options)
    layer = layer.bfloat16().eval()
    for module in layer.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({name: None if x is None else fake(x) for name, x in kept.items()})
    return layer


def given(case: Case, tokens: int):
    """Arguments of a call for ``tokens`` patches."""
    entry, n, dims = MECHANISMS.entry(case.name), tokens + case.prefix, case.heads * case.width
    side = 2 ** (math.isqrt(tokens).bit_length() - 1)
    grid = (side, tokens // side) if {0, 2} & {*entry.grid} and not case.causal else (tokens,)
    if case.causal and 1 not in entry.grid:
        grid = None
    heads = case.heads, case.kv_heads, case.kv_heads
    qkv = [torch.empty(1, h, n, case.width, dtype=torch.bfloat16, device="meta") for h in heads]
    qkv = [fake(x).requires_grad_() for x in qkv]
    x = fake(torch.empty(1, n, dims, dtype=torch.bfloat16, device="meta"))
    return qkv, (grid, case.prefix), {"x": x, "causal": case.causal}


def count(case: Case) -> Found:
    found = Found(str(case))
    try:
        for tokens in case.sizes:
            layer, (qkv, place, more) = made(case), given(case, tokens)
            leaves = [*qkv, *layer.parameters()]
            with counting():
                layer(*qkv, *place, **more)
            with counting() as forward:
                y = layer(*qkv, *place, **more)
            found.forward.append(forward.launches)
            with counting() as back:
                torch.autograd.grad(y, leaves, torch.empty_like(y), allow_unused=True)
            found.backward.append(back.launches)
            found.stops += forward.stops + back.stops
            if "-v" in sys.argv:
                print(
                    case, tokens, forward.by_op.most_common(), "\n  back", back.by_op.most_common()
                )
        ask(case, found)
    except Exception as error:
        found.errors.append(_where(error))
    return found


def ask(case: Case, found: Found) -> None:
    """Count what questions to a recorded call launch, those to a second call for each number of tokens."""
    for tokens in case.sizes:
        layer, (qkv, place, more) = made(case), given(case, tokens)
        r = fake(torch.empty(1, 1, qkv[0].shape[2], device="meta"))
        index = fake(torch.empty(5, dtype=torch.int64, device="meta"))
        questions = {
            "maps": lambda call: call.maps,
            "rows": lambda call, index=index: call.operator.rows(index),
            "vecmat": lambda call, r=r: call.operator.vecmat(r),
        }
        if tokens <= 4096:  # gradient_vecmat goes over rows, 2^27 numbers of A at a time
            questions |= {
                "tile": lambda call: call.operator.tile(slice(0, 7), slice(None)),
                "row_sums": lambda call: call.operator.row_sums(),
                "gradient_vecmat": lambda call, v=qkv[2], r=r: call.operator.gradient_vecmat(
                    v, call.output, r
                ),
            }
        for later in (False, True):
            with torch.no_grad(), counting() as counts, record(layer) as calls:
                counts.most = math.inf
                layer(*qkv, *place, **more)
            for name, question in questions.items():
                with torch.no_grad(), counting() as counts:
                    counts.most = math.inf
                    try:
                        question(calls[0])
                    except Exception as error:
                        found.errors.append(f"{name}: {_where(error)}")
                if later:
                    found.answers.setdefault(name, []).append(counts.launches)
                    found.waits += [f"{name} {stop}" for stop in counts.stops]
                    if "-v" in sys.argv:
                        print("  ", name, tokens, counts.by_op.most_common())


def _where(error: Exception) -> str:
    trace, at = error.__traceback__, "?"
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if ROOT in path.parents and ".venv" not in path.parts and "tests" not in path.parts:
            at = f"{path.relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} {' '.join(str(error).split())[:160]} at {at}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_up()
    names = [x for x in sys.argv[1:] if not x.startswith("-")]
    results = [count(case) for case in cases() if not names or case.name in names]
    if "--json" in sys.argv:
        print(json.dumps([asdict(x) for x in results]))
    else:
        for x in results:
            print(
                f"| {x.case} | {x.forward} | {x.backward} | {Counter(x.stops) or 'none'} |",
                *x.errors,
            )
