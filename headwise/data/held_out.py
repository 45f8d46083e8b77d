"""Windows of real text: the reference of the Python language, which every Python carries, or a file of one's own."""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import check_count, start_ids
from headwise.data.reference import digest, paragraphs
from headwise.task import Batch, Task

SHARES = (5, 20, 1000)
KNOWN = 0.5


@dataclass(frozen=True)
class HeldOut(Task):
    """Windows of real text for perplexity; every token is predicted from those before it.

    The text is the reference that Python carries for its `help` (pydoc_data.topics), each paragraph once, about 370,000
    characters; it may have been in a model's training data, so it compares ways to run a model rather than models. It
    differs a little between versions of Python: about["text"] tells its digest.
    SmolLM2-135M-Instruct loses 2.08 nats a token on the second halves of three windows of 500 (seed 0).

    Fields:
        length: tokens of a window.
        path: a text file (UTF-8) to be read instead.
    """

    length: int = 512
    path: str = ""

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Windows of exactly `length` tokens, start token included, that begin with a paragraph drawn by seed.

        Raises:
            ValueError: a length that predicts nothing, a text that is too short or cannot be read, or a tokenizer that
                does not know half of its words.
        """
        check_count(n)
        first = start_ids(tokenizer)
        if self.length < len(first) + 2:
            raise ValueError(f"Texts of {self.length} tokens predict nothing; at least {len(first) + 2} are needed.")
        parts = paragraphs(self.path)
        draw = random.Random(f"held out {seed}")
        rows = [first + self._window(tokenizer, parts, draw) for _ in range(n)]
        ids = torch.tensor(rows)
        unknown = float((ids == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0.0
        if unknown > KNOWN:
            raise ValueError(f"This tokenizer does not know {unknown:.0%} of the text; allowed is {KNOWN:.0%}.")
        return Batch(
            inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            at=torch.arange(self.length - 1).expand(n, -1).clone(),
            answer=ids[:, 1:].clone(),
            texts=[tokenizer.decode(row, skip_special_tokens=True) for row in rows],
            about={**self.about(n, seed), "text": digest(parts)},
        )

    def _window(self, tokenizer: PreTrainedTokenizerBase, parts: tuple[str, ...], draw: random.Random) -> list[int]:
        """Ids from the beginning of a paragraph on; where the text ends too early, an earlier paragraph is taken."""
        need = self.length - len(start_ids(tokenizer))
        start = draw.randrange(len(parts))
        while True:
            whole = "\n\n".join(parts[start:])
            for share in SHARES:
                text = whole[: need * share].rpartition(" ")[0] if need * share < len(whole) else whole
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if len(ids) >= need:
                    return ids[:need]
            if start == 0:
                raise ValueError(
                    f"{self.path or 'The reference of Python'} has fewer than the {self.length} tokens that a window "
                    "was to have; give a longer text as `path`."
                )
            start //= 2
