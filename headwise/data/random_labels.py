"""Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla.
Lieberum et al., 2023. arXiv:2307.09458

Row s109 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Piece, ask, check_count, lay_out, one_token_words
from headwise.data.words import NOUNS
from headwise.task import Batch, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class RandomLabels(Task):
    """The question of `multiple_choice` with random letters as labels, so that a label no longer tells the place.

    What finds the right letter by "the second of A, B, C, D" fails here; what reads the label beside the option does
    not. Corrupt prompts ask for the word of the foil's option. The letter at span "label_0" is the first label.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in 41 % and is never the top token: that
    model cannot answer with letters.
    """

    row: ClassVar[str] = "s109"
    options: int = 4

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "asked" (the word in the question), "label_0", "option_0" (the word after it) and so on, and "end".

        Raises:
            ValueError: there are not 2 to 26 options, fewer nouns than options are one token, or letters are not.
        """
        check_count(n)
        if not 2 <= self.options <= len(LETTERS):
            raise ValueError(f"{self.options} options were asked for; allowed are 2 to {len(LETTERS)}.")
        nouns = one_token_words(tokenizer, NOUNS, self.options, "nouns")
        nouns = one_token_words(tokenizer, nouns, self.options, "quoted nouns", before='is "')
        letters = one_token_words(tokenizer, list(LETTERS), self.options, "letters", before="Answer: ")
        draw = random.Random(f"random labels {seed}")
        clean, corrupt = [], []
        for _ in range(n):
            labels, words = draw.sample(letters, self.options), draw.sample(nouns, self.options)
            right, wrong = draw.sample(range(self.options), 2)
            ways = [f" {labels[i]}" for i in (right, wrong)]
            prompt, (answer, foil) = ask(tokenizer, _pieces(labels, words, words[right]), ways)
            other, _ = ask(tokenizer, _pieces(labels, words, words[wrong]), ways)
            clean.append(prompt._replace(answer=answer, foil=foil))
            corrupt.append(other)
        return lay_out(self, tokenizer, clean, corrupt, n, seed)


def _pieces(labels: list[str], words: list[str], asked: str) -> list[Piece]:
    pieces: list[Piece] = [('Which option is "', None), (asked, "asked"), ('"?\n', None)]
    for i, (label, word) in enumerate(zip(labels, words, strict=True)):
        pieces += [(label, f"label_{i}"), (".", None), (f" {word}", f"option_{i}"), ("\n", None)]
    return [*pieces, ("Answer", None), (":", "end")]
