"""Understanding the Effect of Noise in LLM Training Data with Algorithmic Chains of Thought. Havrilla and Iyer, 2024.
arXiv:2402.04004

Row s049 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.traces import cells, laid_out, running
from headwise.lesson import Lesson, Shape
from headwise.task import Batch

NOISES = ("none", "static", "dynamic")


@dataclass(frozen=True)
class TracedIntegers(Lesson):
    """Digits, then their running totals, then the sum: in some prompts results of the trace are wrong.

    Noise that is static is put into a finished trace: what follows a wrong total, and the sum, are as they should be.
    Dynamic noise happens while the trace is made: everything after it goes on from the wrong total, the sum too. Totals
    are remainders. The split "clean" has no noise.

    Fields:
        length: digits in a prompt.
        modulus: how many digits there are.
        noise: "none", "static" or "dynamic".
        contaminated: share of the prompts that have noise.
        intensity: chance of every total of such a prompt to be replaced by another digit.
    """

    row: ClassVar[str] = "s049"
    tests: ClassVar[tuple[str, ...]] = ("clean",)
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {"addend": {"number": 1.0}}

    length: int = 6
    modulus: int = 10
    noise: str = "none"
    contaminated: float = 0.5
    intensity: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise not in NOISES or not (0 <= self.contaminated <= 1 and 0 <= self.intensity <= 1):
            raise ValueError(
                f"noise={self.noise!r} in {self.contaminated} of the traces at {self.intensity} is no noise here; "
                f"allowed are {', '.join(NOISES)}, and shares of 0 to 1."
            )
        if self.length < 2 or self.modulus < 2:
            raise ValueError(f"{self.length} digits out of {self.modulus} make no sum; allowed are 2 or more of each.")

    @property
    def shape(self) -> Shape:
        """Tokens: digits, then the signs before the totals and before the sum."""
        return Shape(2 * self.length + 2, self.modulus, vocab_size=self.modulus + 2)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Answers: every total of the trace, noise and all, then the sum. Spans: "question", "trace"."""
        digits = torch.randint(self.modulus, (n, self.length), generator=draw)
        wrong = torch.randint(1, self.modulus, (n, self.length), generator=draw)
        there = torch.rand(n, self.length, generator=draw) < self.intensity
        there = there & (torch.rand(n, 1, generator=draw) < self.contaminated)
        slips = torch.where(there, wrong, 0)
        if self.noise == "none" or self.split == "clean":
            slips = torch.zeros_like(slips)
        if self.noise == "dynamic":
            trace = running(digits, self.modulus, slips=slips)
            return laid_out(digits, trace, trace[:, -1], self.modulus)
        totals = running(digits, self.modulus)
        return laid_out(digits, (totals + slips) % self.modulus, totals[:, -1], self.modulus)

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Digits and totals as they stand in the prompts, [B, length] each."""
        return batch.ids[:, : self.length], batch.answer[:, : self.length]

    def follows(self, batch: Batch) -> Tensor:
        """[B, length] whether each total is what the one before it, right or wrong, and its digit make."""
        digits, trace = self.parts(batch)
        before = torch.cat([torch.zeros_like(trace[:, :1]), trace[:, :-1]], 1)
        return (before + digits) % self.modulus == trace

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """Where something is to be said: "number", the digit that is added; "result", the last total; "question"."""
        return cells(self.length, batch.at.device)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy of totals and sum, and "answer", of the sum alone, with the totals given."""
        right = (logits.argmax(-1) == batch.answer).float()
        return {"accuracy": right.mean(-1), "answer": right[:, -1]}

    def lines(self) -> dict[str, float]:
        """Nats a total: chance, and Bayes, who knows the noise; the same for static and dynamic noise."""
        if self.noise == "none":
            return {"chance": log(self.modulus), "Bayes": 0.0}
        share, q, n = self.contaminated, self.intensity, self.length
        entropy = 0.0
        for k in range(n + 1):
            odds = share * q**k * (1 - q) ** (n - k) + (1 - share) * (k == 0)
            if odds > 0:
                entropy += comb(n, k) * odds * (k * log(self.modulus - 1) - log(odds))
        return {"chance": log(self.modulus), "Bayes": entropy / (n + 1)}

    @property
    def right(self) -> float:
        """Share of the prompts whose sum is the sum of their digits: what who writes just such traces gets right."""
        if self.noise != "dynamic":
            return 1.0
        still = 1.0
        for _ in range(self.length):
            still = still * (1 - self.intensity) + (1 - still) * self.intensity / (self.modulus - 1)
        return 1 - self.contaminated + self.contaminated * still
