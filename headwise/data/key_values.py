"""Lost in the Middle: How Language Models Use Long Contexts. Liu et al., 2023. arXiv:2307.03172"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.haystack import codes, filler, hide, keys, lay_out_asked, secret
from headwise.data.layout import check_count, encode
from headwise.data.words import NOUNS
from headwise.task import Batch, Task


@dataclass(frozen=True)
class KeyValues(Task):
    """Many lines '"key": number' stand between sentences of plain prose; those of some keys are asked for.

    On SmolLM2-135M-Instruct (6 prompts, seed 1, all four of four asked for) 23 of 24 numbers are right in every digit
    at 500 and at 1000 tokens, and 19 at 2000.

    Fields:
        length: tokens of a prompt, about.
        pairs: how many lines, 1 to 53; asked: how many of them are asked for, one after the other.
        digits: digits of a number, all different.
    """

    length: int = 500
    pairs: int = 4
    asked: int = 1
    digits: int = 5

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Prompts of at most `length` tokens. Corrupt prompts hold other numbers at the keys that are asked for.

        Answers are all tokens of the numbers asked for. Spans: "hidden_0" and "answer_0" (the first number asked for,
        in the prose and at the end), and so on; "question" (from the first question to the end).

        Raises:
            ValueError: numbers outside their range, or a length too short for the lines.
        """
        check_count(n)
        if not 1 <= self.asked <= self.pairs <= len(NOUNS):
            raise ValueError(
                f"{self.pairs} lines with {self.asked} asked for do not work; allowed are 1 to {len(NOUNS)}, "
                "and no more asked for than there are."
            )
        if not 1 <= self.digits <= 5:
            raise ValueError(f"Numbers of {self.digits} digits were asked for; allowed are 1 to 5.")
        draw = random.Random(f"key values {seed}")
        stems = keys(tokenizer, '"{key}":', NOUNS)
        pick = codes(tokenizer, stems[0], lambda: "".join(draw.sample("0123456789", self.digits)), "digits")
        pairs = []
        for row in range(n):
            hidden = [secret(stem, pick) for stem in draw.sample(stems, self.pairs)]
            asked = draw.sample(range(self.pairs), self.asked)
            lines = [*hidden, *(hidden[i] for i in asked)]
            room = self.length - 1 - sum(len(encode(tokenizer, f"\n{s.stem} {s.said}.\n")) for s in lines)
            said = filler(tokenizer, f"key values {seed} {row}", room, self.length)
            pairs.append(hide(said, hidden, asked, draw))
        return lay_out_asked(self, tokenizer, pairs, n, seed)
