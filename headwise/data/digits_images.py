"""Handwritten digits of scikit-learn (8 x 8 pixels) as prompts for a small vision transformer.

Row s112 of the mission.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
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
        from sklearn.datasets import load_digits

        data = load_digits()
        split = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[low:high]
        rows = split[torch.randperm(high - low, generator=torch.Generator().manual_seed(seed))[:n]]
        images = torch.tensor(data.images, dtype=torch.float32)[rows].unsqueeze(1) / 8 - 1
        labels = torch.tensor(data.target, dtype=torch.long)[rows].unsqueeze(1)
        return Batch(
            inputs={"pixel_values": images},
            at=torch.zeros_like(labels),
            answer=labels,
            texts=[f"image {row}" for row in rows.tolist()],
            about=self.about(n, seed),
        )
