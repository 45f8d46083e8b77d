"""Rules that can or cannot all hold (s068): satisfiability, its crossing, and the lesson made of it."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from headwise import replicate
from headwise.data import Rules
from headwise.data.satisfying import crossing, random_clauses, satisfiable, share, told
from headwise.lab import PhaseTransition, train
from headwise.lesson import generator
from headwise.task import answer_logits


def plainly(clauses, facts):
    """Every assignment in plain Python."""
    return any(
        all(any(states[one // 2] != bool(one % 2) for one in clause) for clause in clauses)
        for states in product((False, True), repeat=facts)
    )


@pytest.mark.parametrize(("facts", "literals", "most"), [(3, 2, 8), (5, 3, 40), (7, 3, 45), (8, 3, 50)])
def test_every_assignment_is_tried(facts, literals, most):
    draw = generator(facts)
    clauses = random_clauses(60, most, facts, literals, draw)
    assert (torch.stack([row.sort(-1).values.diff(dim=-1) for row in clauses // 2]) > 0).all()
    count = torch.randint(1, most + 1, (60,), generator=draw)
    found = satisfiable(clauses, facts, count)
    said = [plainly(row[:n].tolist(), facts) for row, n in zip(clauses, count.tolist(), strict=True)]
    assert found.tolist() == said and 0 < sum(said) < 60


def test_few_rules_can_hold_and_many_cannot():
    assert share(5, 4, 3, generator(0)) > 0.99 and share(5, 80, 3, generator(0)) < 0.02
    ratios = [crossing(facts, 3, generator(1), n=300) for facts in (5, 8, 12)]
    assert ratios == sorted(ratios, reverse=True) and 5.5 < ratios[0] < 6.5 and 4.27 < ratios[2] < 5.3
    assert crossing(8, 2, generator(1), n=300) < 2.5
    one = Rules()
    assert share(5, one.middle, 3, generator(2), 4000) == pytest.approx(0.5, abs=0.06)
    larger = one.on("more facts")
    assert larger.middle > one.middle and share(6, larger.middle, 3, generator(2), 4000) == pytest.approx(0.5, abs=0.06)


def test_prompts_hold_their_rules_and_the_answer_is_true():
    lesson = Rules(facts=4)
    for split in ("train", *lesson.tests):
        here = lesson.on(split)
        batch = here.make(None, 30, 3)
        shape = batch.inputs["inputs_embeds"].shape
        assert shape[2] == lesson.shape.input_size and (batch.at == shape[1] - 1).all()
        counts = set()
        for row in range(30):
            clauses = here.clauses(batch, row)
            counts.add(len(clauses))
            assert all(len({one // 2 for one in clause}) == 3 for clause in clauses)
            assert plainly(clauses, 5) == bool(batch.answer[row, 0])
            assert len({one // 2 for clause in clauses for one in clause}) <= (5 if split == "more facts" else 4)
            assert batch.inputs["attention_mask"][row].sum() == len(clauses) + 1
        assert counts <= set(here.counts()) and (len(counts) == 1) == (split in ("crossing", "more facts"))
    far = Rules(facts=4, kind="far")
    assert far.counts() == lesson.on("far").counts() and not set(far.counts()) & set(lesson.counts())
    assert far.lines()["number of rules"] < 0.5 * lesson.lines()["number of rules"] < lesson.lines()["chance"]


def test_a_rule_in_words_says_the_same():
    names = ("ann", "bob", "cat")
    assert told([1, 2, 4], names) == "If ann and not bob then cat."
    assert told([0, 3], names) == "If not ann then not bob."
    lesson = Rules(facts=4)
    text = lesson.said_in_words(lesson.make(None, 2, 0), 1)
    assert (
        text.count("If ") == text.count(".") == text.count(" then ") == len(lesson.clauses(lesson.make(None, 2, 0), 1))
    )


def test_the_order_of_rules_does_not_matter_and_nobody_looks_at_what_fills_up():
    lesson = Rules(facts=4)
    one = PhaseTransition(facts=4).conditions()["near"]
    model = one.model.build(0).eval()
    batch = lesson.make(None, 5, 0)
    order = torch.cat([torch.randperm(batch.at[0, 0]), batch.at[0, :1]])
    turned = {name: value[:, order] for name, value in batch.inputs.items()}
    with torch.no_grad():
        said = answer_logits(model, batch)
        assert torch.allclose(answer_logits(model, batch, turned), said, atol=1e-5)
        start = int(batch.spans["rules"][0, 0])
        alone = {name: value[:1, start:] for name, value in batch.inputs.items()}
        short = replace(batch.take([0]), inputs=alone, at=batch.at[:1] - start)
        assert torch.allclose(answer_logits(model, short), said[:1], atol=1e-5)


def test_the_loss_goes_down():
    lab = PhaseTransition(facts=3)
    assert list(lab.conditions()) == ["near", "far"]
    one = lab.conditions()["far"]
    few = replace(one.training, steps=40, batch=32, measure_every=20, rows=64)
    losses = train(one.model, one.lesson, few, seed=1).tape.curve("loss")[1]
    assert losses[-1] < losses[0]
    assert replicate.find("s068").name == "phase_transition"


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="is no problem"):
        Rules(kind="middling")
    with pytest.raises(ValueError, match="is no problem"):
        Rules(facts=12)
    with pytest.raises(ValueError, match="cannot be tried one by one"):
        satisfiable(np.zeros((1, 1, 3), dtype=int), 13, np.ones(1))
