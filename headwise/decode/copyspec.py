"""CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality.
Dumitru et al., 2025. arXiv:2502.08923
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading
from headwise.grams import Grams
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class CopySpec(DraftMethod):
    """Where the last `gamma` tokens stood in the text before, the tokens that followed them there are proposed.

    The first such place is taken, as in the paper. Runs are compared token by token, not by their hashes. The index of
    runs grows with the text, one entry a token, up to `remember` entries a row.

    Fields:
        gamma: tokens that must be the same; the paper uses 3 to 5. Fewer find more places and worse ones.
        tokens: proposed at most. remember: runs in the index of a row.
    """

    row: ClassVar[str] = "s009"
    gamma: int = 3
    tokens: int = 10
    remember: int = 1_000_000

    def __post_init__(self) -> None:
        if min(self.gamma, self.tokens, self.remember) < 1:
            raise ValueError(
                f"gamma is {self.gamma}, tokens {self.tokens} and remember {self.remember}; allowed are 1 or more."
            )

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter; it fits every model."""
        return _Copies(self)


class _Copies(Drafter):
    """An index for each row."""

    def __init__(self, method: CopySpec) -> None:
        self.method = method
        self.rows: list[Grams] = []

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Index the prompts."""
        self.rows = [Grams((self.method.gamma,), self.method.remember) for _ in texts]
        for row, text in zip(self.rows, texts, strict=True):
            row.add(text)

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        """Index what was added."""
        for row, one in news.items():
            self.rows[row].add(one.tokens)

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """What stood behind the same run before."""
        return {row: self._one(self.rows[row]) for row in rooms}

    def _one(self, row: Grams) -> Draft:
        place = row.behind(self.method.gamma)
        if place is None:
            return Draft([], source="copyspec", why=f"the last {self.method.gamma} tokens are new")
        return Draft(row.copy(place, self.method.tokens), source="copyspec")
