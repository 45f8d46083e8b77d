"""Plain prose without any trick: what an intervention costs where nothing special is asked."""

from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import check_count, encode, start_ids
from headwise.data.prose import sentences
from headwise.task import Batch, Task


@dataclass(frozen=True)
class NeutralText(Task):
    """Sentences put together from word lists; every token is predicted from those before it.

    The mean log-probability on SmolLM2-135M-Instruct is -4.2 nats a token (16 texts of 128 tokens, seed 0): the
    sentences are put together at random, so that little can be guessed.
    """

    length: int = 128

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Texts of exactly `length` tokens, start token included; answers are all tokens but the first."""
        check_count(n)
        first = start_ids(tokenizer)
        if self.length < len(first) + 2:
            raise ValueError(f"Texts of {self.length} tokens predict nothing; at least {len(first) + 2} are needed.")
        rows, texts = [], []
        for row in range(n):
            flow = sentences(f"neutral {seed} {row}")
            text = " ".join(islice(flow, 2))
            while len(ids := encode(tokenizer, text)) + len(first) < self.length:
                text = " ".join([text, *islice(flow, 4)])
            rows.append((first + ids)[: self.length])
            texts.append(text)
        ids = torch.tensor(rows)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            at=torch.arange(self.length - 1).expand(n, -1).clone(),
            answer=ids[:, 1:].clone(),
            texts=[tokenizer.decode(row, skip_special_tokens=True) for row in rows],
            about=self.about(n, seed),
        )
