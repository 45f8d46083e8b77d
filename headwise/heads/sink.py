"""Efficient Streaming Language Models with Attention Sinks. Xiao et al., 2023. arXiv:2309.17453"""

from dataclasses import dataclass

from torch import Tensor

from headwise.pattern import PatternMethod, mean_over_queries, real
from headwise.task import Batch


@dataclass(frozen=True)
class Sink(PatternMethod):
    """Mean attention from all later tokens to the first token of the prompt."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1. The first token of a padded prompt is its first real one."""
        there = real(batch, pattern.shape[-1])
        first = there.int().argmax(-1)
        later = there & (there.cumsum(-1) > 1)
        column = first[:, None, None, None].expand(*pattern.shape[:3], 1)
        return mean_over_queries(pattern.gather(-1, column).squeeze(-1), later)
