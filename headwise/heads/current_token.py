"""What Does BERT Look At? An Analysis of BERT's Attention. Clark et al., 2019. arXiv:1906.04341"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.pattern import PatternMethod, landing, real
from headwise.task import Batch


@dataclass(frozen=True)
class CurrentToken(PatternMethod):
    """Mean attention from each token to itself, the first token left out: it has nothing else to look at."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1."""
        there = real(batch, pattern.shape[-1])
        later = there & (there.cumsum(-1) > 1)
        return landing(pattern, torch.diag_embed(later))
