"""RASP-L: its steps, what it refuses, and programs that agree with plain Python; the lesson of lengths (s048)."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from headwise import rasp, replicate
from headwise.data import LengthLesson
from headwise.data.rasp_programs import MARK, ONE, TASKS, ZERO, agreement, lengths, vocabulary
from headwise.lab import LengthGeneralization, train
from headwise.rasp import (
    aggregate,
    compare,
    each,
    induct,
    kqv,
    moved,
    places,
    select,
    shift,
    size,
    tokens,
    where,
    width,
)

X = tokens([[0, 5, 7, 6, 0, 5, 7], [3, 3, 3, 1, 2, 1, 3]])


def test_looking_back_sees_nothing_that_comes_later():
    assert shift(X).values.tolist() == [[-1, 0, 5, 7, 6, 0, 5], [-1, 3, 3, 3, 1, 2, 1]]
    seen = width(select(X, X))
    assert seen.values.tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 1, 2, 4]] and seen.grows
    here = places(X)
    assert kqv(here, here, X, "<=", "min").values.tolist() == [[0] * 7, [3, 3, 3, 1, 1, 1, 1]]
    assert kqv(here, here, X, "<=", "mean").values[1].tolist() == [
        np.mean([3, 3, 3, 1, 2, 1, 3][: i + 1]) for i in range(7)
    ]
    assert kqv(X, 9, X, default=4).values.tolist() == [[4] * 7] * 2
    assert aggregate(select(X, 5), here, "min").values.tolist() == [[0, 1, 1, 1, 1, 1, 1], [0] * 7]
    for relation, function in rasp.RELATIONS.items():
        cells = select(X, X, relation).cells
        for q in range(7):
            for k in range(7):
                assert cells[1, q, k] == (k <= q and function(X.values[1, k], X.values[1, q]))


def test_induction_takes_the_last_one_before():
    assert induct(X, X, X).values.tolist() == [[-1, -1, -1, -1, 5, 7, 6], [-1, 3, 3, -1, -1, 2, 1]]
    assert kqv(shift(X), X, X).values[0, -1] == 6


def test_the_size_of_a_program_is_what_it_needed():
    assert size(X) == (0, 0, 0)
    before = shift(X)
    assert size(before) == (2, 1, 1) and size(shift(before)) == (4, 2, 2)
    shift(before)  # computed in vain
    said = kqv(before, X, X)
    assert size(said) == (3, 2, 2)
    # A step that two others need counts once.
    assert size(where(compare(said, "==", 6), before, said)) == (5, 2, 2)
    assert size(moved(X, 1)) == (1, 0, 0)


def test_places_and_counts_take_no_arithmetic():
    here, seen = places(X), width(select(X, X))
    assert moved(here, -1).grows and where(compare(here, "<", seen), here, seen).grows
    for make, said in (
        (lambda: each(lambda v: v % 2, seen), "no other function takes them"),
        (lambda: moved(here, 2), "moved by 1 or -1"),
        (lambda: compare(here, "==", X), "not with tokens"),
        (lambda: select(X, here), "not with tokens"),
        (lambda: where(compare(X, "==", 5), here, 0), "not with tokens"),
        (lambda: aggregate(select(X, X), here, "mean"), "arithmetic with them"),
        (lambda: aggregate(select(X, X), X, "sum"), "no way to aggregate"),
        (lambda: compare(X, "~", 5), "is no relation"),
        (lambda: tokens([1, 2]), "these have 1 axes"),
        (lambda: agreement("parity"), "no short program"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.program])
def test_every_program_says_what_plain_python_says(name):
    assert agreement(name, inputs=1000) == 1.0


def test_a_program_writes_token_by_token():
    draw = random.Random(3)
    prompts = [TASKS["parity step by step with hints"].ask(draw, 5, 8) for _ in range(20)]
    said = rasp.generate(lambda x: TASKS["parity step by step with hints"].program(x, 19), prompts, 11)
    assert said.tolist() == [TASKS["parity step by step with hints"].answer(prompt) for prompt in prompts]


def test_a_wrong_program_does_not_agree(monkeypatch):
    wrong = TASKS["copy different letters"]._replace(program=lambda x, hint: x)
    monkeypatch.setitem(TASKS, "copy different letters", wrong)
    assert agreement("copy different letters", inputs=20) == 0.0


def test_the_table_of_lengths():
    found = lengths()
    assert {name: one and tuple(one) for name, one in found.items()} == {
        "count": (10, 3, 2),
        "mode": (3, 3, 3),
        "copy different letters": (3, 2, 2),
        "copy bits with hints": (8, 4, 3),
        "parity step by step with hints": (11, 4, 3),
        "copy bits": None,
        "parity": None,
    }


@pytest.mark.parametrize("name", TASKS)
def test_prompts_end_in_the_mark_and_answers_follow(name):
    lesson = LengthLesson(task=name, longest=4, tested=7)
    for split, longest in (("train", 4), ("longer", 7)):
        batch = lesson.on(split).make(None, 60, 1)
        ids, there = batch.ids, batch.weight > 0
        assert ids.max() < vocabulary(7) == lesson.shape.vocab_size and ids.shape[1] <= lesson.shape.length
        for row in range(60):
            at, answer = batch.at[row][there[row]], batch.answer[row][there[row]]
            prompt = ids[row, : at[0] + 1].tolist()
            assert prompt[-1] == MARK and TASKS[name].answer(prompt) == answer.tolist()
            assert torch.equal(ids[row, at[1:]], answer[:-1])
        items = there.sum(-1)
        if name in ("count", "copy different letters", "copy bits"):
            assert items.max() == longest + 1 and (items.min() == 3 if split == "train" else items.min() == 8)
        perfect = 50.0 * torch.nn.functional.one_hot(batch.answer, lesson.shape.outputs)
        assert lesson.loss(perfect, batch).max() < 1e-6 and lesson.metrics(perfect, batch)["exact"].all()
        off = perfect.clone()
        off[:, 0] = off[:, 0].roll(1, -1)
        assert not lesson.metrics(off, batch)["exact"].any() and lesson.metrics(off, batch)["accuracy"].max() < 1
    assert lesson.shape.length == lesson.on("longer").make(None, 4).ids.shape[1]


def test_hints_are_numbers_in_a_row():
    lesson = LengthLesson(task="parity step by step with hints", longest=4, tested=7)
    batch = lesson.on("longer").make(None, 30, 0)
    hints, bits, parity = batch.ids[:, 1:15:2], batch.ids[:, 2:15:2], batch.answer[:, 1::2]
    assert hints.min() >= lesson.hint and (hints.diff() == 1).all() and torch.equal(batch.answer[:, 0:-1:2], hints)
    assert torch.equal(parity == ONE, (bits == ONE).cumsum(-1) % 2 == 1) and ((bits == ZERO) | (bits == ONE)).all()


def test_the_loss_goes_down():
    lab = LengthGeneralization(longest=4, tested=8)
    assert list(lab.conditions()) == list(TASKS)
    one = lab.conditions()["count"]
    few = replace(one.training, steps=40, batch=32, measure_every=20, rows=64)
    run = train(one.model, one.lesson, few, seed=1)
    losses = run.tape.curve("loss")[1]
    assert losses[-1] < losses[0] and 0 <= run.tape.last("exact", "longer") <= 1
    assert replicate.find("s048").name == "length_generalization"


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(ValueError, match="is no algorithmic task"):
        LengthLesson(task="sort")
    with pytest.raises(ValueError, match="cannot be taught to be tested"):
        LengthLesson(longest=9, tested=8)


def test_prompts_may_begin_anywhere():
    lab = LengthGeneralization(longest=4, tested=8, positions="learned")
    one = lab.conditions()["copy different letters"]
    for split in ("train", "longer"):
        batch = one.lesson.on(split).make(None, 400, 0)
        places, room = batch.inputs["position_ids"], one.lesson.shape.length
        last = (batch.at * batch.weight).amax(-1).long()
        inside = torch.arange(1, places.shape[1]) <= last[:, None]
        assert (places.diff(dim=-1) == 1)[inside].all() and places.max() == room - 1 == one.model.max_positions - 1
        for end in last.unique():
            rows = places[last == end]
            assert sorted(set(rows[:, 0].tolist())) == list(range(room - int(end)))
            assert rows[:, int(end)].max() == room - 1
    assert not {"position_ids"} & set(LengthLesson().make(None, 2).inputs)
    few = replace(one.training, steps=4, batch=8, measure_every=2, rows=8)
    assert train(one.model, one.lesson, few, seed=1).step == 4
