"""Analyzing the Structure of Attention in a Transformer Language Model. Vig and Belinkov, 2019. arXiv:1906.04284"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.pattern import PatternMethod, mean_over_queries, real
from headwise.task import Batch


@dataclass(frozen=True)
class AttentionDistance(PatternMethod):
    """Mean distance in tokens between a query and what it attends to, the first token left out as query."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in tokens. A head that rests on the first token has a large distance."""
        there = real(batch, pattern.shape[-1])
        place = torch.arange(pattern.shape[-1], device=pattern.device)
        far = (place[:, None] - place[None, :]).abs().to(pattern.dtype)
        later = there & (there.cumsum(-1) > 1)
        return mean_over_queries(torch.einsum("bhqk,qk->bhq", pattern, far), later)
