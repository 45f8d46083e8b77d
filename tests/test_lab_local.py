"""Local experience (s026): nets, what is seen of them, ways of asking, and the experiment."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from headwise import replicate
from headwise.data import LocalBayesNet
from headwise.data.local_bayes_net import information
from headwise.lab import LocalExperience, TinyConfig, train
from headwise.lab.local_experience import asked, estimate, wandering

NODES = 7


@pytest.fixture(scope="module")
def net():
    return LocalBayesNet(nodes=NODES, pairs=3, world=1)


@pytest.fixture(scope="module")
def model(net):
    return TinyConfig(**net.config(layers=1, heads=2, width=16, mlp=16)).build(0).eval()


def test_a_net_is_a_distribution_and_its_links_carry_the_information(net):
    found = net.net
    assert found.joint.sum() == pytest.approx(1.0) and found.joint.shape == (2**NODES,)
    assert found.linked.sum() == 2 * NODES and np.array_equal(found.near == 1, found.linked)
    assert len(found.held) == 3
    for a, b in found.held:
        assert not found.linked[a, b] and 1 < found.near[a, b] < NODES and information(found.joint, a, b) > 1e-6
    a, b = found.held[0]
    sure = net.conditional(a, {})
    mixed = sure * net.conditional(b, {a: 1}) + (1 - sure) * net.conditional(b, {a: 0})
    assert mixed == pytest.approx(net.conditional(b, {}))


def test_information_by_hand():
    # Three variables: two fair coins, and the third says whether they differ.
    states = np.arange(8)
    a, b, c = states & 1, states >> 1 & 1, states >> 2 & 1
    joint = np.where(c == (a ^ b), 0.25 - 1e-12, 1e-12)
    assert information(joint, 0, 1) == pytest.approx(0, abs=1e-9)
    assert information(joint, 0, 1, (2,)) == pytest.approx(np.log(2), abs=1e-6)
    copy = np.where((a == c) & (b == 0), 0.5 - 1e-12, 1e-12)
    assert information(copy, 0, 2) == pytest.approx(np.log(2), abs=1e-6)


def test_a_scaffold_makes_two_variables_independent(net):
    for a, b in net.net.held:
        between = net.scaffold(a, b)
        assert between and information(net.net.joint, a, b, tuple(between)) < 1e-9
        given = dict.fromkeys(between, 1)
        both = [net.conditional(b, given | {a: v}) for v in (0, 1)]
        assert both[0] == pytest.approx(both[1]) == pytest.approx(net.conditional(b, given))
        assert [net.net.near[a, node] for node in between] == sorted(net.net.near[a, node] for node in between)


@pytest.mark.parametrize("seen", ["local", "full", "wrong"])
def test_held_out_pairs_are_never_observed_together(net, seen):
    lesson = replace(net, seen=seen)
    batch = lesson.make(None, 400, 0)
    names = torch.where(batch.weight > 0, batch.answer, -1)[:, 0::2]
    shown = torch.stack([(names == node).any(-1) for node in range(NODES)], -1)
    assert not any((shown[:, a] & shown[:, b]).any() for a, b in lesson.net.held)
    assert shown.any(0).all()
    count = shown.sum(-1)
    assert torch.equal(count, (names >= 0).sum(-1)) and count.min() >= 1
    last = names.gather(1, count[:, None] - 1)[:, 0]
    assert torch.equal(batch.ids[:, 1], last) and (batch.ids[:, 0] == NODES + 2).all()
    assert torch.equal(batch.ids[:, 2:], torch.where(batch.weight > 0, batch.answer, NODES + 3)[:, :-1])
    if seen == "local":
        linked = torch.from_numpy(lesson.net.near <= 1)
        pairs = shown[:, :, None] & shown[:, None]
        full = replace(net, seen="full").make(None, 400, 0)
        assert count.float().mean() < (full.weight.sum(-1) / 2).mean() - 1
        assert (pairs & linked).sum() > 0.5 * pairs.sum()


def test_values_come_as_often_as_the_net_says(net):
    batch = replace(net, seen="full").make(None, 4000, 3)
    names, values = batch.answer[:, 0::2], batch.answer[:, 1::2] - NODES
    there = batch.weight[:, 0::2] > 0
    for node in range(NODES):
        mine = there & (names == node)
        assert values[mine].float().mean().item() == pytest.approx(net.conditional(node, {}), abs=0.04)


def test_the_line_is_the_loss_of_guessing_names_and_knowing_marginals(net):
    batch = net.make(None, 3000, 5)
    odds = torch.tensor([net.conditional(node, {}) for node in range(NODES)])
    logits = torch.full((*batch.answer.shape, NODES + 2), -torch.inf)
    logits[:, 0::2, :NODES] = 0
    name = batch.answer[:, 0::2]
    logits[:, 1::2, NODES] = (1 - odds[name]).log()
    logits[:, 1::2, NODES + 1] = odds[name].log()
    logits = torch.where(batch.weight[..., None] > 0, logits, 0.0)
    assert net.loss(logits, batch).mean().item() == pytest.approx(net.lines()["marginals"], rel=0.02)
    perfect = 50.0 * torch.nn.functional.one_hot(batch.answer, NODES + 2)
    perfect = torch.where(batch.weight[..., None] > 0, perfect, -perfect)
    assert net.loss(perfect, batch).max() < 1e-6 and (net.metrics(perfect, batch)["accuracy"] == 1).all()


def test_asking_directly_is_the_next_token(net, model):
    of, given, value = asked(net)[0]
    assert len(asked(net)) == 12 and value == 0
    straight = estimate(model, net, of, given, value, [])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[NODES + 2, of, given, NODES + value, of]])).logits[0, -1, NODES:]
    assert straight == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-6)


def test_a_scaffold_is_summed_over(net, model):
    of, given, value = asked(net)[1]
    between = [node for node in range(NODES) if node not in (of, given)][:2]
    total = 0.0
    for one in (0, 1):
        for two in (0, 1):
            ids = [NODES + 2, of, given, NODES + value, between[0], NODES + one, between[1], NODES + two, of]
            with torch.no_grad():
                odds = model(input_ids=torch.tensor([ids])).logits[0, :, NODES:].softmax(-1)
            total += float(odds[4, one] * odds[6, two] * odds[8, 1])
    assert estimate(model, net, of, given, value, between) == pytest.approx(total, abs=1e-6)


def test_the_model_may_say_by_itself_what_lies_in_between(net, model):
    questions = asked(net)
    said, steps = wandering(model, net, questions, draws=3, seed=0)
    assert said.shape == steps.shape == (12,)
    assert ((said > 0) & (said < 1)).all() and ((steps >= 0) & (steps <= NODES - 2)).all()
    again = wandering(model, net, questions, draws=3, seed=0)
    assert torch.equal(said, again[0]) and torch.equal(steps, again[1])


def test_the_loss_goes_down():
    conditions = LocalExperience(nets=(3,), nodes=6).conditions()
    assert list(conditions) == ["local, net 3", "full, net 3", "wrong, net 3"]
    one = conditions["local, net 3"]
    few = replace(one.training, steps=40, warmup=5, measure_every=20, rows=64)
    losses = train(one.model, one.lesson, few, seed=1).tape.curve("loss")[1]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="are no net here; allowed are local, full, wrong"):
        LocalBayesNet(seen="some")
    assert replicate.find("local_experience").row == "s026"
