"""Listening to the Wise Few: Select-and-Copy Attention Heads for Multiple-Choice QA. Tulchinskii et al.,
2024. arXiv:2410.02343

Row s010 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Piece, Prompt, ask, check_count, lay_out, one_token_words
from headwise.data.words import NOUNS
from headwise.task import Batch, Task


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Options A to D hold four words in random order, and the question is which option holds a given one.

    Corrupt prompts ask for the word of the foil's option. `about["letters"]` are the ids of the option letters in
    order, so that the index of the right option is the place of the answer among them.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the logit of the right letter beats that of one
    wrong letter in 50 %: that model cannot answer with letters, though some of its heads attend to the right option.
    """

    row: ClassVar[str] = "s010"
    options: int = 4

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "asked" (the word in the question), "option_0".. (letter to end of line) and "option_end_0"...

        The end of an option is its line break, or its last token where the tokenizer drops line breaks.

        Raises:
            ValueError: there are not 2 to 26 options, or fewer nouns than options are one token.
        """
        check_count(n)
        if not 2 <= self.options <= 26:
            raise ValueError(f"{self.options} options were asked for; allowed are 2 to 26.")
        nouns = one_token_words(tokenizer, NOUNS, self.options, "nouns")
        nouns = one_token_words(tokenizer, nouns, self.options, "quoted nouns", before='is "')
        letters = [chr(ord("A") + i) for i in range(self.options)]
        draw = random.Random(f"multiple choice {seed}")
        clean, corrupt, ways = [], [], []
        for _ in range(n):
            words = draw.sample(nouns, self.options)
            right, wrong = draw.sample(range(self.options), 2)
            prompt, ways = ask(tokenizer, self._pieces(words, words[right]), [f" {letter}" for letter in letters])
            other, _ = ask(tokenizer, self._pieces(words, words[wrong]), [f" {letter}" for letter in letters])
            if len(set(ways)) < self.options:
                raise ValueError(f"The letters {letters[0]} to {letters[-1]} are not one token each here.")
            clean.append(self._ends(prompt)._replace(answer=ways[right], foil=ways[wrong]))
            corrupt.append(other)
        return lay_out(self, tokenizer, clean, corrupt, n, seed, letters=ways)

    def _pieces(self, words: list[str], asked: str) -> list[Piece]:
        lines = [(f"{chr(ord('A') + i)}. {word}\n", f"option_{i}") for i, word in enumerate(words)]
        return [('Which option is "', None), (asked, "asked"), ('"?\n', None), *lines, ("Answer", None), (":", "end")]

    def _ends(self, prompt: Prompt) -> Prompt:
        ends = {f"option_end_{i}": prompt.spans[f"option_{i}"][1] for i in range(self.options)}
        return prompt._replace(spans={**prompt.spans, **{name: (end - 1, end) for name, end in ends.items()}})
