"""Plans are made once, within bounds, and are constants of graphs; rows are taken alike on all devices."""

import pytest
import torch

from xattn.attention import create_attention, mechanism_class, order, plans
from xattn.attention.operators.patterns import Pattern
from xattn.attention.order import take_rows
from xattn.attention.plans import Constants, cache_plan
from xattn.attention.selection import Blocks
from xattn.runtime.lru_cache import LRUCache


@pytest.fixture
def counted(monkeypatch):
    """A plan of its own, and the numbers that it was made of."""
    monkeypatch.setattr(plans, "KEPT", LRUCache(2**20))
    made = []

    @cache_plan
    def numbers(count, step=1):
        made.append((count, step))
        whole = torch.arange(count) * step
        return whole, int(whole[-1])  # a value that is read, as plans do

    return numbers, made


def constants():
    return [name for name in vars(Constants) if name.startswith("plan_")]


def test_a_plan_is_made_once_until_others_need_its_room(counted, monkeypatch):
    numbers, made = counted
    assert numbers(5)[0] is numbers(5)[0] and numbers(5, step=2)[1] == 8
    assert made == [(5, 1), (5, 2)]
    monkeypatch.setattr(plans, "KEPT", LRUCache(1000))
    for count in (100, 20, 30):  # of 8 bytes each: the first one has no room beside the others
        numbers(count)
    made.clear()
    numbers(20), numbers(30), numbers(100)
    assert made == [(100, 1)]


def test_the_mask_of_a_pattern_counts_as_a_plan(monkeypatch):
    pattern = Pattern(Blocks(torch.zeros(1, 1, 8, 1, dtype=torch.int32), 1, 1), fixed=True)
    layout = 8, 0, False, torch.float32
    monkeypatch.setattr(plans, "KEPT", LRUCache(8 * 8 * 4))
    mask, _ = pattern.kept_mask(*layout)
    assert pattern.kept_mask(*layout)[0] is mask
    plans.load_or_make("another", lambda: torch.zeros(8))
    assert pattern.kept_mask(*layout)[0] is not mask


def test_code_compiled_for_a_plan_that_gave_way_is_compiled_anew(counted, monkeypatch):
    numbers, _ = counted
    for name in constants():
        delattr(Constants, name)
    monkeypatch.setattr(plans, "MOST", 1)

    def add(x, step):
        whole, last = numbers(3, step=step)
        return x + whole * last

    torch._dynamo.reset()
    compiled, x = torch.compile(add, backend="eager", fullgraph=True), torch.ones(3)
    for step in (1, 2, 1, 2):
        assert torch.equal(compiled(x, step), add(x, step)) and len(constants()) == 1


def test_lengths_that_compiled_code_leaves_open_are_numbers_to_a_plan(counted):
    numbers, made = counted

    def add(x):
        return x + numbers(3, step=x.shape[0])[1] + numbers(x.shape[1])[1]

    torch._dynamo.reset()
    compiled = torch.compile(add, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((3, 4), (5, 6)):
        assert torch.equal(compiled(torch.zeros(shape)), add(torch.zeros(shape)))
    assert set(map(type, sum(made, ()))) == {int}


def test_a_plan_made_during_an_export_is_a_constant_and_serves_later_calls(counted):
    numbers, made = counted

    class Adding(torch.nn.Module):
        def forward(self, x):
            whole, last = numbers(x.shape[1])
            return x + whole * last

    x, free = torch.ones(2, 5), {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Adding(), (x,), dynamic_shapes=free, strict=False)
    expected = 1 + 4 * torch.arange(5.0)
    for batch in (2, 3):
        found = program.module()(x[:1].expand(batch, -1))
        assert torch.equal(found, expected.expand(batch, -1))
    assert torch.equal(Adding()(x), expected.expand(2, -1)) and made == [(5, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["gna", "hip", "llsa", "nsa", "routing"])
def test_a_layer_that_never_ran_is_exported(name, causal):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = create_attention(name, 32, 2, **mechanism_class(name).entry.cases[0])

        def forward(self, x):
            return self.layer(x, (27,) if causal else (9, 3), 1, causal)

    net, x = Net().eval(), torch.randn(2, 28, 32)  # a grid of no other test
    program = torch.export.export(net, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("cpu", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize(
    "shape, index",
    [((2, 3), (2, 3)), ((2, 3), (1, 3)), ((2, 1), (2, 3)), ((2, 3), (1, 1)), ((2, 3), (3,)), ((2, 3), ())],
)  # fmt: skip
def test_rows_are_taken_by_numbers_that_several_tables_share(shape, index, cpu, monkeypatch):
    monkeypatch.setattr(order, "on_cpu", lambda x: cpu)
    x = torch.randn(*shape, 7, 4, dtype=torch.float64, requires_grad=True)
    at = torch.randint(7, (*index, 5))
    found = take_rows(x, at)
    every = torch.arange(7) == at[..., None]  # (..., 5, 7), as a product
    expected = every.double() @ x
    assert found.shape == expected.shape and torch.equal(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads)
