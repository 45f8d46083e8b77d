"""Pushing the Limits of Rule Reasoning in Transformers through Natural Language Satisfiability. Richardson and
Sabharwal, 2021. arXiv:2112.09054

Row s068 of the mission.
"""

from dataclasses import dataclass
from functools import cache
from math import log
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from headwise.data.satisfying import FACTS, crossing, random_clauses, satisfiable, share, told
from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch

NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ivy", "jon", "kim", "lea")
KINDS = ("near", "far")
NEAR, FAR = 12, (16, 24)


@dataclass(frozen=True)
class Rules(Lesson):
    """Random rules such as "If ann and not bob then cat.": can all of them hold at once?

    A rule is one position, the sum of marks for what it names; a last position is where no (0) or yes (1) is said.
    Problems are hard near the number of rules at which half of them can be satisfied, the crossing; far from it that
    number tells. Splits: "crossing", "far", and "more facts", at the crossing of problems about one fact more. Prompts
    are filled up on the left, where nobody looks.

    Fields:
        facts: what a problem is about; which of the names they have, one more than there are facts, is drawn.
        literals: facts in a rule.
        kind: "near": training has at most 12 rules more or less than the crossing; "far": 16 to 24.
    """

    row: ClassVar[str] = "s068"
    tests: ClassVar[tuple[str, ...]] = ("crossing", "far", "more facts")

    facts: int = 5
    literals: int = 3
    kind: str = "near"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS or not 2 <= self.literals <= self.facts < FACTS:
            raise ValueError(
                f"kind={self.kind!r} with {self.literals} of {self.facts} facts in a rule is no problem; allowed are "
                f"{', '.join(KINDS)}, 2 facts in a rule or more, and at most {FACTS - 1} facts."
            )

    @property
    def shape(self) -> Shape:
        """A channel for each name and each denied name, and one for the last position; two classes."""
        return Shape(self.middle + FAR[1] + 1, 2, input_size=2 * (self.facts + 1) + 1)

    @property
    def middle(self) -> int:
        """The number of rules at which about half of the problems of this split can be satisfied."""
        return _middle(self.facts + (self.split == "more facts"), self.literals)

    def counts(self) -> list[int]:
        """The numbers of rules that this split has, all alike."""
        split = self.kind if self.split == "train" else self.split
        if split == "near":
            return list(range(max(1, self.middle - NEAR), self.middle + NEAR + 1))
        if split == "far":
            away = range(FAR[0], FAR[1] + 1)
            return [self.middle + by for by in (*(-one for one in away if one < self.middle), *away)]
        return [self.middle]

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Answers are 0 or 1. Spans: "rules"."""
        facts, names = self.facts + (self.split == "more facts"), self.facts + 1
        counts = torch.tensor(self.counts())
        count = counts[torch.randint(len(counts), (n,), generator=draw)]
        most = int(counts.max())
        clauses = random_clauses(n, most, facts, self.literals, draw)
        # The last of them are shown.
        answer = torch.from_numpy(satisfiable(clauses.flip(1), facts, count)).long()
        named = torch.rand(n, names, generator=draw).argsort(-1)[:, :facts]
        marks = 2 * named.gather(1, (clauses // 2).flatten(1)).view_as(clauses) + clauses % 2
        there = torch.arange(most) >= most - count[:, None]
        whole = torch.zeros(n, most + 1, 2 * names + 1)
        whole[:, :-1, :-1] = one_hot(marks, 2 * names).sum(2) * there[..., None]
        whole[:, -1, -1] = 1
        at = torch.full((n, 1), most)
        mask = torch.cat([there, torch.ones(n, 1, dtype=torch.bool)], 1).long()
        return Batch(
            inputs={"inputs_embeds": whole, "attention_mask": mask},
            at=at,
            answer=answer[:, None],
            spans={"rules": torch.stack([most - count, at[:, 0]], 1)},
        )

    def clauses(self, batch: Batch, row: int) -> list[list[int]]:
        """The rules of one prompt as literals: 2i says the name i, 2i + 1 denies it."""
        start, end = batch.spans["rules"][row].tolist()
        return [one.nonzero().flatten().tolist() for one in batch.inputs["inputs_embeds"][row, start:end, :-1]]

    def said_in_words(self, batch: Batch, row: int) -> str:
        """The rules of one prompt as a text; every rule could be turned round in as many ways as it has facts."""
        return " ".join(told(clause, NAMES) for clause in self.clauses(batch, row))

    def lines(self) -> dict[str, float]:
        """Nats of guessing, and of who knows for each number of rules how many problems can be satisfied."""
        return {"chance": log(2), "number of rules": _by_count(self.facts, self.literals, self.kind), "perfect": 0.0}

    def config(self, **options: object) -> dict[str, object]:
        """Rules have no order: no positions, and everybody sees everybody."""
        return super().config(**({"pos": "none", "causal": False} | options))


@cache
def _middle(facts: int, literals: int) -> int:
    return round(crossing(facts, literals, generator(0x5068, facts, literals)) * facts)


@cache
def _by_count(facts: int, literals: int, kind: str) -> float:
    draw = generator(0x5068, facts, literals, 1)
    counts = Rules(facts=facts, literals=literals, kind=kind).counts()
    odds = torch.tensor([share(facts, one, literals, draw, 1000) for one in counts])
    return float(-(torch.xlogy(odds, odds) + torch.xlogy(1 - odds, 1 - odds)).mean())
