"""Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference. Feng et al., 2024.
arXiv:2407.11550
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.compressed import Budget, Compressed
from headwise.kv_cache import CacheMethod
from headwise.store import Store


@dataclass(frozen=True)
class AdaKV(CacheMethod):
    """SnapKV whose KV heads share the budget of their layer: the best votes of all heads together are kept.

    Every KV head has a buffer of its own length, so what one gives up is free; in a batch, a head's buffer is as long
    as its longest row. The heads of a layer that are treated so share what they would have had one by one.

    Fields:
        window: most recent tokens, whose queries choose; a forward pass of fewer tokens is not compressed.
        capacity: tokens that a KV head keeps on average of all prompts so far, the window among them.
        share: share of all tokens of a row kept instead of `capacity`, where it is not 0.
        kernel: neighbours over which attention is averaged before the choice; odd.
        safeguard: share of its equal part that no head loses.
    """

    window: int = 32
    capacity: int = 512
    share: float = 0.0
    kernel: int = 5
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        Budget(self.window, self.capacity, self.share, self.kernel)
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard is {self.safeguard}; allowed is 0 to 1.")

    def store(self, reserve: int = 0) -> Store:
        """A buffer for each KV head."""
        budget = Budget(self.window, self.capacity, self.share, self.kernel)
        return Compressed(budget, self._best_of_all, apart=True, reserve=reserve)

    def _best_of_all(self, votes: Tensor, most: Tensor) -> Tensor:
        heads = votes.shape[1]
        sure = (self.safeguard * most).long()
        wins = (_rank(votes.flatten(1)) < (heads * (most - sure))[:, None]).view_as(votes)
        return _rank(votes) < (sure[:, None] + wins.sum(2))[..., None]


def _rank(votes: Tensor) -> Tensor:
    """The place of each vote among the last axis, the largest first."""
    places = torch.arange(votes.shape[-1], device=votes.device).expand_as(votes)
    return torch.empty_like(places).scatter_(-1, votes.argsort(dim=-1, descending=True, stable=True), places)
