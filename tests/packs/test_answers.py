"""What packs keep of the answers of vision-language models."""

import json
from dataclasses import replace

import pytest
from pack_files import rewritten
from small_explanations import make

from xattn.packs.answers import MOST, AnswerFacts, AnswerWord
from xattn.packs.contained_files import PackError
from xattn.packs.explanation import ImageFacts
from xattn.packs.merging import merge_packs
from xattn.packs.reader import Pack
from xattn.packs.writer import save_pack

TEXT = "A fork \u2014 \u53c9."


def answer(method="attention"):
    words = (
        AnswerWord(
            "A", (0, 1), -0.25, 0.0, 0.75, {method: (0.5, 0.25, 0.25)}, {method: (0.125, 0.0)}
        ),
        AnswerWord(
            "fork", (2, 6), -0.5, 3.25, 0.5, {method: (1.0, 0.0, 0.0)}, {method: (0.5, -1e-9)}
        ),
    )
    return AnswerFacts("What is it?", TEXT, words, ("What", "A"), 1)


def pack(folder, method="attention", facts=None):
    made = [
        replace(make(target=i, method=method), facts=ImageFacts(answer=facts or answer(method)))
        for i in range(2)
    ]
    return Pack(save_pack(folder, made, overlays=False))


def test_an_answer_is_read_as_it_was_written(tmp_path):
    read = pack(tmp_path / "p")
    for id in read.entry_ids:
        assert read.explanation(id).facts.answer == answer()
    assert (
        Pack(save_pack(tmp_path / "q", [make()], overlays=False))
        .explanation("cat@3.head")
        .facts.answer
        is None
    )


def test_merged_answers_have_the_numbers_of_all_methods(tmp_path):
    first = pack(tmp_path / "a")
    merge_packs([first, pack(tmp_path / "b", "occlusion")], tmp_path / "both")
    both = Pack(tmp_path / "both")
    word = both.explanation("cat@1.attention").facts.answer.words[1]
    assert set(word.shares) == set(word.sources) == {"attention", "occlusion"}
    other = pack(tmp_path / "c", "rise", replace(answer("rise"), text="A fork is here."))
    with pytest.raises(
        ValueError, match="packs: the answer about cat is not the same in a and in c"
    ):
        merge_packs([first, other], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def changed(**fields):
    record = json.loads(answer().to_json())
    word = record["words"][0]
    for name, value in fields.items():
        (record if name in record else word)[name] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    "value",
    [
        "[]",
        "{}",
        changed(text=5),
        changed(words={}),
        changed(words=[5]),
        changed(tokens=["x"] * (MOST + 1)),
        changed(span=[0, 400]),
        changed(span=[-1, 1]),
        changed(span=[1]),
        changed(log_prob="x"),
        changed(log_prob=True),
        changed(lost=None),
        changed(shares=[1]),
        changed(shares={"attention": [1, 2]}),
        changed(sources={"attention": [1, 2, 3]}),
        changed().replace("0.125", "1e999"),
        changed(more=1),
        changed(asked=3),
        changed(asked="1"),
    ],
)
def test_answers_that_no_pack_can_hold_are_refused(tmp_path, value):
    pack(tmp_path / "p")
    rewritten(tmp_path / "p", "answer", value, "images-00000.parquet")
    with pytest.raises(PackError):
        Pack(tmp_path / "p").explanation("cat@0.attention")


def test_texts_of_other_peoples_packs_show_what_they_are(tmp_path):
    written = replace(answer(), text="A fork\u202e", prompt="\ud800?")
    read = pack(tmp_path / "p", facts=written).explanation("cat@0.attention").facts.answer
    assert (
        read.prompt == "??"
        and "\u202e" not in Pack(tmp_path / "p").explanation("cat@0.attention").facts.answer.text
    )


def test_scores_of_tokens_are_kept_short_and_left_out_where_they_are_too_many(tmp_path):
    few = answer()
    assert json.loads(few.to_json())["words"][0]["sources"] == {"attention": [0.125]}
    tokens = tuple("x" for _ in range(3000))
    sources = {"attention": tuple(0.123 + i for i in range(3000))}
    words = tuple(replace(few.words[0], sources=sources) for _ in range(300))
    long = replace(few, words=words, tokens=tokens)
    with pytest.warns(
        UserWarning, match="answer: .* too long for the pack to keep the scores that each word"
    ):
        read = pack(tmp_path / "p", facts=long).explanation("cat@0.attention").facts.answer
    assert len(read.words) == 300 and read.words[0].sources == {} and read.tokens == tokens


def test_answers_of_two_models_are_not_merged(tmp_path):
    other = replace(answer("rise"), words=tuple(replace(w, lost=9.0) for w in answer("rise").words))
    with pytest.raises(
        ValueError, match="packs: the answer about cat is not the same in a and in b"
    ):
        merge_packs([pack(tmp_path / "a"), pack(tmp_path / "b", "rise", other)], tmp_path / "both")
