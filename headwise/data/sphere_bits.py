"""Opening the Black Box of Deep Neural Networks via Information. Shwartz-Ziv and Tishby, 2017. arXiv:1703.00810

Row s159 of the mission. The authors' own rule lies in a file of theirs; this one is of the same kind and drawn here.
"""

from dataclasses import dataclass
from functools import cache
from math import log
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from headwise.information import entropy
from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch

DEGREES = 8  # of Legendre polynomials


@dataclass(frozen=True)
class SphereBits(Lesson):
    """Bits choose points on a sphere, and a label tells about how they lie to each other, however the sphere is turned.

    All inputs come equally often, and their label is 1 with a known probability, so that every entropy is exact. The
    rule sums a function of the angle over all pairs of chosen points; half of the inputs are above its threshold.

    Fields:
        bits: of an input.
        known: bits, below 1, that an input says of its label.
    """

    row: ClassVar[str] = "s159"

    bits: int = 12
    known: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 16 or not 0 < self.known < 1:
            raise ValueError(
                f"{self.bits} bits that say {self.known} of a label are no rule; allowed are 2 to 16, and a number "
                "between 0 and 1."
            )

    @property
    def shape(self) -> Shape:
        """One channel, -1 or 1, at each position; two classes."""
        return Shape(self.bits, 2, input_size=1)

    def every(self) -> tuple[Tensor, Tensor]:
        """All inputs [2 ** bits, bits] of -1 and 1, and the probability of label 1 for each, float64."""
        return _rule(self.bits, self.known, self.world)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Inputs at random, with labels at random; the answer is due at the last position."""
        inputs, likely = self.every()
        rows = torch.randint(len(inputs), (n,), generator=draw)
        label = (torch.rand(n, generator=draw) < likely[rows]).long()
        at = torch.full((n, 1), self.bits - 1)
        return Batch(inputs={"inputs_embeds": inputs[rows][..., None]}, at=at, answer=label[:, None])

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing, and of knowing each input's probability."""
        return {"chance": log(2), "Bayes": log(2) * (1 - self.known)}


@cache
def _rule(bits: int, known: float, world: int) -> tuple[Tensor, Tensor]:
    draw = generator(world, 159)
    points = torch.nn.functional.normalize(torch.randn(bits, 3, generator=draw).double(), dim=1)
    angles = (points @ points.T).clamp(-1, 1)
    kernel = sum(
        float(weight) * torch.special.legendre_polynomial_p(angles, degree)
        for degree, weight in enumerate(torch.randn(DEGREES, generator=draw), 1)
    )
    chosen = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) % 2
    value = torch.einsum("ni,ij,nj->n", chosen.double(), kernel, chosen.double())
    value = (value - value.median()) / value.std()
    low, high = 1e-2, 1e4
    for _ in range(60):
        slope = (low * high) ** 0.5
        low, high = (slope, high) if _said(value, slope) < known else (low, slope)
    return (2 * chosen - 1).float(), torch.sigmoid(slope * value)


def _said(value: Tensor, slope: float) -> float:
    """Bits that the input says of its label."""
    likely = torch.sigmoid(slope * value).numpy()
    both = np.stack([likely, 1 - likely], 1)
    return float(entropy(both.mean(0)) - entropy(both).mean())
