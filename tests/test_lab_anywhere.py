"""Answers anywhere (s150): where they stand, what is asked and told anew, and the experiment."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.data import AnswerAnywhere
from headwise.lab import WholeContext, train
from headwise.lab.whole_context import accuracy_by_place


@pytest.mark.parametrize("way", ["forward", "backward", "both"])
def test_every_answer_stands_where_it_is_said_to(way):
    lesson = AnswerAnywhere(pairs=8, questions=3, symbols=16, way=way)
    batch = lesson.make(None, 200, 2)
    ids, source = batch.ids, lesson.sources(batch)
    assert ids.shape == (200, 2 * 8 + 5) and (ids[:, 0:16:2] < 16).all() and (ids[:, 1:16:2] >= 16).all()
    assert all(len(set(row)) == 16 for row in ids[:, :16].tolist())
    assert torch.equal(ids.gather(1, source), batch.answer)
    asked = ids.gather(1, batch.at)
    assert torch.equal(ids.gather(1, source ^ 1), asked) and torch.equal(ids[:, 17::2], batch.answer[:, :-1])
    assert all(len(set(row)) == 3 for row in (source // 2).tolist())
    odd = (source % 2).float().mean().item()
    assert odd == {"forward": 1.0, "backward": 0.0}.get(way, pytest.approx(0.5, abs=0.1))
    answer = lesson.cells(batch)["answer"]
    assert answer.sum() == 600 and answer[7, batch.at[7, 1], source[7, 1]]
    (pair,) = lesson.cells(batch)["pair"]
    assert pair.sum() == 8 and pair[1, 0] and pair[15, 14]
    assert torch.equal(lesson.said(batch)[:, :16], ids[:, :16]) and (lesson.said(batch)[:, 16:] == -1).all()


@pytest.mark.parametrize("way", ["forward", "backward", "both"])
def test_corrupt_prompts_differ_in_the_answers_alone(way):
    lesson = AnswerAnywhere(pairs=8, questions=3, symbols=16, way=way)
    batch = lesson.make(None, 100, 3)
    other, source = batch.flipped().ids, lesson.sources(batch)
    changed = torch.zeros_like(other, dtype=torch.bool).scatter(1, source, True)
    assert torch.equal(other != batch.ids, changed)
    for row in range(100):
        assert not set(other[row, source[row]].tolist()) & set(batch.ids[row, :16].tolist())
        assert len(set(other[row, :16].tolist())) == 16
    assert torch.equal(other >= 16, batch.ids >= 16)


@pytest.mark.parametrize(
    ("asked", "places"), [("uniform", range(16)), ("ends", [0, 1, 14, 15]), ("start", [0, 1, 2, 3])]
)
def test_places_are_asked_for_alike(asked, places):
    lesson = AnswerAnywhere(asked=asked, questions=2)
    for split, allowed in (("train", list(places)), ("anywhere", list(range(16)))):
        one = replace(lesson, split=split)
        count = torch.bincount((one.sources(one.make(None, 4000, 1)) // 2).flatten(), minlength=16)
        assert count.nonzero().flatten().tolist() == allowed
        even = 8000 / len(allowed)
        # Chi squared over what is allowed, far below what chance gives once in a thousand.
        assert ((count[allowed] - even) ** 2 / even).sum() < 38


def test_accuracy_is_told_place_by_place():
    lesson = AnswerAnywhere(questions=2)
    batch = lesson.make(None, 500, 0)
    right = lesson.sources(batch) // 2 >= 8
    assert lesson.by_place(right, batch) == [0.0] * 8 + [1.0] * 8
    few = replace(lesson, asked="start")
    batch = few.make(None, 50, 0)
    assert few.by_place(torch.ones(50, 2), batch)[:4] == [1.0] * 4
    assert all(value != value for value in few.by_place(torch.ones(50, 2), batch)[4:])
    logits = torch.zeros(50, 2, 64)
    logits[..., :32] = -torch.inf
    assert few.loss(logits, batch).mean().item() == pytest.approx(few.lines()["any symbol"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"asked": "middle"}, "is unknown; allowed are uniform, ends, start and forward, backward, both"),
        ({"pairs": 17}, "allowed are 8 to 16 pairs"),
        ({"asked": "ends", "questions": 5}, "1 to 4 questions here"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AnswerAnywhere(**options)


def test_the_loss_goes_down_and_places_are_measured():
    conditions = WholeContext().conditions()
    assert list(conditions) == ["uniform", "ends", "start"]
    one = conditions["ends"]
    few = replace(one.training, steps=40, warmup=5, measure_every=20, rows=32)
    run = train(one.model, one.lesson, few, seed=1)
    losses = run.tape.curve("loss")[1]
    assert losses[-1] < losses[0] and run.tape.last("loss", "anywhere") > 0
    curve = accuracy_by_place(run.model, one.lesson, rows=200)
    assert len(curve) == 16 and all(0 <= value <= 1 for value in curve)
    assert replicate.find("whole_context").row == "s150"
