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

    Fields:
        gamma: tokens that must be the same; the paper uses 3 to 5. Fewer find more places and worse ones.
        tokens: proposed at most. Reading 24 costs little more than reading 10 (docs/bench.md).
        remember: runs in the index of a row.
    """

    row: ClassVar[str] = "s009"
    gamma: int = 3
    tokens: int = 24
    remember: int = 1_000_000

    def __post_init__(self) -> None:
        if min(self.gamma, self.tokens, self.remember) < 1:
            raise ValueError(
                f"gamma is {self.gamma}, tokens {self.tokens} and remember {self.remember}; allowed are 1 or more."
            )

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter; it fits every model."""
        return Copies((self.gamma,), self.tokens, "copyspec", self.remember)
