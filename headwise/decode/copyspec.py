"""CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality.
Dumitru et al., 2025. arXiv:2502.08923
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.drafting import Drafter
from headwise.grams import Copies
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class CopySpec(DraftMethod):
    """Where the last `gamma` tokens stood in the text before, the tokens that followed them there are proposed.

    The first such place is taken, as in the paper. Runs are compared token by token, not by their hashes. The index of
    runs grows with the text, one entry a token, up to `remember` entries a row.

    Unlike in the paper a copy that went apart is taken up again as soon as one token fits near the place where it did,
    so that a changed word costs one or two passes rather than `gamma` (docs/bench.md); `near=0` is the paper's rule.

    Fields:
        gamma: tokens that must be the same; the paper uses 3 to 5. Fewer find more places and worse ones.
        tokens: proposed at most, shared by the rows of a batch. For one row reading 24 costs little more than reading
            10 (docs/bench.md).
        remember: runs in the index of a row.
        near: tokens ahead, and half as many back, in which a copy is taken up again.

    Raises:
        ValueError: `gamma`, `tokens` or `remember` below 1, or `near` below 0.
    """

    row: ClassVar[str] = "s009"
    gamma: int = 3
    tokens: int = 24
    remember: int = 1_000_000
    near: int = 8

    def __post_init__(self) -> None:
        if min(self.gamma, self.tokens, self.remember) < 1:
            raise ValueError(
                f"gamma is {self.gamma}, tokens {self.tokens} and remember {self.remember}; allowed are 1 or more."
            )
        if self.near < 0:
            raise ValueError(f"near is {self.near}; allowed are 0 and more.")

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter; it fits every model."""
        return Copies((self.gamma,), self.tokens, "copyspec", self.remember, self.near)
