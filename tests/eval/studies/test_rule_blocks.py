"""The grammar of rules by its definition, the dial's limit cases, theory's bound, recruitment, the command."""

import csv
import math

import pytest
import torch

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import rule_blocks
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.rule_blocks import (
    COUNT,
    FROM,
    RULES,
    START,
    TITLES,
    TOPICS,
    WORDS,
    Modules,
    RuleModel,
    RulesConfig,
    bound,
    dial_penalty,
    draw,
    group_lasso,
    mark_figures,
    measure,
    probe,
    random_blocks,
    recruited_blocks,
    recruited_modules,
    rules,
    same_pairs,
)

SMALL = RulesConfig(dim=16, before=2, steps=2, batch_size=4, tests=24)


def test_every_answer_is_what_the_rule_makes_of_the_last_word_of_its_block():
    found = draw(20, 32, 3)
    assert torch.equal(found.tokens, draw(20, 32, 3).tokens)
    for line, rule, source, topic in zip(*found, strict=True):
        last = {}
        for place, token in enumerate(line.tolist()):
            if token < COUNT:
                last[token // WORDS] = place
                assert token // WORDS // (RULES // TOPICS) == topic
            elif token < START:
                r = token - COUNT
                assert rule[place] == r and source[place] == last[r]
                if place + 1 < len(line):
                    assert line[place + 1] == rules()[line[last[r]]]
    assert (found.rule >= 0).sum() == (found.tokens[:, 1:] >= COUNT).sum() > 100


def test_rules_are_permutations_of_their_blocks_without_a_fixed_word():
    words = torch.arange(COUNT)
    assert torch.equal(rules().sort().values, words)
    assert torch.equal(rules() // WORDS, words // WORDS) and not (rules() == words).any()


def test_the_model_does_not_see_the_future():
    model, tokens = RuleModel(SMALL), draw(2, 12, 0).tokens
    other = tokens.clone()
    other[:, 7:] = tokens[:, 7:].flip(0)
    torch.testing.assert_close(model.run(tokens)[0][:, :7], model.run(other)[0][:, :7])
    attention = model.run(tokens)[1]
    assert attention.triu(1).sum() == 0 and torch.allclose(attention.sum(-1), torch.ones(()))


def local(sentences):
    """Attention (B, 1, 1, T, T) of marks to the place that they ask for, of others to the start."""
    batch, length = sentences.tokens.shape
    to = sentences.source.clamp_min(0)
    return torch.nn.functional.one_hot(to, length).float().view(batch, 1, 1, length, length)


def test_the_penalty_is_0_where_marks_read_their_block_alone_and_1_where_they_read_another():
    sentences, blocks = draw(4, 24, 1), rule_blocks.rule_blocks()
    assert float(dial_penalty(local(sentences), sentences, blocks)) < 1e-4
    elsewhere = local(sentences._replace(source=torch.zeros_like(sentences.source)))
    assert float(dial_penalty(elsewhere, sentences, blocks)) == pytest.approx(1, abs=1e-4)


def test_the_lasso_without_anchors_is_least_where_all_rows_read_one_block():
    sentences, blocks = draw(4, 24, 1), rule_blocks.rule_blocks()
    start = torch.zeros_like(sentences.source)
    one = float(group_lasso(local(sentences._replace(source=start)), sentences, blocks))
    assert one == pytest.approx(1, abs=1e-4)
    assert float(group_lasso(local(sentences), sentences, blocks)) > one + 0.1


def test_random_blocks_have_the_sizes_of_those_of_the_grammar():
    found, known = random_blocks(1), rule_blocks.rule_blocks()
    assert torch.equal(found.of.bincount(), known.of.bincount())
    assert same_pairs(found.of[:COUNT], known.of[:COUNT]) < 0.3


def test_the_bound_holds_for_all_scores_and_is_met_by_two_levels():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        keys, margin = 12, float(4 * torch.rand((), generator=generator))
        inside = int(torch.randint(1, keys, (), generator=generator))
        scores = torch.randn(keys, generator=generator, dtype=torch.float64)
        scores[:inside] += scores[inside:].max() + margin - scores[:inside].min()
        a = scores.softmax(0)
        outside, most = bound(torch.tensor(inside), torch.tensor(keys), margin)
        assert a[inside:].sum() <= outside + 1e-12
        if outside <= 1 - inside / keys:
            assert -(a * a.log()).sum() <= most + 1e-12
    a = torch.tensor([2.0] * 3 + [0.0] * 5, dtype=torch.float64).softmax(0)
    outside, most = bound(torch.tensor(3), torch.tensor(8), 2.0)
    assert float(a[3:].sum()) == pytest.approx(float(outside))
    assert float(-(a * a.log()).sum()) == pytest.approx(float(most))
    assert float(bound(torch.tensor(3), torch.tensor(8), 80.0)[1]) == pytest.approx(math.log(3))


def test_a_probe_reads_the_rules_where_attention_points_at_the_source():
    words = torch.arange(COUNT).repeat(6)
    seen = torch.nn.functional.one_hot(words, START + 1).double()
    told, table = probe(seen, rules()[words])
    assert told == 1 and torch.equal(table[:COUNT], rules())
    assert probe(torch.ones_like(seen), rules()[words])[0] < 0.2


def test_partitions_are_compared_beyond_chance():
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert same_pairs(a, (a + 1) % 3) == 1 and same_pairs(a, a // 3) == 0
    assert same_pairs(a, a % 2) < 1


class Reader(RuleModel):
    """Marks read the words of their block alike."""

    def run(self, tokens, gate=None):
        logits, attention, q, k = super().run(tokens, gate)
        blocks = rule_blocks.rule_blocks().of[tokens]
        rule = torch.where(tokens >= COUNT, tokens - COUNT, blocks)
        same = (rule[:, :, None] == blocks[:, None]).tril()
        a = same.float() / same.sum(-1, keepdim=True).clamp_min(1)
        return logits, a[:, None, None].expand(attention.shape), q, k


def test_blocks_and_modules_are_recruited_where_attention_shows_them():
    model, sentences = Reader(SMALL), draw(400, 32, 5)
    blocks = recruited_blocks(model, sentences, 0.2)
    assert same_pairs(blocks.of[:COUNT], rule_blocks.rule_blocks().of[:COUNT]) == 1
    assert torch.equal(blocks.of[torch.arange(RULES) * WORDS], blocks.anchors)
    modules = recruited_modules(sentences.tokens, blocks, 0.7)
    assert len(modules.anchors) == TOPICS
    assert same_pairs(modules.of(sentences.tokens), sentences.topic) == 1
    found = mark_figures(model, sentences, 4.0)
    assert found["mass"] == pytest.approx(1) and found["within"] == 1
    assert found["entropy"] == pytest.approx(found["inside"], rel=1e-5)


def test_heads_are_dealt_out_to_modules_and_the_others_say_nothing():
    blocks = rule_blocks.rule_blocks()
    anchors = torch.zeros(2, RULES + 1)
    anchors[0, :3], anchors[1, 3:6] = 1 / 3, 1 / 3
    modules, sentences = Modules(blocks, anchors), draw(6, FROM + 4, 2)
    assert torch.equal(modules.of(sentences.tokens), sentences.topic)
    gate = modules.gate(sentences.tokens, 4)
    assert torch.equal(gate[:, 0], gate[:, 2]) and torch.equal(gate[:, 0], 1 - gate[:, 1])
    model = RuleModel(SMALL)
    whole = model.run(sentences.tokens)[0]
    torch.testing.assert_close(model.run(sentences.tokens, torch.ones(6, 4))[0], whole)
    assert not torch.allclose(model.run(sentences.tokens, gate)[0], whole)


def test_a_dial_of_0_trains_as_without_a_dial():
    off, zero = (measure(SMALL, kind, 0.0, Split("test"), 0) for kind in ("off", "dial"))
    assert {**off, "seconds": 0} == {**zero, "seconds": 0}


def test_the_command_prints_every_row(tmp_path, capsys):
    assert main(["rules", "--quick", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for title in (*TITLES.values(), "lambda 0.1"):
        assert f"\n| {title} |" in shown
    with (tmp_path / "out" / "values.csv").open() as file:
        assert {row["row"] for row in csv.DictReader(file)} >= {"off", "modules", "dial-1"}
