"""Longformer: The Long-Document Transformer. Beltagy et al., 2020. arXiv:2004.05150"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.pattern import PatternMethod, mean_over_queries, real
from headwise.task import Batch


@dataclass(frozen=True)
class LocalShare(PatternMethod):
    """Share of attention that falls at most `window` tokens away, over queries that can see farther."""

    window: int = 8

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"A window of {self.window} tokens holds nothing; allowed are 0 and more.")

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1; NaN where no prompt is longer than the window."""
        there = real(batch, pattern.shape[-1])
        place = torch.arange(pattern.shape[-1], device=pattern.device)
        near = (place[:, None] - place[None, :]).abs() <= self.window
        farther = there & (there.cumsum(-1) > self.window + 1)
        return mean_over_queries((pattern * near).sum(-1), farther)
