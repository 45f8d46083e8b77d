"""Masked chains of thought as a lesson (s023)."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.data import MaskedThought
from headwise.lab import MaskedSteps, train

LESSON = MaskedThought(masked=0.3, problems=40, length=4, modulus=7)


def test_results_follow_from_the_question_whatever_is_masked():
    for split in ("train", "seen", "fresh"):
        batch = LESSON.on(split).make(None, 200, 1)
        ids = batch.ids
        assert ids.shape == (200, 10) and (ids[:, 4] == 14).all() and (ids[:, 9] == 15).all()
        for row in range(200):
            question, result, said = ids[row, :4].tolist(), 0, []
            for token in question:
                result = (result * (token - 7) if token >= 7 else result + token) % 7
                said.append(result)
            assert batch.answer[row].tolist() == [*said, said[-1]] and question[0] < 7
        read = ids[:, 5:9]
        hidden = read == LESSON.mask
        assert torch.equal(read[~hidden], batch.answer[:, :4][~hidden])
        share = float(hidden.float().mean())
        assert share == pytest.approx(0.3, abs=0.05) if split == "train" else share == 0


def test_training_comes_from_a_fixed_set_of_problems():
    def questions(split, seed):
        return {tuple(row) for row in LESSON.on(split).make(None, 400, seed).ids[:, :4].tolist()}

    seen = questions("train", 0) | questions("train", 1)
    assert len(seen) == 40 and questions("seen", 5) <= seen and len(questions("fresh", 0)) > 300
    plain = replace(LESSON, masked=0.0)
    assert torch.equal(plain.make(None, 30, 2).answer, LESSON.make(None, 30, 2).answer)
    assert torch.equal(plain.make(None, 30, 2).ids, plain.on("seen").make(None, 30, 2).ids)


def test_exact_needs_all_of_the_results():
    batch = LESSON.on("fresh").make(None, 9, 0)
    perfect = 50.0 * torch.nn.functional.one_hot(batch.answer, 7)
    assert LESSON.loss(perfect, batch).max() < 1e-6 and LESSON.metrics(perfect, batch)["exact"].all()
    perfect[:, 2] = perfect[:, 2].roll(1, -1)
    found = LESSON.metrics(perfect, batch)
    assert not found["exact"].any() and torch.allclose(found["accuracy"], torch.full((9,), 0.8))
    cells = LESSON.cells(batch)["question"][0]
    assert cells.any(-1).nonzero().flatten().tolist() == [4, 5, 6, 7, 9] and cells.sum() == 20


def test_the_loss_goes_down():
    lab = MaskedSteps()
    conditions = lab.conditions()
    assert list(conditions) == ["masked 0%", "masked 20%"]
    one = conditions["masked 20%"]
    shares = [change.lesson.masked for change in one.edits]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < one.lesson.masked == 0.2
    on = [sum(change.when.on(step) for change in one.edits) for step in range(one.training.steps)]
    assert on[0] == 1 and on[-1] == 0 and sorted(on, reverse=True) == on
    few = replace(one.training, steps=30, measure_every=15, rows=64)
    run = train(one.model, one.lesson, few, one.edits, seed=1)
    losses = run.tape.curve("loss")[1]
    assert losses[-1] < losses[0] and 0 <= run.tape.last("exact", "fresh") <= 1
    assert replicate.find("s023").name == "masked_steps"


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(ValueError, match="cannot be masked"):
        MaskedThought(masked=1.0)
    with pytest.raises(ValueError, match="cannot be taught"):
        MaskedThought(problems=0)
