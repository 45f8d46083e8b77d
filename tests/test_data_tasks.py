"""What each task of the data room promises about its prompts and their answers."""

import importlib.util

import pytest
import torch
from trained_tokenizers import MAKERS, byte_level

from headwise.data.capitals import Capitals
from headwise.data.capitals_conflict import CapitalsConflict
from headwise.data.digits_images import DigitImages
from headwise.data.induction import Induction
from headwise.data.ioi import IOI
from headwise.data.multiple_choice import MultipleChoice
from headwise.data.needle import STEM, Needle
from headwise.data.neutral import NeutralText
from headwise.data.prose import sentences
from headwise.data.repeated_tokens import RepeatedTokens
from headwise.data.successor import Successor
from headwise.data.words import CAPITALS


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


def test_repeated_tokens_repeat(tokenizer):
    for repeats in (2, 4):
        batch = RepeatedTokens(length=12, repeats=repeats).make(tokenizer, 3, 1)
        period = batch.about["period"]
        (low, high), (start, stop) = batch.spans["first"][0], batch.spans["last"][0]
        assert period == 12 and stop == batch.ids.shape[1]
        assert start - low == period * (repeats - 1)
        assert torch.equal(batch.ids[:, low:high], batch.ids[:, start:stop])
        assert torch.equal(batch.ids[:, batch.at[0] + 1], batch.answer)
        assert batch.at.shape[1] == 11
        assert not set(batch.ids[:, low:].flatten().tolist()) & set(tokenizer.all_special_ids)


def test_repeated_tokens_may_be_long(tokenizer):
    batch = RepeatedTokens(length=2500, repeats=4).make(tokenizer, 1)
    assert batch.ids.shape[1] >= 10000


def test_induction_answer_follows_the_earlier_token(tokenizer):
    batch = Induction().make(tokenizer, 6, 2)
    for ids, other, answer, foil, source, target in zip(
        batch.ids,
        batch.corrupt["input_ids"],
        batch.answer,
        batch.foil,
        batch.spans["source"],
        batch.spans["target"],
        strict=True,
    ):
        assert ids[source[0]] == ids[-1] != other[source[0]]
        assert ids[target[0]] == answer[0] == other[target[0]]
        assert foil[0] in ids
        places = (ids[:-1] == ids[-1]).nonzero().flatten()
        assert len(places) == 4 and (ids[places + 1] == answer[0]).all()
        assert ids[-1] not in other[:-1]


def test_needle_holds_the_code(tokenizer):
    batch = Needle(length=200, depths=(0.1, 0.9)).make(tokenizer, 6)
    size = batch.about["code_tokens"]
    for row, text in enumerate(batch.texts):
        low, high = batch.spans["needle"][row]
        code = batch.ids[row, low:high].tolist()
        assert high - low == size and code[0] == batch.answer[row, 0]
        assert batch.corrupt["input_ids"][row, low] == batch.foil[row, 0]
        assert len(set(code)) == size
        assert text.endswith(STEM) and text.count(STEM) == 2
        assert all(int((batch.ids[row] == token).sum()) == 1 for token in code)
    real = batch.inputs["attention_mask"].sum(1)
    assert (real <= 202).all() and (real > 150).all()
    start = batch.inputs["attention_mask"].argmax(1)
    place = (batch.spans["needle"][:, 0] - start) / real
    assert (place[0::2] < 0.35).all() and (place[1::2] > 0.65).all()


def test_ioi_names(tokenizer):
    batch = IOI().make(tokenizer, 8)
    ids = batch.ids
    row = torch.arange(8)
    io, s1, s2 = (ids[row, batch.spans[name][:, 0]] for name in ("io", "s1", "s2"))
    assert torch.equal(s1, s2) and torch.equal(io, batch.answer[:, 0]) and torch.equal(s1, batch.foil[:, 0])
    first = batch.spans["io"][:, 0] < batch.spans["s1"][:, 0]
    assert int(first.sum()) == 4
    assert torch.equal(batch.spans["end"][:, 1], torch.full((8,), ids.shape[1]))


def test_capitals_answer_what_the_text_says():
    tokenizer = byte_level()
    batch = Capitals(countries=("France", "Germany", "Italy", "Spain", "Japan")).make(tokenizer, 10)
    for text, answer in zip(batch.texts, batch.answer, strict=True):
        country = text.removeprefix("The capital of ").removesuffix(" is")
        assert f" {CAPITALS[country]}".startswith(tokenizer.decode(answer))
    for text, answer, foil in zip(
        *(lambda b: (b.texts, b.answer, b.foil))(CapitalsConflict().make(tokenizer, 10)), strict=True
    ):
        country = text.rpartition("capital of ")[2].removesuffix(" is")
        stated = text.partition(" is ")[2].partition(".")[0]
        assert stated != CAPITALS[country]
        assert f" {stated}".startswith(tokenizer.decode(answer))
        assert f" {CAPITALS[country]}".startswith(tokenizer.decode(foil))


def test_multiple_choice_marks_its_options():
    tokenizer = byte_level()
    batch = MultipleChoice().make(tokenizer, 12)
    letters = batch.about["letters"]
    rights = set()
    for row in range(12):
        right, wrong = letters.index(int(batch.answer[row])), letters.index(int(batch.foil[row]))
        rights.add(right)
        said = {
            name: tokenizer.decode(batch.ids[row, low:high])
            for name, (low, high) in ((k, v[row]) for k, v in batch.spans.items())
        }
        assert said[f"option_{right}"] == f"{'ABCD'[right]}. {said['asked']}\n"
        low, high = batch.spans["asked"][row]
        assert said[f"option_{wrong}"].strip().endswith(tokenizer.decode(batch.corrupt["input_ids"][row, low:high]))
        for i in range(4):
            assert batch.spans[f"option_end_{i}"][row].tolist() == [
                batch.spans[f"option_{i}"][row, 1] - 1,
                batch.spans[f"option_{i}"][row, 1],
            ]
    assert len(rights) > 2


def test_successor_answers_come_next(tokenizer):
    batch = Successor().make(tokenizer, 12)
    sets = batch.about["sets"]
    assert sets
    for row in range(12):
        last = int(batch.ids[row, batch.spans["last"][row, 0]])
        ids = next(one for one in sets.values() if last in one and int(batch.answer[row]) in one)
        assert ids[ids.index(last) + 1] == batch.answer[row, 0]


def test_neutral_text_predicts_every_token(tokenizer):
    batch = NeutralText(length=50).make(tokenizer, 3)
    assert batch.ids.shape == (3, 50)
    assert torch.equal(batch.ids.gather(1, batch.at + 1), batch.answer)
    assert batch.foil is None and batch.corrupt is None


def test_prose_is_varied_and_plain():
    flow = sentences("some seed")
    said = [next(flow) for _ in range(400)]
    assert len(set(said)) > 390
    assert not any(char.isdigit() or char == ":" for one in said for char in one)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_digit_images():
    batch = DigitImages().make(None, 20)
    assert batch.inputs["pixel_values"].shape == (20, 1, 8, 8)
    assert batch.inputs["pixel_values"].abs().max() <= 1
    assert batch.at.shape == batch.answer.shape == (20, 1) and batch.answer.max() <= 9
    train = DigitImages("train").make(None, 1297)
    test = DigitImages("test").make(None, 500)
    assert not set(train.texts) & set(test.texts)
    with pytest.raises(ValueError, match="not tokens"):
        _ = batch.ids
    with pytest.raises(ValueError, match="1 to 500"):
        DigitImages().make(None, 501)
    with pytest.raises(ValueError, match="'validation'.*train, test, all"):
        DigitImages("validation").make(None, 5)
