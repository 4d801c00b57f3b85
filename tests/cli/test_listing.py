"""xattn list attention: what is known of every mechanism, found out or read from where it is kept."""

import re
import subprocess
import sys
from importlib import import_module

import pytest

from xattn.attention import (
    Mechanism,
    SoftmaxOperator,
    list_attention,
    mechanism_class,
    register_attention,
)
from xattn.attention.base import MECHANISMS
from xattn.attention.description import described
from xattn.cli import main
from xattn.cli.commands.listing import (
    ADDS,
    HOMES,
    declared_docs,
    described_lines,
    measured_rows,
    read_accuracy,
    registered_docs,
)


@pytest.fixture
def mine():
    @register_attention("mine", paper="a test", complexity="N^2 D", cases=({}, {"kind": "b"}))
    class Mine(Mechanism):
        def __init__(self, dim, num_heads, kind="a"):
            super().__init__(dim, num_heads)
            self.kind = kind

        def operator(self, inputs):
            return SoftmaxOperator(inputs.q, inputs.k, inputs.scale)

        def maps(self, operator, inputs):
            return {self.kind: operator.row_sums()[..., inputs.prefix :].unflatten(-1, inputs.grid)}

    yield
    MECHANISMS.remove("mine")


def table(capsys):
    assert main(["list", "attention"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {
        row.split(" | ")[0][2:]: row[2:-2].split(" | ") for row in lines[2:] if row.startswith("|")
    }, lines


def test_every_mechanism_has_a_row_with_all_that_is_known(capsys, mine):
    rows, lines = table(capsys)
    assert list(rows) == list_attention()
    accuracy = read_accuracy()
    first = accuracy["sizes"][0]
    for name, row in rows.items():
        entry = mechanism_class(name).entry
        assert len(row) == 7 and row[1:3] == [entry.paper, entry.complexity]
        kind = "a control" if entry.control else "needs training"
        assert row[3] == ("training-free" if entry.training_free else kind)
        figures = [float(x) for x in re.findall(r"(?:^|; )(\d+\.\d) %", row[4])]
        shown = [
            found
            for at, found in measured_rows(accuracy, name)
            if at is first or found["positions"] == "tile"
        ]
        sparse = [found for found in shown if not found["dense"]]
        assert figures == [found["right"] for found in sparse or shown]
        assert ("dense network" in row[4]) == (len(sparse) not in (0, len(shown)))
        missing = "see docs/results/controls.md" if entry.control else "not measured"
        assert figures or row[4] == missing
    assert any(f"{first['photos']} photos, {first['dense']:.1f} %" in line for line in lines)


def test_what_is_the_dense_network_at_its_size_is_not_shown_as_a_result(capsys):
    rows, _ = table(capsys)
    first = read_accuracy()["sizes"][0]
    dense = {row["mechanism"] for row in first["rows"] if row["dense"]}
    assert dense == {"softmax", "hip", "infllm_v2", "freeswim"}
    for name in dense - {"softmax"}:
        assert f"{first['dense']:.1f} %" not in rows[name][4]
    assert rows["hip"][4].startswith("79.4 % (keep=96, block=4)")
    assert rows["infllm_v2"][4].startswith("78.0 % (block=2, stride=1, dense_below=0)")


def test_maps_of_all_cases_are_named(mine):
    assert described("mine").maps == ("a", "b")
    assert described("agent").maps == ("agents",)
    assert {"importance", "selected", "gate_near"} <= set(described("nsa").maps)


def test_kernels_are_those_that_run():
    assert described("softmax").kernels == ("softmax",)
    assert "block_sparse" in described("gna").kernels
    assert {"block_topk", "block_sparse", "softmax"} <= set(described("nsa").kernels)
    assert "causal_product" in described("hedgehog").kernels
    assert "flows (PyTorch)" in described("flow").kernels


@pytest.mark.parametrize("kind", ADDS)
def test_what_files_declare_is_what_they_register(kind):
    registry = getattr(
        import_module(f"xattn.{HOMES[kind].replace('/', '.')}.base"), kind.upper().replace("-", "_")
    )
    own = {
        n: d
        for n, d in registered_docs(kind).items()
        if registry.get(n).__module__.startswith("xattn.")
    }
    found = declared_docs(kind)
    assert found.keys() == own.keys()
    assert {n: d.split() for n, d in found.items()} == {n: d.split() for n, d in own.items()}


def test_names_of_the_code_stand_without_their_marks():
    lines = [*described_lines("explainers")]
    assert any("mechanism of xattn.attention." in line for line in lines)
    assert not [line for line in lines if "`" in line]


def test_lists_of_the_package_own_things_do_not_wait_for_torch():
    run = f"from xattn.cli import main; import sys; [main(['list', k]) for k in {[*ADDS]}]; "
    told = subprocess.run(
        [sys.executable, "-c", run + "assert 'torch' not in sys.modules"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "  gradcam " in told and "  ttame " in told and "  ninformer " in told


def test_heads_whose_recipe_is_outcomes_are_known_before_torch():
    from xattn.cli.commands.train import ON_TABLES
    from xattn.heads import head_entry, list_heads

    assert set(ON_TABLES) == {
        name for name in list_heads() if head_entry(name).recipe == "outcomes"
    }
