"""What several replications of long contexts need: prompts read through caches, and the last tokens of real text."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.attach import caching
from headwise.kv_cache import CacheMethod, KVCache


def last_logits(
    model: PreTrainedModel, ids: Tensor, make: Callable[[], KVCache], last: int, turn: int = 32
) -> tuple[Tensor, KVCache]:
    """Logits [last, V] that predict the last tokens of ids [T], and the cache that they were read through.

    What stands before is one prefill; then come turns of `turn` tokens.
    """
    cache, start = make(), len(ids) - last - 1
    with caching(model), torch.no_grad():
        model(ids[None, :start], past_key_values=cache, logits_to_keep=1)
        parts = [
            model(ids[None, at : min(at + turn, len(ids) - 1)], past_key_values=cache).logits[0]
            for at in range(start, len(ids) - 1, turn)
        ]
    return torch.cat(parts).float(), cache


def nats(logits: Tensor, ids: Tensor) -> float:
    """Mean loss of logits [last, V] on the last tokens of ids [T]."""
    return float(torch.nn.functional.cross_entropy(logits, ids[-len(logits) :]))


def divergence(full: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the full run, in nats; logits [last, V]."""
    said = full.log_softmax(-1)
    return float((said.exp() * (said - other.log_softmax(-1))).sum(-1).mean())


class Made:
    """Builds caches by one method, for some KV heads, and keeps the latest one to look at."""

    def __init__(self, model: PreTrainedModel, treatments: "dict[str, CacheMethod]") -> None:
        self.model, self.treatments = model, treatments
        self.last: KVCache | None = None

    def __call__(self) -> KVCache:
        """A fresh cache."""
        self.last = KVCache(self.model, self.treatments)
        return self.last

    def stores(self, kind: type) -> list:
        """The stores of this kind in the latest cache, layer by layer."""
        parts = [part for layer in getattr(self.last, "layers", []) for part in getattr(layer, "parts", [])]
        return [part.store for part in parts if isinstance(part.store, kind)]
