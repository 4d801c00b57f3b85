"""The head of words: its layer, captions, maps of words, files, commands, refusals."""

from __future__ import annotations

import pytest
import torch
from attentive_fakes import GRID, WIDTH, cnn, make, map_patches, random_tokens, read_by
from PIL import Image
from torch.nn import functional as F

from xattn import explain, load_pack
from xattn.eval.sanity import sanity_rows
from xattn.explainers import create_explainer
from xattn.heads import create_head, load_head, save_head
from xattn.heads.probed import probed

WORDS = ["dog", "hot dog", "cat", "reptile or amphibian", "food"]
N = GRID[0] * GRID[1]


def word_head(dtype=torch.float64, **options):
    head = make("words", read_by("words"), class_names=WORDS, norm=False, **options).to(dtype)
    return head, random_tokens(head, dtype=dtype)


def captions(*texts, head):
    found = torch.zeros(len(texts), len(WORDS), dtype=torch.bool)
    for row, text in zip(found, texts, strict=True):
        row[head.words_of(text)] = True
    return found


# ---------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_all_logits_are_what_the_patches_agree_with_the_output_of_the_layer(heads):
    head, tokens = word_head(heads=heads)
    x = F.layer_norm(tokens.patches[-1], (WIDTH,))
    y = head.attention(x, (head.table[None],))
    (operator,) = head.attention.operators(x, (head.table[None],))
    a = operator.rows(torch.arange(N))
    # The last word means nothing: its part of y is no logit.
    value = head.attention.v[0](head.table)[-1].unflatten(0, (heads, -1))
    told = torch.einsum("bht,hd->bthd", a[..., -1], value).flatten(2)
    nothing = told @ head.attention.proj[0].weight.T
    expected = (x * (y - nothing)).sum(2).mean(1)
    torch.testing.assert_close((head.logits(tokens) - head.classifier.bias).sum(1), expected)
    torch.testing.assert_close(head.reading_maps(tokens).flatten(2), a[..., :-1].mean(1).mT)


def test_a_logit_has_no_part_of_other_words_but_through_the_softmax():
    head, tokens = word_head()
    before = head.class_maps(tokens).maps
    with torch.no_grad():  # another value of one word leaves the maps of the others alone
        head.attention.v[0].weight[:] *= 2
    torch.testing.assert_close(head.class_maps(tokens).maps, 2 * before)
    head, tokens = word_head(width=WIDTH)
    slope = torch.autograd.grad(head.logits(tokens)[:, 0].sum(), head.classifier.bias)[0]
    assert slope.tolist() == [3.0, 0, 0, 0, 0]


def test_the_size_of_a_token_does_not_matter():
    head, tokens = word_head()
    other = map_patches(tokens, lambda x: 7 * x + 3)
    torch.testing.assert_close(head.logits(other), head.logits(tokens), rtol=1e-4, atol=1e-4)


def test_inner_tokens_are_the_default():
    taps = type(word_head()[0]).default_taps
    assert [taps(depth) for depth in (24, 12, 5, 1)] == [
        ("block.15",),
        ("block.7",),
        ("block.3",),
        ("block.0",),
    ]


# ---------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A dog and a CAT.", [0, 2]),
        ("a hot dog", [1]),
        ("a dog beside a hot dog", [0, 1]),
        ("cat, cat; cat", [2]),
        ("a Reptile or amphibian on food", [3, 4]),
        ("dogs, a catfish and a cat", [2]),
    ],
)
def test_a_caption_has_the_words_that_stand_in_it(caption, found):
    head, _ = word_head()
    assert head.words_of(caption) == found


def test_a_caption_without_known_words_is_refused():
    head, tokens = word_head()
    for refused in (lambda: head.words_of("a spoon"), lambda: head.for_caption("a spoon")):
        with pytest.raises(
            ValueError, match="^caption: got 'a spoon', with no known word; use dog"
        ):
            refused()
    with pytest.raises(ValueError, match="^caption: got ''"):
        head.words_of("")
    with pytest.raises(ValueError, match="^captions: got one without a known word"):
        head.match(tokens, torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^captions: got torch.bool of shape \(2, 5\); give bool"):
        head.match(tokens, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="^caption: this head has no names"):
        make("words", read_by("words")).words_of("dog")


def test_words_of_a_caption_alone_are_asked():
    head, tokens = word_head()
    asked = captions("a dog", "hot dog, cat", "cat, dog, food", head=head)
    found = head.match(tokens, asked)
    assert torch.equal(found.isneginf(), ~asked)
    x = F.layer_norm(tokens.patches[-1], (WIDTH,))
    for i in range(3):
        words = [*asked[i].nonzero().flatten().tolist(), 5]
        (operator,) = head.attention.operators(x[i : i + 1], (head.table[words][None],))
        own = head.for_caption(", ".join(WORDS[w] for w in words[:-1]))
        one = map_patches(tokens, lambda x, i=i: x[i : i + 1])
        maps = own.reading_maps(one)
        torch.testing.assert_close(
            maps[:, words[:-1]].flatten(2), operator.rows(torch.arange(N)).mean(1).mT[:, :-1]
        )
        others = sorted({*range(5)} - {*words})
        assert not maps[:, others].any() and not own.class_maps(one).maps[:, others].any()
        torch.testing.assert_close(own.logits(one)[:, words[:-1]], found[i : i + 1, words[:-1]])
    torch.testing.assert_close(head.match(tokens, torch.ones(3, 5).bool()), head.logits(tokens))


def test_of_caption_leaves_the_head_as_it_was_and_shares_its_weights():
    head, tokens = word_head()
    before = head.logits(tokens)
    own = head.for_caption("a dog")
    assert own.table is head.table and head.asked is None
    assert torch.equal(head.logits(tokens), before)
    assert set(own.state_dict()) == set(head.state_dict()) and "classifier.bias" in own.state_dict()


def test_no_answer_depends_on_the_other_captions_of_a_batch():
    head, tokens = word_head()
    asked = captions("a dog", "hot dog, cat", "cat, dog, food", head=head)
    whole = head.match(tokens, asked)
    for i in range(3):
        one = map_patches(tokens, lambda x, i=i: x[i : i + 1])
        one = one._replace(prefix=tokens.prefix[i : i + 1])
        torch.testing.assert_close(head.match(one, asked[i : i + 1]), whole[i : i + 1])


def test_training_by_captions_learns_the_words():
    head, _ = word_head(torch.float32)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, WIDTH, generator=generator)
    labels = torch.arange(5).repeat(6)
    tokens = random_tokens(head, batch=30)
    x = tokens.patches[-1]
    x[:, :4] += 3 * means[labels][:, None]  # the object covers four patches
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    asked = (
        F.one_hot(labels, 5).bool() | F.one_hot((labels + 1 + torch.arange(30) % 4) % 5, 5).bool()
    )
    for _ in range(40):
        loss = F.cross_entropy(head.match(tokens, asked), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head.match(tokens, asked).argmax(1) == labels).float().mean() > 0.9
    maps = head.class_maps(tokens, labels).maps[:, 0].flatten(1).clamp_min(0)
    assert (maps[:, :4].sum(1) / maps.sum(1)).mean() > 0.6  # of 4 patches in 15


# ---------------------------------------------------------------------- explainers and files


def test_maps_of_words_through_a_probed_backbone_and_a_caption(tmp_path):
    backbone = cnn()
    head = make("words", backbone, class_names=WORDS)
    save_head(head, tmp_path / "head")
    whole = probed(backbone, load_head(tmp_path / "head", backbone))
    assert whole.class_names == WORDS
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    target = torch.tensor([0, 2])
    taps = whole(images)
    plain = create_explainer("head", whole, whole.probe).attribute(images, target)
    torch.testing.assert_close(plain, head(taps, target).detach(), rtol=1e-4, atol=1e-6)
    asked = create_explainer("head", whole, whole.probe, caption="a dog and a cat")
    own = head.for_caption("a dog and a cat")
    shown = asked.attribute(images, target)
    torch.testing.assert_close(shown, own(taps, target).detach(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(shown, plain)
    read = create_explainer("head", whole, whole.probe, caption="a dog and a cat", maps="attention")
    both = torch.cat([read.attribute(images, torch.tensor([k, k])) for k in (0, 2)], 1)
    assert (both >= 0).all() and (both.sum(1) < 1).all(), "the rest reads what means nothing"
    assert not read.attribute(images, torch.tensor([1, 4])).any()
    with pytest.raises(ValueError, match="^caption: got 'a spoon', with no known word"):
        create_explainer("head", whole, whole.probe, caption="a spoon")
    with pytest.raises(ValueError, match="^caption: got 'a dog' for the head 'gap'"):
        create_explainer("head", backbone, make("gap", backbone), caption="a dog")


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="^heads: got 5; choose a divisor of the tokens' width 32"):
        create_head("words", read_by("words"), heads=5)
    with pytest.raises(ValueError, match="^width: got 0"):
        create_head("words", read_by("words"), width=0)


def test_maps_of_words_enter_packs_and_have_sanity_rows(tmp_path):
    backbone = cnn()
    whole = probed(backbone, make("words", backbone, class_names=WORDS))
    method = create_explainer("head", whole, whole.probe, caption="a dog and a cat")
    pixels = torch.rand(120, 100, 3, generator=torch.Generator().manual_seed(0))
    photo = Image.fromarray((255 * pixels).byte().numpy())
    explained = explain(photo, whole, whole.probe, method, ["dog", "cat"], output=tmp_path / "p")
    pack = load_pack(tmp_path / "p")
    assert [one.target_name for one in pack] == ["dog", "cat"]
    assert pack[0].protocol["notes"] == ["only the words of the caption: dog, cat"]
    assert (pack[1].map == explained[1].map).all()
    assert not (pack[0].map == pack[1].map).all()
    rows = sanity_rows(whole, "head", head=whole.probe, caption="a dog and a cat")
    image, target = pixels.permute(2, 0, 1)[None, :, :96, :96], torch.tensor([2])
    twin = rows["randomized_head"].attribute(image, target)
    assert twin.shape == method.attribute(image, target).shape
    assert not torch.allclose(twin, method.attribute(image, target)), "it depends on the network"
