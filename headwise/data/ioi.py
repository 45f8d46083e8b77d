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
            (io, s, other), template, words = drawn(draw, names, 3)
            who = in_order(row, io, s)
            clean.append(said(tokenizer, template, who, s, words, (io, s)))
            corrupt.append(said(tokenizer, template, who, other, words, (io, s)))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)


def said(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    who: dict[str, str],
    giver: str,
    words: dict[str, str],
    options: tuple[str, str],
) -> Prompt:
    """One prompt of a template: `who` names the two persons in order ("io" and "s1"), the giver is "s2".

    The options are the names of the answer and of the foil.
    """
    start, rest = template.split("{a}")
    middle, rest = rest.split("{b}")
    before, after = rest.format(s="{s}", **words).split("{s}")
    (first, one), (second, other) = who.items()
    pieces = [
        (start, None),
        (one, first),
        (middle, None),
        (other, second),
        (before, None),
        (giver, "s2"),
        (after.removesuffix(" to"), None),
        (" to", "end"),
    ]
    prompt, (answer, foil) = ask(tokenizer, pieces, [f" {name}" for name in options])
    return prompt._replace(answer=answer, foil=foil)


def drawn(draw: random.Random, names: list[str], count: int) -> tuple[list[str], str, dict[str, str]]:
    """Names, a template, and the words that fill it."""
    people = draw.sample(names, count)
    words = {"place": draw.choice(PLACES), "gift": draw.choice(GIFTS)}
    return people, draw.choice(TEMPLATES), words


def in_order(row: int, io: str, s1: str) -> dict[str, str]:
    """The two persons in the order in which they are named: the receiver first in even rows."""
    return {"io": io, "s1": s1} if row % 2 == 0 else {"s1": s1, "io": io}
