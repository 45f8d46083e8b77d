"""Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
Models. Chen et al., 2024. arXiv:2403.02178

Row s023 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.traces import cells, laid_out, running
from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch


@dataclass(frozen=True)
class MaskedThought(Lesson):
    """Sums and products step by step, from a fixed set of problems; in training results are hidden from who reads them.

    A prompt is numbers, each with what is done with it (plus or times), then the result of every step, then the last
    again as the answer. All that is said stays as it is; only what is read is masked. Splits: "seen", the problems of
    training without masks, and "fresh", other problems without masks.

    Fields:
        masked: chance of every result in a training prompt to be read as a mask.
        problems: how many are trained on.
        length: numbers in a problem.
        modulus: results are remainders of it.
    """

    row: ClassVar[str] = "s023"
    tests: ClassVar[tuple[str, ...]] = ("seen", "fresh")
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {"question": {"question": 1.0}}

    masked: float = 0.2
    problems: int = 5000
    length: int = 6
    modulus: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.masked < 1:
            raise ValueError(f"A share of {self.masked} of the steps cannot be masked; allowed are 0 up to 1.")
        if self.problems < 1 or self.length < 2 or self.modulus < 2:
            raise ValueError(
                f"{self.problems} problems of {self.length} numbers below {self.modulus} cannot be taught; allowed are "
                "1 problem, 2 numbers and a modulus of 2, or more."
            )

    @property
    def shape(self) -> Shape:
        """Tokens: numbers to add (and results), numbers to multiply with, two signs and the mask."""
        return Shape(2 * self.length + 2, self.modulus, vocab_size=2 * self.modulus + 3)

    @property
    def mask(self) -> int:
        """The token that stands for what is hidden."""
        return 2 * self.modulus + 2

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Answers: every result, then the last again. Spans: "question", "trace"."""
        if self.split == "fresh":
            question = _drawn(n, self.length, self.modulus, draw)
        else:
            known = _known(self.problems, self.length, self.modulus, self.world)
            question = known[torch.randint(len(known), (n,), generator=draw)]
        trace = running(question % self.modulus, self.modulus, question >= self.modulus)
        batch = laid_out(question, trace, trace[:, -1], 2 * self.modulus)
        if self.split == "train":
            ids, at = batch.ids, slice(self.length + 1, 2 * self.length + 1)
            ids[:, at] = torch.where(torch.rand(trace.shape, generator=draw) < self.masked, self.mask, ids[:, at])
        return batch

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """Where something is said: "number", of the same step; "result", the last one; "question", all its numbers."""
        return cells(self.length, batch.at.device)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy of results, and "exact": all are right, and so they would be if the model wrote them."""
        right = logits.argmax(-1) == batch.answer
        return {"accuracy": right.float().mean(-1), "exact": right.all(-1).float()}

    def lines(self) -> dict[str, float]:
        """Nats a result of guessing."""
        return {"chance": log(self.modulus), "perfect": 0.0}


def _drawn(n: int, length: int, modulus: int, draw: torch.Generator) -> Tensor:
    """[n, length] questions: tokens below the modulus are added, the others, modulus more, multiplied with."""
    times = torch.randint(2, (n, length), generator=draw)
    times[:, 0] = 0
    return torch.randint(modulus, (n, length), generator=draw) + modulus * times


@cache
def _known(problems: int, length: int, modulus: int, world: int) -> Tensor:
    return _drawn(problems, length, modulus, generator(world, 0x5023))
