"""Pixel sequences and list operations, their answers and their own inputs."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.data import ListOps, PixelSequences
from headwise.data.digits_images import part_of_digits
from headwise.data.list_ops import ASK, CLOSE, EMPTY, value
from headwise.lab import SelfPretraining, Training, train

MAX, MIN, MEDIAN, SUM = range(10, 14)


def test_values_are_those_of_the_operations():
    assert value([MAX, 3, 9, 4, CLOSE]) == 9 and value([MIN, 3, 9, CLOSE]) == 3
    assert value([MEDIAN, 9, 1, 4, CLOSE]) == 4 and value([MEDIAN, 1, 4, CLOSE]) == 2
    assert value([SUM, 9, 5, CLOSE]) == 4
    assert value([MAX, 3, MIN, 7, 2, SUM, 9, 9, CLOSE, CLOSE, 1, CLOSE]) == 3


def test_expressions_fill_prompts_from_the_right_and_none_is_in_both_parts():
    lesson = ListOps(examples=400, length=16)
    seen = set()
    for split, n in (("train", 400), ("test", 500)):
        batch = lesson.on(split).make(n=n)
        assert batch.ids.shape == (n, 17) and (batch.ids[:, -1] == ASK).all() and (batch.at == 16).all()
        for row, answer in zip(batch.ids.tolist(), batch.answer[:, 0].tolist(), strict=True):
            tokens = [token for token in row[:-1] if token != EMPTY]
            assert row[:-1] == [EMPTY] * (16 - len(tokens)) + tokens and value(tokens) == answer
            assert tuple(tokens) not in seen
            seen.add(tuple(tokens))
    inputs = replace(lesson, due="inputs").make(n=9)
    assert torch.equal(inputs.answer, inputs.ids[:, 1:16]) and torch.equal(inputs.at[0], torch.arange(15))
    assert torch.equal(inputs.weight > 0, inputs.answer != EMPTY)


def test_pixels_are_those_of_the_images():
    pytest.importorskip("sklearn")
    lesson = PixelSequences(split="test")
    batch = lesson.make(n=500)
    images, digits, _ = part_of_digits("test")
    assert sorted(batch.ids[:, :64].sum(-1).tolist()) == sorted(((images + 1) * 8).sum((1, 2)).long().tolist())
    assert batch.ids[:, :64].max() == 16 and sorted((batch.answer[:, 0] - 18).tolist()) == sorted(digits.tolist())
    inputs = replace(lesson, due="inputs").make(n=5)
    assert torch.equal(inputs.answer, inputs.ids[:, 1:64]) and inputs.at.shape == (5, 63)


def test_the_answers_come_after_the_inputs():
    pytest.importorskip("sklearn")
    every = SelfPretraining(before=3, after=3).conditions()
    few = Training(steps=6, batch=4, measure_every=3, rows=8)
    for mixer in ("attention", "recurrence"):
        names = [f"list operations, {mixer}, {start}" for start in ("scratch", "pretrained")]
        scratch, first = (train(every[n].model, every[n].lesson, few, every[n].edits, seed=1) for n in names)
        assert scratch.losses[0] != first.losses[0]
        assert first.losses[3] != scratch.losses[3]
        assert scratch.tape.curve("accuracy", "test")[0] == first.tape.curve("accuracy", "test")[0] == [0, 3, 6]


def test_what_cannot_be_taught_is_refused():
    for make, said in (
        (lambda: ListOps(due="all"), "is nothing to be taught"),
        (lambda: PixelSequences(due="all"), "is nothing to be taught"),
        (lambda: ListOps(length=4), "do not fit 4 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


def test_the_replication_is_found():
    assert replicate.find("s027").name == "self_pretraining"
