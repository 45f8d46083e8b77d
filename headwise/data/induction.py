"""In-context Learning and Induction Heads. Olsson et al., 2022. arXiv:2209.11895"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, check_count, lay_out, ordinary_ids
from headwise.task import Batch, Task


@dataclass(frozen=True)
class Induction(Task):
    """Random tokens with "X A B" among them a few times, ending in "X A": only the earlier Bs tell the next.

    On SmolLM2-135M-Instruct (64 prompts, seed 0) the log-probability of B is -2.4 nats, against -11.3 where every
    earlier A is replaced; B is the top token of 70 % of prompts, and beats the foil in all. One bare pair
    (`length=24, pairs=1, segment=1`) is too little for that model: -8.3 nats, 8 %.
    """

    length: int = 40
    pairs: int = 4
    segment: int = 2

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "source" (the first A of each prompt), "target" (its B) and "end" (the last A).

        Corrupt prompts replace every A but the last by another random token, so that nothing but what comes before B
        differs. The foil is another token of the prompt. `segment` counts the tokens before B that return (X A: 2).

        Raises:
            ValueError: the pairs do not fit, or the tokenizer has too few ordinary tokens.
        """
        check_count(n)
        if self.pairs < 1 or self.segment < 1 or self.length < (self.segment + 1) * (self.pairs + 1):
            need = (max(self.segment, 1) + 1) * (max(self.pairs, 1) + 1)
            raise ValueError(
                f"{self.pairs} pairs of segment {self.segment} do not fit in {self.length} tokens; "
                f"both must be at least 1, and length at least {need}."
            )
        pool = ordinary_ids(tokenizer)
        need = self.length + self.segment + 2
        if len(pool) < need:
            raise ValueError(f"This tokenizer has {len(pool)} ordinary tokens; prompts of {self.length} need {need}.")
        draw = random.Random(f"induction {seed}")
        clean, corrupt = [], []
        for _ in range(n):
            one, other = self._prompt(draw, pool)
            clean.append(one._replace(text=tokenizer.decode(one.ids)))
            corrupt.append(other)
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(self, draw: random.Random, pool: list[int]) -> tuple[Prompt, Prompt]:
        words = draw.sample(pool, self.length + 2)
        said, b, spare = words[: self.segment], words[self.segment], words[self.segment + 1]
        row = words[self.segment + 2 :]
        row = row[: self.length - self.segment]
        changed = list(row)
        size = len(row) // self.pairs
        starts = [part * size + draw.randrange(size - self.segment) for part in range(self.pairs)]
        for place in starts:
            row[place : place + self.segment + 1] = [*said, b]
            changed[place : place + self.segment + 1] = [*said[:-1], spare, b]
        foil = draw.choice([token for token in row if token != b and token not in said])
        b_at, end = starts[0] + self.segment, self.length - 1
        spans = {"source": (b_at - 1, b_at), "target": (b_at, b_at + 1), "end": (end, end + 1)}
        return Prompt(row + said, spans, "", b, foil), Prompt(changed + said, spans, "", b, foil)
