"""SnapKV: LLM Knows What You Are Looking for Before Generation. Li et al., 2024. arXiv:2404.14469"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.compressed import Budget, Compressed
from headwise.kv_cache import CacheMethod
from headwise.store import Store


@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """Of a prompt, a KV head keeps the last tokens and the earlier ones that these attend to most; later tokens stay.

    The query heads of one KV head vote together. A prompt that comes in chunks is compressed after each of them to the
    same capacity, so that what stays at the end is no more than in one piece, though it may be other tokens; a last
    chunk shorter than the window is kept.

    Fields:
        window: most recent tokens, whose queries choose; a forward pass of fewer tokens is not compressed.
        capacity: tokens that a KV head keeps of all prompts so far, the window among them.
        share: share of all tokens of a row kept instead of `capacity`, where it is not 0.
        kernel: neighbours over which attention is averaged before the choice; odd.
    """

    window: int = 32
    capacity: int = 512
    share: float = 0.0
    kernel: int = 5

    def __post_init__(self) -> None:
        Budget(self.window, self.capacity, self.share, self.kernel)

    def store(self, reserve: int = 0) -> Store:
        """One buffer for all KV heads, which keep equally many tokens."""
        budget = Budget(self.window, self.capacity, self.share, self.kernel)
        return Compressed(budget, _best_of_each, apart=False, reserve=reserve)


def _best_of_each(votes: Tensor, most: Tensor) -> Tensor:
    places = torch.arange(votes.shape[2], device=votes.device).expand_as(votes)
    rank = torch.empty_like(places).scatter_(2, votes.argsort(dim=2, descending=True, stable=True), places)
    return rank < most[:, None, None]
