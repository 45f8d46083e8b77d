"""Successor Heads: Recurring, Interpretable Attention Heads In The Wild. Gould et al., 2023. arXiv:2312.09230

Row s107 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, check_count, encode, lay_out, shared_start
from headwise.data.words import ORDERED
from headwise.task import Batch, Task


@dataclass(frozen=True)
class Successor(Task):
    """A few neighbours of an ordered list (days, numbers, letters...) are said in order: the next one is the answer.

    Corrupt prompts say another stretch of the same list, whose next word is the foil. Lists of which a tokenizer knows
    too little as single tokens are left out. On SmolLM2-135M-Instruct (64 prompts, seed 0)
    the answer is the top token in 56 % and beats the foil in 98 %; in corrupt prompts in 3 %.
    """

    row: ClassVar[str] = "s107"
    kinds: tuple[str, ...] = tuple(ORDERED)
    shown: int = 3
    between: str = ","

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Span "last" is the last word shown; about["sets"] holds the ids of every list in use, in order.

        Raises:
            ValueError: a kind is unknown, or no list has `shown` + 2 neighbours of one token each.
        """
        check_count(n)
        if self.shown < 1:
            raise ValueError(f"{self.shown} words shown are too few; at least 1 is needed.")
        for kind in self.kinds:
            if kind not in ORDERED:
                raise ValueError(f"There is no ordered list {kind!r}; allowed are {', '.join(ORDERED)}.")
        found = {kind: ordered_ids(tokenizer, ORDERED[kind]) for kind in self.kinds}
        sets = {kind: items for kind, items in found.items() if len(items[1]) >= self.shown + 2}
        if not sets:
            raise ValueError(
                f"None of the lists {', '.join(self.kinds)} has {self.shown + 2} neighbours that are one token each "
                "for this tokenizer."
            )
        draw = random.Random(f"successor {seed}")
        clean, corrupt = [], []
        for row in range(n):
            kind = list(sets)[row % len(sets)]
            lead, ids = sets[kind]
            start, other = draw.sample(range(len(ids) - self.shown), 2)
            answer, foil = ids[start + self.shown], ids[other + self.shown]
            clean.append(self._prompt(tokenizer, lead, ids, start)._replace(answer=answer, foil=foil))
            corrupt.append(self._prompt(tokenizer, lead, ids, other))
        return lay_out(
            self, tokenizer, clean, corrupt, n, seed, sets={kind: list(items[1]) for kind, items in sets.items()}
        )

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, lead: list[int], ids: list[int], start: int) -> Prompt:
        after = encode(tokenizer, self.between) if self.between else []
        row: list[int] = []
        for token in ids[start : start + self.shown]:
            row += [*lead, token, *after]
        end = len(row) - len(after)
        return Prompt(row + lead, {"last": (end - 1, end)}, tokenizer.decode(row))


def ordered_ids(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> tuple[list[int], list[int]]:
    """The longest stretch of an ordered list whose words are one token each, after ids that all of them share.

    Returns:
        the shared ids (such as a blank that is a token of its own), and one id a word.
    """
    stem = encode(tokenizer, "and")
    ways = [encode(tokenizer, f"and {word}") for word in words]
    tails = [way[len(stem) :] if way[: len(stem)] == stem else [] for way in ways]
    single = [tail for tail in tails if tail]
    lead = single[0][: shared_start(single)] if len(single) > 1 else []
    best: list[int] = []
    run: list[int] = []
    for tail in [*tails, []]:
        if len(tail) == len(lead) + 1 and tail[-1] != tokenizer.unk_token_id and tail[-1] not in run:
            run.append(tail[-1])
        else:
            best, run = max(best, run, key=len), []
    return list(lead), best
