"""Methods of one thesis: memory that is moved towards what was read, and beams that may not repeat themselves."""

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from headwise.decode import ConditionalBeams, HiddenStates
from headwise.decode.conditional_beams import NEVER, Conditioned
from headwise.models import fingerprint
from headwise.replicate.conditional_beams import ConditionedBeams
from headwise.replicate.hidden_states import HiddenStatesOnText

KINDS = ("llama", "gpt2", "qwen3", "phi3", "gpt_neox")


def told(model, ids, mask=None) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, from one forward pass."""
    real = torch.ones_like(ids) if mask is None else mask
    places = (real.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=real, position_ids=places, use_cache=False).logits
    said = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return said * (real[:, :-1] * real[:, 1:])


# Hidden state optimisation.


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_step_it_is_the_model(kind):
    model, inputs = FAMILIES[kind].build(), FAMILIES[kind].inputs(padded=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for window in (1, 4, 50):
        said, cache = HiddenStates(rate=0.0, window=window).read(model, ids, mask)
        torch.testing.assert_close(said, told(model, ids, mask), atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == ids.shape[1]
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(HiddenStates(rate=0.0).generate(model, ids, attention_mask=mask, **options).ids, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_make_the_last_window_likelier_and_leave_the_weights(kind, steps):
    model, ids = FAMILIES[kind].build(), FAMILIES[kind].inputs(rows=3, length=24)["input_ids"]
    before = fingerprint(model)
    method = HiddenStates(rate=0.003, steps=steps, window=12)
    said, cache = method.read(model, ids)
    torch.testing.assert_close(said[:, :11], told(model, ids)[:, :11], atol=1e-4, rtol=1e-4)

    def again(known: DynamicCache) -> torch.Tensor:
        """Loss of each row of the second window with what is known of the first."""
        known.crop(-(known.get_seq_length() - 12))
        with torch.no_grad():
            logits = model(input_ids=ids[:, 12:], past_key_values=known).logits
        return cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 13:], reduction="none").sum(1)

    moved, was = again(cache), again(HiddenStates(rate=0.0, window=12).read(model, ids)[1])
    assert bool((moved < was).all())
    assert fingerprint(model) == before and all(p.grad is None for p in model.parameters())
    assert not any(layer.keys.requires_grad for layer in cache.layers)


def test_a_step_goes_down_the_gradient_and_has_the_length_it_says():
    model, ids = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(rows=1, length=12)["input_ids"]
    _, cache = HiddenStates(rate=0.02, window=6).read(model, ids)
    _, plain = HiddenStates(rate=0.0, window=6).read(model, ids)
    # By hand: all keys and values of the second window as leaves, its own among them.
    whole = [(layer.keys.clone(), layer.values.clone()) for layer in plain.layers]
    leaves = [(k[:, :, :6].requires_grad_(), v[:, :, :6].requires_grad_()) for k, v in whole]
    known = DynamicCache(config=model.config)
    for number, (k, v) in enumerate(leaves):
        known.update(k, v, number)
    logits = model(input_ids=ids[:, 6:], past_key_values=known).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 7:].flatten(), reduction="sum").backward()
    model.zero_grad()
    for (k, v), layer, (old_k, old_v) in zip(leaves, cache.layers, whole, strict=True):
        for leaf, new, old in ((k, layer.keys, old_k), (v, layer.values, old_v)):
            change = new - old
            cosine = torch.cosine_similarity(change[:, :, :6].flatten(), -leaf.grad.flatten(), dim=0)
            assert float(cosine) > 0.9999
            torch.testing.assert_close(change.square().mean().sqrt(), 0.02 * old.square().mean().sqrt())


def test_what_is_predicted_is_never_known_before():
    model, ids = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(rows=1, length=20)["input_ids"]
    method, other = HiddenStates(rate=0.05, window=5), ids.clone()
    other[:, 12:] = (other[:, 12:] + 7) % VOCAB
    one, two = method.read(model, ids)[0], method.read(model, other)[0]
    assert torch.equal(one[:, :11], two[:, :11]) and not torch.allclose(one[:, 11:], two[:, 11:])
    assert not torch.allclose(one[:, 10:], told(model, ids)[:, 10:], atol=1e-4)


def test_rows_of_a_batch_are_what_they_are_alone():
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(rows=3, length=24, padded=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    method = HiddenStates(rate=0.05, window=6)
    together = method.read(model, ids, mask)[0]
    for row in range(3):
        alone = method.read(model, ids[row : row + 1], mask[row : row + 1])[0]
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    # A window of padding in front changes nothing.
    pads = torch.zeros(1, 6, dtype=torch.long)
    behind = method.read(model, torch.cat([pads, ids[:1]], 1), torch.cat([pads, mask[:1]], 1))[0]
    torch.testing.assert_close(behind[:, 6:], together[:1], atol=1e-4, rtol=1e-4)
    assert not behind[:, :6].any()


def test_what_cannot_be_optimised_is_a_sentence():
    with pytest.raises(ValueError, match="rate is -1, steps 1 and window 32"):
        HiddenStates(rate=-1)
    with pytest.raises(ValueError, match="steps 0"):
        HiddenStates(steps=0)
    model, ids = FAMILIES["gemma3"].build(), FAMILIES["gemma3"].inputs(rows=1)["input_ids"]
    with pytest.raises(ValueError, match="cache of this gemma3.* does not hold the keys and values of every token"):
        HiddenStates().read(model, ids)


# Conditional beam search.

BEAMS = ConditionalBeams(beams=3, candidates=12, most=16)
GOOD, BAD = [list(range(start, start + 16)) for start in range(12)], [[3 + n % 2, 9] * 8 for n in range(12)]


@pytest.fixture(scope="module")
def judge():
    return BEAMS.learn(GOOD + BAD)


def test_what_is_degenerate():
    assert not BEAMS.degenerate(GOOD[0]) and BEAMS.degenerate(BAD[0]) and BEAMS.degenerate([])
    assert ConditionalBeams(least=3).degenerate([5, 6]) and not ConditionalBeams(least=3).degenerate([5, 6, 7])


def test_the_classifier_doubts_beginnings_that_repeat_and_knows_whole_texts(judge):
    assert judge([1, 2, 3, 4, 5, 6, 7, 8], False) > judge([1, 2, 1, 2, 1, 2, 1, 2], False)
    assert max(judge(text[:end], False) for text in GOOD for end in range(17)) <= 0
    assert not BEAMS.doomed([1, 1, 1, 1, 1, 1]) and BEAMS.doomed([1] * 7) and judge([1] * 7, False) == NEVER
    assert judge(GOOD[0], True) == 0 and judge(BAD[0], True) == judge([], True) == NEVER


def test_a_beam_scores_what_the_model_and_the_classifier_say(judge):
    model, ids = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(rows=2)["input_ids"]
    how = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0, "eos_token_id": None}
    how |= {"num_beams": 3, "max_new_tokens": 16, "do_sample": False}
    found = model.generate(ids, logits_processor=[Conditioned(BEAMS, judge, ids.shape[1], {None})], **how)
    assert torch.equal(BEAMS.generate(model, ids, judge=judge, **how).ids, found.sequences)
    for row, score in zip(found.sequences, found.sequences_scores, strict=True):
        text = row[ids.shape[1] :].tolist()
        assert len(text) == 16 and not BEAMS.degenerate(text)
        likely = float(told(model, row[None])[0, ids.shape[1] - 1 :].sum())
        assert float(score) == pytest.approx(likely - judge([], False), abs=1e-3)


def test_where_beams_repeat_conditioned_ones_do_not(judge):
    model, ids = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(rows=3)["input_ids"]
    with torch.no_grad():  # a model that says again what it has just read
        model.lm_head.weight.copy_(6 * model.model.embed_tokens.weight)
    plain = model.generate(ids, num_beams=3, max_new_tokens=16, do_sample=False)[:, ids.shape[1] :].tolist()
    assert any(map(BEAMS.degenerate, plain))
    ours = BEAMS.generate(model, ids, judge=judge).ids[:, ids.shape[1] :].tolist()
    assert not any(map(BEAMS.degenerate, ours))


def test_what_cannot_be_searched_is_a_sentence():
    with pytest.raises(ValueError, match="beams is 0, candidates 16"):
        ConditionalBeams(beams=0)
    with pytest.raises(ValueError, match="12 texts, all of one kind, teach no classifier"):
        BEAMS.learn(GOOD)
    with pytest.raises(ValueError, match="The option judge is None"):
        BEAMS.generate(FAMILIES["llama"].build(), torch.ones(1, 3, dtype=torch.long))


# Their replications.


def test_outcomes_follow_the_checks():
    beams = [[(BAD[0], -0.5), (GOOD[0], -1.2)], [(GOOD[1], -1.0)]]
    judged = ConditionedBeams(least_before=50.0).judged
    good = judged(BEAMS, beams, [(GOOD[0], -1.2), (GOOD[1], -1.0)])
    assert list(good[2].values()) == [True, True, True]
    assert list(judged(BEAMS, beams, [(GOOD[0], -1.4), (GOOD[1], -1.0)])[2].values()) == [True, False, True]
    assert list(judged(BEAMS, beams, [(BAD[0], -0.2), (GOOD[1], -1.0)])[2].values()) == [False, True, True]
    lost = judged(BEAMS, [[(BAD[0], -0.5)], beams[1]], [(GOOD[0], -1.2), (GOOD[1], -1.0)])
    assert lost[3]["filtered"] == [None, -1.0] and list(lost[2].values()) == [True, True, True]
    plain, judge = np.linspace(2.0, 3.0, 30), HiddenStatesOnText()._judge
    found = judge(plain, plain - 0.1, plain[:15] - 0.1, 0.01, {0.01: 2.0}, good)
    assert found.outcome == "holds" and "30 of 30" in found.measured
    assert judge(plain, plain + 0.1, plain[:15], 0.01, {}, good).outcome == "fails"
    assert judge(plain, plain - 0.1, plain[:15], 0.01, {}, good).outcome == "partly"
    worse = judged(BEAMS, beams, [(BAD[0], -0.2), (GOOD[1], -1.0)])
    assert judge(plain, plain - 0.1, plain[:15] - 0.1, 0.01, {}, worse).outcome == "partly"
