"""Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding. Zhang et al., 2023.
arXiv:2309.08168

The paper searches which blocks to leave out; here they stand evenly, as in unified layer skipping (Liu et al., 2024).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headwise.drafting import Draft, Drafter, News, Reading
from headwise.skipping import must_run, skipping, stack_blocks
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class SelfSpeculation(DraftMethod):
    """The model drafts for itself with some of its blocks left out, and then checks with all of them.

    A draft ends early where the drafting model is unsure. It has a KV cache of its own, of the blocks that run.

    Fields:
        skip: share of blocks that are left out, evenly; never the first, the last, or one that the cache counts on.
        blocks: numbers of the blocks that are left out instead.
        tokens: proposed at most. sure: least chance that the drafting model must give to its token.

    Raises:
        ValueError: a share, a number of tokens or a chance that is not allowed.
    """

    skip: float = 0.3
    blocks: tuple[int, ...] = ()
    tokens: int = 4
    sure: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.skip < 1 or self.tokens < 1 or not 0 <= self.sure <= 1:
            raise ValueError(
                f"skip is {self.skip}, tokens {self.tokens} and sure {self.sure}; allowed are a share below 1, 1 token "
                "or more, and a chance from 0 to 1."
            )

    def left_out(self, model: PreTrainedModel) -> list[int]:
        """The blocks that do not draft."""
        numbers = list(stack_blocks(model))
        if self.blocks:
            return sorted(self.blocks)
        keep = max(2, round(len(numbers) * (1 - self.skip)))
        kept = {numbers[round(i * (len(numbers) - 1) / max(1, keep - 1))] for i in range(keep)} | set(must_run(model))
        return [number for number in numbers if number not in kept]

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter. Raises ValueError where the model has no blocks that can be passed by."""
        with skipping(model, self.left_out(model)):
            return _Itself(self, model)


class _Itself(Drafter):
    """A row's text, and the cache of what the shorter model has read of it."""

    def __init__(self, method: SelfSpeculation, model: PreTrainedModel) -> None:
        self.method, self.model = method, model
        self.left_out = method.left_out(model)
        self.unread: dict[int, list[int]] = {}
        self.caches: dict[int, Cache | None] = {}

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Nothing is read before the first draft."""
        if model is not self.model:
            raise ValueError("Self-speculation drafts with the model that it was made for; another one is generating.")
        self.unread, self.caches = dict(enumerate(map(list, texts))), dict.fromkeys(range(len(texts)))

    def accept(self, news: Mapping[int, News], read: Reading | None = None) -> None:
        """Note what must be read before the next draft."""
        for row, one in news.items():
            self.unread[row] += one.tokens

    @torch.no_grad()
    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """One chain for each row."""
        with skipping(self.model, self.left_out):
            return {row: self._row(row, min(room, self.method.tokens)) for row, room in rooms.items()}

    def _row(self, row: int, most: int) -> Draft:
        said: list[int] = []
        fed, drafted = self.unread[row], 0
        self.unread[row] = []
        while len(said) < most:
            ids = torch.tensor([fed], device=self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.caches[row], use_cache=True)
            self.caches[row] = out.past_key_values
            drafted += len(fed) if said else 0
            chance, token = out.logits[0, -1].float().softmax(-1).max(-1)
            if float(chance) < self.method.sure:
                break
            said.append(int(token))
            fed = [said[-1]]
        if drafted:
            self.caches[row].crop(-drafted)
        return Draft(said, source="SelfSpeculation", why="unsure")
