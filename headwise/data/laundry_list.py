"""Talking Heads: Understanding Inter-layer Communication in Transformer Language Models.
Merullo et al., 2024. arXiv:2406.09519

Row s127 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Piece, Prompt, ask, check_count, lay_out, one_token_words
from headwise.data.words import GROCERIES
from headwise.task import Batch, Task


@dataclass(frozen=True)
class LaundryList(Task):
    """A shopping list, and everything on it but one item is already there: the answer is what is still needed.

    The foil is one of the items that are there; corrupt prompts have the answer in its place, so that the foil is
    needed. The longer the list (`items`), the harder.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in 92 %, by 3.40 on average, and is the top
    token in 84 %; in corrupt prompts in 5 %. With six items it is 64 %, 0.81 and 34 %.
    """

    row: ClassVar[str] = "s127"
    items: int = 3

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "item_0".. (the list, in order), "swapped" (the foil among the items that are there) and "end".

        Raises:
            ValueError: there are not 2 to 20 items, or fewer of the words than items are one token for this tokenizer.
        """
        check_count(n)
        if not 2 <= self.items <= 20:
            raise ValueError(f"Lists of {self.items} items were asked for; allowed are 2 to 20.")
        words = one_token_words(tokenizer, GROCERIES, self.items, "shopping items")
        draw = random.Random(f"laundry list {seed}")
        clean, corrupt = [], []
        for _ in range(n):
            items = draw.sample(words, self.items)
            missing = draw.choice(items)
            there = draw.sample([item for item in items if item != missing], self.items - 1)
            place = draw.randrange(len(there))
            clean.append(self._prompt(tokenizer, items, there, place, missing, there[place]))
            changed = [*there[:place], missing, *there[place + 1 :]]
            corrupt.append(self._prompt(tokenizer, items, changed, place, missing, there[place]))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: list[str],
        there: list[str],
        place: int,
        missing: str,
        foil: str,
    ) -> Prompt:
        pieces: list[Piece] = [("I need to buy", None)]
        for i, item in enumerate(items):
            pieces += [(_before(i, len(items)), None), (f" {item}", f"item_{i}")]
        pieces.append((". I already have", None))
        for i, item in enumerate(there):
            pieces += [(f"{_before(i, len(there))} the", None), (f" {item}", "swapped" if i == place else None)]
        pieces += [(", so I still need", None), (" the", "end")]
        prompt, (answer, wrong) = ask(tokenizer, pieces, (f" {missing}", f" {foil}"))
        return prompt._replace(answer=answer, foil=wrong)


def _before(i: int, count: int) -> str:
    return "" if i == 0 else " and" if i == count - 1 else ","
