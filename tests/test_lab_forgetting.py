"""Parts of speech: what prompts hold on every split, and forgetting of some rows of an embedding."""

import pytest
import torch

from headwise import replicate
from headwise.data import PartsOfSpeech
from headwise.data.parts_of_speech import BLANK, COPULA, FIRST
from headwise.lab import DualProcess, TinyConfig, Training, train
from headwise.task import answer_logits

LESSON = PartsOfSpeech(words=40, unclear=0.0)


def roles(ids):
    """Noun and adjective of every sentence."""
    after = ids[:, 1] == COPULA
    assert (ids[after, 1] == COPULA).all() and (ids[~after, 0] == COPULA).all()
    return torch.where(after, ids[:, 0], ids[:, 2]), torch.where(after, ids[:, 2], ids[:, 1])


@pytest.mark.parametrize("split", ["train", "unseen", "rare", "swapped"])
def test_the_blanks_follow_from_the_sentence(split):
    batch = LESSON.on(split).make(n=400)
    ids = batch.ids
    noun, adjective = roles(ids)
    asked = ids[:, 3] == noun
    assert ((ids[:, 3] == adjective) == ~asked).all() and 0.4 < asked.float().mean() < 0.6
    assert (ids[:, 4:] == BLANK).all() and torch.equal(batch.answer[:, 1:], ids[:, 3:4].expand(-1, 2))
    assert torch.equal(batch.answer[:, 0], adjective)
    assert torch.equal(batch.foil[:, 0], noun)
    known = (noun < FIRST + 20) & (adjective >= FIRST + 20)
    if split == "train":
        assert 0.8 < known.float().mean() < 0.99 and max(noun.max(), adjective.max()) < FIRST + 40
    if split == "unseen":
        assert set(ids[:, :4].unique().tolist()) - {COPULA} == set(range(*LESSON.unseen))
    if split == "rare":
        assert known.all() and set(noun.tolist()) | set(adjective.tolist()) <= {20, 21, 40, 41}
    if split == "swapped":
        assert ((noun >= FIRST + 20) & (adjective < FIRST + 20)).all()


def test_an_unclear_prompt_says_nothing_of_roles():
    batch = LESSON.on("unclear").make(n=600)
    ids = batch.ids
    assert not (ids == COPULA).any() and ((ids[:, :3] == BLANK).sum(-1) == 1).all()
    noun = (ids[:, :3] >= FIRST) & (ids[:, :3] < FIRST + 20)
    places = noun.int().argmax(-1) * 3 + (ids[:, :3] == BLANK).int().argmax(-1)
    assert len(places.unique()) == 6
    assert ((batch.answer[:, 0] >= FIRST + 20) & (batch.foil[:, 0] < FIRST + 20)).all()
    some = PartsOfSpeech(words=40).make(n=2000).ids
    assert 0.25 < (some[:, :3] == BLANK).any(-1).float().mean() < 0.35


def test_frequent_words_are_frequent_and_some_are_both():
    lesson = PartsOfSpeech(words=200, zipf=1.0, unclear=0.0)
    noun, adjective = roles(lesson.make(n=20_000).ids)
    assert (noun != adjective).all()
    assert (noun == FIRST).sum() / (noun == FIRST + 19).sum().clamp(1) > 10
    as_adjective, as_noun = (adjective == FIRST + 9).sum(), (noun == FIRST + 9).sum()
    assert 0.5 < as_adjective / as_noun < 2
    assert not (adjective == FIRST).any()


def test_a_copier_without_roles_has_the_loss_of_the_line():
    batch = LESSON.make(n=64)
    logits = torch.full((64, 3, 46), -30.0)
    logits.scatter_(2, batch.answer[..., None], 0.0)
    logits[:, 0].scatter_(1, batch.foil[:, :1], 0.0)
    assert LESSON.loss(logits, batch).mean() == pytest.approx(LESSON.lines()["copied without a role"], abs=1e-4)
    found = LESSON.metrics(logits.scatter(2, batch.answer[..., None], 1.0), batch)
    assert all(value.eq(1).all() for value in found.values()) and set(found) == {"accuracy", "tokens", "role"}


def test_words_are_forgotten_and_unseen_ones_never_learned():
    config = TinyConfig(**LESSON.config(width=16))
    edits = DualProcess(words=40, forget=3).conditions()["active forgetting"].edits
    few = Training(steps=6, batch=8, measure_every=3, rows=16)
    run = train(config, LESSON, few, edits, seed=2)
    assert {"to copula", "to the same word"} <= {row[1] for row in run.tape.rows}
    batch = LESSON.on("unseen").make(n=4)
    assert answer_logits(run.model, batch).shape == (4, 3, 46)
    free = train(config, LESSON, few, edits[:1], seed=2)
    assert run.losses[:3] == free.losses[:3] and run.losses[3] != free.losses[3]
    start = config.build(2).embed.weight
    assert not torch.equal(run.model.embed.weight[-4:], start[-4:])
    assert 0.08 < run.model.embed.weight[-4:].std() < 0.17


def test_what_is_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="no vocabulary"):
        PartsOfSpeech(words=50)


def test_the_replication_is_found():
    assert replicate.find("s138").name == "dual_process"
