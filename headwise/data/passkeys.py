"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads.
Xiao et al., 2024. arXiv:2410.10819

Row s104 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.haystack import codes, filler, hide, keys, lay_out_asked, secret
from headwise.data.layout import check_count, encode
from headwise.data.words import NOUNS
from headwise.task import Batch, Task

ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
STEM = 'Passkey "{key}":'


@dataclass(frozen=True)
class Passkeys(Task):
    """Passkeys, each a few random words of the radio alphabet, stand in plain prose; its end asks for some of them.

    On SmolLM2-135M-Instruct (12 prompts, seed 1, both of two passkeys asked for) 20 of 24 are right in every token at
    500 tokens and 19 at 1000: it confuses the two. Of a single passkey 12 of 12 are right at either length.

    Fields:
        length: tokens of a prompt, about.
        passkeys: how many are hidden, 1 to 53; asked: how many of them are asked for, one after the other.
        words: words of a passkey.
    """

    row: ClassVar[str] = "s104"
    length: int = 500
    passkeys: int = 2
    asked: int = 1
    words: int = 2

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Prompts of at most `length` tokens. Corrupt prompts hide other words in the passkeys that are asked for.

        Answers are all tokens of the passkeys asked for. Spans: "hidden_0" and "answer_0" (the first passkey asked for,
        in the prose and at the end), and so on; "question" (from the first question to the end).

        Raises:
            ValueError: numbers outside their range, or a length too short for what is hidden.
        """
        check_count(n)
        if not 1 <= self.asked <= self.passkeys <= len(NOUNS):
            raise ValueError(
                f"{self.passkeys} passkeys with {self.asked} asked for do not work; allowed are 1 to {len(NOUNS)}, "
                "and no more asked for than hidden."
            )
        if not 1 <= self.words <= 13:
            raise ValueError(f"Passkeys of {self.words} words were asked for; allowed are 1 to 13.")
        draw = random.Random(f"passkeys {seed}")
        stems = keys(tokenizer, STEM, NOUNS)
        pick = codes(tokenizer, stems[0], lambda: " ".join(draw.sample(ALPHABET.split(), self.words)), "radio alphabet")
        pairs = []
        for row in range(n):
            hidden = [secret(stem, pick) for stem in draw.sample(stems, self.passkeys)]
            asked = draw.sample(range(self.passkeys), self.asked)
            lines = [*hidden, *(hidden[i] for i in asked)]
            room = self.length - 1 - sum(len(encode(tokenizer, f"\n{s.stem} {s.said}.\n")) for s in lines)
            said = filler(tokenizer, f"passkeys {seed} {row}", room, self.length)
            pairs.append(hide(said, hidden, asked, draw))
        return lay_out_asked(self, tokenizer, pairs, n, seed)
