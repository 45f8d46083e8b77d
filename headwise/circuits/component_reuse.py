"""Circuit Component Reuse Across Tasks in Transformer Language Models. Merullo, Eickhoff and Pavlick, 2023.
arXiv:2310.08744

Two tasks are compared by what each head is worth in both. Where one of them is done badly by heads that serve the other
well, setting a few of these heads may repair it.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.do import Scale, do
from headwise.method import Method
from headwise.progress import hidden
from headwise.score import Score
from headwise.stats import spearman
from headwise.task import Batch, answer_logits, metric


@dataclass(frozen=True)
class ComponentReuse(Method):
    """Which heads two tasks share, beyond chance, and the few strengths at which they do the weaker task better.

    Fields:
        share: part of all heads that counts as a task's circuit, those worth most.
        strengths: what a head's output may be multiplied with.
        most: heads that may be set.
        draws: random pairings of the heads that the rank correlation is compared with.
        metric: what a repair shall raise; prompts: prompts in one part.
    """

    share: float = 0.1
    strengths: tuple[float, ...] = (0.0, 3.0)
    most: int = 4
    draws: int = 2000
    metric: str = "logprob"
    prompts: int = 8
    seed: int = 0

    row: ClassVar[str] = "s121"

    def compare(self, first: Score, second: Score) -> "Reuse":
        """Two scores of the same heads side by side. Raises ValueError where they score different heads."""
        units = first.table["unit"].to_list()
        if units != second.table["unit"].to_list():
            raise ValueError(f"{first.name} and {second.name} score different heads, so no overlap can be told.")
        one, two = (score.table["value"].to_numpy() for score in (first, second))
        count = max(1, math.ceil(self.share * len(units)))
        heads = [frozenset(score.top(count)) for score in (first, second)]
        rank = spearman(one, two)
        draw = np.random.default_rng(self.seed)
        chance = [spearman(one, draw.permutation(two)) for _ in range(self.draws)]
        p = (1 + sum(value >= rank for value in chance)) / (1 + len(chance))
        return Reuse(heads[0], heads[1], rank, p, count / len(units))

    @torch.no_grad()
    def repair(self, model: PreTrainedModel, batch: Batch, heads: list[str]) -> dict[str, float]:
        """Strengths of at most `most` of the heads that raise the metric on these prompts; nothing where none does.

        Each head is tried at each strength alone; the best are then set together, one after the other, while it helps.

        Raises:
            ValueError: no head of this model.
        """
        own = self._worth(model, batch, {})
        single: dict[str, tuple[float, float]] = {}
        for head in tqdm(heads, desc="repair", disable=hidden(), leave=False):
            tried = [(self._worth(model, batch, {head: alpha}), alpha) for alpha in self.strengths]
            single[head] = max(tried)
        chosen: dict[str, float] = {}
        best = own
        for head in sorted(single, key=lambda name: -single[name][0])[: self.most]:
            value = self._worth(model, batch, {**chosen, head: single[head][1]})
            if value > best:
                best, chosen = value, {**chosen, head: single[head][1]}
        return chosen

    def _worth(self, model: PreTrainedModel, batch: Batch, strengths: dict[str, float]) -> float:
        measure = metric(self.metric)
        with do(model, *[Scale(head, alpha) for head, alpha in strengths.items()]):
            parts = [part.to(model.device) for part in batch.chunks(self.prompts)]
            return float(torch.cat([measure(answer_logits(model, part), part) for part in parts]).mean())


@dataclass(frozen=True)
class Reuse:
    """Heads of two tasks.

    Attributes:
        first, second: the heads worth most in each.
        rank: rank correlation of what all heads are worth; p: how often random pairings reach it.
        chance: share of a circuit that would be in another at random.
    """

    first: frozenset[str]
    second: frozenset[str]
    rank: float
    p: float
    chance: float

    @property
    def shared(self) -> float:
        """Share of the first circuit's heads that are in the second."""
        return len(self.first & self.second) / len(self.first)
