"""Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small. Wang et al., 2022.
arXiv:2211.00593
"""

from dataclasses import dataclass

from torch import Tensor

from headwise.pattern import PatternMethod, earlier_same, landing
from headwise.task import Batch


@dataclass(frozen=True)
class DuplicateToken(PatternMethod):
    """Mean attention from a token that occurred before to its earlier occurrences."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1; NaN for a prompt in which no token is repeated."""
        return landing(pattern, earlier_same(batch))
