"""Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small. Wang et al., 2022. arXiv:2211.00593"""  # noqa: E501

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, ask, check_count, lay_out, one_token_words
from headwise.data.words import GIFTS, NAMES, PLACES
from headwise.task import Batch, Task

TEMPLATES = (
    "When {a} and {b} were at the {place}, {s} gave a {gift} to",
    "Then {a} and {b} left the {place}. {s} gave a {gift} to",
    "After {a} and {b} had lunch at the {place}, {s} brought a {gift} to",
    "While {a} and {b} were working at the {place}, {s} handed a {gift} to",
)


@dataclass(frozen=True)
class IOI(Task):
    """Two people are named, one of them gives something away: the answer is the other one, the foil the giver.

    Half of the prompts name the receiver first (ABBA), half the giver (BABA). Corrupt prompts let a third person give,
    so that nobody is named twice. On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in
    98 %, by 3.85 on average; in corrupt prompts in 47 %, by 0.02.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "io", "s1", "s2" (the names) and "end" (the last token).

        Raises:
            ValueError: fewer than 8 of the names are one token for this tokenizer.
        """
        check_count(n)
        names = one_token_words(tokenizer, NAMES, 8, "first names")
        draw = random.Random(f"ioi {seed}")
        clean, corrupt = [], []
        for row in range(n):
            io, s, other = draw.sample(names, 3)
            words = {"place": draw.choice(PLACES), "gift": draw.choice(GIFTS)}
            template = draw.choice(TEMPLATES)
            order = ("io", "s1") if row % 2 == 0 else ("s1", "io")
            clean.append(self._prompt(tokenizer, template, order, io, s, s, words))
            corrupt.append(self._prompt(tokenizer, template, order, io, s, other, words))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        order: tuple[str, str],
        io: str,
        s: str,
        giver: str,
        words: dict[str, str],
    ) -> Prompt:
        who = {"io": io, "s1": s}
        start, rest = template.split("{a}")
        middle, rest = rest.split("{b}")
        before, after = rest.format(s="{s}", **words).split("{s}")
        pieces = [
            (start, None),
            (who[order[0]], order[0]),
            (middle, None),
            (who[order[1]], order[1]),
            (before, None),
            (giver, "s2"),
            (after.removesuffix(" to"), None),
            (" to", "end"),
        ]
        prompt, (answer, foil) = ask(tokenizer, pieces, (f" {io}", f" {s}"))
        return prompt._replace(answer=answer, foil=foil)
