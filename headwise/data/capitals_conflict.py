"""Characterizing Mechanisms for Factual Recall in Language Models. Yu et al., 2023. arXiv:2310.15910

Row s058 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.capitals import by_length, chosen
from headwise.data.layout import Prompt, ask, check_count, lay_out
from headwise.data.words import CAPITALS
from headwise.task import Batch, Task


@dataclass(frozen=True)
class CapitalsConflict(Task):
    """The prompt states a false capital, then asks for it: the answer is what was stated, the foil what is memorised.

    Corrupt prompts state the true capital, so that context and memory agree. Answers are first tokens of names.
    On SmolLM2-135M-Instruct (78 prompts, seed 0) the stated capital beats the true one in 71 %,
    and never in corrupt prompts.
    """

    row: ClassVar[str] = "s058"
    countries: tuple[str, ...] = ()

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "stated" (the capital in the context), "country" (its last mention) and "end".

        Raises:
            ValueError: a country is not in the list, or no two capitals have the same number of tokens.
        """
        check_count(n)
        groups = by_length(tokenizer, sorted(set(CAPITALS.values())))
        home = {city: group for group in groups.values() for city in group}
        pool = [country for country in chosen(self.countries) if CAPITALS[country] in home]
        if not pool:
            raise ValueError("This tokenizer has no two capitals with the same number of tokens.")
        draw = random.Random(f"capitals conflict {seed}")
        clean, corrupt = [], []
        order: list[str] = []
        for _ in range(n):
            order = order or draw.sample(pool, len(pool))
            country = order.pop()
            true = CAPITALS[country]
            others = [c for c in home[true] if c != true and c[:2] != true[:2]]
            false = draw.choice(others or [c for c in home[true] if c != true])
            clean.append(self._prompt(tokenizer, country, false, false, true))
            corrupt.append(self._prompt(tokenizer, country, true, false, true))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, country: str, stated: str, false: str, true: str) -> Prompt:
        pieces = [
            (f"The capital of {country} is", None),
            (f" {stated}", "stated"),
            (f". Q: What is the capital of {country}? A: The capital of", None),
            (f" {country}", "country"),
            (" is", "end"),
        ]
        prompt, (answer, foil) = ask(tokenizer, pieces, (f" {false}", f" {true}"))
        return prompt._replace(answer=answer, foil=foil)
