"""Listening to the Wise Few: Select-and-Copy Attention Heads for Multiple-Choice QA. Tulchinskii et al., 2024.
arXiv:2410.02343

Row s010 of the mission. The paper's twin of the QK-score: attention weights, RoPE and the other keys included.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headwise.pattern import PatternMethod, option_ends, right_option
from headwise.task import Batch


@dataclass(frozen=True)
class SelectAndCopyAttention(PatternMethod):
    """Accuracy of a head as a judge: the option whose end the last token attends to most."""

    row: ClassVar[str] = "s010"
    needs: ClassVar[str] = "multiple_choice"

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H], 1 where the head is right. Raises ValueError when no options are marked."""
        rows = torch.arange(len(pattern), device=pattern.device)
        last = pattern.transpose(1, 2)[rows, batch.at[:, -1]]
        ends = option_ends(batch)[:, None].expand(-1, last.shape[1], -1)
        return (last.gather(-1, ends).argmax(-1) == right_option(batch)[:, None]).float()
