"""SHRP on sentences: batches, what pruning leaves, limit cases of routing, the command."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import single_heads, sst
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.single_heads import (
    ACCURACIES,
    PAIRS,
    TIMES,
    SingleHeadsConfig,
    accuracy,
    batches,
    encoder,
    largest_head,
    load_corpus,
    prune_by_magnitude,
    single,
    size_of,
    size_with,
    train,
    units_for,
)

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "sst"
GOOD, BAD, PLAIN = ("fine", "lovely"), ("dull", "awful"), ("film", "the", "it", "is", "a")
CONFIG = SingleHeadsConfig(dim=16, hidden=24, phrases=40)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A folder of sentences of plain words and one that decides."""
    folder, rng = tmp_path_factory.mktemp("trees"), np.random.default_rng(0)
    for name, count in (("train", 150), ("dev", 40)):
        lines = []
        for _ in range(count):
            label = int(rng.integers(2))
            tree = f"({4 * label} {rng.choice(GOOD if label else BAD)})"
            for _ in range(int(rng.integers(1, 7))):
                tree = f"({1 + 2 * label} (2 {rng.choice(PLAIN)}) {tree})"
            lines.append(tree)
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def corpus(trees):
    return load_corpus(trees)


def words(count=3, length=5):
    return torch.randint(7, (count, length), generator=torch.Generator().manual_seed(1))


def test_no_text_is_in_two_parts(corpus):
    parts = [set(part.texts) for part in corpus[:3]]
    assert all(parts) and not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    assert all(len(text) > 1 for text in corpus.phrases.texts)


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_every_text_once_and_one_length(seed):
    lengths = torch.tensor([2, 5, 2, 2, 9, 5, 2])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = batches(lengths, 6, generator)
    assert sorted(torch.cat(found).tolist()) == list(range(7))
    for numbers in found:
        assert len(lengths[numbers].unique()) == 1
        assert len(numbers) == 1 or int(lengths[numbers].sum()) <= 6


def test_a_router_that_always_takes_the_kept_heads_loses_nothing_by_pruning():
    net = encoder(CONFIG, 7, "routed").eval()
    kept = [1, 3]
    with torch.no_grad():
        for block, head in zip(net.blocks, kept, strict=True):
            block.router.weight.zero_()
            block.router.bias.copy_(100.0 * (torch.arange(4) == head))
    torch.testing.assert_close(single(net, kept)(words()), net(words()))
    assert not torch.allclose(single(net, [0, 0])(words()), net(words()), atol=1e-4)


def test_what_is_pruned_has_the_parameters_of_the_encoder_trained_alone():
    alone = encoder(CONFIG, 7, "single")
    assert size_of(single(encoder(CONFIG, 7, "routed"), [None, 2])) == size_of(alone)
    dim, d, m = CONFIG.dim, CONFIG.dim // CONFIG.heads, CONFIG.hidden
    weights = sum(p.numel() for p in alone.blocks[0].parameters() if p.ndim == 2)
    assert weights == 3 * dim * d + d * m + m * dim


def test_the_head_with_the_largest_weights_is_found():
    block = encoder(CONFIG, 7, "routed").blocks[0]
    with torch.no_grad():
        block.qkv.weight.unflatten(0, (3, 4, 4))[1, 2] *= 9
    assert largest_head(block) == 2


def test_pruning_by_magnitude_keeps_the_largest_and_training_does_not_bring_others_back():
    net = encoder(CONFIG, 7, "transformer").eval()
    torch.testing.assert_close(prune_by_magnitude(net, 4, 64)(words()), net(words()))
    with torch.no_grad():
        for block in net.blocks:
            block.attn.proj.weight.unflatten(1, (4, 4))[:, [0, 1, 3]] = 0
            block.mlp.fc2.weight[:, 5:] = 0
    small = prune_by_magnitude(net, 1, 5)
    torch.testing.assert_close(small(words()), net(words()))
    optimizer = torch.optim.SGD(small.parameters(), 1.0)
    small(words()).square().sum().backward()
    optimizer.step()
    small(words())
    for block in small.blocks:
        assert (block.attn.proj.weight != 0).any(0).sum() == 4
        assert (block.mlp.fc2.weight != 0).any(0).sum() == 5


def test_the_parameters_of_a_pruned_transformer_are_those_of_a_block_of_its_size():
    whole = SingleHeadsConfig(dim=16, heads=1)
    assert size_with(whole, 64) == size_of(encoder(whole, 1, "transformer").blocks[0])
    budget = size_of(encoder(CONFIG, 1, "single").blocks[0])
    units = units_for(CONFIG, budget)
    assert size_with(CONFIG, units) <= budget < size_with(CONFIG, units + 1)


def test_the_penalty_makes_each_layer_keep_one_head(corpus):
    config = replace(CONFIG, epochs=8, tokens=64, mixed=0.1, dropout=0.0)
    usages = []
    for penalty in (0.0, 1.0):
        torch.manual_seed(0)
        net = encoder(config, corpus.vocabulary, "routed")
        train(net, corpus, config, Split("test"), 0, penalty)
        usages.append(min(float(block.usage.max()) for block in net.blocks))
        assert accuracy(net, corpus, Split("test")) > 0.75
    assert usages[1] > 0.99 >= usages[0] - 0.01
    pruned = single(net, [None, None])
    assert accuracy(pruned, corpus, Split("test")) == accuracy(net, corpus, Split("test"))


def test_without_layers_the_order_of_words_does_not_count():
    net = encoder(CONFIG, 7, "single", 0).eval()
    with torch.no_grad():
        net.positions.zero_()
    torch.testing.assert_close(net(words()), net(words().flip(1)))


def test_the_command_prints_every_row(trees, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(single_heads, "ROUNDS", 3)
    command = ["single-heads", str(trees), "--quick", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for title in (*(row[-1] for row in (*ACCURACIES, *PAIRS)), *TIMES.values()):
        assert f"\n| {title} |" in shown
    with (tmp_path / "out" / "values.csv").open() as file:
        assert {row["row"] for row in csv.DictReader(file)} >= {"shrp", "alone", "times"}
    assert main([*command, "--depth", "1"]) == 2
    assert "has other settings" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/sst")
def test_the_corpus_of_the_page():
    found = load_corpus(DATA)
    assert len(found.tests.texts) == len({tuple(s.words) for s in sst.read(DATA / "dev.txt")})
    assert max(map(len, found.tests.words)) <= single_heads.LONGEST
