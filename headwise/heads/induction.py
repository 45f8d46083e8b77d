"""In-context Learning and Induction Heads. Olsson et al., 2022. arXiv:2209.11895"""

from dataclasses import dataclass

from torch import Tensor

from headwise.pattern import PatternMethod, after_same, landing
from headwise.task import Batch


@dataclass(frozen=True)
class Induction(PatternMethod):
    """Mean attention from a token that occurred before to what followed it then (prefix matching)."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1; NaN for a prompt in which no token is repeated."""
        return landing(pattern, after_same(batch))
