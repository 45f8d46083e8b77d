"""What Does BERT Look At? An Analysis of BERT's Attention. Clark et al., 2019. arXiv:1906.04341"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.pattern import PatternMethod, mean_over_queries, real
from headwise.task import Batch


@dataclass(frozen=True)
class Entropy(PatternMethod):
    """Mean entropy in nats of where a token looks: 0 for one key, the logarithm of their number for all alike."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in nats, the first token left out as query."""
        there = real(batch, pattern.shape[-1])
        later = there & (there.cumsum(-1) > 1)
        return mean_over_queries(torch.special.entr(pattern).sum(-1), later)
