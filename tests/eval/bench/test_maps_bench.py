"""The cost of attention maps: both sides compute the same, and peaks count what operators hide."""

import pytest
import torch
import torch.nn.functional as F

from xattn.eval.studies.benches.maps import available_memory, study
from xattn.runtime.measuring import peak_memory


def test_both_sides_of_the_table_compute_the_same_maps():
    *_, rollout, relevance = study((17,), rounds=1)
    for line, name in ((rollout, "rollout"), (relevance, "generic_relevance")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [name, "17"] and len(cells) == 10
        assert float(cells[8]) < 1e-6 and cells[9] == ""  # no bound on so few tokens


def test_stored_maps_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr("xattn.eval.studies.benches.maps.available_memory", lambda: 1000)
    *_, rollout, _ = study((17,), rounds=1)
    assert "needed" in rollout and "x |" not in rollout
    assert available_memory() > 1 << 20


def test_the_peak_counts_what_lives_at_once_also_inside_operators():
    if torch.cuda.is_available():
        pytest.skip("counted on the CPU")
    x = torch.rand(1, 1, 256, 64, requires_grad=True)

    def attend():  # without a fused path: 256 x 256 scores, in the backward pass once more
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
        torch.autograd.grad(y.sum(), x)

    def one_after_another():
        for _ in range(10):
            torch.zeros(1 << 16)

    assert peak_memory(attend) > 2 * 4 * 256 * 256
    assert 4 << 16 <= peak_memory(one_after_another) < 2 * (4 << 16)


@pytest.mark.parametrize("tokens", [(1024,), (1,), ()])
def test_tokens_have_to_be_a_class_token_and_a_square(tokens):
    with pytest.raises(ValueError, match=r"tokens: got .*; give 1 \+ a square"):
        next(study(tokens))
