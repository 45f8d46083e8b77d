"""Exits of an encoder that are trained together: what the loss says, what an exit gives, and what training leaves."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from command_line import words_tokenizer
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel

from headwise.data.documented import documented
from headwise.lab import ModularExits
from headwise.replicate import runs
from headwise.replicate.modular_exits import ModularExits as Exits

PAIRS = [(f"w{n} w{n + 1} w{n + 2}", f"w{n + 60} w{n + 61}") for n in range(2, 42)]
METHOD = ModularExits(exits=(1, 2, 3), length=6)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=120, pad_token_id=1, **size), add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


def test_an_exit_is_the_mean_of_the_states_after_its_layer(encoder, tokenizer):
    texts = ["w5 w6 w7", "w8", "w9 w10"]
    for number in (1, 2, 3):
        found = METHOD.embed(encoder, tokenizer, texts, number)
        for text, one in zip(texts, found, strict=True):
            ids = torch.tensor([[int(word[1:]) for word in text.split()]])
            with torch.no_grad():
                states = encoder(input_ids=ids, output_hidden_states=True).hidden_states[number][0]
            torch.testing.assert_close(one, normalize(states.mean(0), dim=0), atol=1e-5, rtol=1e-4)


def test_the_loss_is_contrast_weighted_by_depth_and_what_the_last_exit_teaches():
    draw = torch.Generator().manual_seed(0)
    one, other = ([normalize(torch.randn(5, 8, generator=draw), dim=1) for _ in range(3)] for _ in range(2))
    right = torch.arange(5)

    def contrast(a, b):
        alike = a @ b.T / 0.05
        return (cross_entropy(alike, right) + cross_entropy(alike.T, right)) / 2

    alone = ModularExits(exits=(1, 2, 3), guide=0.0).loss(one, other)
    parts = [contrast(a, b) for a, b in zip(one, other, strict=True)]
    torch.testing.assert_close(alone, (parts[0] / 3 + parts[1] * 2 / 3 + parts[2]) / 2)
    assert METHOD.loss(one, other) > alone
    same = METHOD.loss([one[2]] * 3, [other[2]] * 3)
    torch.testing.assert_close(same, contrast(one[2], other[2]))


def test_the_last_exit_teaches_and_is_not_taught():
    draw = torch.Generator().manual_seed(1)
    leaves = [torch.randn(4, 8, generator=draw, requires_grad=True) for _ in range(4)]
    early, late, early_too, late_too = (normalize(one, dim=1) for one in leaves)
    grown = []
    for guide in (0.0, 5.0):
        method = ModularExits(exits=(1, 2), guide=guide)
        grown.append(torch.autograd.grad(method.loss([early, late], [early_too, late_too]), leaves, retain_graph=True))
    assert torch.equal(grown[0][1], grown[1][1]) and torch.equal(grown[0][3], grown[1][3])
    assert not torch.allclose(grown[0][0], grown[1][0])


def test_training_finds_partners_at_every_exit(encoder, tokenizer):
    model = copy.deepcopy(encoder)
    losses = METHOD.train(model, tokenizer, PAIRS, steps=40, batch=20, rate=3e-3)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]) and not model.training
    again = copy.deepcopy(encoder)
    assert METHOD.train(again, tokenizer, PAIRS, steps=3, batch=20, rate=3e-3)[0] == losses[0]
    for number in METHOD.exits:
        said, told = (METHOD.embed(model, tokenizer, [pair[side] for pair in PAIRS], number) for side in (0, 1))
        right = ((said @ told.T).argmax(1) == torch.arange(len(PAIRS))).float().mean()
        assert float(right) > 0.5


def test_what_cannot_be_trained_is_a_sentence(encoder, tokenizer):
    for exits in ((), (4, 2), (0, 2), (2, 2)):
        with pytest.raises(ValueError, match="allowed are numbers of layers from 1 on, in order, each once"):
            ModularExits(exits=exits)
    with pytest.raises(ValueError, match="An exit after layer 6 was asked for; this model has 3 layers"):
        ModularExits().train(encoder, tokenizer, PAIRS)
    with pytest.raises(ValueError, match="40 pairs for 60 batches of 99"):
        METHOD.train(encoder, tokenizer, PAIRS, batch=99)
    with pytest.raises(ValueError, match="There is no exit after layer 4"):
        METHOD.embed(encoder, tokenizer, ["w5"], 4)


def test_documented_functions_lack_their_docstrings():
    pairs = documented(0)
    assert len(pairs) > 800 and pairs == documented(0) != documented(1) and set(pairs) == set(documented(1))
    assert all(code.startswith("def ") for _, code in pairs)
    assert sum(sentence in code for sentence, code in pairs) < 0.01 * len(pairs)


def test_outcomes_follow_the_checks():
    found = {
        "untuned": {2: 20.0, 4: 30.0, 6: 60.0},
        "together": {2: 50.0, 4: 60.0, 6: 69.5},
        **{f"{number} alone": {number: value} for number, value in ((2, 48.0), (4, 60.0), (6, 70.0))},
        "time": {2: 40.0, 4: 70.0, 6: 100.0},
    }
    assert Exits()._judge(found, 9, 9, "x").outcome == "holds"
    assert Exits()._judge(found | {"6 alone": {6: 75.0}}, 9, 9, "x").outcome == "partly"
    slow = Exits()._judge(found | {"time": {2: 46.0, 4: 70.0, 6: 100.0}}, 9, 9, "x")
    assert slow.outcome == "partly" and "2 layers take at most 45% of the processor time of 6" in slow.measured
    assert Exits()._judge(found | {"2 alone": {2: 51.0}}, 9, 9, "x").outcome == "fails"


def test_time_is_a_share_of_that_of_the_whole(monkeypatch):
    asked, clock = [], iter(range(10**6))

    def work(size):
        asked.append(size)
        for _ in range(size):
            next(clock)

    monkeypatch.setattr(runs, "time", SimpleNamespace(process_time=lambda: next(clock)))
    shares = runs.shares_of_time({size: partial(work, size) for size in (9, 19, 39)}, 39)
    assert shares == {9: 0.25, 19: 0.5, 39: 1.0}
    # One round is for warming up, and another way begins each round.
    assert len(asked) == 3 * 8 and set(asked[::3]) == {9, 19, 39}
