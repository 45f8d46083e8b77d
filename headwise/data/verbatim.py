"""Repeat After Me: Transformers are Better than State Space Models at Copying.
Jelassi et al., 2024. arXiv:2402.01032
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from headwise.data.haystack import filler
from headwise.data.layout import check_count, encode, pad_id, start_ids
from headwise.data.reference import digest, plain_paragraphs
from headwise.task import Batch, Task, pad_left

MORE = 8


@dataclass(frozen=True)
class Verbatim(Task):
    """A passage of real text stands in long plain prose and is begun once more at its end, to be copied.

    The passages are from the reference that Python carries; about["text"] tells its digest. On SmolLM2-135M-Instruct
    11 of 12 are right in every token at 500, at 1000 and at 2000 tokens (seed 1).

    Fields:
        length: tokens of a prompt, about.
        shown: tokens of the passage that stand at the end before answers are read; answers: tokens that are read.
    """

    length: int = 500
    shown: int = 16
    answers: int = 8

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Prompts of at most `length` tokens. Corrupt prompts hold another passage of as many tokens in the prose.

        Spans: "hidden_0" (the passage in the prose), "question" (what is shown of it at the end).

        Raises:
            ValueError: numbers outside their range, a length too short for the passage, or a tokenizer that does not
                know the words of the passages.
        """
        check_count(n)
        if self.shown < 1 or self.answers < 1:
            raise ValueError(
                f"A passage with {self.shown} tokens shown and {self.answers} to copy cannot be; allowed is 1 or more."
            )
        draw = random.Random(f"verbatim {seed}")
        first, size = start_ids(tokenizer), self.shown + self.answers
        gap = encode(tokenizer, "\n\n")
        flow = self._passages(tokenizer, draw)
        rows, others, places = [], [], []
        for row in range(n):
            passage, other = next(flow), next(flow)
            room = self.length - len(first) - 2 * size - MORE - 3 * len(gap) - 3
            said = filler(tokenizer, f"verbatim {seed} {row}", room, self.length)
            cut = draw.randint(1, len(said))
            ahead = first + encode(tokenizer, " ".join(said[:cut])) + gap
            behind = gap + encode(tokenizer, " ".join(said[cut:])) + gap + passage[:size]
            rows.append(ahead + passage + behind)
            others.append(ahead + other + behind)
            places.append(-len(behind))
        ids, mask = pad_left(rows, pad_id(tokenizer))
        width = ids.shape[1]
        at = torch.arange(width - self.answers - 1, width - 1).expand(n, -1).clone()
        hidden = [[width + place - size - MORE, width + place] for place in places]
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            corrupt={"input_ids": pad_left(others, pad_id(tokenizer))[0], "attention_mask": mask},
            at=at,
            answer=ids.gather(1, at + 1),
            spans={"hidden_0": torch.tensor(hidden), "question": torch.tensor([[width - size, width]] * n)},
            texts=[tokenizer.decode(row, skip_special_tokens=True) for row in rows],
            about={**self.about(n, seed), "text": digest(plain_paragraphs())},
        )

    def _passages(self, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> Iterator[list[int]]:
        """Endless passages of the size in use, without unknown tokens; none twice before all have been."""
        size = self.shown + self.answers + MORE
        parts = plain_paragraphs()
        while True:
            found = 0
            for part in draw.sample(parts, len(parts)):
                ids = encode(tokenizer, part)[:size]
                if len(ids) == size and tokenizer.unk_token_id not in ids:
                    found += 1
                    yield ids
            if found < 2:
                raise ValueError(
                    f"This tokenizer finds {found} passages of {size} tokens that it knows; at least 2 are needed."
                )
