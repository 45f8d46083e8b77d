"""Prompt Lookup Decoding. Saxena, 2023.

The rule is that of transformers' `prompt_lookup_num_tokens`, which serves one row; here it runs in the same loop as all
other drafters, so that they can be compared in tokens, and for batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading
from headwise.grams import Grams
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class PromptLookup(DraftMethod):
    """The longest run of at most `longest` last tokens that stood in the text before proposes what followed it first.

    Fields:
        longest: tokens of the run at most; transformers takes 2. tokens: proposed at most.
    """

    longest: int = 2
    tokens: int = 10

    def __post_init__(self) -> None:
        if min(self.longest, self.tokens) < 1:
            raise ValueError(f"longest is {self.longest} and tokens {self.tokens}; allowed are 1 or more.")

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter; it fits every model."""
        return _Lookup(self)


class _Lookup(Drafter):
    def __init__(self, method: PromptLookup) -> None:
        self.method = method
        self.rows: list[Grams] = []

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Index the prompts."""
        sizes = tuple(range(1, self.method.longest + 1))
        self.rows = [Grams(sizes, 1_000_000) for _ in texts]
        for row, text in zip(self.rows, texts, strict=True):
            row.add(text)

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        """Index what was added."""
        for row, one in news.items():
            self.rows[row].add(one.tokens)

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """What stood behind the longest run that is not new."""
        return {row: self._one(self.rows[row]) for row in rooms}

    def _one(self, row: Grams) -> Draft:
        for size in range(self.method.longest, 0, -1):
            place = row.behind(size)
            if place is not None:
                return Draft(row.copy(place, self.method.tokens), source="prompt_lookup")
        return Draft([], source="prompt_lookup", why="the last token is new")
