"""What drafters copy from, what drafts are, and which of them, and which requests, are refused."""

import random

import pytest
import torch
from families import FAMILIES, VOCAB
from oracles import Says

import headwise as hw
from headwise.drafting import Draft
from headwise.grams import Grams
from headwise.verifying import DraftMethod, Verifying

D = hw.decode


def test_memory_of_an_index_is_bounded_and_it_copies_the_first_place() -> None:
    grams = Grams((2,), most=5)
    grams.add([1, 2, 3, 1, 2, 4, 1, 2])
    assert grams.behind(2) == 2 and grams.copy(2, 3) == [3, 1, 2]
    grams.add(list(range(10, 40)))
    assert len(grams._behind) == 5 and grams.behind(2) is None
    draw = random.Random(0)
    text = [draw.randrange(4) for _ in range(300)]
    grams = Grams((3,), most=10**6)
    for at, token in enumerate(text, 1):
        grams.add([token])
        first = next((i for i in range(3, at) if text[i - 3 : i] == text[at - 3 : at]), None) if at >= 3 else None
        assert grams.behind(3) == first


def test_heads_point_at_the_token_that_followed() -> None:
    planted = hw.data.Planted(parts=("induction",), decoys=()).build(seed=0)
    batch = hw.data.RepeatedTokens(length=20).make(planted.tokenizer, n=1, seed=0)
    heads = tuple(unit for unit, what in planted.truth.items() if "induction" in what)
    ids = batch.ids[:, :30]
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    found = D.HeadCopying(heads=heads, least=0.5).generate(planted.model, ids, **how)
    assert torch.equal(found.ids, planted.model.generate(ids, **how))
    assert found.stats.accepted >= 8 and found.stats.acceptance > 0.7
    score = hw.heads.Induction().score(planted.model, hw.data.RepeatedTokens(length=20).make(planted.tokenizer, 4))
    assert set(heads) <= set(D.HeadCopying().asking(score, 2).heads)


def test_trees_are_cut_and_become_chains() -> None:
    tree = Draft([1, 2, 3, 4, 5], [-1, -1, 0, 2, 1], probs=torch.eye(8)[:5])
    assert tree.chain().tokens == [1, 3, 4] and tree.chain().parents is None
    assert tree.chain().probs is not None and tree.chain().probs.shape == (3, 8)
    short = tree.cut(2)
    assert short.tokens == [1, 2, 3, 5] and short.parents == [-1, -1, 0, 1]
    assert tree.cut(3) is tree and Draft([1, 2]).cut(1).tokens == [1]


@pytest.mark.parametrize(
    ("draft", "sentence"),
    [
        (Draft([3, VOCAB]), f"A drafter proposed token {VOCAB}; allowed are 0 to {VOCAB - 1}"),
        (Draft([-1], source="mine"), "mine proposed token -1"),
        (Draft([1, 2], [-1, 1]), "a tree of 2 tokens with the parents"),
        (Draft([1, 2], [-1]), "a tree of 2 tokens with the parents"),
        (Draft([1], None, torch.ones(1, 7)), "the vocabulary of the model"),
    ],
)
def test_a_drafter_of_another_model_is_told(draft: Draft, sentence: str) -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match=sentence):
        model.generate(torch.tensor([[4, 5]]), max_new_tokens=6, custom_generate=Verifying(Says(draft)))


def test_bad_requests_are_answered_in_sentences() -> None:
    model, ids = FAMILIES["llama"].build(), torch.tensor([[4, 5, 6]])
    copy = D.CopySpec()
    with pytest.raises(ValueError, match="gamma is 0, tokens 24"):
        D.CopySpec(gamma=0)
    with pytest.raises(ValueError, match="longest is 0"):
        D.PromptLookup(longest=0)
    with pytest.raises(ValueError, match="tokens is 0 and least 0.2"):
        D.HeadCopying(tokens=0)
    with pytest.raises(ValueError, match="HeadCopying has no heads to ask"):
        D.HeadCopying().generate(model, ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="L7"):
        D.HeadCopying(heads=("L7.H0",)).generate(model, ids, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"'L0' is no head to ask; allowed are names such as L5\.H1\."):
        D.HeadCopying(heads=("L0",)).generate(model, ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="'copyspec' does not draft"):
        D.Either("copyspec", copy)
    with pytest.raises(ValueError, match="'copyspec' does not draft"):
        D.Paced("copyspec")
    with pytest.raises(ValueError, match="least is 3, start 2, most 24"):
        D.Paced(copy, start=2, least=3)
    with pytest.raises(ValueError, match="max_new_tokens is 0; allowed is 1 or more"):
        copy.generate(model, ids, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"The prompt has the shape \[1, 0\]"):
        copy.generate(model, ids[:, :0], max_new_tokens=3)
    with pytest.raises(ValueError, match="num_beams is 2"):
        copy.generate(model, ids, max_new_tokens=3, num_beams=2)
    with pytest.raises(ValueError, match="Drafts need a cache"):
        copy.generate(model, ids, max_new_tokens=3, use_cache=False)
    with pytest.raises(ValueError, match="output_scores is not handed back"):
        copy.generate(model, ids, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    with pytest.raises(TypeError, match="does not say how it drafts"):
        DraftMethod().generate(model, ids, max_new_tokens=3)


def test_encoder_decoders_are_refused() -> None:
    name = next(name for name, family in FAMILIES.items() if family.kind == "both")
    family = FAMILIES[name]
    with pytest.raises(ValueError, match="is an encoder-decoder; drafts are verified"):
        family.build().generate(
            family.inputs(rows=1)["input_ids"], max_new_tokens=3, custom_generate=Verifying(Says(Draft([1])))
        )
