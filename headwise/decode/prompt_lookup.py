"""Prompt Lookup Decoding. Saxena, 2023.

The rule is that of transformers' `prompt_lookup_num_tokens`, which serves one row; here it runs in the same loop as all
other drafters, so that they can be compared in tokens, and for batches.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from headwise.drafting import Drafter
from headwise.grams import Copies
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class PromptLookup(DraftMethod):
    """The longest run of at most `longest` last tokens that stood in the text before proposes what followed it first.

    Fields:
        longest: tokens of the run at most; transformers takes 2. tokens: proposed at most, shared by the rows of a
            batch.
    """

    longest: int = 2
    tokens: int = 10

    def __post_init__(self) -> None:
        if min(self.longest, self.tokens) < 1:
            raise ValueError(f"longest is {self.longest} and tokens {self.tokens}; allowed are 1 or more.")

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter; it fits every model."""
        return Copies(tuple(range(1, self.longest + 1)), self.tokens, "prompt_lookup")
