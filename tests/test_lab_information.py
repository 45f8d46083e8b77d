"""Information in bits against exact values, the rule on a sphere, and small networks side by side."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from headwise import replicate
from headwise.data import SphereBits
from headwise.information import bottleneck, cells, entropy, mutual, plane
from headwise.lab import InformationPlane, TinyConfig, Training, train
from headwise.replicas import Replicas


def binary(p):
    return float(entropy(np.array([p, 1 - p])))


def test_information_of_tables_is_exact():
    assert binary(0.5) == 1 and binary(0.0) == 0
    assert mutual(np.array([[0.45, 0.05], [0.05, 0.45]])) == pytest.approx(1 - binary(0.1))
    assert mutual(np.outer([0.2, 0.8], [0.3, 0.7])) == pytest.approx(0, abs=1e-12)
    assert mutual(np.eye(8)) == pytest.approx(3)
    # An erasure channel: the input is seen in 3 of 4 cases.
    assert mutual(np.array([[0.375, 0, 0.125], [0, 0.375, 0.125]])) == pytest.approx(0.75)


def test_what_bins_say_is_exact_where_the_distribution_is_known():
    # Inputs 0 to 1023 as numbers from -1 to 1, seen to 3 bits; the label is the first bit, wrong in one of ten cases.
    x = (np.arange(1024) + 0.5) / 512 - 1
    likely = np.where(x > 0, 0.9, 0.1)
    kept, told = plane(cells(x[:, None], 0.25), likely)
    assert kept == pytest.approx(3) and told == pytest.approx(1 - binary(0.1))
    # Two units of different coarseness together say what the finer one does; noise says nothing of the label.
    both = np.stack([x, 0.999 * np.tanh(50 * x)], 1)
    assert plane(cells(both, 0.25), likely)[0] == pytest.approx(3, abs=0.01 + np.log2(9 / 8))
    noise = np.random.default_rng(0).permutation(1024) % 4
    kept, told = plane(noise, likely)
    assert kept == pytest.approx(2) and told < 0.01
    # Every value alone: a deterministic layer keeps all bits of its input.
    assert plane(cells(x[:, None], 1e-6), likely)[0] == pytest.approx(10)
    assert plane(cells(np.sign(x)[:, None], 0.1), likely)[0] == pytest.approx(1)


def test_the_bound_of_a_noisy_bit_is_the_known_one():
    found = bottleneck(np.array([0.1, 0.9]), (1.2, 2.0, 4.0, 40.0), clusters=2, rounds=3000)
    for size, says in found:
        low, high = 0.0, 0.5
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if 1 - binary(middle) > size else (low, middle)
        assert says == pytest.approx(1 - binary(low * 0.9 + (1 - low) * 0.1), abs=2e-3)
    assert found[0] == pytest.approx((0, 0), abs=1e-3)  # below 1 / 0.64, nothing is worth its price
    assert found[-1][1] == pytest.approx(1 - binary(0.1), abs=1e-3)


def test_no_summary_says_more_than_the_bound():
    inputs, likely = SphereBits(bits=8).every()
    likely = likely.numpy()
    bound = bottleneck(likely, (1.05, 1.2, 1.5, 2.0, 5.0, 20.0))
    assert [b[0] for b in bound] == sorted(b[0] for b in bound)
    for n in (2, 4, 8):
        kept, told = plane((np.argsort(np.argsort(likely)) * n // len(likely)), likely)
        assert told <= np.interp(kept, *np.array(bound).T) + 0.03


def test_the_rule_says_what_it_promises_and_does_not_turn():
    lesson = SphereBits()
    inputs, likely = lesson.every()
    assert inputs.shape == (4096, 12) and len(inputs.unique(dim=0)) == 4096
    both = np.stack([likely.numpy(), 1 - likely.numpy()], 1)
    assert mutual(both) == pytest.approx(0.99, abs=1e-3) and likely.mean() == pytest.approx(0.5, abs=0.01)
    nats = torch.nn.functional.binary_cross_entropy(likely, likely).item()
    assert nats == pytest.approx(lesson.lines()["Bayes"], abs=1e-3)
    assert not torch.equal(replace(lesson, world=1).every()[1], likely)
    batch = lesson.make(n=2000)
    code = ((batch.inputs["inputs_embeds"][..., 0] > 0) * 2 ** torch.arange(12)).sum(-1)
    assert (batch.answer[:, 0] - likely[code]).abs().mean() < 0.02
    few = Training(steps=30, batch=64, measure_every=15, rows=64)
    run = train(TinyConfig(**lesson.config(heads=2, width=16, pos="learned")), lesson, few)
    assert np.isfinite(run.losses).all()
    with pytest.raises(ValueError, match="are no rule"):
        SphereBits(known=1.0)


def test_networks_side_by_side_do_not_touch_each_other():
    x, y = torch.randn(2, 16, 5), torch.randint(2, (2, 16))

    def trained(rows):
        nets = Replicas((5, 4, 2), "tanh", [[3, 8][row] for row in rows])
        adam = torch.optim.Adam(nets.parameters(), lr=1e-2)
        for _ in range(5):
            adam.zero_grad()
            logits = nets(x[rows])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum").backward()
            adam.step()
        return nets

    both, second = trained([0, 1]), trained([1])
    assert torch.allclose(both.weights[0][1], second.weights[0][0], atol=1e-6)
    assert [s.shape for s in both.slopes()] == [(2, 24), (2, 10)]
    first = both.layers(x)[0][0]
    assert torch.allclose(first, torch.tanh(x[0] @ both.weights[0][0] + both.biases[0][0]), atol=1e-6)
    with pytest.raises(ValueError, match="no activation of replicas"):
        Replicas((2, 2), "gelu", [0])


@pytest.mark.parametrize("act", ["tanh", "relu"])
def test_a_plane_has_a_place_for_every_layer(act):
    method = InformationPlane(hidden=(6, 3), act=act, epochs=6, batch=32, moments=5, lesson=SphereBits(bits=8))
    found = method.train((1, 2))
    moments = len(found.epochs)
    assert found.epochs[0] == 0 and found.epochs[-1] == 6
    assert found.kept.shape == found.told.shape == found.ranged.shape == (moments, 2, 3)
    assert (found.kept >= found.told - 1e-9).all() and found.kept.max() <= 8 + 1e-9 and found.told.max() < 0.99 + 1e-3
    assert np.isnan(found.drift[0]).all() and np.isfinite(found.drift[1:]).all() and (found.spread[1:] > 0).all()
    again = method.train((1, 2))
    assert np.array_equal(found.kept, again.kept) and np.array_equal(found.accuracy, again.accuracy)


def test_the_replication_is_found():
    assert replicate.find("s159").name == "information_plane"
