"""Experiments of the lab that learn functions in their prompts, and the theory beside them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from headwise import replicate
from headwise.data import LinearRegression, SoftmaxRegression
from headwise.data.regressions import gaussian, interleaved, mixture, pairs
from headwise.data.softmax_regression import gradient, objective, shift
from headwise.lab import AttentionSVM, RegressionHeads, SoftmaxStep, TinyConfig, train
from headwise.lab.attention_svm import _unit, cosine, hard_margin, nearest, nonnegative
from headwise.lab.regression_heads import circuits
from headwise.tap import tap
from headwise.task import answer_logits


def test_bayes_is_ridge_and_a_mixture_of_one_family_is_that_family():
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 9, 3, generator=draw), torch.randn(6, 3, generator=draw)
    y = (x @ w[..., None])[..., 0] + 0.3 * torch.randn(6, 9, generator=draw)
    mean, var, density = gaussian(x, y, 0.09)
    for i in (0, 4, 8):
        seen, said = x[:, :i].double(), y[:, :i].double()
        inverse = torch.linalg.inv(seen.mT @ seen + 0.09 * torch.eye(3))
        ridge = (inverse @ (seen.mT @ said[..., None]))[..., 0]
        at = x[:, i].double()
        assert torch.allclose((ridge * at).sum(-1), mean[:, i])
        assert torch.allclose(0.09 * (1 + torch.einsum("bi,bij,bj->b", at, inverse, at)), var[:, i])
    same = mixture([(mean, var, density)], [1.0])
    assert torch.allclose(same[0], mean) and torch.allclose(same[1], var)
    far = gaussian(x, y, 0.09, mean=torch.tensor([9.0, 9.0, 9.0]))
    both = mixture([(mean, var, density), far], [0.5, 0.5])
    assert (both[2].sum(0) - 1).abs().max() < 1e-12 and (both[2][0, :, -1] > 0.99).all()


def test_examples_stand_where_they_are_said_to():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4)
    batch = interleaved(x, y)
    assert batch.inputs["inputs_embeds"].shape == (2, 8, 4)
    assert torch.equal(pairs(batch)[0], x) and torch.equal(pairs(batch)[1], y)
    assert torch.equal(batch.inputs["inputs_embeds"][:, 1::2, 3], y)
    lesson = LinearRegression(length=6)
    batch = lesson.make(n=5)
    model = TinyConfig(**lesson.config(heads=2)).build(0)
    with tap(model, "L0.pattern") as taken:
        answer_logits(model, batch)
    last = taken["L0.pattern"][:, :, -1]
    assert (last[..., -1] == 0).all() and torch.allclose(last[..., :-1].sum(-1), torch.ones(5, 2))
    assert torch.equal(lesson.cells(batch)["examples"][0, -1].nonzero().flatten(), torch.arange(6))


@pytest.mark.parametrize("lesson", [LinearRegression(length=8), LinearRegression(dim=3, length=20, noise=0.5)])
def test_the_lines_are_the_errors_of_the_predictors(lesson):
    batch = lesson.make(n=40_000, seed=3)
    lines = lesson.lines()
    for name, said in lesson.predict(batch).items():
        assert float((said - batch.answer[:, 0]).square().mean()) == pytest.approx(lines[name], rel=0.04), name
    assert lines["Bayes"] < lines["gradient descent"] < lines["chance"]


def test_two_heads_made_by_hand_are_debiased_gradient_descent():
    lesson = LinearRegression()
    model = TinyConfig(**lesson.config(heads=2)).build(0).eval()
    width, omega = 6, 0.02
    eye = torch.eye(width)[:5]
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
        part = model.blocks[0].attention
        for head, sign in enumerate((1.0, -1.0)):
            rows = slice(head * width, (head + 1) * width)
            part.q_proj.weight[rows][:5] = eye * width**0.5 * omega
            part.k_proj.weight[rows][:5] = sign * eye
            part.v_proj.weight[rows][5, 5] = 1
            part.o_proj.weight[5, head * width + 5] = sign * lesson.steps[1] / (2 * omega)
        model.readout.out.weight[0, 5] = 1
    found = circuits(model)
    assert torch.allclose(found.omega, torch.tensor([omega, -omega])) and found.uneven < 1e-9
    assert found.sum < 1e-6 and found.leak == 0
    batch = lesson.make(n=500)
    with torch.no_grad():
        said = answer_logits(model, batch)[:, 0, 0]
    known = lesson.predict(batch)
    assert torch.cosine_similarity(said, known["debiased gradient descent"], 0) > 0.999
    assert torch.cosine_similarity(said, known["gradient descent"], 0) < 0.999


def test_softmax_regression_has_the_gradient_and_the_bound_that_are_told():
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(7, 6, 4, generator=draw).double()
    b = torch.randn(7, 6, generator=draw).double().softmax(-1)
    x, by = (torch.randn(7, 4, generator=draw).double() for _ in range(2))
    x.requires_grad_()
    (auto,) = torch.autograd.grad(objective(a, b, x).sum(), x)
    assert torch.allclose(auto, gradient(a, b, x), atol=1e-12)
    moved, bound = shift(a, x.detach(), by)
    assert (moved.norm(dim=-1) <= bound).all()
    lesson = SoftmaxRegression(dim=3, length=8)
    batch = lesson.make(n=6)
    entries = batch.inputs["inputs_embeds"][:, :-1, -1]
    assert torch.allclose(entries.sum(-1), torch.full((6,), 8.0))
    best = float((lesson.stepped(batch, 0.0) - 1).abs().max())
    assert best < 1e-5
    lines = SoftmaxRegression().lines()
    assert 0 < lines["one step"] < 0.7 * lines["chance"]


def test_the_margin_problems_are_solved():
    rng = np.random.default_rng(0)
    matrix, target = rng.standard_normal((12, 7)), rng.standard_normal(12)
    y = nonnegative(matrix, target)
    pull = matrix.T @ (target - matrix @ y)
    assert (y >= 0).all() and (pull <= 1e-9).all() and abs(pull @ y) < 1e-9
    assert np.allclose(nearest(np.array([[1.0, 0.0]]), np.array([2.0]), np.array([0.0, 3.0])), [2.0, 3.0])
    with pytest.raises(ValueError, match="separate these tokens"):
        hard_margin(np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="no norm here"):
        hard_margin(np.eye(4), norm="spectral")


def test_the_least_nuclear_norm_is_told_only_where_it_was_found():
    one = np.array([[2.0, 0, 0, 1.0]])
    found = hard_margin(one, "nuclear")
    assert (one @ found.ravel()).item() >= 1 - 1e-9
    # By hand: all of it goes to the largest singular value, where the Frobenius norm spreads it.
    assert np.allclose(found, [[0.5, 0], [0, 0]], atol=2e-3) and np.allclose(hard_margin(one), [[0.4, 0], [0, 0.2]])
    exact = hard_margin(one, "nuclear", tolerance=1e-9)
    assert np.allclose(exact, [[0.5, 0], [0, 0]], atol=1e-6)
    with pytest.raises(ValueError, match="known to a share of .* after 2 rounds"):
        hard_margin(one, "nuclear", rounds=2, tolerance=1e-9)
    with pytest.raises(ValueError, match="known to a share of inf after 0 rounds"):
        hard_margin(one, "nuclear", rounds=0)


def test_attention_that_cannot_move_stays_where_it_is():
    alone = AttentionSVM(prompts=2, tokens=1, dim=3, steps=3)
    problem = alone.problem(2)
    assert (alone.train(problem) == 0).all()
    parts = alone.train_factors(problem)
    assert np.isfinite(parts).all() and np.array_equal(parts, AttentionSVM(2, 1, 3, steps=1).train_factors(problem))
    pull = np.zeros((3, 2, 2))
    pull[1], pull[2] = 3e-200, -5.0
    assert np.allclose(_unit(pull), np.array([0, 0.5, -0.5])[:, None, None])


def test_attention_turns_to_the_margin():
    method = AttentionSVM(prompts=3, tokens=4, dim=6, steps=800)
    problem = method.problem(2, 3)
    w = rng = np.random.default_rng(2).standard_normal((2, 6, 6))
    slope, bump = problem.gradient(w), 1e-6 * np.random.default_rng(4).standard_normal((2, 6, 6))
    assert np.allclose(problem.loss(w + bump) - problem.loss(w - bump), 2 * (slope * bump).sum((1, 2)), atol=1e-12)
    w, parts = method.train(problem), method.train_factors(problem)
    assert rng.shape == w.shape == parts.shape
    for s in range(2):
        rows = problem.margins(s, problem.attention(w)[s].argmax(-1))
        whole, few = hard_margin(rows), hard_margin(rows, "nuclear")
        assert (rows @ whole.ravel()).min() == pytest.approx(1) and (rows @ few.ravel()).min() == pytest.approx(1)
        assert np.linalg.norm(whole) <= np.linalg.norm(few) + 1e-9
        assert np.linalg.norm(few, "nuc") <= np.linalg.norm(whole, "nuc") + 1e-9
        assert cosine(w[s], whole) > 0.97


@pytest.mark.parametrize("experiment", [RegressionHeads(), SoftmaxStep()])
def test_the_loss_goes_down(experiment):
    name, one = next(iter(experiment.conditions().items()))
    few = replace(one.training, steps=40, batch=32, measure_every=20, rows=64)
    losses = train(one.model, one.lesson, few, seed=1).tape.curve("loss")[1]
    assert losses[-1] < losses[0], name


def test_what_cannot_be_drawn_is_refused():
    for make, said in (
        (lambda: LinearRegression(length=1), "is no regression"),
        (lambda: SoftmaxRegression(spread=0.0), "is no softmax regression"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


@pytest.mark.parametrize("name", ["regression_heads", "attention_svm", "softmax_step"])
def test_replications_are_found(name):
    entry = replicate.find(name)
    assert entry.claim.endswith(".") and entry.paper and entry.row.startswith("s")
