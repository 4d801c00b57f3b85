"""The benchmark of attention mechanisms: its rows, its counting of operations, its plot."""

import pytest
import torch

from xattn.attention import list_attention, mechanism_class
from xattn.cli import main
from xattn.eval.bench.attention import bench, jobs
from xattn.eval.studies.__main__ import main as studies
from xattn.eval.studies.benches import growth


def test_every_mechanism_has_a_row_beside_dense():
    lines = list(bench(tokens=(64,), rounds=1))
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:]
    assert rows[0] == "dense (SDPA)"
    names = [name for name in list_attention() if not mechanism_class(name).entry.control]
    assert [name for name in names if not any(r.startswith(name) for r in rows)] == []
    controls = list(bench(("uniform", "none", "static"), tokens=(64,), rounds=1))
    assert (
        sum(line.startswith(("| uniform |", "| none |", "| static tokens")) for line in controls)
        == 3
    )


def test_operations_are_counted_from_what_the_operator_reads():
    made, visited = jobs(["softmax", "dma"], 256, "cpu", torch.float32)
    assert visited["softmax"] == 256 * 256
    assert visited["dma window=128"] == 256 * 128
    assert visited["block lists S=4"] == 256 * 256
    forward, both = made["dma window=128"]
    assert forward().shape == (1, 6, 256, 64)
    both()


def test_pairs_of_a_product_add_up():
    from xattn.attention import ProductOperator, SoftmaxOperator

    q, a = torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 2, 4)
    assert ProductOperator([SoftmaxOperator(q, a), SoftmaxOperator(a, q)]).pairs == 2 * 9 * 2


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    plot = tmp_path / "times.png"
    assert main(["bench", "attention", "--tokens", "64", "--rounds", "1", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "| gna kernel=7 | 64 |" in out and f"plot: {plot}" in out
    assert plot.stat().st_size > 5000


def test_some_mechanisms_alone_have_rows_beside_dense(capsys):
    command = ["bench", "attention", "--only", "act", "gna", "--tokens", "64", "--rounds", "1"]
    assert main(command) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| 64 |" in line]
    names = [row[0].removeprefix("| ") for row in rows]
    assert names == ["dense (SDPA)", "act", "act stride=8", "gna kernel=7"]
    assert rows[0][3:6] == ["1.00x", "1.0x", "1.00"]  # gain, operations, share
    gain, promised = (float(x.removesuffix("x")) for x in rows[3][3:5])
    assert float(rows[3][5]) == pytest.approx(gain / promised, abs=0.01)


def test_growth_is_from_the_first_number_of_tokens():
    lines = growth.study(("dma",), (256, 1024), rounds=1)
    rows = [line for line in lines if line.startswith("| dma")]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[1] for row in cells] == ["256", "1024"] * (len(cells) // 2)
    assert cells[0][3] == cells[0][5] == "1.00x"
    assert 2 < float(cells[1][5].removesuffix("x")) < 6  # memory is linear in the tokens


def test_half_of_the_heads_are_measured_beside_all(capsys):
    assert studies(["bench-skipped-heads", "--tokens", "256", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| 256")]
    assert [(row[1], row[3]) for row in rows] == [
        (routing, level) for routing in ("even", "skewed") for level in ("attention", "module")
    ]
    for row in rows:
        shares = [int(share) for share in row[2].split()]
        assert shares[0] == 100 and abs(sum(shares) - 300) <= 3  # half of six heads a token
        assert (max(shares[1:]) > 4 * min(shares[1:])) == (row[1] == "skewed")


def test_causal_forms_are_measured_beside_the_others(capsys):
    command = ["bench-causal", "--tokens", "64", "--rounds", "1", "--only"]
    assert studies([*command, "hedgehog", "dma"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " | 64 | " in line]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["hedgehog", "dma:window=128", "dma:window=512"]
    assert studies([*command, "agent"]) != 0
    assert "only: agent has no causal form; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": (200,)}, "tokens: got .200.; give square numbers"),
        ({"names": ("gan",)}, "unknown attention 'gan'; did you mean gna"),
        ({"rounds": 0}, "rounds: got 0"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        list(bench(**options))
