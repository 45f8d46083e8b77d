"""Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small. Wang et al., 2022. arXiv:2211.00593"""  # noqa: E501

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.ioi import drawn, in_order, said
from headwise.data.layout import check_count, lay_out, one_token_words
from headwise.data.words import NAMES
from headwise.task import Batch, Task


@dataclass(frozen=True)
class IOIABC(Task):
    """The prompts of `ioi`, but three unrelated names in the corrupt ones (ABC): nothing there tells of the answer.

    `ioi` changes only the second mention of the giver, so that its corrupt prompts still hold the answer's name; here
    they do not, and what copies the name is lost as well as what chooses it.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in all, by 3.94 on average, and is the top
    token in 69 %; in corrupt prompts in 48 %, by 0.19.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "io", "s1", "s2" (the names) and "end" (the last token).

        Raises:
            ValueError: fewer than 8 of the names are one token for this tokenizer.
        """
        check_count(n)
        names = one_token_words(tokenizer, NAMES, 8, "first names")
        draw = random.Random(f"ioi abc {seed}")
        clean, corrupt = [], []
        for row in range(n):
            (io, s, a, b, c), template, words = drawn(draw, names, 5)
            clean.append(said(tokenizer, template, in_order(row, io, s), s, words, (io, s)))
            corrupt.append(said(tokenizer, template, in_order(row, a, b), c, words, (io, s)))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)
