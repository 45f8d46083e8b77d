"""Heads kept in a few directions: all of them change nothing, the right few keep a planted behaviour."""

import math

import pytest
import torch
from families import ALL
from test_heads import make

from headwise.circuits import PathPatching
from headwise.data import IOI, LetteredChoices, Planted
from headwise.do import do
from headwise.features import HeadSubspaces
from headwise.features.head_subspaces import compressed
from headwise.replicate.head_subspaces import HeadSubspaces as Replicated
from headwise.replicate.head_subspaces import even, writers
from headwise.task import answer_logits, correct
from headwise.tiny import TinyConfig


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_all_directions_change_nothing_and_none_leave_the_mean(kind):
    model, batch = ALL[kind].build(), make(kind)
    size = model.config.hidden_size // model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or size
    whole = HeadSubspaces(rank=size).fit(model, [batch])
    assert all(share == pytest.approx(1, abs=1e-3) for share in whole.found["variance"].values())
    heads = ["L0.H1", "L1.H3"]
    with torch.no_grad():
        plain = answer_logits(model, batch)
        with do(model, *compressed(whole, heads)):
            same = answer_logits(model, batch)
        with do(model, *compressed(HeadSubspaces(rank=1, heads=tuple(heads)).fit(model, [batch]), heads)):
            less = answer_logits(model, batch)
    assert torch.allclose(plain, same, atol=1e-3) and not torch.allclose(plain, less, atol=1e-2)


def test_a_planted_inhibition_head_asks_in_one_direction():
    planted = Planted().build(5)
    at = {role: unit for unit, role in planted.truth.items()}
    batch = even(IOI().make(planted.tokenizer, 24, 0))
    unit = at["subject inhibition"]
    reader = HeadSubspaces(rank=1).fit(planted.model, [batch])
    with torch.no_grad(), do(planted.model, *compressed(reader, [unit], sides=("q",))):
        assert correct(answer_logits(planted.model, batch), batch).mean() == 1


def test_prompts_of_one_length_have_no_padding():
    planted = Planted().build(5)
    batch = even(IOI().make(planted.tokenizer, 24, 0))
    assert bool(batch.inputs["attention_mask"].all()) and (batch.at == batch.ids.shape[1] - 1).all()
    assert all(text.split()[0] for text in batch.texts) and batch.spans["end"].max() == batch.ids.shape[1]


def test_what_cannot_be_kept_is_a_sentence():
    model, batch = ALL["llama"].build(), make("llama")
    with pytest.raises(ValueError, match="rank = 0 keeps no direction"):
        HeadSubspaces(rank=0).fit(model, [batch])
    reader = HeadSubspaces(heads=("L0.H1",)).fit(model, [batch])
    with pytest.raises(ValueError, match="has no directions of L1.H0; it has L0.H1"):
        compressed(reader, ["L1.H0"])


def test_outcomes_on_made_up_numbers():
    def judged(own, wider, said_by, right=97.0):
        one = {"own": own, "random": 0.1, "worth": 3.0, "right_whole": 98.0, "right_own": right}
        one |= {"right_random": 30.0, "right_none": 25.0}
        mixed, names = one | {"right_own": 60.0}, one | {"right_own": 97.0}
        letters = {"said": 0.9, "heads": ["L2.H0"], "of": 16, "in order, qk": one, "random letters, qk": mixed}
        found = {"names": names, "countries": names | {"own": wider}}
        return Replicated()._judge(found, letters, said_by, ["L1.H1"], 25.0, (40, 40)).outcome

    assert judged(0.9, 0.5, 0.9) == "holds"
    assert judged(0.9, 0.95, 0.9) == judged(0.9, 0.5, 0.7) == judged(0.7, 0.5, 0.9) == "partly"
    assert judged(0.9, 0.5, 0.9, right=50.0) == "fails"


def test_lettered_choices_ask_for_the_letter_of_a_word():
    lesson = LetteredChoices()
    for split in ("train", *lesson.tests):
        batch = lesson.on(split).make(n=64, seed=3)
        ids, row = batch.ids, torch.arange(64)
        match, rival = (batch.spans[name][:, 0] for name in ("match", "rival"))
        assert ids.shape == (64, 10) and (ids[:, -1] == lesson.shape.vocab_size - 1).all()
        assert (ids[row, match] == batch.answer[:, 0]).all() and (ids[row, rival] == batch.foil[:, 0]).all()
        assert (ids[row, match + 1] == ids[:, 0]).all() and (batch.answer != batch.foil).all()
        changed = batch.corrupt["input_ids"]
        assert (changed[row, rival + 1] == changed[:, 0]).all() and (changed[:, 1:] == ids[:, 1:]).all()
        ordered = float((ids[:, 1:9:2] == torch.arange(4)).all(1).float().mean())
        low, high = {"in order": (1, 1), "random letters": (0, 0.1), "train": (0.3, 0.7)}[split]
        assert low <= ordered <= high
    with pytest.raises(ValueError, match="1 options do not fit 12 letters and 32 words; allowed are 2 to 12"):
        LetteredChoices(options=1)


def test_a_small_model_of_a_lesson_has_edges_to_its_last_column_only():
    lesson = LetteredChoices()
    model = TinyConfig(**lesson.config(layers=2, heads=2, width=16, mlp=16)).build(0).eval()
    order, said = writers(model, lesson.make(n=4, seed=0), 3)
    assert len(order) == 7 and math.isfinite(said)
    graph = PathPatching(tokens=True).find(model, lesson.make(n=2, seed=0))
    assert ("embed@9", "logits") in graph.edges and abs(graph["embed@3", "logits"]) < 1e-6
