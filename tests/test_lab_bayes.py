"""Lessons whose best predictor is known exactly, and the experiments that compare networks with it."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.data import FourierSeries, HiddenFactors, MixedRegression, RepresentedRegression, UncertainRegression
from headwise.data.factor_circuit import by_hand
from headwise.data.fourier_series import grid, power
from headwise.data.regressions import interleaved, nats, pairs, stacked
from headwise.data.uncertain_regression import spread
from headwise.lab import BayesianPrism, FactorProbes, ICLUncertainty, RepresentedICL, TinyConfig, train
from headwise.lab.represented_icl import upper
from headwise.lesson import generator
from headwise.replicate.bayesian_prism import shares, swept
from headwise.replicate.icl_uncertainty import least_squares
from headwise.replicate.represented_icl import probe, told
from headwise.replicate.runs import streams
from headwise.stats import explained, foretold
from headwise.task import answer_logits

LESSONS = [
    UncertainRegression(),
    UncertainRegression(tasks=4, apart=True, length=6),
    MixedRegression(),
    MixedRegression(kinds=("left", "right"), dim=3, apart=True),
    FourierSeries(frequencies=3, length=8),
    FourierSeries(rising=True),
    RepresentedRegression(),
    RepresentedRegression(maps=2, width=4, apart=True, length=10),
    RepresentedRegression(maps=0, dim=4, width=4),
]


def test_an_example_may_share_its_position_with_the_next_x():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4)
    together, apart = stacked(x, y), interleaved(x, y)
    seen = together.inputs["inputs_embeds"]
    assert torch.equal(seen[:, 1:, 3:6], x[:, :-1]) and torch.equal(seen[:, 1:, 6], y[:, :-1])
    assert (seen[:, 0, 3:] == 0).all()
    for batch in (together, apart):
        assert torch.equal(pairs(batch)[0], x) and torch.equal(pairs(batch)[1], y)


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_answer_is_nowhere_to_be_seen_before_it_is_asked(lesson):
    batch = lesson.make(n=3)
    model = TinyConfig(**lesson.config(layers=1, width=16, mlp=16)).build(0).eval()
    changed = batch.inputs["inputs_embeds"].clone()
    changed[:, int(batch.at[0, 4]) - lesson.apart :] += 1.0
    with torch.no_grad():
        left = answer_logits(model, batch)
        right = answer_logits(model, replace(batch, inputs={"inputs_embeds": changed}))
    assert torch.allclose(left[:, :4], right[:, :4], atol=1e-6) and not torch.allclose(left[:, 4:], right[:, 4:])


@pytest.mark.parametrize("lesson", LESSONS)
def test_cells_say_where_examples_lie(lesson):
    batch = lesson.make(n=2)
    cells = lesson.cells(batch)
    whole = batch.inputs["inputs_embeds"]
    asked = cells["examples"][0, int(batch.at[0, 3])].nonzero().flatten()
    assert torch.equal(whole[0, asked, -1], batch.answer[0, :3])
    assert ("own x" in cells) == lesson.apart


@pytest.mark.parametrize("lesson", LESSONS)
def test_bayes_is_no_worse_than_others_and_foretells_its_error(lesson):
    batch = lesson.make(n=4000, seed=3)
    mean, variance, weights = lesson.bayes(batch)
    assert torch.allclose(weights.sum(0), torch.ones_like(mean))
    error = (mean - batch.answer).square().mean(0)
    assert torch.allclose(error, variance.mean(0), rtol=0.15)
    lines = lesson.lines()
    assert lines["Bayes"] < lines["chance"]
    for off in (0.9, 1.1):
        assert nats(mean, variance, batch.answer).mean() < nats(mean, off**2 * variance, batch.answer).mean() + 0.01
        assert error.mean() < (off * mean - batch.answer).square().mean()


def test_noise_and_pools_are_what_they_are_said_to_be():
    lesson = UncertainRegression(tasks=4, length=30)
    x, y, noise = lesson.examples(200, torch.Generator().manual_seed(1))
    left = (y[..., None] - x @ lesson.pool.T).std(1)
    assert torch.allclose(left.min(-1).values, noise, rtol=0.6) and noise.min() >= 0.1 and noise.max() <= 0.9
    assert lesson.on("longer").make(n=2).answer.shape == (2, 60)
    assert lesson.on("other noise").examples(3, torch.Generator())[2].tolist() == pytest.approx([1.8] * 3)
    same = lesson.on("other inputs").examples(2000, torch.Generator())[0].std((0, 1))
    assert torch.allclose(same, torch.linspace(0.5, 1.5, 5), rtol=0.1)


def test_least_squares_is_the_baseline_without_a_prior():
    lesson = UncertainRegression(least=0.3, most=0.300001)
    batch = lesson.make(n=3000)
    mean, variance, _ = lesson.bayes(batch)
    known = nats(mean, variance, batch.answer)[:, 15].mean()
    assert known < least_squares(batch, 15).mean() < known + 0.3


def test_a_variance_is_said_and_paid_for():
    lesson = UncertainRegression(length=4)
    batch = lesson.make(n=5)
    logits = torch.stack([batch.answer, torch.zeros_like(batch.answer)], -1)
    assert torch.allclose(lesson.loss(logits, batch), torch.full((5,), 0.918939), atol=1e-5)
    assert torch.equal(lesson.metrics(logits, batch)["squared_error"], torch.zeros(5))
    assert float(spread(torch.tensor([[0.0, 50.0]]))) == pytest.approx(2980.958, rel=1e-4)
    assert lesson.shape.outputs == 2


def test_bayes_of_a_mixture_comes_to_know_the_kind():
    lesson = MixedRegression()
    batch = lesson.make(n=2000, seed=4)
    x, y = pairs(batch)
    kind = lesson.examples(2000, generator(4))[2]
    mean, _, weights = lesson.bayes(batch)
    likely = lesson.likely(weights).gather(0, kind[None, :, None].expand(1, -1, y.shape[1]))[0]
    assert torch.allclose(likely[:, 0], torch.full((2000,), 0.5, dtype=torch.float64)) and likely[:, -1].mean() > 0.9
    assert (
        torch.isclose(likely.mean(0).diff(), torch.tensor(0.0).double(), atol=0.02) | (likely.mean(0).diff() > 0)
    ).all()
    errors = {name: (lesson.only(name).bayes(batch)[0] - y).square().mean() for name in lesson.kinds}
    assert (mean - y).square().mean() < min(errors.values())
    sparse = lesson.only("sparse").make(n=500)
    x, y = (part.double() for part in pairs(sparse))
    w = torch.linalg.lstsq(x, y[..., None]).solution[..., 0]
    assert (w.abs() > 0.6).sum(-1).double().mean() < 1.1


def test_waves_have_the_power_that_they_were_drawn_with():
    lesson = FourierSeries(rising=True)
    assert lesson.dim == 2 and torch.allclose(lesson.profile().sum(), torch.tensor(1.0))
    assert (lesson.profile().diff() > 0).all() and (FourierSeries().profile().diff() < 0).all()
    x, y, many = lesson.examples(4000, generator(5))
    assert float(y.square().mean()) == pytest.approx(1.01, rel=0.05)
    waves = replace(lesson, frequencies=5).waves(grid(32))
    known = 3 * waves[:, 1] + waves[:, 9]
    assert torch.allclose(power(known, 5), torch.tensor([0, 4.5, 0, 0, 0.5]).double(), atol=1e-5)
    batch = swept(lesson, 4, 3, 16, seed=0)
    seen, said = pairs(batch)
    assert len(batch) == 48 and torch.equal(seen[0, :4], seen[15, :4])
    assert torch.equal(seen[16:32, 4], grid(16)) and torch.equal(said[0, :4], said[15, :4])
    exact = swept(replace(lesson, length=31), 30, 20, 16, seed=0)
    # Bayes who has seen thirty examples knows the function, so that its power is that of the prior.
    assert shares(lesson.bayes(exact)[0][:, -1], 4, 16)[3] > 0.3


def test_a_representation_is_fixed_and_ridge_on_it_is_bayes():
    lesson = RepresentedRegression(maps=2)
    x = torch.randn(5000, 5)
    seen = lesson.represented(x)
    assert seen.shape == (2, 5000, 6) and not torch.allclose(seen[0], seen[1])
    assert torch.allclose(seen.square().mean((1, 2)), torch.ones(2), rtol=0.1)
    assert torch.equal(lesson.represented(x), RepresentedRegression(maps=2).represented(x))
    assert not torch.equal(lesson.represented(x), replace(lesson, world=1).represented(x))
    assert probe(x[:, None], seen[0][:, None]) < 0.9 < probe(seen[0][:, None], seen[0][:, None])
    batch = lesson.make(n=1000, seed=6)
    which = lesson.examples(1000, generator(6))[2]
    right = (lesson.bayes(batch)[2].argmax(0) == which[:, None]).double().mean(0)
    assert right[0] < 0.6 and right[-1] > 0.95


def test_upper_layers_go_behind_another_map():
    lesson = RepresentedRegression(width=4)
    model = TinyConfig(**lesson.config(width=16, mlp=16)).build(0)
    linear = RepresentedRegression(maps=0, dim=4, width=4)
    pasted = upper(model, 1, linear.shape.input_size)
    batch = linear.make(n=4)
    assert pasted.config.layers == 2 and answer_logits(pasted, batch).shape == (4, 20, 1)
    stream = torch.randn(2, 5, 16)
    with torch.no_grad():
        whole, part = stream, stream
        for block in model.blocks[1:]:
            whole = block(whole, None, None, None)
        for block in pasted.blocks:
            part = block(part, None, None, None)
        assert torch.equal(model.readout(model.norm(whole)), pasted.readout(pasted.norm(part)))
    before = {name: value.clone() for name, value in pasted.named_parameters()}
    few = replace(next(iter(RepresentedICL().conditions().values())).training, steps=2, batch=4, rows=4)
    train(pasted, linear, few)
    moved = {name for name, value in pasted.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"embed.weight", "embed.bias"}
    with pytest.raises(ValueError, match="no layer 3 to paste from"):
        upper(model, 3, 9)


def test_linear_probes_are_judged_on_other_rows():
    draw = torch.Generator().manual_seed(2)
    values, noise = torch.randn(400, 6, generator=draw), torch.randn(400, 3, generator=draw)
    target = values @ torch.randn(6, 3, generator=draw)
    assert explained(*foretold(values.numpy(), target.numpy())) > 0.999
    assert explained(*foretold(values.numpy(), noise.numpy())) < 0.1
    which = (values[:, 0] > 0).long()
    assert told(values[:, None], which)[0] > 0.8
    lesson = RepresentedRegression(width=4)
    model = TinyConfig(**lesson.config(width=16, mlp=16)).build(0).eval()
    batch = lesson.make(n=3)
    found = streams(model, batch)
    assert len(found) == 4 and found[0].shape == (3, 20, 16)
    assert torch.allclose(found[0], model.embed(batch.inputs["inputs_embeds"]), atol=1e-6)


def test_items_are_made_of_factors_and_bayes_reads_them():
    lesson = HiddenFactors()
    items, answer, hidden = lesson.examples(50, generator(7))
    made = lesson.made_of(torch.arange(lesson.items))
    assert len(made.unique(dim=0)) == 27
    value = lesson.made_of(items).gather(2, hidden[..., None])[..., 0]
    for row in range(50):
        names = {(int(a), int(b)) for a, b in zip(value[row], answer[row], strict=True)}
        assert len({a for a, _ in names}) == len(names) == len({b for _, b in names})
    named, batch = lesson.on("named").make(n=4), lesson.make(n=4000)
    assert named.inputs["inputs_embeds"][..., 27:30].sum() == 4 * 20
    said = lesson.bayes(batch)
    assert torch.allclose(said.sum(-1), torch.ones(4000, 10).double())
    right = said.gather(2, batch.answer[..., None])[..., 0]
    assert torch.allclose(right.mean(0), said.square().sum(-1).mean(0), atol=0.03)
    assert right[:, 0].mean() == pytest.approx(1 / 3) and right[:, -1].mean() > 0.9
    assert 0 < lesson.lines()["Bayes"] < lesson.lines()["chance"]
    cells = lesson.cells(batch)["examples"][0]
    assert cells[6].nonzero().flatten().tolist() == [1, 3, 5] and not cells[7].any()


@pytest.mark.parametrize("lesson", [HiddenFactors(length=12), HiddenFactors(factors=2, values=4, length=16)])
def test_weights_by_hand_match_and_copy(lesson):
    batch = lesson.make(n=1000, seed=8)
    model = by_hand(lesson)
    with torch.no_grad():
        right = (answer_logits(model, batch).argmax(-1) == batch.answer).float().mean(0)
        assert right[-1] >= 0.95 and right[-1] > right[1]
        # Without what layer 0 notes, every factor counts, and answers are worse.
        model.blocks[0].mlp.down_proj.weight.zero_()
        blind = (answer_logits(model, batch).argmax(-1) == batch.answer).float().mean(0)
    assert blind[-1] < right[-1] - 0.05


@pytest.mark.parametrize("experiment", [ICLUncertainty(), BayesianPrism(), RepresentedICL(), FactorProbes()])
def test_the_loss_goes_down(experiment):
    for name, one in list(experiment.conditions().items())[:4]:
        few = replace(one.training, steps=8, batch=16, measure_every=8, rows=64, warmup=0)
        run = train(one.model, one.lesson, few, one.edits, seed=1)
        assert sum(run.losses[-3:]) < sum(run.losses[:3]), name
    for one in replace(experiment, full=True).conditions().values():
        assert one.training.steps >= 4000


def test_items_are_learned_by_heart_first():
    experiment = FactorProbes(named=3)
    scratch, first = list(experiment.conditions().values())[:2]
    (switch,) = first.edits
    assert not scratch.edits and experiment.head_start == 3 and switch.lesson.split == "named"
    assert [switch.when.on(step) for step in (0, 2, 3)] == [True, True, False]
    assert len(experiment.conditions()) * len(experiment.seeds) >= 20


def test_what_cannot_be_drawn_is_refused():
    for make, said in (
        (lambda: UncertainRegression(least=0.0), "is no uncertain regression"),
        (lambda: UncertainRegression(most=0.1), "has no range"),
        (lambda: MixedRegression(kinds=("round",)), "'round' is no kind of linear function"),
        (lambda: MixedRegression(few=0), "nothing to draw from"),
        (lambda: FourierSeries(noise=0.0), "is no Fourier series"),
        (lambda: RepresentedRegression(maps=0), "both numbers of channels must be the same"),
        (lambda: HiddenFactors(values=1), "are no prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


@pytest.mark.parametrize("name", ["icl_uncertainty", "bayesian_prism", "represented_icl", "factor_probes"])
def test_replications_are_found(name):
    entry = replicate.find(name)
    assert entry.claim.endswith(".") and entry.paper and entry.row.startswith("s")
