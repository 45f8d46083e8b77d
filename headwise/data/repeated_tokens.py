"""In-context Learning and Induction Heads. Olsson et al., 2022. arXiv:2209.11895"""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import check_count, ordinary_ids, start_ids
from headwise.task import Batch, Task


@dataclass(frozen=True)
class RepeatedTokens(Task):
    """A run of random ordinary tokens, said `repeats` times: what comes next is known only from the earlier copy.

    Where the tokenizer has enough tokens, no token occurs twice in a run. Answers are the tokens of the last copy
    but its first; corrupt prompts keep the last copy and replace the earlier ones by other random tokens.
    """

    length: int = 64
    repeats: int = 2

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "first", "second" and "last" are copies; about["period"] is the distance between them in columns."""
        check_count(n)
        if self.length < 2 or self.repeats < 2:
            raise ValueError(
                f"A run of {self.length} tokens said {self.repeats} times predicts nothing; both must be at least 2."
            )
        draw = random.Random(f"repeated {seed}")
        pool = ordinary_ids(tokenizer)
        first = start_ids(tokenizer)

        def run() -> list[int]:
            return draw.sample(pool, self.length) if len(pool) >= self.length else draw.choices(pool, k=self.length)

        clean, corrupt = [], []
        for _ in range(n):
            said, other = run(), run()
            clean.append(first + said * self.repeats)
            corrupt.append(first + other * (self.repeats - 1) + said)
        ids = torch.tensor(clean)
        mask = torch.ones_like(ids)
        last = len(first) + (self.repeats - 1) * self.length
        at = torch.arange(last, last + self.length - 1).expand(n, -1).clone()
        copies = {"first": 0, "second": 1, "last": self.repeats - 1}
        starts = {name: len(first) + copy * self.length for name, copy in copies.items()}
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            corrupt={"input_ids": torch.tensor(corrupt), "attention_mask": mask},
            at=at,
            answer=ids.gather(1, at + 1),
            spans={name: torch.tensor([[s, s + self.length]] * n) for name, s in starts.items()},
            texts=[tokenizer.decode(row) for row in clean],
            about={**self.about(n, seed), "period": self.length},
        )
