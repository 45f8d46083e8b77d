"""In-context Learning and Induction Heads. Olsson et al., 2022. arXiv:2209.11895"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.pattern import PatternMethod, landing, real
from headwise.task import Batch


@dataclass(frozen=True)
class PreviousToken(PatternMethod):
    """Mean attention from each token to the token just before it."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1."""
        there = real(batch, pattern.shape[-1])
        cells = torch.diag_embed(there[:, 1:] & there[:, :-1], offset=-1)
        return landing(pattern, cells)
