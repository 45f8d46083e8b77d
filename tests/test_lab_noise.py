"""Chains of thought as lessons: traces with noise (s049)."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.data import TracedIntegers
from headwise.data.traces import running, written
from headwise.lab import NoisyTraces, TinyConfig, train
from headwise.lesson import generator

CLEAN = TracedIntegers(length=5)


def noisy(noise, **more):
    return TracedIntegers(length=5, noise=noise, **({"contaminated": 1.0} | more))


def test_results_run_through_sums_and_products():
    numbers, times = torch.tensor([[3, 4, 5], [2, 6, 7]]), torch.tensor([[False, True, False], [True, False, True]])
    assert running(numbers, 10).tolist() == [[3, 7, 2], [2, 8, 5]]
    assert running(numbers, 10, times).tolist() == [[3, 2, 7], [2, 8, 6]]
    assert running(numbers, 10, slips=torch.tensor([[0, 1, 0], [5, 0, 0]])).tolist() == [[3, 8, 3], [7, 3, 0]]


def test_a_trace_holds_the_totals_and_ends_in_the_sum():
    batch = CLEAN.make(None, 30, 0)
    ids, (digits, totals) = batch.ids, CLEAN.parts(batch)
    assert ids.shape == (30, 12) and (ids[:, 5] == 10).all() and (ids[:, 11] == 11).all()
    assert torch.equal(totals, digits.cumsum(-1) % 10) and torch.equal(batch.answer[:, -1], totals[:, -1])
    # Every total is said where the token before it stands.
    assert torch.equal(ids.gather(1, batch.at[:, :-1] + 1), totals)
    for name, low, high in (("question", 0, 5), ("trace", 6, 11)):
        assert (batch.spans[name] == torch.tensor([low, high])).all()
    cells = CLEAN.cells(batch)
    assert torch.equal(ids[:, cells["number"][0].int().argmax(-1)[5:10]], digits)
    assert cells["number"][0].any(-1).sum() == 5 and cells["result"][0].nonzero().tolist() == [[11, 10]]
    assert CLEAN.follows(batch).all() and CLEAN.right == 1.0 and CLEAN.lines()["Bayes"] == 0.0


def test_dynamic_mistakes_carry_on_and_static_ones_do_not():
    for noise in ("static", "dynamic"):
        lesson = noisy(noise, intensity=0.15)
        batch = lesson.make(None, 3000, 1)
        digits, trace = lesson.parts(batch)
        true, follows, answer = digits.cumsum(-1) % 10, lesson.follows(batch), batch.answer[:, -1]
        if noise == "static":
            assert torch.equal(answer, true[:, -1])
            slips = trace != true
            one = slips.sum(-1) == 1
            # A wrong total does not follow from the one before it, nor the next one from it.
            assert torch.equal(~follows[one], slips[one] | (slips[one].roll(1, -1) & (torch.arange(5) > 0)))
        else:
            assert torch.equal(answer, trace[:, -1])
            one = (~follows).sum(-1) == 1
            # After the one mistake every total is off by the same.
            off = ((trace - true) % 10)[one]
            assert torch.equal(off > 0, (~follows[one]).cumsum(-1) > 0)
            assert all(len(row[row > 0].unique()) == 1 for row in off)
            assert not (answer == true[:, -1])[one].any()
        assert one.sum() > 500


@pytest.mark.parametrize("noise", ["static", "dynamic"])
def test_the_lines_are_those_of_the_noise(noise):
    lesson = noisy(noise, contaminated=0.6, intensity=0.2)
    batch = lesson.make(None, 60_000, 2)
    digits, trace = lesson.parts(batch)
    assert float((batch.answer[:, -1] == digits.sum(-1) % 10).float().mean()) == pytest.approx(lesson.right, abs=0.01)
    # Nats of the mistakes' pattern, counted, and of which digit each became.
    slips = ~lesson.follows(batch) if noise == "dynamic" else trace != digits.cumsum(-1) % 10
    _, counts = slips.long().matmul(2 ** torch.arange(5)).unique(return_counts=True)
    odds = counts / counts.sum()
    nats = -(odds * odds.log()).sum() + slips.float().sum(-1).mean() * torch.tensor(9.0).log()
    assert float(nats / 6) == pytest.approx(lesson.lines()["Bayes"], rel=0.02)
    assert lesson.lines()["Bayes"] == noisy("static", contaminated=0.6, intensity=0.2).lines()["Bayes"]
    assert lesson.on("clean").follows(lesson.on("clean").make(None, 50, 0)).all()


def test_a_model_reads_what_it_writes():
    model = TinyConfig(**CLEAN.config(layers=1, heads=2, width=16, pos="learned")).build(0).eval()
    batch = CLEAN.make(None, 6, 0)
    said = written(model, batch)
    # With its own results in the prompt, the model says just these.
    ids = batch.ids.clone()
    ids[:, 6:11] = said[:, :5]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.equal(logits.argmax(-1).gather(1, batch.at), said)
    drawn = written(model, batch, generator(3))
    assert torch.equal(drawn, written(model, batch, generator(3))) and not torch.equal(drawn, said)


def test_the_loss_goes_down_and_every_share_is_a_condition():
    lab = NoisyTraces()
    conditions = lab.conditions()
    assert list(conditions) == ["clean", "static 50%", "static 100%", "dynamic 25%", "dynamic 50%"]
    one = conditions["dynamic 50%"]
    few = replace(one.training, steps=30, measure_every=15, rows=64)
    run = train(one.model, one.lesson, few, seed=1)
    losses = run.tape.curve("loss")[1]
    assert losses[-1] < losses[0] and run.tape.last("answer", "clean") >= 0
    assert replicate.find("s049").name == "noisy_traces"


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="is no noise here"):
        TracedIntegers(noise="loud")
    with pytest.raises(ValueError, match="make no sum"):
        TracedIntegers(length=1)
