"""Towards Best Practices of Activation Patching in Language Models: Metrics and Methods. Zhang and Nanda, 2023.
arXiv:2309.16042
"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.ioi import drawn, in_order, said
from headwise.data.layout import check_count, lay_out, one_token_words
from headwise.data.words import NAMES
from headwise.task import Batch, Task


@dataclass(frozen=True)
class IOISymmetric(Task):
    """The prompts of `ioi`, but the other person gives in the corrupt ones, so that answer and foil change places.

    One name differs, and the corrupt prompt is as good a sentence as the clean one: patching then moves the model from
    one answer to the other, and never into nonsense.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in 98 %, by 4.10 on average, and is the top
    token in 69 %; in corrupt prompts it never beats the foil.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "io", "s1", "s2" (the names) and "end" (the last token).

        Raises:
            ValueError: fewer than 8 of the names are one token for this tokenizer.
        """
        check_count(n)
        names = one_token_words(tokenizer, NAMES, 8, "first names")
        draw = random.Random(f"ioi symmetric {seed}")
        clean, corrupt = [], []
        for row in range(n):
            (io, s), template, words = drawn(draw, names, 2)
            who = in_order(row, io, s)
            clean.append(said(tokenizer, template, who, s, words, (io, s)))
            corrupt.append(said(tokenizer, template, who, io, words, (io, s)))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)
