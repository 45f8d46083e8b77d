"""Core and shortcut: how predictive they are, what Bayes does, and the bias of models that are known."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.data import CoreAndShortcut
from headwise.lab import ShortcutFeatures, Training, train
from headwise.lab.shortcut_features import bias, fitted, tangent
from headwise.lesson import generator

LESSON = CoreAndShortcut(amplified=8.0)


def test_numbers_are_as_predictive_as_they_are_said_to_be():
    latents, label = LESSON.latents(100_000, generator(1))
    right = ((latents > 0) == (label[:, None] == 1)).double().mean(0)
    assert right[0] == pytest.approx(0.9, abs=0.005) and right[1] == pytest.approx(0.85, abs=0.005)
    bayes = ((latents @ LESSON.means > 0) == (label == 1)).double().mean()
    assert bayes > right.max() + 0.03
    lines = LESSON.lines()
    assert 0 < lines["Bayes"] < lines["chance"] and lines["Bayes"] == LESSON.lines()["Bayes"]


@pytest.mark.parametrize("nested", [0, 2])
def test_bayes_can_be_read_from_the_input(nested):
    lesson = replace(LESSON, nested=nested)
    latents, _ = lesson.latents(500, generator(2))
    x = lesson.write(latents)
    assert x.shape == (500, 100)
    if not nested:
        lengths = torch.linalg.lstsq(latents, x).solution.norm(dim=1)
        assert torch.allclose(lengths, torch.tensor([1.0, 8.0]), atol=1e-4)
    alone = lesson.write(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert not torch.allclose(alone[0], alone[1])
    batch = lesson.make(n=6)
    assert batch.inputs["inputs_embeds"].shape == (6, 4, 25)


def test_the_bias_of_known_models():
    plane = LESSON.plane()
    assert LESSON.bias(plane @ LESSON.means) == 0
    only_shortcut, only_core = LESSON.bias(plane[:, 1]), LESSON.bias(plane[:, 0])
    assert 0.5 < only_shortcut < 0.65 and -0.5 < only_core < -0.35
    assert only_shortcut - only_core == pytest.approx(1.0, abs=1e-9)
    stacked = LESSON.bias(torch.stack([plane[:, 1], plane @ LESSON.means]))
    assert stacked.shape == (2,) and stacked[1] == 0


def test_the_tangent_kernel_is_that_of_a_wide_layer():
    torch.manual_seed(0)
    x = torch.randn(5, 3).double()
    wide = 200_000
    w, v = torch.randn(wide, 3).double(), torch.randn(wide).double()
    on = (x @ w.T > 0).double()
    act = (x @ w.T).relu()
    by_first = (on * v.square()) @ on.T * (x @ x.T) / wide
    assert torch.allclose(tangent(x, x), act @ act.T / wide + by_first, rtol=0.05, atol=0.05)
    assert torch.equal(tangent(x, x, "linear"), x @ x.T)


def test_networks_have_one_bias_for_each_ratio_and_seed():
    small = ShortcutFeatures(ratios=(1.0, 16.0), examples=400, steps=60, hidden=8)
    found = small.networks(0, "linear", (1, 2))
    assert found.shape == (2, 2) and torch.equal(found, small.networks(0, "linear", (1, 2)))
    assert small.networks(1, "relu", (1,), nested=1).shape == (2, 1)
    theory = small.kernel(0, examples=100)
    assert theory.shape == (2,) and theory[1] > theory[0]


def test_linear_models_are_at_their_optimum():
    latents, label = LESSON.latents(800, generator(5))
    x = LESSON.write(latents).double()
    weights = fitted(x, label)
    odds = (x @ weights[:-1] + weights[-1]).sigmoid()
    assert ((odds - label) @ x).abs().max() / 800 < 1e-6 and (odds - label).mean().abs() < 1e-6
    # What is written at another length is weighed by the same odds.
    alike = replace(LESSON, amplified=1.0).write(latents)
    again = fitted(alike, label)
    assert torch.allclose(alike.double() @ again[:-1] + again[-1], x @ weights[:-1] + weights[-1], atol=1e-3)
    small = ShortcutFeatures(ratios=(1.0, 16.0), examples=400)
    found = small.linear((1, 2))
    assert found.shape == (2, 2) and torch.allclose(found[0], found[1], atol=2e-3)
    with pytest.raises(ValueError, match="No optimum was found"):
        fitted(torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([1, 1, 0]))


def test_a_transformer_has_a_bias():
    one = ShortcutFeatures().conditions()["amplified 8 times"]
    run = train(one.model, one.lesson, Training(steps=4, batch=16, measure_every=2, rows=32), seed=1)
    assert -0.6 < bias(run.model, one.lesson) < 0.7


def test_what_is_no_shortcut_is_refused():
    with pytest.raises(ValueError, match="beside a core of"):
        CoreAndShortcut(shortcut=0.95)
    with pytest.raises(ValueError, match="do not go into"):
        CoreAndShortcut(dim=30)


def test_the_replication_is_found():
    assert replicate.find("s039").name == "shortcut_features"
