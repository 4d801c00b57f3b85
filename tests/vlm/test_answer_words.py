"""Words of an answer, by three kinds of tokenizers."""

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from xattn.vlm.words import spans_of, word_number, words_of

TEXT = "A small fork's tines. 日本, and 3.5 naïve cafés 🙂!"
WORDS = "A|small|fork's|tines|.|日|本|,|and|3.5|naïve|cafés|🙂|!".split("|")


def made(pre, decoder, alphabet):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 15, initial_alphabet=alphabet, special_tokens=["</s>"]
    )
    texts = ["small forks and small tines and forks", "a cafe, a fork"]
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_level():
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made(pre, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet())


def pieces():
    return made(pre_tokenizers.Metaspace(), decoders.Metaspace(), sorted(set(TEXT) | {"▁"}))


@pytest.mark.parametrize("tokenizer", [byte_level(), pieces()], ids=["byte level", "pieces"])
def test_words_and_their_characters(tokenizer):
    ids = tokenizer(TEXT)["input_ids"] + [tokenizer.eos_token_id]
    text, words = words_of(tokenizer, ids)
    assert text == TEXT
    assert [word.text for word in words] == WORDS
    assert all(text[start:end] == word.text for word in words for start, end in [word.span])
    # Every token that shows something is in one word.
    used = [t for word in words for t in word.tokens]
    assert used == sorted(set(used))
    spans = spans_of(tokenizer, ids)[1]
    assert set(used) == {i for i, (a, b) in enumerate(spans) if text[a:b].strip()}
    assert len(ids) - 1 not in used


def test_parts_of_a_character_are_one_word():
    tokenizer = byte_level()
    ids = tokenizer("🙂")["input_ids"]
    _, words = words_of(tokenizer, ids)
    assert len(ids) > 1
    assert [word.tokens for word in words] == [tuple(range(len(ids)))]


def test_words_are_found_by_text_number_and_count():
    tokenizer = byte_level()
    _, words = words_of(tokenizer, tokenizer("The fork, the Fork, the fork")["input_ids"])
    assert word_number(words, "fork") == 1
    assert word_number(words, ("fork", 2)) == len(words) - 1 == word_number(words, -1)
    assert word_number(words, "Fork") == 4
    for key, match in {
        "forks": "^words: 'forks' is not in the answer; .*fork",
        ("fork", 3): "^words: 'fork' is 2 times in the answer; got 3",
        99: "^words: got 99; the answer has words 0 to",
    }.items():
        with pytest.raises(ValueError, match=match):
            word_number(words, key)


def test_marks_belong_to_their_letters():
    pieces = ["हिन्द", "ी", " cafe", "\u0301", "!"]

    class Pieces:
        all_special_ids = ()

        def decode(self, ids, **options):
            return "".join(pieces[i] for i in ids)

    assert [w.text for w in words_of(Pieces(), range(5))[1]] == ["हिन्दी", "cafe\u0301", "!"]
