"""Repeat After Me: Transformers are Better than State Space Models at Copying.
Jelassi et al., 2024. arXiv:2402.01032
"""

import random
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from headwise.data.haystack import codes, filler, hide, lay_out_asked, secret
from headwise.data.layout import check_count, encode
from headwise.data.words import NOUNS
from headwise.task import Batch, Task

STEM = "List:"


@dataclass(frozen=True)
class Verbatim(Task):
    """A list of random plain words stands in long plain prose and is begun once more at its end, to be copied.

    Fields:
        length: tokens of a prompt, about.
        words: words of the list, at least shown + answers.
        shown: tokens of the list that stand at the end before answers are read; answers: tokens that are read.
    """

    length: int = 500
    words: int = 12
    shown: int = 4
    answers: int = 8

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Prompts of at most `length` tokens. Corrupt prompts hold a list of other words in the prose.

        Spans: "hidden_0" and "answer_0" (the list in the prose and at the end) and "question" (the end). No word comes
        twice in a list, so that each says which comes next.

        Raises:
            ValueError: numbers outside their range, or a length too short for the list.
        """
        check_count(n)
        if self.shown < 0 or self.answers < 1 or not self.shown + self.answers <= self.words <= len(NOUNS) // 2:
            raise ValueError(
                f"A list of {self.words} words with {self.shown} tokens shown and {self.answers} to copy cannot be; "
                f"allowed are at most {len(NOUNS) // 2} words, 0 or more shown, 1 or more to copy, and in sum no more "
                "tokens than words."
            )
        draw = random.Random(f"verbatim {seed}")
        pick = codes(tokenizer, STEM, lambda: " ".join(draw.sample(NOUNS, self.words)), "plain nouns")
        pairs = []
        for row in range(n):
            hidden = [secret(STEM, pick)]
            room = self.length - 1 - 2 * len(encode(tokenizer, f"\n{STEM} {hidden[0].said}.\n"))
            said = filler(tokenizer, f"verbatim {seed} {row}", room, self.length)
            pairs.append(hide(said, hidden, [0], draw))
        batch = lay_out_asked(self, tokenizer, pairs, n, seed)
        read = slice(self.shown, self.shown + self.answers)
        return replace(batch, at=batch.at[:, read], answer=batch.answer[:, read], foil=batch.foil[:, read])
