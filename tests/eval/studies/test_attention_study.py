"""The text study: trees, figures by definition, what may be learned from, and a study that goes on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xattn.eval.bootstrap import t_interval
from xattn.eval.studies import attention_text, sst
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.attention_text import (
    CLEAN,
    Run,
    Setting,
    TextClassifier,
    TextStudyConfig,
    Vocabulary,
    pad,
)
from xattn.training.attention_training import PERTURBATIONS, create_perturbation

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "sst"
GOOD, BAD, PLAIN = ("fine", "lovely"), ("dull", "awful"), ("film", "the", "it", "is", "a")


def write_trees(folder, count=120, seed=0):
    """Sentences of plain words and one that decides."""
    rng = np.random.default_rng(seed)
    for name, n in (("train.txt", count), ("dev.txt", count // 3)):
        lines = []
        for _ in range(n):
            label = int(rng.integers(2))
            leaf = f"({4 * label} {rng.choice(GOOD if label else BAD)})"
            tree = f"({1 + 2 * label} {leaf} (2 {rng.choice(PLAIN)}))"
            for _ in range(int(rng.integers(0, 6))):
                tree = f"({1 + 2 * label} (2 {rng.choice(PLAIN)}) {tree})"
            lines.append(tree)
        (folder / name).write_text("\n".join([*lines, "(2 (2 neutral) (2 film))"]) + "\n")
    return folder


SMALL = TextStudyConfig(
    methods=("none", "at"), attention=("dot",), seeds=2, grid_seeds=1, epsilons=(0.5, 2.0),
    weights=(1.0,), epochs=2, batch_size=8, lr=5e-3, embedding=8, width=4,
)  # fmt: skip


# ------------------------------------------------------------------ trees


def test_a_tree_gives_its_words_and_every_phrase():
    words, phrases = sst.parse("(3 (2 It) (4 (2 's) (4 lovely)))")
    assert words == ("It", "'s", "lovely")
    assert set(phrases) == {(0, 1, 2), (1, 2, 2), (2, 3, 4), (1, 3, 4), (0, 3, 3)}
    assert phrases[-1] == (0, 3, 3)


def test_evidence_is_the_signed_mean_of_the_near_phrases(tmp_path):
    file = tmp_path / "trees.txt"
    file.write_text(
        "(3 (2 It) (4 (2 's) (4 lovely)))\n(2 (2 so) (2 what))\n\n(1 (0 bad) (3 fun))\n"
        "(4 (2 a) (4 (2 b) (4 (2 c) (4 (2 d) (4 (2 e) (4 f))))))\n"
    )
    first, second, third = sst.read(file)
    assert (first.label, second.label) == (1, 0)
    assert np.allclose(first.evidence, [(0 + 0.5) / 2, (0 + 1 + 0.5) / 3, (1 + 1 + 0.5) / 3])
    assert first.rationale.tolist() == [False, True, True]
    assert np.allclose(second.evidence, [(1 + 0.5) / 2, (-0.5 + 0.5) / 2])
    assert np.allclose(third.evidence[:2], [0, 1 / 2])  # phrases of six words are not near


@pytest.mark.parametrize(
    "line", ["(3 (2 It) (5 x))", "(3 (2 It)", "(3 It))", "It", "(3 )", "( )", ")"]
)
def test_what_is_no_tree_is_refused_with_its_line(line, tmp_path):
    file = tmp_path / "trees.txt"
    file.write_text(f"(3 good)\n{line}\n")
    with pytest.raises(ValueError, match=r"data: line 2 of .*trees.txt: tree: "):
        sst.read(file)


def test_trees_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "trees.txt").write_bytes(b"(3 good)\xff")
    with pytest.raises(ValueError, match=r"data: .*trees.txt is not UTF-8 text"):
        sst.read(tmp_path / "trees.txt")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/sst")
def test_the_treebank_has_its_published_numbers_of_sentences():
    found = sst.read(DATA / "dev.txt")
    assert len(found) == 872 and sum(s.label for s in found) == 444
    assert len(sst.read(DATA / "train.txt")) == 6920 - 3  # this copy lacks three trees
    assert 0.6 < np.mean([s.rationale.any() for s in found]) < 0.8


# ------------------------------------------------------------------ figures


def test_figures_are_their_definitions():
    predicted, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    assert attention_text.f1(predicted, labels) == pytest.approx(2 / 3)
    assert attention_text.f1(np.zeros(3), np.zeros(3)) == 0
    scores, positive = np.array([0.9, 0.1, 0.5, 0.2]), np.array([True, False, False, True])
    assert attention_text.average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert attention_text.top_precision(scores, positive) == 0.5
    assert attention_text.auc(scores, positive) == 3 / 4
    assert (
        attention_text.auc(np.array([1.0, 1.0, 1.0, 0.0]), positive) == (1 / 2 + 1 / 2 + 0 + 0) / 4
    )
    assert attention_text.auc(scores, np.zeros(4)) == 0.5
    for all_or_none in (np.ones(4, bool), np.zeros(4, bool)):
        assert np.isnan(attention_text.average_precision(scores, all_or_none))
        assert np.isnan(attention_text.top_precision(scores, all_or_none))


def test_importance_is_the_gradient_by_the_word_vectors(tmp_path):
    sentences = sst.read(write_trees(tmp_path) / "dev.txt")[:5]
    vocabulary = Vocabulary((s.words for s in sentences), minimum=1)
    torch.manual_seed(0)
    model = TextClassifier(len(vocabulary), 2, "dot", 8, 4)
    with torch.no_grad():
        model.attention.weight.mul_(30)
    found = attention_text.measure(model, sentences, vocabulary)
    for i, sentence in enumerate(sentences):  # one by one, without padding
        encoded = model.encode(vocabulary.encode(sentence.words)[None])
        loss = -model.classify(encoded).log_softmax(1)[0, sentence.label]
        g = torch.autograd.grad(loss, encoded.embedded)[0].norm(dim=-1)[0].double().numpy()
        a = model.weights(encoded)[0].detach().double().numpy()
        assert found.values["correlation"][i] == pytest.approx(np.corrcoef(a, g)[0, 1], abs=1e-4)
        entropy = -(a * np.log(a)).sum() / np.log(len(a))
        assert found.values["entropy"][i] == pytest.approx(entropy, abs=1e-5)
        # with attention held fixed: what e.x of a word adds to the loss through its hidden states
        encoded = model.encode(vocabulary.encode(sentence.words)[None])
        logits = model.classify(encoded._replace(scores=torch.from_numpy(a).log().float()[None]))
        loss = -logits.log_softmax(1)[0, sentence.label]
        g = torch.autograd.grad(loss, encoded.embedded)[0]
        product = (g * encoded.embedded).sum(-1).abs()[0].detach().double().numpy()
        assert found.values["product"][i] == pytest.approx(np.corrcoef(a, product)[0, 1], abs=1e-4)
    assert found.accuracy == np.mean(found.values["correct"])


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_padding_changes_nothing(attention):
    torch.manual_seed(0)
    model = TextClassifier(9, 3, attention, 8, 4)
    words = [torch.tensor([3, 4, 5, 6, 7]), torch.tensor([8, 2]), torch.tensor([5])]
    together = model(pad(words))
    for row, sentence in zip(together, words, strict=True):
        assert torch.allclose(model(sentence[None])[0], row, atol=1e-6)
    encoded = model.encode(pad(words))
    weights = model.weights(encoded)
    assert torch.allclose(weights.sum(1), torch.ones(3)) and (weights[~encoded.mask] == 0).all()


def test_hidden_states_are_those_of_a_bidirectional_lstm():
    torch.manual_seed(0)
    model = TextClassifier(9, 2, "dot", 8, 4)
    whole = torch.nn.LSTM(8, 4, batch_first=True, bidirectional=True)
    for name, value in model.ahead.named_parameters():
        getattr(whole, name).data = value.data
    for name, value in model.back.named_parameters():
        getattr(whole, f"{name}_reverse").data = value.data
    sentences = [torch.tensor([3, 4, 5, 6, 7]), torch.tensor([8, 2])]
    encoded = model.encode(pad(sentences))
    for row, words in enumerate(sentences):
        expected = whole(model.embedding(words[None]))[0][0]
        torch.testing.assert_close(encoded.hidden[row, : len(words)], expected)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_every_method_trains_the_text_model_through_one_encoding(name):
    torch.manual_seed(0)
    model = TextClassifier(9, 2, "additive", 8, 4)
    encoded = model.encode(
        pad([torch.tensor([3, 4, 5, 6, 7]), torch.tensor([8, 2]), torch.tensor([5])])
    )
    options = {} if name == "none" else {"epsilon": 2.0}
    loss = create_perturbation(name, **options).loss(
        encoded.scores, lambda s: model.classify(encoded, s), torch.tensor([0, 1, 1]), encoded.mask
    )
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_word_vectors_come_from_a_file_and_the_rest_at_random(tmp_path):
    vocabulary = Vocabulary([("Film", "fine"), ("film", "fine", "odd")])
    assert vocabulary.words[2:] == ["film", "fine"]
    assert vocabulary.encode(("Fine", "odd")).tolist() == [3, 1]
    file = tmp_path / "vectors.vec"
    file.write_text("2 3\nfilm 1 2 3\nother 4 5 6\n")
    found = vocabulary.vectors(file, torch.Generator().manual_seed(0))
    assert found.shape == (4, 3) and found[2].tolist() == [1, 2, 3]
    again = vocabulary.vectors(file, torch.Generator().manual_seed(0))
    assert torch.equal(found, again) and (found[3] != 0).all()
    file.write_text("film 1 2 3\nfine 4 5\n")
    with pytest.raises(ValueError, match="line 2 of .* has 2 numbers"):
        vocabulary.vectors(file, torch.Generator())
    for line in ("film 1 2 x\n", "film 1 2 nan\n", "film 1 2 1e50\n"):
        file.write_text(line)
        with pytest.raises(
            ValueError, match="line 1 of .* holds something that is not a finite number"
        ):
            vocabulary.vectors(file, torch.Generator())
    file.write_text("other 1 2 3\n")
    with pytest.raises(ValueError, match="has none of the 4 words"):
        vocabulary.vectors(file, torch.Generator())


# ------------------------------------------------------------------ the study


def test_batches_are_a_function_of_seed_and_epoch_and_hold_every_sentence_once():
    lengths = [3, 9, 4, 8, 3, 20, 5, 1, 1, 2, 6]
    found = list(attention_text.batches(lengths, 4, 1, 2))
    assert sorted(i for batch in found for i in batch) == list(range(11))
    assert found == list(attention_text.batches(lengths, 4, 1, 2))
    assert found != list(attention_text.batches(lengths, 4, 1, 3))
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in found) < 20 - 1


def test_words_of_held_out_sentences_and_dev_are_not_learned(tmp_path):
    texts = attention_text.load(write_trees(tmp_path), SMALL)
    assert len(texts.held) == 12 and len(texts.train) == 108 and len(texts.dev) == 40
    (tmp_path / "dev.txt").write_text("(4 (4 unheard) (2 of))\n")
    lines = (tmp_path / "train.txt").read_text().splitlines()
    lines[0] = lines[10] = "(4 (4 unseen) (2 unseen))"
    (tmp_path / "train.txt").write_text("\n".join(lines))
    words = attention_text.load(tmp_path, SMALL).vocabulary.words
    assert not {"unheard", "unseen", "of"} & set(words)
    with pytest.raises(ValueError, match=r"data: .* lacks train.txt and dev.txt"):
        attention_text.load(tmp_path / "nowhere", SMALL)


@pytest.mark.parametrize(("monitor", "other"), [("auc", "f1"), ("f1", "auc")])
def test_epsilon_and_weight_are_chosen_by_the_monitored_held_out_figure_alone(monitor, other):
    def row(held, rest):
        return {"held": {monitor: held, other: rest}, "dev": {monitor: rest, other: rest}}

    config = replace(SMALL, weights=(1.0, 0.5), monitor=monitor)
    rows = {
        Run("dot", "at", 0.5, 0.5, 0): row(0.7, 0.9),
        Run("dot", "at", 0.5, 1.0, 0): row(0.8, 0.1),
        Run("dot", "at", 2.0, 0.5, 0): row(0.7, 0.9),
        Run("dot", "at", 2.0, 1.0, 0): row(0.7, 0.9),
    }
    assert attention_text.choose(rows, "dot", "at", config) == Setting(0.5, 1.0)
    rows[Run("dot", "at", 2.0, 0.5, 0)] = row(0.8, 0.9)
    assert attention_text.choose(rows, "dot", "at", config) == Setting(0.5, 1.0)  # smaller epsilon
    rows[Run("dot", "at", 2.0, 1.0, 0)] = row(0.9, 0.1)
    assert attention_text.choose(rows, "dot", "at", config) == Setting(2.0, 1.0)
    assert attention_text.choose({}, "dot", "none", config) == CLEAN


@pytest.mark.parametrize("monitor", ["auc", "f1"])
def test_the_best_epoch_is_kept_and_training_ends_without_a_better_one(monitor, tmp_path):
    texts = attention_text.load(write_trees(tmp_path), SMALL)
    config = replace(SMALL, epochs=8, patience=2, lr=0.05, monitor=monitor)
    model, history = attention_text.train(Run("dot", "none", *CLEAN, 0), texts, config)
    best = history.index(max(history))
    assert len(history) == min(best + 3, 8) and len(history) < 8
    kept = attention_text.measure(model, texts.held, texts.vocabulary)
    assert getattr(kept, monitor) == max(history)
    whole = attention_text.train(Run("dot", "none", *CLEAN, 0), texts, replace(config, patience=0))[
        1
    ]
    assert len(whole) == 8 and whole[: len(history)] == history


def test_the_weight_of_the_perturbed_loss_is_trained_with(tmp_path):
    texts = attention_text.load(write_trees(tmp_path), SMALL)
    config = replace(SMALL, epochs=1)
    light, heavy = (
        attention_text.train(Run("dot", "iat_released", 2.0, weight, 0), texts, config)[0]
        for weight in (0.5, 1.0)
    )
    assert not torch.equal(light.attention.weight, heavy.attention.weight)


def test_a_stopped_study_goes_on_and_gives_the_same_rows(tmp_path):
    data = write_trees(tmp_path)
    whole = attention_text.study(SMALL, data, tmp_path / "whole", say=lambda _: None)
    runs = [Run("dot", "none", *CLEAN, s) for s in (0, 1)]
    assert set(runs) < set(whole.rows) and len(whole.rows) == 5
    said = []

    def stop(line):
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attention_text.study(SMALL, data, tmp_path / "part", say=stop)
    lines = (tmp_path / "part" / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines] == [
        ["dot", "none", 0.0, 0.0, 0],
        ["dot", "at", 0.5, 1.0, 0],
    ]
    rest = attention_text.study(SMALL, data, tmp_path / "part", say=said.append)
    assert len(said) == 5
    for run, row in whole.rows.items():
        assert {k: v for k, v in rest.rows[run].items() if k != "seconds"} == {
            k: v for k, v in row.items() if k != "seconds"
        }
    other = TextStudyConfig(**{**SMALL.__dict__, "epochs": 1})
    with pytest.raises(ValueError, match="output: .* other settings"):
        attention_text.study(other, data, tmp_path / "part")
    (tmp_path / "part" / "runs.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 of .* is damaged"):
        attention_text.study(SMALL, data, tmp_path / "part")


@pytest.mark.parametrize("name", ["train.txt", "dev.txt", "vectors"])
def test_other_data_of_equal_size_does_not_go_on(name, tmp_path):
    data, out = write_trees(tmp_path), tmp_path / "out"
    vectors = tmp_path / "words.vec"
    vectors.write_text("the 1 2 3\n")
    config = replace(SMALL, methods=("none",), seeds=1, epochs=1, vectors=vectors)
    attention_text.study(config, data, out, say=lambda _: None)
    before = (out / "runs.jsonl").read_bytes()
    attention_text.study(config, data, out, say=pytest.fail)  # all is there
    file = vectors if name == "vectors" else data / name
    old, new = ("1 2 3", "1 2 4") if name == "vectors" else ("film", "cows")
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match="output: .* has other settings or photos"):
        attention_text.study(config, data, out)
    assert (out / "runs.jsonl").read_bytes() == before


def test_two_studies_do_not_share_a_folder(tmp_path, held_elsewhere):
    data, out = write_trees(tmp_path), tmp_path / "out"
    with held_elsewhere(out):
        with pytest.raises(ValueError, match="output: another run is writing to"):
            attention_text.study(SMALL, data, out)
        assert not (out / "settings.json").exists()
    config = replace(SMALL, methods=("none",), seeds=1, epochs=1)
    attention_text.study(config, data, out, say=lambda _: None)


def test_the_command_writes_tables_differences_and_a_plot(tmp_path, capsys):
    data = write_trees(tmp_path)
    arguments = ["at", str(data), "--output", str(tmp_path / "out")]
    arguments += (
        "--methods none at iat iat_released --attention dot --seeds 3 --grid-seeds 1".split()
    )
    arguments += "--epsilons 0.5 2 --weights 0.5 1 --epochs 1".split()
    arguments += "--batch-size 16 --embedding 8 --width 4".split()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "| vanilla |" in text and "| dot | iAT - AT |" in text
    value = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "| dot | released iAT - AT |" in text
    assert [row["method"] for row in value["dev"]] == ["none", "at", "iat", "iat_released"]
    assert {row["weight"] for row in value["held_out"]} == {0.0, 0.5, 1.0}
    rows = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    f1 = [r["dev"]["f1"] for r in rows if r["run"][1] == "none"]
    assert value["dev"][0]["f1"]["mean"] == pytest.approx(np.mean(f1)) and len(f1) == 3
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    every_seed = text.split("every seed")[1].split("over epsilon")[0]
    vanilla = next(line for line in every_seed.splitlines() if "| vanilla |" in line)
    assert [cell.split(" / ")[0].strip() for cell in vanilla.split("|")[3:-1]] == [
        f"{100 * value:.1f}" for value in f1
    ]
    for name in ("epsilon.png", "seeds.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert main(["at", str(tmp_path / "nowhere")]) == 2
    assert "lacks train.txt" in capsys.readouterr().err


def test_the_t_interval_is_students():
    mean, lo, hi, n = t_interval([1.0, 2.0, 4.0, 5.0, 8.0])
    assert (mean, n) == (4.0, 5)
    assert hi - mean == pytest.approx(2.7764451 * np.std([1, 2, 4, 5, 8], ddof=1) / 5**0.5)
    assert mean - lo == pytest.approx(hi - mean)
    assert np.isnan(t_interval([1.0]).lo)
