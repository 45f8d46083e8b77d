"""Drafters that know what a model will say, or that always say the same."""

import random
from collections.abc import Mapping

from families import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading


class Oracle(Drafter):
    """Knows the right continuation and spoils it at random, in chains or in trees; checks what it is told."""

    wants_hidden = True

    def __init__(self, right: list[list[int]], trees: bool, seed: int = 0) -> None:
        self.right, self.trees, self.draw = right, trees, random.Random(seed)

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        self.model, self.texts = model, [list(text) for text in texts]
        self.start = [len(text) for text in texts]
        self.hidden: list[list[Tensor]] = [[] for _ in texts]

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        for row, one in news.items():
            assert one.hidden is not None and len(one.hidden) == len(read.columns[row])
            self.texts[row] += one.tokens
            self.hidden[row].append(one.hidden)
            assert sum(map(len, self.hidden[row])) == len(self.texts[row]) - 1

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        return {row: self._one(row) for row in rooms}

    def _one(self, row: int) -> Draft:
        made = len(self.texts[row]) - self.start[row]
        good = self.right[row][made : made + self.draw.randint(0, 6)]
        if not self.trees:
            return Draft([token if self.draw.random() < 0.8 else self.draw.randrange(VOCAB) for token in good])
        tokens: list[int] = []
        parents: list[int] = []
        last = -1
        for token in good:
            here = [self.draw.randrange(VOCAB), token] if self.draw.random() < 0.7 else [token]
            places = range(len(tokens), len(tokens) + len(here))
            tokens += here
            parents += [last] * len(here)
            last = self.draw.choice(places)
        return Draft(tokens, parents)


class Says(Drafter):
    """Proposes one draft, whatever was said."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        pass

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        pass

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        return dict.fromkeys(rooms, self.draft)
