"""Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven Priors. Amos et al., 2023.
arXiv:2310.02980

Row s027 of the mission. The paper's pixel sequences are of CIFAR-10 and paths; these are of scikit-learn's digits.
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch

from headwise.data.digits_images import part_of_digits
from headwise.lesson import Lesson, Shape
from headwise.task import Batch

LEVELS, ASK = 17, 17  # grey levels 0 to 16, then the token that asks; digits come behind it


@dataclass(frozen=True)
class PixelSequences(Lesson):
    """The 64 pixels of a handwritten digit, one token each, then a token that asks which digit it is.

    1,297 images are taught, the split "test" has 500 others.

    Fields:
        due: "answer", the digit; or "inputs", every next pixel, for training on the same images without their labels.
    """

    row: ClassVar[str] = "s027"
    tests: ClassVar[tuple[str, ...]] = ("test",)

    due: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.due not in ("answer", "inputs"):
            raise ValueError(f"due={self.due!r} is nothing to be taught; allowed are 'answer' and 'inputs'.")

    @property
    def shape(self) -> Shape:
        """Tokens: grey levels, the one that asks, digits."""
        size = ASK + 1 + 10
        return Shape(65, size, vocab_size=size)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Different images as far as there are enough, then any."""
        images, digits, _ = part_of_digits(self.split)
        size = len(images)
        rows = torch.randperm(size, generator=draw)[:n] if n <= size else torch.randint(size, (n,), generator=draw)
        pixels = ((images[rows] + 1) * 8).round().long().flatten(1)
        ids = torch.cat([pixels, torch.full((n, 1), ASK)], 1)
        if self.due == "inputs":
            return Batch({"input_ids": ids}, at=torch.arange(63).repeat(n, 1), answer=pixels[:, 1:])
        return Batch({"input_ids": ids}, at=torch.full((n, 1), 64), answer=digits[rows][:, None] + ASK + 1)

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among digits, or among grey levels."""
        return {"chance": log(10 if self.due == "answer" else LEVELS), "perfect": 0.0}
