"""Rows of a batch that must wait for others: their drafts stay, and so do their texts."""

import random

import torch
from families import FAMILIES

import headwise as hw
from headwise.attach import treated
from headwise.drafting import WAITS, Draft, Drafter
from headwise.verifying import Verifying


class Foresight(Drafter):
    """Drafts what will be said, up to random lengths, and minds being asked twice before a row has grown."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.draw = answers, random.Random(0)

    def begin(self, model, texts, sampling):
        """Nothing is said yet."""
        self.said, self.grown = [0] * len(texts), set(range(len(texts)))

    def accept(self, news, read):
        """These rows have grown."""
        self.grown |= set(news)
        for row, one in news.items():
            self.said[row] += len(one.tokens)

    def propose(self, rooms):
        """Each row once."""
        assert self.grown >= set(rooms), "asked again before anything was added"
        self.grown -= set(rooms)
        ends = {row: self.said[row] + self.draw.choice((0, 0, 6)) for row in rooms}
        return {row: Draft(self.answers[row][self.said[row] : end]) for row, end in ends.items()}


def test_rows_that_wait_keep_their_draft() -> None:
    model = FAMILIES["llama"].build()
    ids = torch.randint(4, 9, (4, 12), generator=torch.Generator().manual_seed(0))
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with treated(model, hw.cache.Duo(sink=2, recent=5)):
        plain = model.generate(ids, **how)
        loop = Verifying(Foresight(plain[:, 12:].tolist()))
        assert torch.equal(model.generate(ids, custom_generate=loop, **how), plain)
        assert loop.stats.why[WAITS] > 0
        assert torch.equal(hw.decode.SelfSpeculation(blocks=(1,), sure=0).generate(model, ids, **how).ids, plain)
