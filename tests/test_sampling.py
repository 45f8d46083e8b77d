"""Samplers: equal to their definitions, at home in transformers' generate, refusing what makes no sense."""

from math import isnan

import pytest
import torch
from families import FAMILIES, VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.decode import LocallyTypical, LogitFusion
from headwise.decode.logit_fusion import Fusing, divergence
from headwise.replicate.fused_logits import FusedLogits, asked, done
from headwise.replicate.typical_sampling import TypicalSampling, gaps, repeated


@pytest.fixture(scope="module")
def models():
    return [FAMILIES["llama"].build(seed=seed) for seed in range(4)]


def logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


# Locally typical sampling.


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("least", [1, 5])
def test_transformers_keeps_what_the_definition_keeps(mass, least):
    method = LocallyTypical(mass, least)
    rows = torch.cat([logits(250, seed, scale) for seed, scale in enumerate((0.1, 1.0, 3.0, 10.0))])
    rows[::7, :40] = -torch.inf
    theirs = method.warper()(None, rows.clone()) > -torch.inf
    assert torch.equal(theirs, method.keeps(rows) & (rows > -torch.inf))


def test_the_likeliest_token_can_be_left_out():
    p = torch.tensor([[0.4, *[0.6 / 20] * 20]])
    keeps = LocallyTypical(0.5).keeps(p.log())
    assert not keeps[0, 0] and keeps.sum() == 17


def test_it_samples_in_generate(models):
    ids = FAMILIES["llama"].inputs()["input_ids"]
    torch.manual_seed(0)
    done = LocallyTypical(0.9).generate(models[0], ids, max_new_tokens=6)
    torch.manual_seed(0)
    theirs = models[0].generate(ids, max_new_tokens=6, do_sample=True, top_k=0, typical_p=0.9)
    assert torch.equal(done.ids, theirs) and done.stats.tokens == 18


# Dynamic logits fusion.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 4.0))
def test_the_weight_meets_the_constraint_or_stands_at_its_bound(seed, scale):
    large, direction = logits(8, seed), logits(8, seed + 1, scale)
    wanted = torch.rand(8, generator=torch.Generator().manual_seed(seed)).double()
    method = LogitFusion(most=3.0)
    weight = method.weight(large, direction, wanted)
    reached = divergence(large.double() + weight[:, None] * direction.double(), large)
    at_bound = weight > 3.0 - 1e-9
    assert (reached[~at_bound] - wanted[~at_bound]).abs().max() < 1e-9 if bool((~at_bound).any()) else True
    assert bool((reached[at_bound] <= wanted[at_bound] + 1e-9).all())
    assert bool((weight >= 0).all())


def test_where_the_large_model_is_the_small_one_the_tuned_one_speaks():
    small, tuned = logits(6, 1), logits(6, 2)
    fused, weight = LogitFusion().fuse(small, [tuned], small)
    torch.testing.assert_close(weight, torch.ones(6, dtype=torch.double))
    torch.testing.assert_close(fused.softmax(-1), tuned.softmax(-1))


def test_an_expert_that_changed_nothing_changes_nothing():
    large, small, tuned = logits(6, 0), logits(6, 1), logits(6, 2)
    assert torch.equal(LogitFusion().fuse(large, [small.clone()], small)[0], large)
    both = LogitFusion().fuse(large, [tuned, small.clone()], small)[0]
    torch.testing.assert_close(both, LogitFusion().fuse(large, [tuned], small)[0])


class Forgets(Fusing):
    """Reads every text anew, whatever it has read."""

    def __call__(self, input_ids, scores):
        self.read = None
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("beams", [1, 3])
def test_caches_of_the_small_models_agree_with_reading_anew(models, beams):
    large, small, tuned, _ = models
    inputs = FAMILIES["llama"].inputs(padded=True)
    rule = LogitFusion().processor(small, tuned, attention_mask=inputs["attention_mask"])
    said = large.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[rule], num_beams=beams)
    if beams > 1:
        fresh = Forgets(LogitFusion(), small, [tuned], inputs["attention_mask"])
        anew = large.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[fresh], num_beams=beams)
        assert torch.equal(said, anew)
        return
    for row in range(3):
        pads = int((inputs["attention_mask"][row] == 0).sum())
        ids = inputs["input_ids"][row : row + 1, pads:]
        for _ in range(6):
            rows = [model(input_ids=ids, use_cache=False).logits[:, -1] for model in (large, tuned, small)]
            fused, _ = LogitFusion().fuse(rows[0], [rows[1]], rows[2])
            ids = torch.cat([ids, fused.argmax(-1)[:, None]], 1)
        assert said[row, 10:].tolist() == ids[0, -6:].tolist()


def test_weight_zero_is_the_large_model(models):
    large, small, tuned, other = models
    ids = FAMILIES["llama"].inputs()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    done = LogitFusion(most=0).generate(large, ids, experts=(small, tuned, other), **options)
    assert torch.equal(done.ids, large.generate(ids, **options))
    done = LogitFusion(fixed=1.0).generate(large, ids, experts=(large, tuned), **options)
    assert torch.equal(done.ids, tuned.generate(ids, **options))


def test_bad_input_is_a_sentence(models):
    with pytest.raises(ValueError, match="mass is 1.5 and least 1"):
        LocallyTypical(1.5)
    with pytest.raises(ValueError, match="most is -1"):
        LogitFusion(most=-1)
    with pytest.raises(ValueError, match="1 small models were given; an untuned one and a tuned one"):
        LogitFusion().generate(models[0], torch.ones(1, 3, dtype=torch.long), experts=(models[1],))
    with pytest.raises(ValueError, match=r"vocabularies of \[64\]"):
        LogitFusion().processor(models[0])
    rule = LogitFusion().processor(models[0], models[1])
    with pytest.raises(ValueError, match="The large model says 70 logits, the small ones 64"):
        rule(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 70))


# Their replications.


def test_repetition_counts():
    text = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert repeated(text).tolist() == pytest.approx([100 * 2 / 6, 0])


def test_orders_are_done_and_mostly_ignored():
    draw = torch.Generator().manual_seed(0)
    words = torch.tensor([[5, 23, 0, 9, 2, 7]])
    for task, right in (
        ("sorted", [0, 2, 5, 7, 9, 23]),
        ("swapped", [23, 5, 9, 0, 7, 2]),
        ("reversed", [7, 2, 9, 0, 23, 5]),
    ):
        assert done(task, words).tolist() == [right]
    ids = asked("swapped", 2000, draw, obeyed=0.15)
    given, said = ids[:, 1:7], ids[:, 8:]
    obeyed = (said == done("swapped", given)).all(1)
    assert bool((obeyed | (said == given).all(1)).all()) and 0.12 < float(obeyed.float().mean()) < 0.18


def test_outcomes_follow_the_checks():
    good = {"large": 0.0, "tuned small": 80.0, "tuned large": 100.0, "fused": 90.0, "fixed": 60.0}
    rows = {task: {**good, "fused, all experts": 70.0} for task in ("a", "b", "c")}
    assert FusedLogits()._judge(rows, 1e-6, 10).outcome == "holds"
    worse = {task: {**one, "fused": 50.0} for task, one in rows.items()}
    assert FusedLogits()._judge(worse, 1e-6, 10).outcome == "fails"
    known = {task: {**one, "large": 30.0} for task, one in rows.items()}
    assert FusedLogits()._judge(known, 1e-6, 10).outcome == "partly"

    def points(again):
        return [(torch.linspace(-2, -1, 8) + shift, torch.linspace(1, 2, 8) + again) for shift in (-1.0, 0.0, 1.0)]

    found = {"typical": points(0.0)[1:2], "nucleus": points(5.0), "top-k": points(6.0)}
    assert TypicalSampling()._judge(found, 8, 0, 100.0).outcome == "holds"
    found["typical"] = points(5.5)[1:2]
    assert TypicalSampling()._judge(found, 8, 0, 100.0).outcome == "fails"


def test_a_rule_is_not_compared_beyond_its_own_strengths():
    at = {"nucleus": [(-1.0, 10.0), (-3.0, 4.0)], "top-k": [(-1.0, 10.0), (-2.0, 8.0)]}
    compared, more = gaps(at | {"typical": [(-1.5, 1.0), (-2.5, 1.0)]})
    assert compared == {"nucleus": 2, "top-k": 1} and more == {"nucleus": 6.0, "top-k": 8.0}
    compared, more = gaps(at | {"typical": [(-2.5, 1.0)]})
    assert compared["top-k"] == 0 and isnan(more["top-k"])
    points = {name: [(torch.full((8,), log), torch.full((8,), again)) for log, again in at[name]] for name in at}
    points["typical"] = [(torch.full((8,), -2.5), torch.ones(8))]
    outcome = TypicalSampling()._judge(points, 8, 0, 100.0)
    assert outcome.outcome == "partly" and outcome.checks["and less than top-k sampling that is as likely"] is False
    assert "0 of 1 with top-k" in outcome.baseline
