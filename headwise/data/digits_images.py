"""Handwritten digits of scikit-learn (8 x 8 pixels) as prompts for a small vision transformer.

Row s112 of the mission.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import check_count
from headwise.task import Batch, Task

PARTS = {"train": (0, 1297), "test": (1297, 1797), "all": (0, 1797)}


@dataclass(frozen=True)
class DigitImages(Task):
    """Images of digits with labels: 1,297 to train on and 500 others to test, split by one fixed shuffle."""

    row: ClassVar[str] = "s112"
    part: str = "test"

    def make(self, tokenizer: PreTrainedTokenizerBase | None, n: int, seed: int = 0) -> Batch:
        """inputs["pixel_values"] is [n, 1, 8, 8] from -1 to 1; `seed` orders the images; the tokenizer is not used.

        Raises:
            ValueError: no such part, or more images than it has.
            ModuleNotFoundError: scikit-learn is not installed.
        """
        if self.part not in PARTS:
            raise ValueError(f"There is no part {self.part!r}; allowed are {', '.join(PARTS)}.")
        low, high = PARTS[self.part]
        check_count(n, high - low, f"images of the {self.part} part")
        pixels, digits, numbers = part_of_digits(self.part)
        chosen = torch.randperm(high - low, generator=torch.Generator().manual_seed(seed))[:n]
        labels, rows = digits[chosen].unsqueeze(1), numbers[chosen]
        return Batch(
            inputs={"pixel_values": pixels[chosen].unsqueeze(1)},
            at=torch.zeros_like(labels),
            answer=labels,
            texts=[f"image {row}" for row in rows.tolist()],
            about=self.about(n, seed),
        )


@cache
def part_of_digits(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, 8, 8] from -1 to 1 of a part, the digits on them [n], and their numbers in scikit-learn's order [n].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        sentence = "The images of digits come with scikit-learn, which is not installed: pip install scikit-learn"
        raise ModuleNotFoundError(sentence, name="sklearn") from None
    data = load_digits()
    split = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[slice(*PARTS[part])]
    images = torch.tensor(data.images, dtype=torch.float32)[split] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.long)[split], split
